//! `dayfly register` as people start it: the program, its variables, a GitLab behind TLS with a CA of its own.
#![expect(clippy::disallowed_methods, reason = "the program is a process here")]

use crate::gitlab_tls_server::{Ca, server_config};
use dayfly::clock::Clock;
use dayfly::rng::Rng;
use dayfly::secret::Secret;
use dayfly_exec::standin::{self, Standin};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use tokio::net::TcpListener;

const TOKEN: &str = "glrt-t1_0123456789abcdefghij";

/// A GitLab that knows one runner, and a folder for its operator.
pub(crate) struct Lab {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) standin: Standin,
    pub(crate) url: String,
    _served: standin::Served,
}

impl Lab {
    pub(crate) async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ca = Ca::new("a private CA");
        std::fs::write(dir.path().join("ca.pem"), &ca.pem).unwrap();
        let standin = Standin::new(Clock::system(), Rng::seeded(1));
        let project = standin.add_project("group/project");
        let id = standin.add_runner(project);
        standin.edit(|model| model.runners.get_mut(&id).unwrap().token = Secret::new(TOKEN));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let tls = Arc::new(server_config(&ca.good(), None));
        let served = standin::serve(standin.clone(), listener, Some(tls)).unwrap();
        let url = format!("https://localhost:{}", served.address().port());
        let lab = Self { dir, standin, url, _served: served };
        std::fs::write(
            lab.path("config.toml"),
            "state_directory = \"state\"\nruntime_directory = \"run\"\nimage_directory = \"images\"\n\
             [[class]]\nname = \"small\"\nimage = \"debian-12-shell\"\n",
        )
        .unwrap();
        lab
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs `dayfly` with this line and these variables only.
    pub(crate) async fn dayfly(&self, line: &[&str], variables: &[(&str, &str)]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dayfly"));
        command.arg("--config").arg(self.path("config.toml")).args(line).stdin(Stdio::null());
        command.env_clear().envs(variables.iter().copied());
        tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
    }

    /// A runner that is registered.
    pub(crate) async fn registered(&self) {
        let ca = self.path("ca.pem");
        let variables = [
            ("CI_SERVER_URL", self.url.as_str()),
            ("CI_SERVER_TOKEN", TOKEN),
            ("RUNNER_NAME", "ci"),
            ("CI_SERVER_TLS_CA_FILE", ca.to_str().unwrap()),
        ];
        let done = self.dayfly(&["register", "--non-interactive", "--executor", "shell"], &variables).await;
        assert!(done.status.success(), "{}", said(&done));
        assert!(said(&done).contains("next: dayfly image build debian-12-shell"), "{}", said(&done));
        assert!(said(&done).contains("note: --executor shell: so it is"), "{}", said(&done));
    }
}

pub(crate) fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// U18: by variables alone, as gitlab-runner has them; with a CA that nobody but its owner may read.
#[tokio::test]
async fn a_runner_is_registered_by_variables_alone() {
    let lab = Lab::new().await;
    std::fs::set_permissions(lab.path("ca.pem"), std::fs::Permissions::from_mode(0o600)).unwrap();
    lab.registered().await;
    assert_eq!(std::fs::read_to_string(lab.path("tokens/ci")).unwrap(), format!("{TOKEN}\n"));
    assert_eq!((mode(&lab.path("tokens/ci")), mode(&lab.path("tls/ci.ca.pem"))), (0o600, 0o644));
    let checked = lab.dayfly(&["check"], &[]).await;
    assert!(checked.status.success(), "{}", said(&checked));
    assert!(!said(&checked).contains("abcdefghij"));
}

/// U18: another CA than GitLab's, and no CA at all, are told from each other; nothing is left of either try.
#[tokio::test]
async fn a_wrong_ca_is_told_from_none() {
    let lab = Lab::new().await;
    std::fs::write(lab.path("other.pem"), Ca::new("another CA").pem).unwrap();
    let other = lab.path("other.pem");
    let base = [("CI_SERVER_URL", lab.url.as_str()), ("CI_SERVER_TOKEN", TOKEN), ("RUNNER_NAME", "ci")];
    let wrong = [&base[..], &[("CI_SERVER_TLS_CA_FILE", other.to_str().unwrap())]].concat();
    let text = said(&lab.dayfly(&["register"], &wrong).await);
    assert!(text.contains("other.pem holds no CA that has signed GitLab's certificate"), "{text}");
    let text = said(&lab.dayfly(&["register"], &base).await);
    assert!(text.contains("put its CA into `tls_ca_file`") || text.contains("no CA certificates"), "{text}");
    assert!(!lab.path("tokens").exists() && !lab.path("tls").exists() && !lab.path("state").exists());
}

/// U18: the life of a runner, by gitlab-runner's verbs, in a directory where no daemon has ever run.
#[tokio::test]
async fn a_runner_is_verified_reset_and_unregistered() {
    let lab = Lab::new().await;
    lab.registered().await;
    let managers =
        || lab.standin.edit(|model| model.runners.values().map(|runner| runner.managers.len()).sum::<usize>());
    assert_eq!(managers(), 1);
    let listed = said(&lab.dayfly(&["list"], &[]).await);
    assert!(
        listed.starts_with("ci  https://localhost") && listed.contains("class small") && !listed.contains("glrt"),
        "{listed}"
    );
    let json: serde_json::Value = serde_json::from_str(&said(&lab.dayfly(&["list", "--json"], &[]).await)).unwrap();
    assert_eq!(json[0]["name"], "ci");
    // As if no daemon had ever run.
    std::fs::remove_dir_all(lab.path("state")).unwrap();
    let verified = lab.dayfly(&["verify"], &[]).await;
    assert!(
        verified.status.success() && said(&verified).contains("knows its token, as its runner "),
        "{}",
        said(&verified)
    );

    lab.standin.configure(|settings| settings.runner_token_expiry = Some(std::time::Duration::from_secs(86400)));
    let reset = lab.dayfly(&["reset-token", "--name", "ci"], &[]).await;
    assert!(reset.status.success() && said(&reset).contains("it expires on"), "{}", said(&reset));
    let token = std::fs::read_to_string(lab.path("tokens/ci")).unwrap();
    assert_ne!(token.trim(), TOKEN);
    assert!(!said(&reset).contains(token.trim()) && mode(&lab.path("tokens/ci")) == 0o600);
    let verified = said(&lab.dayfly(&["verify", "--name", "ci"], &[]).await);
    assert!(verified.contains("the token expires on"), "{verified}");

    let which = lab.dayfly(&["unregister"], &[]).await;
    assert_eq!(which.status.code(), Some(64), "{}", said(&which));
    let gone = lab.dayfly(&["unregister", "--name", "ci"], &[]).await;
    assert!(gone.status.success(), "{}", said(&gone));
    assert!(!lab.path("tokens/ci").exists() && !lab.path("tls/ci.ca.pem").exists() && lab.path("ca.pem").exists());
    let config = std::fs::read_to_string(lab.path("config.toml")).unwrap();
    assert!(!config.contains("runner") && config.contains("[[class]]"), "{config}");
    assert_eq!(managers(), 1, "that of the state that was removed");
}

/// U18: a runner that was deleted in GitLab is told as that, with both ways on, and can be taken out here.
#[tokio::test]
async fn a_runner_that_is_gone_at_gitlab_is_taken_out_here() {
    let lab = Lab::new().await;
    lab.registered().await;
    lab.standin.edit(|model| model.runners.clear());
    let verified = lab.dayfly(&["verify"], &[]).await;
    assert_eq!(verified.status.code(), Some(1));
    let text = said(&verified);
    assert!(text.contains("dayfly register --name 'ci'") && text.contains("dayfly unregister --name 'ci'"), "{text}");
    let gone = lab.dayfly(&["unregister", "--all-runners"], &[]).await;
    assert!(gone.status.success() && said(&gone).contains("did not know its token any more"), "{}", said(&gone));
    assert!(said(&lab.dayfly(&["list"], &[]).await).contains("no runner is configured"));
}

/// U18: without an answer of GitLab's an entry stays, unless it is wished away.
#[tokio::test]
async fn an_entry_stays_while_gitlab_does_not_answer() {
    let lab = Lab::new().await;
    lab.registered().await;
    let config = std::fs::read_to_string(lab.path("config.toml")).unwrap();
    std::fs::write(lab.path("config.toml"), config.replace(&lab.url, "https://localhost:9")).unwrap();
    let refused = lab.dayfly(&["unregister", "--name", "ci"], &[]).await;
    assert!(!refused.status.success() && said(&refused).contains("--force"), "{}", said(&refused));
    assert!(lab.path("tokens/ci").exists());
    let forced = lab.dayfly(&["unregister", "--name", "ci", "--force"], &[]).await;
    assert!(forced.status.success() && said(&forced).contains("GitLab was not told"), "{}", said(&forced));
    assert!(!lab.path("tokens/ci").exists());
}
