//! Takes a recorded job to its end where the recording cannot: with a runner that decides for itself.
//!
//! ```text
//! stand-in runner ──► relay ──wire──► door ► job, spool, uploader ──► stand-in GitLab
//! ```
//!
//! The stand-in runner is a process of its own (`dayfly-standin-runner`), with the scenario's
//! config.toml and the scenario's job. dayfly's answers are good ones, whatever the recording server did,
//! so the job's end is what its scripts say. They run here, in a folder of their own, with a `sleep`
//! that takes no time.

use crate::compare;
use crate::gitlab::Gitlab;
use crate::play::{Booted, LIMIT, Scene, Stage};
use crate::recording::{Class, Recording};
use dayfly_exec::standin::JobState;
use dayfly_test_guest::boot::guest_token;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use tokio::process::Command;
use tokio::time::timeout;

/// A function that every bash of a job takes from its environment.
const NO_SLEEP: (&str, &str) = ("BASH_FUNC_sleep%%", "() { :; }");

/// Where the stand-in runner is: beside this program, or where the variable says.
pub(crate) fn runner() -> Result<PathBuf, String> {
    if let Some(path) = std::env::var_os("DAYFLY_STANDIN_RUNNER") {
        return Ok(path.into());
    }
    let own = std::env::current_exe().map_err(|error| error.to_string())?;
    // A test program is one folder further down.
    let beside =
        own.ancestors().skip(1).take(2).map(|dir| dir.join("dayfly-standin-runner")).find(|path| path.exists());
    beside.ok_or_else(|| "there is no dayfly-standin-runner beside this program: build dayfly-test-runner".into())
}

/// Why a scenario's job is none for the stand-in runner.
pub(crate) fn reason_not_to(recording: &Recording) -> Option<String> {
    let Ok(payload) = payload(recording) else { return Some("its payload is no JSON".into()) };
    let config = recording.config.as_deref().unwrap_or_default().parse::<toml_edit::DocumentMut>();
    let executor = config.as_ref().ok().and_then(|toml| toml.get("runners")?.get(0)?.get("executor")?.as_str());
    match executor {
        Some("shell") => {}
        Some(other) => return Some(format!("the stand-in runner has no executor `{other}`")),
        None => return Some("its config names no runner".into()),
    }
    if payload["run"].is_array() {
        return Some("the stand-in runner runs no native steps".into());
    }
    if payload["secrets"].as_object().is_some_and(|secrets| !secrets.is_empty()) {
        return Some("the stand-in runner fetches no secrets".into());
    }
    None
}

/// Runs the recorded job anew, with the stand-in runner at `runner`.
///
/// # Errors
/// What was not as it must be in the end.
pub(crate) async fn finish(stage: &Stage, recording: &Recording, runner: &Path) -> Result<(), String> {
    let gitlab = Gitlab::with_real_archives(recording)?;
    let mut scene = Scene::open(&gitlab).await?;
    let ended = match scene.booted().await {
        Ok(booted) => run(stage, recording, booted, runner).await,
        Err(why) => Err(why),
    };
    scene.close(&gitlab, ended).await?;
    judge(&gitlab, recording)
}

async fn run(stage: &Stage, recording: &Recording, booted: Booted, runner: &Path) -> Result<(), String> {
    let text = |error: &dyn std::error::Error| error.to_string();
    let token = guest_token(&booted.config).ok_or("the guest config holds no guest token")?;
    booted.hand_over(&stage.relay)?;
    let dir = tempfile::tempdir().map_err(|error| text(&error))?;
    let file = dir.path().join("config.toml");
    let (toml, name) = adapted(recording, &format!("http://{}", stage.address), &token, dir.path())?;
    std::fs::write(&file, toml).map_err(|error| text(&error))?;
    #[expect(clippy::disallowed_methods, reason = "the runner under play; killed when dropped")]
    let mut command = Command::new(runner);
    command.arg("run-single").arg("-c").arg(&file).args(["-r", &name, "--max-builds", "1", "--wait-timeout", "30"]);
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("HOME", dir.path());
    command.env(NO_SLEEP.0, NO_SLEEP.1).current_dir(dir.path());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    let output = timeout(LIMIT, command.output()).await.map_err(|_| "the stand-in runner does not end")?;
    let output = output.map_err(|error| format!("start {}: {error}", runner.display()))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(format!("the stand-in runner ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr)))
    }
}

/// The scenario's config.toml for this run, and its runner's name: its own but for where GitLab and folders are.
fn adapted(recording: &Recording, url: &str, token: &str, dir: &Path) -> Result<(String, String), String> {
    let mut toml: toml_edit::DocumentMut = recording
        .config
        .as_deref()
        .unwrap_or_default()
        .parse()
        .map_err(|error: toml_edit::TomlError| error.to_string())?;
    let runner = toml.get_mut("runners").and_then(|all| all.get_mut(0)).ok_or("its config names no runner")?;
    let name = runner.get("name").and_then(toml_edit::Item::as_str).unwrap_or_default().to_owned();
    runner["url"] = toml_edit::value(url);
    runner["token"] = toml_edit::value(token);
    for folder in ["builds", "cache"] {
        runner[&format!("{folder}_dir")] = toml_edit::value(dir.join(folder).display().to_string());
    }
    Ok((toml.to_string(), name))
}

fn payload(recording: &Recording) -> Result<Value, String> {
    let hand_out = recording.requests.iter().find(|r| r.class == Class::Ask && r.answer.status == Some(201));
    let raw = &hand_out.ok_or("no request got the job")?.answer.body;
    serde_json::from_str(raw).map_err(|error| error.to_string())
}

/// The end that the job's own scripts say: a state, and the exit code of a failed one if they name it.
fn right_end(payload: &Value) -> (JobState, Option<i64>) {
    let variables = payload["variables"].as_array().cloned().unwrap_or_default();
    let strategy = variables.iter().rev().find(|variable| variable["key"] == "GIT_STRATEGY");
    if strategy.is_none_or(|strategy| strategy["value"] != "none") {
        // The recorded git server is not there any more.
        return (JobState::Failed, None);
    }
    let steps = payload["steps"].as_array().cloned().unwrap_or_default();
    let script = steps.iter().find(|step| step["name"] == "script").and_then(|step| step["script"].as_array());
    for line in script.into_iter().flatten().filter_map(Value::as_str) {
        let code = line.strip_prefix("exit ").and_then(|code| code.parse().ok());
        let code = code.or_else(|| (line == "false").then_some(1));
        if let Some(code) = code.filter(|code| *code != 0) {
            return (JobState::Failed, Some(code));
        }
    }
    (JobState::Success, None)
}

fn judge(gitlab: &Gitlab, recording: &Recording) -> Result<(), String> {
    let job = gitlab.standin.job(gitlab.job).ok_or("the job is gone at GitLab")?;
    let trace = || String::from_utf8_lossy(&job.trace.bytes).into_owned();
    let (state, code) = right_end(&payload(recording)?);
    let reason = (state == JobState::Failed).then_some("script_failure");
    let wrong_code = code.is_some() && job.exit_code != code;
    if job.state != state || job.failure_reason.as_deref() != reason || wrong_code {
        let (found, why) = (job.state, &job.failure_reason);
        return Err(format!("the job is {found:?} ({why:?}, {:?}) instead of {state:?}:\n{}", job.exit_code, trace()));
    }
    compare::one_verdict(gitlab, &job)?;
    if state == JobState::Success && !trace().contains("Job succeeded") {
        return Err(format!("the trace has lost its end:\n{}", trace()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_right_end_is_what_the_scripts_say() {
        let of = |script: &[&str], strategy: &str| {
            right_end(&json!({
                "variables": [{"key": "GIT_STRATEGY", "value": strategy}],
                "steps": [{"name": "script", "script": script}],
            }))
        };
        assert_eq!(of(&["echo ok"], "none"), (JobState::Success, None));
        assert_eq!(of(&["echo ok", "exit 3"], "none"), (JobState::Failed, Some(3)));
        assert_eq!(of(&["exit 0"], "none"), (JobState::Success, None));
        assert_eq!(of(&["false"], "none"), (JobState::Failed, Some(1)));
        assert_eq!(of(&["echo ok"], "fetch"), (JobState::Failed, None));
    }

    #[test]
    fn a_config_is_the_scenarios_own_but_for_places() {
        let config = "concurrent = 1\n[[runners]]\nname = \"r\"\nurl = \"http://a\"\ntoken = \"b\"\nexecutor = \"shell\"\noutput_limit = 16\n";
        let recording = Recording { config: Some(config.into()), ..Recording::default() };
        let (toml, name) = adapted(&recording, "http://relay", "glrt-guest", Path::new("/tmp/x")).unwrap();
        assert_eq!(name, "r");
        for line in
            ["url = \"http://relay\"", "token = \"glrt-guest\"", "output_limit = 16", "builds_dir = \"/tmp/x/builds\""]
        {
            assert!(toml.contains(line), "no {line} in {toml}");
        }
    }
}
