//! The bash scripts of a job's stages, but for the one that gets the sources ([`crate::sources`]).

use crate::payload::{Artifact, Job};
use crate::variables::Variables;
use std::path::{Path, PathBuf};

/// Text of one bash script, growing line by line.
pub(crate) struct Script(String);

impl Script {
    /// A script that ends at its first failure, knows the job's variables and what earlier stages wrote
    /// into `GITLAB_ENV`.
    pub(crate) fn new(variables: &Variables) -> Self {
        let mut script = Self("set -eo pipefail\nset +o noclobber\n".to_owned());
        for (key, value) in variables.exports() {
            script.export(key, &value);
        }
        let environment_file = environment_file(variables);
        script.export("GITLAB_ENV", &environment_file.to_string_lossy());
        let written = std::fs::read_to_string(environment_file).unwrap_or_default();
        for (key, value) in written.lines().filter_map(|line| line.trim().split_once('=')) {
            if !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
                script.export(key, value);
            }
        }
        script
    }

    /// Adds a line as it is.
    pub(crate) fn line(&mut self, line: &str) -> &mut Self {
        self.0.push_str(line);
        self.0.push('\n');
        self
    }

    /// Adds a program with its arguments, each quoted.
    pub(crate) fn command(&mut self, words: &[&str]) -> &mut Self {
        let quoted: Vec<String> = words.iter().map(|word| quote(word)).collect();
        self.line(&quoted.join(" "))
    }

    /// Adds a green line for the log.
    pub(crate) fn notice(&mut self, text: &str) -> &mut Self {
        let line = format!("\x1b[32;1m{text}\x1b[0;m");
        self.line(&format!("builtin printf '%s\\n' {}", quote(&line)))
    }

    /// Adds an author's commands, each shown before it runs; of several lines only the first is shown.
    pub(crate) fn author_commands(&mut self, commands: &[String]) -> &mut Self {
        for command in commands {
            let command = command.trim();
            match command.split_once('\n') {
                _ if command.is_empty() => self.line("builtin echo"),
                Some((first, _)) => self.notice(&format!("$ {first} # collapsed multi-line command")),
                None => self.notice(&format!("$ {command}")),
            };
            self.line(command);
        }
        self
    }

    /// Changes into the project.
    pub(crate) fn enter(&mut self, directory: &Path) -> &mut Self {
        self.command(&["cd", &directory.to_string_lossy()])
    }

    /// The whole script.
    pub(crate) fn into_text(self) -> String {
        self.0
    }

    fn export(&mut self, key: &str, value: &str) {
        self.line(&format!("export {key}={}", quote(value)));
    }
}

/// The file into which a job's scripts write variables for its later stages.
pub(crate) fn environment_file(variables: &Variables) -> PathBuf {
    variables.files_dir().join("gitlab_runner_env")
}

/// A word that bash reads as exactly this text; NUL, which no program can take, is dropped.
pub(crate) fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\0', "").replace('\'', "'\\''"))
}

/// Uploads what the job offers in this state; `None`: nothing to do.
pub(crate) fn upload(job: &Job, variables: &Variables, transfer: &Transfer<'_>, succeeded: bool) -> Option<Script> {
    let wanted: Vec<&Artifact> = job
        .artifacts
        .iter()
        .filter(|artifact| match artifact.when.as_str() {
            "always" => true,
            "on_failure" => !succeeded,
            _ => succeeded,
        })
        .filter(|artifact| artifact.untracked || !artifact.paths.is_empty())
        .collect();
    if wanted.is_empty() {
        return None;
    }
    let mut script = Script::new(variables);
    script.enter(transfer.project_dir);
    for artifact in wanted {
        let id = job.id.to_string();
        let mut words =
            vec![transfer.program, "artifacts-uploader", "--url", transfer.url, "--token", &job.token, "--id", &id];
        let expand = |list: &[String]| list.iter().map(|text| variables.expand(text)).collect::<Vec<_>>();
        let (paths, excludes) = (expand(&artifact.paths), expand(&artifact.exclude));
        let name = variables.expand(&artifact.name);
        words.extend(paths.iter().flat_map(|path| ["--path", path]));
        words.extend(excludes.iter().flat_map(|exclude| ["--exclude", exclude]));
        if artifact.untracked {
            words.push("--untracked");
        }
        for (flag, value) in [
            ("--name", name.as_str()),
            ("--expire-in", &artifact.expire_in),
            ("--artifact-format", &artifact.artifact_format),
            ("--artifact-type", &artifact.artifact_type),
        ] {
            if !value.is_empty() {
                words.extend([flag, value]);
            }
        }
        script.notice("Uploading artifacts...").command(&words);
    }
    Some(script)
}

/// Fetches the artifacts of earlier jobs; `None`: there are none.
pub(crate) fn download(job: &Job, variables: &Variables, transfer: &Transfer<'_>) -> Option<Script> {
    let mut script = Script::new(variables);
    script.enter(transfer.project_dir);
    let mut any = false;
    for dependency in job.dependencies.iter().filter(|dependency| !dependency.artifacts_file.filename.is_empty()) {
        any = true;
        let id = dependency.id.to_string();
        script.notice(&format!("Downloading artifacts for {} ({id})...", dependency.name)).command(&[
            transfer.program,
            "artifacts-downloader",
            "--url",
            transfer.url,
            "--token",
            &dependency.token,
            "--id",
            &id,
        ]);
    }
    any.then_some(script)
}

/// What both directions need to know.
pub(crate) struct Transfer<'a> {
    /// This program.
    pub(crate) program: &'a str,
    /// GitLab's base URL, as in config.toml.
    pub(crate) url: &'a str,
    /// Where the job works.
    pub(crate) project_dir: &'a Path,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(artifacts: &str) -> Job {
        Job::parse(format!(r#"{{"id": 7, "token": "JT", "artifacts": {artifacts}, "dependencies":
            [{{"id": 5, "name": "prep", "token": "DT", "artifacts_file": {{"filename": "a.zip"}}}}, {{"id": 6, "name": "none"}}]}}"#).as_bytes())
            .expect("a payload")
    }

    fn variables() -> Variables {
        Variables::new(vec![crate::variables::plain("NAME", "it's")], PathBuf::from("/nonexistent/proj.tmp"))
    }

    fn transfer() -> Transfer<'static> {
        Transfer { program: "/bin/runner", url: "http://192.0.2.1", project_dir: Path::new("/b/proj") }
    }

    #[test]
    fn words_survive_quoting() {
        assert_eq!(quote("it's $HOME\n"), "'it'\\''s $HOME\n'");
    }

    #[test]
    fn an_artifact_is_uploaded_in_the_states_it_names() {
        let job = job(r#"[{"paths": ["$NAME/"], "when": "on_failure", "artifact_format": "zip"}]"#);
        assert!(upload(&job, &variables(), &transfer(), true).is_none());
        let text = upload(&job, &variables(), &transfer(), false).expect("a script").into_text();
        assert!(text.contains("'--path' 'it'\\''s/' '--artifact-format' 'zip'"), "{text}");
    }

    #[test]
    fn a_dependency_without_artifacts_is_not_asked_for() {
        let text = download(&job("null"), &variables(), &transfer()).expect("a script").into_text();
        assert!(text.contains("'--token' 'DT' '--id' '5'"), "{text}");
        assert!(!text.contains("'--id' '6'"), "{text}");
    }

    #[test]
    fn a_command_of_several_lines_is_shown_by_its_first() {
        let mut script = Script::new(&variables());
        script.author_commands(&["echo 'a\nb'".to_owned()]);
        let text = script.into_text();
        assert!(text.contains("$ echo '\\''a # collapsed multi-line command"), "{text}");
        assert!(text.contains("\necho 'a\nb'\n"), "{text}");
    }
}
