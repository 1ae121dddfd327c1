//! The corpus of pipeline files: each job of each file either comes out as a payload, or is refused by name.
//!
//! `tests/data/exec` has a file for each construct and each refusal, written for the purpose, with what it comes to
//! beside it (`NAME.yml`, `NAME.expected`). The ring `exec` of `scripts/test` runs this and shows the figures.
//! `DAYFLY_UPDATE_CORPUS=1` writes the expectations anew, to be read before they are committed.

use super::payload::{self, Common};
use super::pipeline::sources::{Directory, Sources};
use super::pipeline::{self, PipelineError};
use super::repository::Repository;
use crate::standin::{Standin, Variable};
use dayfly::clock::Clock;
use dayfly::rng::Rng;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Files at least, so that a corpus that is not found does not pass.
const FILES_MIN: usize = 30;

/// What became of one job.
enum Outcome {
    Runs(Box<Value>),
    Refused(String),
}

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/exec")
}

fn repository() -> Repository {
    Repository {
        top: directory(),
        sha: "1".repeat(40),
        before_sha: "2".repeat(40),
        ref_name: "topic".into(),
        is_tag: false,
        default_branch: Some("main".into()),
        project_path: "Group/project".into(),
        message: "Title".into(),
        author: "A <a@b>".into(),
        timestamp: "2026-01-31T12:00:00+01:00".into(),
        relative_submodules: Vec::new(),
        changes: Some(0),
    }
}

/// The payload that a runner gets for the one job of this plan.
async fn payload(plan: &pipeline::Plan) -> Value {
    let repository = repository();
    let common = Common {
        pipeline: 7,
        repository: Some(&repository),
        file: ".gitlab-ci.yml".into(),
        timeout: Duration::from_secs(3600),
        variables: &[],
    };
    let (spec, _) = payload::spec(&plan.jobs[0], &common, &BTreeMap::new());
    let standin = Standin::new(Clock::system(), Rng::seeded(1));
    standin.configure(|settings| settings.registry = Some(super::REGISTRY.into()));
    let project = standin.add_project(&repository.project_path);
    let runner = standin.add_runner(project);
    let _ = standin.enqueue(project, spec);
    let features = json!({
        "artifacts": true, "artifacts_exclude": true, "return_exit_code": true, "variables": true,
        "upload_multiple_artifacts": true, "upload_raw_artifacts": true, "multi_build_steps": true,
    });
    standin.handed_out(runner, &features).await
}

/// What a reader wants to know of a payload: nothing that all have.
fn essentials(payload: &Value, predefined: &Value) -> String {
    let mut text = format!("  stage {}\n", payload["job_info"]["stage"]);
    for step in payload["steps"].as_array().into_iter().flatten() {
        let _ = writeln!(text, "  {} {}", step["name"].as_str().unwrap_or_default(), step["script"]);
    }
    let own = |v: &&Value| {
        let known = predefined["variables"].as_array().into_iter().flatten().any(|p| p["key"] == v["key"]);
        !known || v["key"].as_str().is_some_and(|key| key.starts_with("CI_NODE_") && v["value"] != "1")
    };
    for variable in payload["variables"].as_array().into_iter().flatten().filter(own) {
        let raw = if variable["raw"] == true { " (raw)" } else { "" };
        let _ =
            writeln!(text, "  variable {}={}{raw}", variable["key"].as_str().unwrap_or_default(), variable["value"]);
    }
    for key in ["image", "artifacts", "hooks"] {
        match &payload[key] {
            Value::Null => {}
            Value::Array(list) if list.is_empty() => {}
            value if key == "image" => {
                let _ = writeln!(text, "  image {} {}", value["name"], value["entrypoint"]);
            }
            value => {
                let _ = writeln!(text, "  {key} {value}");
            }
        }
    }
    if payload["runner_info"]["timeout"] != 3600 {
        let _ = writeln!(text, "  timeout {}", payload["runner_info"]["timeout"]);
    }
    text
}

/// Whether the developer knows what became of the job: it is at the runner under its name with something to do, or
/// they have been told where and why not.
fn is_explained(name: &str, outcome: &Outcome) -> bool {
    match outcome {
        Outcome::Runs(payload) => {
            let script = payload["steps"][0]["script"].as_array();
            payload["job_info"]["name"] == name && script.is_some_and(|lines| !lines.is_empty())
        }
        Outcome::Refused(why) => {
            let key = name.split([':', ' ']).next().unwrap_or(name);
            let reason = why.rsplit_once("`: ").map_or(why.as_str(), |(_, reason)| reason);
            (why.contains(&format!("`{name}`")) || why.contains(&format!("`{key}`"))) && reason.trim().len() >= 8
        }
    }
}

/// All jobs of a file with what becomes of each, in the order of `--list`, and remarks.
async fn outcomes(file: &Path, sources: &dyn Sources) -> (Vec<(String, Outcome)>, Vec<String>, Option<PipelineError>) {
    let (listed, more) = match pipeline::list(file, sources) {
        Ok(listed) => listed,
        Err(error) => return (Vec::new(), Vec::new(), Some(error)),
    };
    assert_eq!(more, 0);
    let (mut jobs, mut notes) = (Vec::new(), Vec::new());
    for job in listed {
        let outcome = match pipeline::read(file, std::slice::from_ref(&job.name), sources) {
            Ok(plan) => {
                assert_eq!((job.refused, job.stage.as_ref()), (None, Some(&plan.jobs[0].stage)), "{}", job.name);
                for note in &plan.notes {
                    let place = plan.files[note.line.file].file_name().unwrap_or_default().to_string_lossy();
                    notes.push(format!("{place}:{note}"));
                }
                Outcome::Runs(Box::new(payload(&plan).await))
            }
            Err(error) => {
                assert_eq!(job.refused, Some(error.to_string()), "{}", job.name);
                Outcome::Refused(error.to_string())
            }
        };
        jobs.push((job.name, outcome));
    }
    notes.sort();
    notes.dedup();
    (jobs, notes, None)
}

/// U34: each construct of a pipeline file comes out as GitLab has it, or is refused by name with a reason
#[tokio::test]
async fn every_job_of_the_corpus_runs_or_is_refused_by_name() {
    let update = std::env::var_os("DAYFLY_UPDATE_CORPUS").is_some();
    let variables = payload::known(Some(&repository()), &[Variable::new("FLAVOUR", "sweet")]);
    let sources = Directory::at(&directory(), variables);
    let mut files: Vec<PathBuf> = std::fs::read_dir(directory())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "yml"))
        .collect();
    files.sort();
    let empty = pipeline::plan(Path::new("f"), "job: {script: x}", &["job".into()]).unwrap();
    let predefined = payload(&empty).await;
    let (mut jobs_seen, mut unexplained, mut wrong) = (0, Vec::new(), Vec::new());
    for file in &files {
        let (jobs, notes, fault) = outcomes(file, &sources).await;
        let mut text = String::new();
        // The path of this machine is nobody's expectation.
        let shown = |words: &str| words.replace(&format!("{}/", directory().display()), "");
        for (name, outcome) in &jobs {
            jobs_seen += 1;
            if !is_explained(name, outcome) {
                unexplained.push(format!("{}: {name}", file.display()));
            }
            match outcome {
                Outcome::Runs(payload) => {
                    let _ = write!(text, "runs `{name}`\n{}", essentials(payload, &predefined));
                }
                Outcome::Refused(why) => {
                    let _ = writeln!(text, "refused `{name}`\n  {}", shown(why));
                }
            }
        }
        for note in notes {
            let _ = writeln!(text, "note {}", shown(&note));
        }
        if let Some(fault) = fault {
            let _ = writeln!(text, "refused\n  {}", shown(&fault.to_string()));
        }
        let expected = file.with_extension("expected");
        if update {
            std::fs::write(&expected, &text).unwrap();
        }
        if std::fs::read_to_string(&expected).ok().as_deref() != Some(&text) {
            wrong.push(format!("{}:\n{text}", file.display()));
        }
    }
    println!("figure exec.files {}", files.len());
    println!("figure exec.jobs {jobs_seen}");
    println!("figure exec.unexplained {}", unexplained.len());
    assert!(files.len() >= FILES_MIN, "{} files", files.len());
    assert_eq!(unexplained, Vec::<String>::new());
    assert!(wrong.is_empty(), "come out otherwise:\n{}", wrong.join("\n"));
}

/// A job that vanishes without a word is found: planted here, since the corpus has none.
#[tokio::test]
async fn an_unexplained_job_is_found() {
    let plan = pipeline::plan(Path::new("f"), "job: {script: x}", &["job".into()]).unwrap();
    let mut made = payload(&plan).await;
    assert!(is_explained("job", &Outcome::Runs(Box::new(made.clone()))));
    assert!(!is_explained("other", &Outcome::Runs(Box::new(made.clone()))), "another job runs in its place");
    made["steps"][0]["script"] = json!([]);
    assert!(!is_explained("job", &Outcome::Runs(Box::new(made))), "nothing runs");
    let refused = |why: &str| is_explained("job", &Outcome::Refused(why.into()));
    assert!(refused("f:3: job `job`: key `trigger`: starts another pipeline, which only GitLab can"));
    assert!(!refused("f:3: key `trigger`: starts another pipeline, which only GitLab can"), "which job?");
    assert!(!refused("f:3: job `job`: "), "and why?");
    assert!(!refused(""));
}
