//! The bash script that gets the sources with the guest's own git, and the credentials that it uses.

use crate::config::Runner;
use crate::payload::Job;
use crate::script::{Script, quote};
use crate::variables::Variables;
use std::path::{Path, PathBuf};

/// What `GIT_STRATEGY` asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Strategy {
    Fetch,
    Clone,
    /// Leave the directory as it is.
    None,
    /// Empty the directory.
    Empty,
}

/// Where the repository is, and how git gets in.
pub(crate) struct Remote {
    /// The URL without credentials, as `remote.origin.url` shows it.
    url: String,
    /// Prefixes of URLs for which git is given the job token: without and with credentials.
    instead_of: Vec<(String, String)>,
}

impl Remote {
    /// `clone_url` and `CI_PROJECT_PATH` if the config has it, else the payload's `repo_url`. 19.3 gives
    /// git the job token for the project, for the base of `clone_url`, and for the host of `repo_url`.
    pub(crate) fn new(job: &Job, runner: &Runner, variables: &Variables) -> Self {
        let payload = &job.git_info.repo_url;
        let base = runner.clone_url.trim_end_matches('/');
        let url = match base {
            "" => without_credentials(payload),
            base => format!("{base}/{}.git", variables.get("CI_PROJECT_PATH").unwrap_or_default()),
        };
        let mut bases = vec![url.clone(), base.to_owned(), host(&without_credentials(payload))];
        if !url.starts_with("http") {
            // A local path, as `exec` may give: no credentials.
            bases.clear();
        }
        let mut instead_of: Vec<(String, String)> = Vec::new();
        for base in bases {
            if let Some((scheme, rest)) = base.split_once("://")
                && !rest.is_empty()
                && instead_of.iter().all(|(known, _)| *known != base)
            {
                let with_token = format!("{scheme}://gitlab-ci-token:{}@{rest}", job.token);
                instead_of.push((base, with_token));
            }
        }
        Self { url, instead_of }
    }

    /// Git's include file: credentials, GitLab's chain, and the id that Gitaly logs.
    pub(crate) fn git_config(&self, correlation_id: &str, ca_file: Option<&Path>) -> String {
        let mut text = String::new();
        if !correlation_id.is_empty() {
            text.push_str(&format!(
                "[http]\n\textraHeader = \"X-Gitaly-Correlation-ID: {}\"\n",
                escape(correlation_id)
            ));
        }
        if let Some(ca_file) = ca_file {
            let ca_file = escape(&ca_file.to_string_lossy());
            text.push_str(&format!("[http \"{}\"]\n\tsslCAInfo = \"{ca_file}\"\n", escape(&host(&self.url))));
        }
        for (plain, with_token) in &self.instead_of {
            text.push_str(&format!("[url \"{}\"]\n\tinsteadOf = \"{}\"\n", escape(with_token), escape(plain)));
        }
        text
    }
}

/// Git's include file, beside the project.
pub(crate) fn git_config_file(variables: &Variables) -> PathBuf {
    variables.files_dir().join(".gitlab-runner.ext.conf")
}

/// The whole stage, hooks included.
pub(crate) fn script(job: &Job, runner: &Runner, variables: &Variables, project_dir: &Path, remote: &Remote) -> Script {
    let mut script = Script::new(variables);
    let strategy = match variables.get("GIT_STRATEGY") {
        Some("clone") => Strategy::Clone,
        Some("fetch") => Strategy::Fetch,
        Some("none") => Strategy::None,
        Some("empty") => Strategy::Empty,
        _ if job.allow_git_fetch => Strategy::Fetch,
        _ => Strategy::Clone,
    };
    hook(&mut script, &runner.pre_get_sources_script, job.hook("pre_get_sources_script"));
    let directory = project_dir.to_string_lossy();
    match strategy {
        Strategy::None | Strategy::Empty => {
            if strategy == Strategy::Empty {
                script.notice("Skipping Git repository setup and creating an empty build directory");
                script.command(&["rm", "-rf", &directory]);
            } else {
                script.notice("Skipping Git repository setup");
            }
            script.command(&["mkdir", "-p", &directory]).enter(project_dir);
            script.notice("Skipping Git checkout").notice("Skipping Git submodules setup");
        }
        Strategy::Fetch | Strategy::Clone => {
            if strategy == Strategy::Clone {
                script.command(&["rm", "-rf", &directory]);
            }
            fetch(&mut script, job, variables, project_dir, remote);
            check_out(&mut script, job, variables);
        }
    }
    hook(&mut script, &runner.post_get_sources_script, job.hook("post_get_sources_script"));
    script
}

fn hook(script: &mut Script, runners: &str, jobs: &[String]) {
    if !runners.is_empty() {
        script.line(runners);
    }
    script.author_commands(jobs);
}

fn fetch(script: &mut Script, job: &Job, variables: &Variables, project_dir: &Path, remote: &Remote) {
    let info = &job.git_info;
    let depth = match info.depth {
        0 => String::new(),
        depth => format!("--depth {depth}"),
    };
    script.line("export GIT_TERMINAL_PROMPT=0");
    if !job.correlation_id.is_empty() {
        script.notice(&format!("Gitaly correlation ID: {}", job.correlation_id));
    }
    match info.depth {
        0 => script.notice("Fetching changes..."),
        depth => script.notice(&format!("Fetching changes with git depth set to {depth}...")),
    };
    // As the official runner: no hint about branch names in the job's log.
    let mut init = vec!["git", "-c", "init.defaultBranch=none", "init"];
    let format = format!("--object-format={}", info.repo_object_format);
    if !matches!(info.repo_object_format.as_str(), "" | "sha1") {
        init.push(&format);
    }
    let directory = project_dir.to_string_lossy();
    init.push(&directory);
    // Locks of a git that died with its machine would stop this one.
    script.line(&format!("rm -f {0}/.git/index.lock {0}/.git/shallow.lock {0}/.git/HEAD.lock", quote(&directory)));
    script.command(&init).enter(project_dir);
    let include = git_config_file(variables);
    for (key, value) in [
        ("include.path", include.to_string_lossy().as_ref()),
        ("fetch.recurseSubmodules", "false"),
        ("credential.interactive", "never"),
        ("gc.autoDetach", "false"),
    ] {
        script.command(&["git", "config", key, value]);
    }
    let url = quote(&remote.url);
    script
        .line(&format!("if git remote add origin {url} >/dev/null 2>&1; then"))
        .notice("Created fresh repository.")
        .line(&format!("else\ngit remote set-url origin {url}\nfi"));
    let flags = variables
        .get("GIT_FETCH_EXTRA_FLAGS")
        .map_or("--prune --quiet".to_owned(), |flags| if flags == "none" { String::new() } else { words(flags) });
    let refspecs: Vec<String> = info.refspecs.iter().map(|refspec| quote(refspec)).collect();
    let user_agent = format!(
        "http.userAgent=gitlab-runner {} {}/{}",
        crate::VERSION,
        crate::info::platform(),
        crate::info::architecture()
    );
    script.line(&format!("git -c {} fetch origin {} {depth} {flags}", quote(&user_agent), refspecs.join(" ")));
}

fn check_out(script: &mut Script, job: &Job, variables: &Variables) {
    let info = &job.git_info;
    if variables.get("GIT_CHECKOUT").is_some_and(|value| matches!(value, "false" | "0" | "f" | "FALSE" | "False" | "F"))
    {
        script.notice("Skipping Git checkout");
    } else {
        let short: String = info.sha.chars().take(8).collect();
        script.notice(&format!("Checking out {short} as detached HEAD (ref is {})...", info.reference)).command(&[
            "git",
            "-c",
            "submodule.recurse=false",
            "checkout",
            "-f",
            "-q",
            &info.sha,
        ]);
        match variables.get("GIT_CLEAN_FLAGS") {
            Some("none") => {}
            Some(flags) => {
                script.line(&format!("git clean {}", words(flags)));
            }
            None => {
                script.line("git clean -ffdx");
            }
        }
        script.line("if git lfs version >/dev/null 2>&1; then git lfs pull; fi");
    }
    match variables.get("GIT_SUBMODULE_STRATEGY") {
        Some("normal") => {
            script.notice("Updating/initializing submodules...");
            script.line("git submodule sync\ngit submodule update --init");
        }
        Some("recursive") => {
            script.notice("Updating/initializing submodules recursively...");
            script.line("git submodule sync --recursive\ngit submodule update --init --recursive");
        }
        _ => {
            script.notice("Skipping Git submodules setup");
        }
    }
}

/// Flags from a variable, as separate quoted words.
fn words(flags: &str) -> String {
    flags.split_whitespace().map(quote).collect::<Vec<_>>().join(" ")
}

fn without_credentials(url: &str) -> String {
    match url.split_once("://") {
        Some((scheme, rest)) => {
            let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
            let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
            format!("{scheme}://{host}{path}")
        }
        None => url.to_owned(),
    }
}

/// Scheme and host of a URL.
fn host(url: &str) -> String {
    match url.split_once("://") {
        Some((scheme, rest)) => format!("{scheme}://{}", rest.split('/').next().unwrap_or_default()),
        None => String::new(),
    }
}

/// Text for a quoted value or section name of git's config files.
fn escape(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace(['\n', '\r', '\0'], "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job() -> Job {
        Job::parse(
            br#"{"id": 7, "token": "JT", "git_info": {"repo_url": "https://gitlab-ci-token:JT@gitlab.example/grp/proj.git",
                "ref": "main", "sha": "0123456789abcdef", "refspecs": ["+refs/heads/main:refs/remotes/origin/main"], "depth": 20}}"#,
        )
        .expect("a payload")
    }

    fn variables(list: &[(&str, &str)]) -> Variables {
        let list = list.iter().map(|(key, value)| crate::variables::plain(key, *value)).collect();
        Variables::new(list, PathBuf::from("/nonexistent/proj.tmp"))
    }

    fn text(list: &[(&str, &str)]) -> String {
        let (job, runner, variables) = (job(), Runner::default(), variables(list));
        let remote = Remote::new(&job, &runner, &variables);
        script(&job, &runner, &variables, Path::new("/b/proj"), &remote).into_text()
    }

    #[test]
    fn the_remote_has_no_credentials_and_git_gets_them_elsewhere() {
        let remote = Remote::new(&job(), &Runner::default(), &variables(&[]));
        assert_eq!(remote.url, "https://gitlab.example/grp/proj.git");
        let config = remote.git_config("01REQ", Some(Path::new("/ca.pem")));
        assert!(config.contains(
            "[url \"https://gitlab-ci-token:JT@gitlab.example\"]\n\tinsteadOf = \"https://gitlab.example\"\n"
        ));
        assert!(config.contains("extraHeader = \"X-Gitaly-Correlation-ID: 01REQ\""));
        assert!(config.contains("[http \"https://gitlab.example\"]\n\tsslCAInfo = \"/ca.pem\"\n"));
    }

    #[test]
    fn clone_url_comes_before_the_payloads_url() {
        let runner = Runner { clone_url: "http://10.0.2.2:8080/".to_owned(), ..Runner::default() };
        let remote = Remote::new(&job(), &runner, &variables(&[("CI_PROJECT_PATH", "grp/proj")]));
        assert_eq!(remote.url, "http://10.0.2.2:8080/grp/proj.git");
        let bases: Vec<&str> = remote.instead_of.iter().map(|(plain, _)| plain.as_str()).collect();
        assert_eq!(bases, ["http://10.0.2.2:8080/grp/proj.git", "http://10.0.2.2:8080", "https://gitlab.example"]);
    }

    #[test]
    fn the_commit_is_fetched_and_checked_out() {
        let text = text(&[]);
        assert!(
            text.contains("fetch origin '+refs/heads/main:refs/remotes/origin/main' --depth 20 --prune --quiet\n"),
            "{text}"
        );
        assert!(text.contains("'checkout' '-f' '-q' '0123456789abcdef'\ngit clean -ffdx\n"), "{text}");
        assert!(!text.contains("rm -rf"), "{text}");
    }

    #[test]
    fn strategies_and_flags_are_obeyed() {
        assert!(text(&[("GIT_STRATEGY", "clone")]).contains("'rm' '-rf' '/b/proj'\n"));
        assert!(!text(&[("GIT_STRATEGY", "none")]).contains("'git' 'init'"));
        let flags = text(&[("GIT_FETCH_EXTRA_FLAGS", "--tags $(reboot)"), ("GIT_CLEAN_FLAGS", "none")]);
        assert!(flags.contains("--depth 20 '--tags' '$(reboot)'\n"), "{flags}");
        assert!(!flags.contains("git clean"), "{flags}");
        assert!(!text(&[("GIT_CHECKOUT", "false")]).contains("'checkout'"));
        assert!(text(&[("GIT_SUBMODULE_STRATEGY", "recursive")]).contains("update --init --recursive"));
    }
}
