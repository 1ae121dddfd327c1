//! gitlab-runner's flags that dayfly has no use for: each is taken off the command line, and said what became of it.
//!
//! Scripts that register runners are full of them. What GitLab keeps (tags, access, timeouts) has been GitLab's matter
//! since runners are made there; what describes an executor describes none here. A flag that neither program knows stays
//! where it is, and is a wrong command line.

use std::ffi::{OsStr, OsString};

/// What GitLab keeps of a runner.
const AT_GITLAB: &str = "GitLab keeps it: set it where the runner was made, on its page there";
const NO_MACHINES: &str = "not used: dayfly makes each job's machine itself, as its class says (--class)";
const OWN_DISK: &str = "not used: each job has a disk of its own";

const IN_THE_ENTRY: &str =
    "not taken from here: put it into the runner's entry (`environment`, `pre_build_script` … in config.example.toml)";

/// A flag, its variable, and what becomes of it.
const FLAGS: &[(&str, &str, &str)] = &[
    ("tag-list", "RUNNER_TAG_LIST", AT_GITLAB),
    ("run-untagged", "REGISTER_RUN_UNTAGGED", AT_GITLAB),
    ("locked", "REGISTER_LOCKED", AT_GITLAB),
    ("access-level", "REGISTER_ACCESS_LEVEL", AT_GITLAB),
    ("maximum-timeout", "REGISTER_MAXIMUM_TIMEOUT", AT_GITLAB),
    ("paused", "REGISTER_PAUSED", AT_GITLAB),
    ("maintenance-note", "REGISTER_MAINTENANCE_NOTE", AT_GITLAB),
    ("leave-runner", "REGISTER_LEAVE_RUNNER", "not needed: what fails here changes nothing at GitLab"),
    ("executor", "RUNNER_EXECUTOR", ""),
    ("shell", "RUNNER_SHELL", "not used: a job has its machine's bash"),
    ("builds-dir", "RUNNER_BUILDS_DIR", OWN_DISK),
    ("cache-dir", "RUNNER_CACHE_DIR", OWN_DISK),
    ("env", "RUNNER_ENV", IN_THE_ENTRY),
    ("environment", "", IN_THE_ENTRY),
    ("pre-get-sources-script", "RUNNER_PRE_GET_SOURCES_SCRIPT", IN_THE_ENTRY),
    ("post-get-sources-script", "RUNNER_POST_GET_SOURCES_SCRIPT", IN_THE_ENTRY),
    ("pre-build-script", "RUNNER_PRE_BUILD_SCRIPT", IN_THE_ENTRY),
    ("post-build-script", "RUNNER_POST_BUILD_SCRIPT", IN_THE_ENTRY),
    ("output-limit", "RUNNER_OUTPUT_LIMIT", IN_THE_ENTRY),
    ("template-config", "TEMPLATE_CONFIG_FILE", "not read: dayfly migrate takes over what can be of such a file"),
    ("request-concurrency", "RUNNER_REQUEST_CONCURRENCY", "not needed: jobs are asked for when there is room"),
];

/// Families of flags, by how they begin.
const FAMILIES: &[(&str, &str)] = &[
    ("docker-", "not used: a job's commands run in its machine, not in a container; choose the machine by --class"),
    ("kubernetes-", NO_MACHINES),
    ("machine-", NO_MACHINES),
    ("autoscaler-", NO_MACHINES),
    ("instance-", NO_MACHINES),
    ("parallels-", NO_MACHINES),
    ("virtualbox-", NO_MACHINES),
    ("ssh-", NO_MACHINES),
    ("custom-", NO_MACHINES),
    ("cache-", "not needed: `cache:` works without a store, and `[cache.upstream]` names one that is there"),
    ("referees-", "not used: there are no referees"),
];

/// Takes them out of the arguments of `register`; what comes first is a sentence for each.
pub(in crate::cli) fn take(args: Vec<OsString>) -> (Vec<String>, Vec<OsString>) {
    let Some(at) = register_at(&args) else { return (Vec::new(), args) };
    let (mut notes, mut kept) = (Vec::new(), args[..=at].to_vec());
    let mut rest = args[at + 1..].iter().peekable();
    while let Some(arg) = rest.next() {
        let whole = arg.to_string_lossy();
        let (flag, mut value) = match whole.split_once('=') {
            Some((flag, value)) => (flag, Some(value.to_owned())),
            None => (whole.as_ref(), None),
        };
        let Some(fate) = flag.strip_prefix("--").and_then(fate) else {
            kept.push(arg.clone());
            continue;
        };
        // As gitlab-runner has them, a switch has no word behind it, and everything else has one.
        if value.is_none() {
            value = rest.next_if(|next| !next.as_encoded_bytes().starts_with(b"-")).map(|v| v.to_string_lossy().into());
        }
        notes.push(note(flag, value.as_deref().unwrap_or_default(), fate));
    }
    (notes, kept)
}

/// The same for what gitlab-runner reads from the environment.
pub(super) fn of_environment(variable: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let named = FLAGS.iter().filter(|(_, name, _)| !name.is_empty());
    let set = named.filter_map(|(_, name, fate)| Some((name, variable(name)?, fate)));
    set.filter(|(_, value, _)| !value.is_empty()).map(|(name, value, fate)| note(name, &value, fate)).collect()
}

/// Where the word `register` stands, if that is the command.
fn register_at(args: &[OsString]) -> Option<usize> {
    let mut at = 1;
    loop {
        let arg = args.get(at)?.as_os_str();
        if arg == "register" {
            return Some(at);
        }
        let is_global = |name: &str| arg == OsStr::new(name);
        match arg.to_string_lossy() {
            _ if is_global("--config") => at += 2,
            text if text.starts_with("--config=") => at += 1,
            _ => return None,
        }
    }
}

fn fate(flag: &str) -> Option<&'static str> {
    let one = FLAGS.iter().find(|(name, ..)| *name == flag).map(|(.., fate)| *fate);
    one.or_else(|| FAMILIES.iter().find(|(start, _)| flag.starts_with(start)).map(|(_, fate)| *fate))
}

fn note(flag: &str, value: &str, fate: &str) -> String {
    match (fate, value) {
        ("", "shell") => {
            format!("{flag} shell: so it is; the shell executor runs in a machine of its own for each job")
        }
        ("", _) => format!(
            "{flag} {value}: the class's image says how jobs run, in a machine of its own for each: by the shell executor, or \
             in containers there (`image:` and `services:`), with an image like debian-12-docker"
        ),
        _ => format!("{flag}: {fate}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(line: &[&str]) -> (Vec<String>, Vec<String>) {
        let args = std::iter::once("dayfly").chain(line.iter().copied()).map(OsString::from).collect();
        let (notes, kept) = take(args);
        (notes, kept.into_iter().skip(1).map(|arg| arg.into_string().unwrap()).collect())
    }

    /// U18: a line for gitlab-runner is a line for dayfly, and each flag without a use is told.
    #[test]
    fn what_gitlab_runner_takes_is_taken_and_told() {
        let line = [
            "--config",
            "f",
            "register",
            "--non-interactive",
            "--url",
            "https://a.example",
            "--executor",
            "docker",
            "--docker-image=alpine",
            "--docker-privileged",
            "--docker-volumes",
            "/cache",
            "--tag-list",
            "a,b",
            "--locked=false",
            "--run-untagged",
            "--name",
            "ci",
            "--cache-s3-bucket-name",
            "b",
            "--maximum-timeout",
            "600",
        ];
        let (notes, kept) = taken(&line);
        assert_eq!(
            kept,
            ["--config", "f", "register", "--non-interactive", "--url", "https://a.example", "--name", "ci"]
        );
        let of = |flag: &str| notes.iter().find(|note| note.starts_with(flag)).unwrap_or_else(|| panic!("{flag}"));
        for flag in ["--tag-list", "--locked", "--run-untagged", "--maximum-timeout"] {
            assert!(of(flag).ends_with(AT_GITLAB), "{}", of(flag));
        }
        assert!(of("--executor docker").contains("the shell executor"));
        assert!(of("--docker-image").contains("--class") && of("--docker-privileged").contains("--class"));
        assert!(of("--cache-s3-bucket-name").contains("[cache.upstream]"));
        assert_eq!(notes.len(), 9);
        assert!(taken(&["register", "--executor", "shell"]).0[0].contains("so it is"));
    }

    #[test]
    fn what_nobody_knows_and_other_commands_stay_as_they_are() {
        for line in
            [&["register", "--dokcer-image", "x", "--url"][..], &["exec", "--tag-list", "register"], &[], &["-x"]]
        {
            let (notes, kept) = taken(line);
            assert_eq!((notes.len(), kept), (0, line.iter().map(ToString::to_string).collect()));
        }
    }

    #[test]
    fn variables_are_told_by_their_names() {
        let set = |name: &str| match name {
            "RUNNER_EXECUTOR" => Some("kubernetes".to_owned()),
            "RUNNER_TAG_LIST" => Some("a".to_owned()),
            "REGISTER_LOCKED" => Some(String::new()),
            _ => None,
        };
        let notes = of_environment(set);
        assert_eq!(notes.len(), 2);
        assert!(notes[0].starts_with("RUNNER_TAG_LIST: GitLab keeps it"), "{notes:?}");
        assert!(notes[1].starts_with("RUNNER_EXECUTOR kubernetes: "), "{notes:?}");
    }
}
