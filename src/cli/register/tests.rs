//! `register` against a GitLab that is a closure, in a directory of its own.

use super::*;
use crate::telemetry::chain;
use std::os::unix::fs::PermissionsExt as _;

#[derive(clap::Parser)]
struct Line {
    #[command(flatten)]
    args: Args,
}

struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let world = Self { dir: tempfile::tempdir().unwrap() };
        world.token(TOKEN);
        world
    }

    /// What the token file holds from now on.
    fn token(&self, token: &str) {
        std::fs::write(self.path("token"), format!("{token}\n")).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs `register` with these flags and a token file; `verified` is GitLab's answer.
    async fn register(&self, flags: &[&str], verified: Result<Verified, GitlabError>) -> anyhow::Result<()> {
        let token = self.path("token");
        let line = ["register", "--token-file", token.to_str().unwrap()].into_iter().chain(flags.iter().copied());
        let args = <Line as clap::Parser>::try_parse_from(line).unwrap().args;
        register(
            &self.path("config.toml"),
            args,
            |_| None,
            async |_: &Config, runner: &Runner, _: RunnerToken| verified.map_err(|error| explain(error, runner)),
        )
        .await
    }

    fn config(&self) -> Config {
        Config::assemble(
            Some((self.path("config.toml"), std::fs::read_to_string(self.path("config.toml")).unwrap())),
            [],
        )
        .unwrap()
        .config
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(self.dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

const TOKEN: &str = "glrt-abcdefghijklmnopqrst";

const URL: [&str; 2] = ["--url", "https://gitlab.example.com"];

fn known() -> Result<Verified, GitlabError> {
    Ok(Verified { id: Some(12), expires_at: None })
}

#[tokio::test]
async fn the_first_runner_makes_a_configuration_with_all_comments() {
    let world = World::new();
    world.register(&[&URL[..], &["--name", "my runner", "--limit", "3"]].concat(), known()).await.unwrap();
    let text = std::fs::read_to_string(world.path("config.toml")).unwrap();
    assert!(text.starts_with(crate::config::EXAMPLE));
    let runner = &world.config().runner[0];
    assert_eq!((runner.name.as_str(), runner.class.as_str(), runner.limit), ("my runner", "default", Some(3)));
    assert_eq!(runner.token_file, world.path("tokens/my-runner"));
    assert_eq!(std::fs::read_to_string(&runner.token_file).unwrap(), "glrt-abcdefghijklmnopqrst\n");
    assert_eq!((mode(&runner.token_file), mode(&world.path("tokens"))), (0o600, 0o700));
}

#[tokio::test]
async fn another_runner_comes_behind_and_changes_nothing_before() {
    let world = World::new();
    let before = "# mine\nconcurrent = 3 # three\n\n[[class]]\nname = \"big\"\nimage = \"x\"\n[log]\nlevel = \"warn\"\n# the end";
    std::fs::write(world.path("config.toml"), before).unwrap();
    std::fs::set_permissions(world.path("config.toml"), std::fs::Permissions::from_mode(0o640)).unwrap();
    world.register(&[&URL[..], &["--name", "a"]].concat(), known()).await.unwrap();
    world.token("glrt-another0000000000000");
    world.register(&[&URL[..], &["--name", "b", "--direct-download"]].concat(), known()).await.unwrap();
    assert!(std::fs::read_to_string(world.path("config.toml")).unwrap().starts_with(before));
    assert_eq!(std::fs::metadata(world.path("config.toml")).unwrap().permissions().mode() & 0o777, 0o640);
    let config = world.config();
    assert_eq!((config.runner.len(), config.concurrent, config.log.level.as_str()), (2, 3, "warn"));
    assert_eq!((config.runner[1].name.as_str(), config.runner[1].direct_download), ("b", true));
}

#[tokio::test]
async fn a_refused_token_leaves_nothing_behind() {
    let world = World::new();
    let error = world.register(&URL, Err(GitlabError::Forbidden { status: 403 })).await.unwrap_err();
    let text = chain(error.as_ref());
    assert!(
        text.contains("GitLab refuses the token (status 403)") && text.contains("glrt-") && !text.contains("abcdefgh"),
        "{text}"
    );
    assert_eq!(world.names(), ["token"]);
}

#[tokio::test]
async fn what_cannot_work_is_refused_before_gitlab_is_asked() {
    let world = World::new();
    world.register(&[&URL[..], &["--name", "a"]].concat(), known()).await.unwrap();
    let before = std::fs::read_to_string(world.path("config.toml")).unwrap();
    std::fs::write(world.path("c.pem"), "").unwrap();
    let pem = world.path("c.pem").to_str().unwrap().to_owned();
    for (flags, part) in [
        (
            vec!["--name", "a", "--url", "https://other.example"],
            "has a runner of this name, of https://gitlab.example.com/",
        ),
        (vec!["--name", "b"], "runner `a` has this very token"),
        (vec!["--name", "c", "--class", "huge"], "unknown class `huge`"),
        (vec!["--name", "c", "--tls-cert-file", &pem], "`tls_key_file` too"),
        (vec!["--name", "c", "--tls-ca-file", "/no/such.pem"], "read `/no/such.pem` (--tls-ca-file)"),
        (vec!["--name", "c\u{7}"], "printable"),
    ] {
        world.token(if flags[1] == "b" { TOKEN } else { "glrt-another0000000000000" });
        let asked = std::cell::Cell::new(false);
        let token = world.path("token");
        let url: &[&str] = if flags.contains(&"--url") { &[] } else { &URL };
        let line =
            ["register", "--token-file", token.to_str().unwrap()].into_iter().chain(url.iter().copied()).chain(flags);
        let args = <Line as clap::Parser>::try_parse_from(line).unwrap().args;
        let verify = async |_: &Config, _: &Runner, _: RunnerToken| {
            asked.set(true);
            Ok(Verified::default())
        };
        let error = register(&world.path("config.toml"), args, |_| None, verify).await.unwrap_err();
        assert!(chain(error.as_ref()).contains(part), "{part}: {error:#}");
        assert!(!asked.get(), "{part}");
    }
    assert_eq!(std::fs::read_to_string(world.path("config.toml")).unwrap(), before);
}

#[tokio::test]
async fn clear_text_needs_to_be_asked_for() {
    let world = World::new();
    let url = ["--url", "http://gitlab.example.com", "--name", "a"];
    assert!(chain(world.register(&url, known()).await.unwrap_err().as_ref()).contains("allow_insecure_http"));
    world.register(&[&url[..], &["--allow-insecure-http"]].concat(), known()).await.unwrap();
    assert!(world.config().runner[0].allow_insecure_http);
}

#[tokio::test]
async fn a_token_as_an_argument_is_refused_and_not_repeated() {
    let world = World::new();
    for flags in [
        vec!["--token", "glrt-secret"],
        vec!["--token=glrt-secret"],
        vec!["--token"],
        vec!["-t", "glrt-secret"],
        vec!["-r", "glrt-secret"],
        vec!["--registration-token=glrt-secret"],
    ] {
        let error = world.register(&[&URL[..], &flags].concat(), known()).await.unwrap_err();
        assert!(error.is::<Usage>());
        let text = chain(error.as_ref());
        assert!(text.contains("DAYFLY_REGISTER_TOKEN") && !text.contains("glrt-secret"), "{text}");
    }
}

#[tokio::test]
async fn a_token_with_odd_characters_is_no_token() {
    for token in ["", " \n", "two words", "gl\u{e9}"] {
        let world = World::new();
        std::fs::write(world.path("token"), token).unwrap();
        assert!(world.register(&URL, known()).await.is_err(), "{token:?}");
        assert_eq!(world.names(), ["token"]);
    }
}

#[tokio::test]
async fn a_configuration_that_cannot_be_written_takes_the_token_back() {
    let world = World::new();
    // Root writes everywhere, so the file's place is taken by a directory after it was read.
    let token = world.path("token");
    let line = ["register", "--token-file", token.to_str().unwrap(), URL[0], URL[1], "--name", "a"];
    let args = <Line as clap::Parser>::try_parse_from(line).unwrap().args;
    let place = world.path("config.toml");
    let verify = async |_: &Config, _: &Runner, _: RunnerToken| {
        std::fs::create_dir(&place).unwrap();
        Ok(Verified::default())
    };
    let error = register(&world.path("config.toml"), args, |_| None, verify).await.unwrap_err();
    assert!(chain(error.as_ref()).contains("write configuration"), "{error:#}");
    assert_eq!(world.names(), ["config.toml", "token"]);
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// U18: what the operator has below /root, say, is not for the daemon: it gets copies, of which it can read each.
#[tokio::test]
async fn ca_certificate_and_key_are_copied_beside_the_configuration() {
    let world = World::new();
    for (name, mode) in [("ca.pem", 0o600), ("c.pem", 0o600), ("c.key", 0o600)] {
        std::fs::write(world.path(name), name).unwrap();
        std::fs::set_permissions(world.path(name), std::fs::Permissions::from_mode(mode)).unwrap();
    }
    let path = |name: &str| world.path(name).to_str().unwrap().to_owned();
    let flags = [
        "--name",
        "a b",
        "--tls-ca-file",
        &path("ca.pem"),
        "--tls-cert-file",
        &path("c.pem"),
        "--tls-key-file",
        &path("c.key"),
    ];
    let seen = std::cell::RefCell::new(None);
    let token = world.path("token");
    let line = ["register", "--token-file", token.to_str().unwrap()].into_iter().chain(URL).chain(flags);
    let args = <Line as clap::Parser>::try_parse_from(line).unwrap().args;
    let verify = async |_: &Config, runner: &Runner, _: RunnerToken| {
        *seen.borrow_mut() = runner.tls_ca_file.clone();
        Ok(Verified::default())
    };
    register(&world.path("config.toml"), args, |_| None, verify).await.unwrap();
    assert_eq!(seen.borrow().as_deref(), Some(world.path("ca.pem").as_path()), "GitLab is asked by what was given");
    let runner = world.config().runner.remove(0);
    for (copy, file, content, expected) in [
        (runner.tls_ca_file, "tls/a-b.ca.pem", "ca.pem", 0o644),
        (runner.tls_cert_file, "tls/a-b.cert.pem", "c.pem", 0o644),
        (runner.tls_key_file, "tls/a-b.key.pem", "c.key", 0o600),
    ] {
        let copy = copy.unwrap();
        assert_eq!(copy, world.path(file));
        assert_eq!((std::fs::read_to_string(&copy).unwrap().as_str(), mode(&copy)), (content, expected), "{file}");
    }
    assert_eq!(mode(&world.path("tls")), 0o755);
    // The file names them as it names the token: moved as a whole, it still stands.
    assert!(std::fs::read_to_string(world.path("config.toml")).unwrap().contains("tls_ca_file = \"tls/a-b.ca.pem\""));
}

/// U18: the copies belong to whom the state directory belongs, who is the daemon.
#[tokio::test]
async fn copies_and_token_belong_to_the_daemon() {
    use std::os::unix::fs::{MetadataExt as _, chown};
    let world = World::new();
    let state = world.path("state");
    std::fs::create_dir(&state).unwrap();
    std::fs::write(world.path("ca.pem"), "ca").unwrap();
    std::fs::write(
        world.path("config.toml"),
        format!("state_directory = {state:?}\n[[class]]\nname = \"s\"\nimage = \"i\"\n"),
    )
    .unwrap();
    // Only root can give anything away.
    if chown(&state, Some(65534), Some(65534)).is_err() {
        return;
    }
    let ca = world.path("ca.pem");
    world
        .register(&[&URL[..], &["--name", "a", "--tls-ca-file", ca.to_str().unwrap()]].concat(), known())
        .await
        .unwrap();
    for name in ["tokens", "tokens/a", "tls", "tls/a.ca.pem"] {
        let found = std::fs::metadata(world.path(name)).unwrap();
        assert_eq!((found.uid(), found.gid()), (65534, 65534), "{name}");
    }
    assert_eq!(std::fs::metadata(world.path("config.toml")).unwrap().uid(), 0);
}

/// U18: the same name again takes the new token, and changes what is asked for and nothing else.
#[tokio::test]
async fn registering_anew_replaces_the_token_and_keeps_the_entry() {
    let world = World::new();
    world.register(&[&URL[..], &["--name", "a", "--limit", "2"]].concat(), known()).await.unwrap();
    let text = std::fs::read_to_string(world.path("config.toml")).unwrap();
    let edited = text.replace("limit = 2", "limit = 2 # mine") + "poll_interval = \"7s\"\n";
    std::fs::write(world.path("config.toml"), &edited).unwrap();
    world.token("glrt-new00000000000000000");
    // Without an address: it is known.
    world.register(&["--name", "a"], known()).await.unwrap();
    assert_eq!(std::fs::read_to_string(world.path("config.toml")).unwrap(), edited);
    assert_eq!(std::fs::read_to_string(world.path("tokens/a")).unwrap(), "glrt-new00000000000000000\n");
    world.register(&["--name", "a", "--limit", "5", "--direct-download"], known()).await.unwrap();
    let text = std::fs::read_to_string(world.path("config.toml")).unwrap();
    assert!(
        text.contains("limit = 5 # mine") && text.contains("poll_interval = \"7s\"\ndirect_download = true"),
        "{text}"
    );
    assert_eq!(world.config().runner.len(), 1);
    // One that GitLab refuses leaves everything.
    world.token("glrt-bad00000000000000000");
    world.register(&["--name", "a", "--limit", "9"], Err(GitlabError::Forbidden { status: 403 })).await.unwrap_err();
    assert_eq!(std::fs::read_to_string(world.path("config.toml")).unwrap(), text);
    assert_eq!(std::fs::read_to_string(world.path("tokens/a")).unwrap(), "glrt-new00000000000000000\n");
}

/// U18: a token that lies there without an entry, because somebody removed that by hand, is in nobody's way.
#[tokio::test]
async fn a_token_of_no_entry_is_replaced() {
    let world = World::new();
    std::fs::create_dir(world.path("tokens")).unwrap();
    std::fs::write(world.path("tokens/stale"), "glrt-old\n").unwrap();
    world.register(&[&URL[..], &["--name", "stale"]].concat(), known()).await.unwrap();
    assert_eq!(std::fs::read_to_string(world.path("tokens/stale")).unwrap(), format!("{TOKEN}\n"));
    assert_eq!(mode(&world.path("tokens/stale")), 0o600);
}

/// U18: what stands between an operator and GitLab is said by what it is, with what to do.
#[tokio::test]
async fn each_obstacle_is_named_with_its_remedy() {
    let unexpected = |status, message: &str| GitlabError::Unexpected {
        what: "a verification of the token",
        status,
        message: message.into(),
    };
    let unavailable = |status| GitlabError::Unavailable { status: Some(status), retry_after: None, source: None };
    for (error, parts) in [
        (unavailable(200), &["page for people", "let requests below"][..]),
        (unavailable(502), &["answers 502", "opens in a browser"]),
        (
            GitlabError::RateLimited { retry_after: std::time::Duration::from_secs(40) },
            &["429", "in 40 s", "nothing is wrong"],
        ),
        (
            unexpected(
                301,
                // GitLab's paths are gitlab's own, here too.
                &["a redirect to `https://g.example/gitlab/api", "/v4/runners/verify`; redirects are never followed"]
                    .concat(),
            ),
            &["https://g.example/gitlab/api", "leads to `https://g.example/gitlab`"],
        ),
        (
            unexpected(302, "a redirect to `/users/sign_in`; redirects are never followed"),
            &["/users/sign_in", "login page"],
        ),
        (
            unexpected(308, "a redirect to `https://g.example/x`; redirects are never followed"),
            &["https://g.example/x", "shows for its runners"],
        ),
        (unexpected(404, "404 Not Found"), &["check `url`"]),
    ] {
        let world = World::new();
        let text = chain(world.register(&URL, Err(error)).await.unwrap_err().as_ref());
        assert!(parts.iter().all(|part| text.contains(part)), "{parts:?}: {text}");
        assert_eq!(world.names(), ["token"]);
    }
}

/// U18: an address without its scheme, which would be taken for one with a strange one.
#[test]
fn an_address_needs_its_scheme() {
    for (text, part) in [
        ("gitlab.example.com", "write https://gitlab.example.com"),
        ("gitlab.example.com:8443", "write https://gitlab.example.com:8443"),
        ("//gitlab.example.com", "write https://gitlab.example.com"),
        ("https://", "empty host"),
    ] {
        let error = address(text).unwrap_err();
        assert!(error.contains(part), "{error}");
    }
    assert!(address(" https://gitlab.example.com/root ").is_ok());
}

/// U18: each flag has its variable, gitlab-runner's where that has one.
#[test]
fn every_flag_has_a_variable() {
    use clap::CommandFactory as _;
    let command = Line::command();
    let variable = |name: &str| {
        let arg = command.get_arguments().find(|arg| arg.get_long() == Some(name)).unwrap();
        arg.get_env().map(|name| name.to_str().unwrap().to_owned())
    };
    for (flag, name) in [
        ("url", "CI_SERVER_URL"),
        ("name", "RUNNER_NAME"),
        ("limit", "RUNNER_LIMIT"),
        ("tls-ca-file", "CI_SERVER_TLS_CA_FILE"),
        ("tls-cert-file", "CI_SERVER_TLS_CERT_FILE"),
        ("tls-key-file", "CI_SERVER_TLS_KEY_FILE"),
        ("clone-url", "CLONE_URL"),
        ("non-interactive", "REGISTER_NON_INTERACTIVE"),
    ] {
        assert_eq!(variable(flag).as_deref(), Some(name));
    }
    let ours = command.get_arguments().filter(|arg| !arg.is_hide_set() && arg.get_long() != Some("help"));
    for arg in ours {
        assert!(arg.get_env().is_some(), "{arg}");
    }
}

/// U18: the token comes by gitlab-runner's variables too; a registration token makes no runner here.
#[test]
fn a_token_comes_from_the_first_variable_that_has_one() {
    let from = |set: &'static [(&str, &str)]| {
        let variable = |name: &str| set.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        token(None, variable, false).map(|token| token.expose().to_owned()).map_err(|error| error.to_string())
    };
    assert_eq!(from(&[("CI_SERVER_TOKEN", "glrt-a"), (TOKEN_VARIABLE, "glrt-b")]).unwrap(), "glrt-b");
    assert_eq!(from(&[("CI_SERVER_TOKEN", "glrt-a"), ("REGISTRATION_TOKEN", "glrt-c")]).unwrap(), "glrt-a");
    assert_eq!(from(&[("REGISTRATION_TOKEN", "glrt-c")]).unwrap(), "glrt-c");
    let refused = from(&[("REGISTRATION_TOKEN", "GR1348941secret")]).unwrap_err();
    assert!(refused.contains("create the runner in GitLab") && !refused.contains("secret"), "{refused}");
    assert!(from(&[]).unwrap_err().contains("--token-file"));
}
