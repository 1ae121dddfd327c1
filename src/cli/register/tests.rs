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
        std::fs::write(world.path("token"), "glrt-abcdefghijklmnopqrst\n").unwrap();
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs `register` with these flags and a token file; `verified` is GitLab's answer.
    async fn register(&self, flags: &[&str], verified: Result<Verified, GitlabError>) -> anyhow::Result<()> {
        let token = self.path("token");
        let line = ["register", "--token-file", token.to_str().unwrap()].into_iter().chain(flags.iter().copied());
        let args = <Line as clap::Parser>::try_parse_from(line).unwrap().args;
        register(&self.path("config.toml"), args, async |_: &Config, _: &Runner, _: RunnerToken| {
            verified.map_err(explain)
        })
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

const URL: [&str; 2] = ["--url", "https://gitlab.example.com"];

fn known() -> Result<Verified, GitlabError> {
    Ok(Verified { id: Some(12) })
}

#[tokio::test]
async fn the_first_runner_makes_a_configuration_with_all_comments() {
    let world = World::new();
    world.register(&[&URL[..], &["--name", "my runner", "--limit", "3"]].concat(), known()).await.unwrap();
    let text = std::fs::read_to_string(world.path("config.toml")).unwrap();
    assert!(text.starts_with(config::EXAMPLE));
    let runner = &world.config().runner[0];
    assert_eq!((runner.name.as_str(), runner.class.as_str(), runner.limit), ("my runner", "default", Some(3)));
    assert_eq!(runner.token_file, world.path("tokens/my-runner"));
    assert_eq!(std::fs::read_to_string(&runner.token_file).unwrap(), "glrt-abcdefghijklmnopqrst\n");
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&runner.token_file), mode(&world.path("tokens"))), (0o600, 0o700));
}

#[tokio::test]
async fn another_runner_comes_behind_and_changes_nothing_before() {
    let world = World::new();
    let before = "# mine\nconcurrent = 3 # three\n\n[[class]]\nname = \"big\"\nimage = \"x\"\n[log]\nlevel = \"warn\"\n# the end";
    std::fs::write(world.path("config.toml"), before).unwrap();
    std::fs::set_permissions(world.path("config.toml"), std::fs::Permissions::from_mode(0o640)).unwrap();
    world.register(&[&URL[..], &["--name", "a"]].concat(), known()).await.unwrap();
    world
        .register(&[&URL[..], &["--name", "b", "--direct-download", "--tls-ca-file", "/ca.pem"]].concat(), known())
        .await
        .unwrap();
    assert!(std::fs::read_to_string(world.path("config.toml")).unwrap().starts_with(before));
    assert_eq!(std::fs::metadata(world.path("config.toml")).unwrap().permissions().mode() & 0o777, 0o640);
    let config = world.config();
    assert_eq!((config.runner.len(), config.concurrent, config.log.level.as_str()), (2, 3, "warn"));
    assert_eq!((config.runner[1].name.as_str(), config.runner[1].direct_download), ("b", true));
    assert_eq!(config.runner[1].tls_ca_file.as_deref(), Some(Path::new("/ca.pem")));
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
    std::fs::write(world.path("tokens/stale"), "x").unwrap();
    for (flags, part) in [
        (vec!["--name", "a"], "has a runner of this name"),
        (vec!["--name", "stale"], "exists already"),
        (vec!["--name", "b", "--class", "huge"], "unknown class `huge`"),
        (vec!["--name", "b", "--tls-cert-file", "c.pem"], "`tls_key_file` too"),
        (vec!["--name", "b\u{7}"], "printable"),
    ] {
        let asked = std::cell::Cell::new(false);
        let token = world.path("token");
        let line = ["register", "--token-file", token.to_str().unwrap(), URL[0], URL[1]].into_iter().chain(flags);
        let args = <Line as clap::Parser>::try_parse_from(line).unwrap().args;
        let verify = async |_: &Config, _: &Runner, _: RunnerToken| {
            asked.set(true);
            Ok(Verified { id: None })
        };
        let error = register(&world.path("config.toml"), args, verify).await.unwrap_err();
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
    for flags in [vec!["--token", "glrt-secret"], vec!["--token=glrt-secret"], vec!["--token"]] {
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
        Ok(Verified { id: None })
    };
    let error = register(&world.path("config.toml"), args, verify).await.unwrap_err();
    assert!(chain(error.as_ref()).contains("write configuration"), "{error:#}");
    assert_eq!(world.names(), ["config.toml", "token"]);
}
