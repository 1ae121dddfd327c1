//! One job from its first log line to its verdict: the stages, in the official runner's order and words.

use crate::cache;
use crate::config::Runner;
use crate::containers::Containers;
use crate::control::{Control, Scope, Stop};
use crate::lines::Source;
use crate::payload::{Job, Step, Variable};
use crate::process::{Ended, Limits, run_bash};
use crate::reporter::Verdict;
use crate::script::{self, Script, Transfer};
use crate::single::Parts;
use crate::sources;
use crate::trace::{Filter, Stream, Trace};
use crate::variables::{Variables, plain};
use crate::{REVISION, VERSION, duration};
use jiff::Timestamp;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A job whose payload names no timeout.
const DEFAULT_TIMEOUT_S: u64 = 7200;
/// `after_script` where `RUNNER_AFTER_SCRIPT_TIMEOUT` does not say.
const AFTER_SCRIPT_MAX: Duration = Duration::from_secs(5 * 60);

/// Why a job failed.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Failure {
    /// A script's exit code.
    Exit(i32),
    /// From outside. All stages that are left are skipped, but after a cancel of the script.
    Stopped(Stop),
    /// `RUNNER_SCRIPT_TIMEOUT` is over.
    ScriptTimeout,
    /// The job asks for what this runner cannot do.
    Configuration(&'static str),
    /// This machine's fault.
    System(String),
}

/// A job whose variables and directories are known; nothing has happened yet.
pub(crate) struct Prepared {
    runner: Runner,
    system_id: String,
    job: Job,
    variables: Variables,
    builds_dir: PathBuf,
    project_dir: PathBuf,
    timeout: Duration,
    timestamps: bool,
}

impl Prepared {
    /// Works out variables and directories. Touches nothing.
    pub(crate) fn new(parts: &Parts, job: Job) -> Self {
        let runner = parts.runner.clone();
        let last = |key: &str| job.variables.iter().rev().find(|variable| variable.key == key);
        let project = last("CI_PROJECT_PATH").map_or("project", |variable| variable.value.as_str());
        let builds_dir = match (runner.executor.as_str(), runner.builds_dir.as_str()) {
            ("docker", "") => PathBuf::from("/builds"),
            (_, builds_dir) => absolute(builds_dir),
        };
        let project_dir = builds_dir.join(runner.short_token()).join("0").join(project.trim_start_matches('/'));
        let mut files_dir = project_dir.clone().into_os_string();
        files_dir.push(".tmp");
        let timeout = Duration::from_secs(match job.runner_info.timeout {
            0 => DEFAULT_TIMEOUT_S,
            seconds => seconds,
        });
        let timestamps =
            runner.feature("FF_TIMESTAMPS", last("FF_TIMESTAMPS").map(|variable| variable.value.as_str()), true);

        let mut list = vec![plain("FF_TIMESTAMPS", timestamps.to_string())];
        list.extend(
            runner
                .environment
                .iter()
                .filter_map(|line| line.split_once('='))
                .map(|(key, value)| Variable { raw: false, ..plain(key, value) }),
        );
        list.extend([
            plain("CI_RUNNER_SHORT_TOKEN", runner.short_token()),
            plain("CI_BUILDS_DIR", builds_dir.to_string_lossy()),
            plain("CI_PROJECT_DIR", project_dir.to_string_lossy()),
            plain("CI_CONCURRENT_ID", "0"),
            plain("CI_CONCURRENT_PROJECT_ID", "0"),
            plain("CI_SERVER", "yes"),
            plain("CI_JOB_STATUS", "running"),
            plain("CI_JOB_TIMEOUT", timeout.as_secs().to_string()),
        ]);
        // A file that is missing is ignored, as by the official runner.
        if let Ok(chain) = std::fs::read_to_string(&runner.tls_ca_file) {
            list.push(Variable { file: true, ..plain("CI_SERVER_TLS_CA_FILE", chain) });
        }
        list.extend(job.variables.iter().filter(|variable| variable.key != "FF_TIMESTAMPS").cloned());
        let files_dir = PathBuf::from(files_dir);
        list.extend([
            plain("CI_SHARED_ENVIRONMENT", "true"),
            plain("CI_RUNNER_VERSION", VERSION),
            plain("CI_RUNNER_REVISION", REVISION),
            plain("CI_RUNNER_EXECUTABLE_ARCH", format!("{}/{}", crate::info::platform(), crate::info::architecture())),
            plain("RUNNER_TEMP_PROJECT_DIR", files_dir.to_string_lossy()),
        ]);
        let variables = Variables::new(list, files_dir);
        Self {
            runner,
            system_id: parts.system_id.clone(),
            job,
            variables,
            builds_dir,
            project_dir,
            timeout,
            timestamps,
        }
    }

    /// Whether the log may hold secrets: GitLab then restricts who reads it.
    pub(crate) fn debug_trace(&self) -> bool {
        self.variables.is_true("CI_DEBUG_TRACE") || self.variables.is_true("CI_DEBUG_SERVICES")
    }

    /// Runs all stages and writes the last line of the log.
    pub(crate) fn run(self, trace: &Arc<Trace>, control: &Arc<Control>) -> Verdict {
        let deadline = Instant::now() + self.timeout;
        let filter = Filter {
            masked: self.variables.masked(),
            token_prefixes: self.job.features.token_mask_prefixes.clone(),
            timestamps: self.timestamps,
        };
        let last_words = filter.clone();
        let (timeout, job) = (self.timeout, self.job.clone());
        let log = Stream::new(trace, Source::Runner, &filter);
        let sections = self.job.features.trace_sections;
        let containers = Containers::of(&self.job, &self.runner, &self.variables);
        let (containers, lacking) = match containers {
            Ok(containers) => (containers, None),
            Err(lacking) => (None, Some(lacking)),
        };
        let mut run = Run { prepared: self, trace, control, filter, log, sections, deadline, containers, lacking };
        let result = run.all();
        drop(run);
        // A stream of its own: the line is a new one, also behind the end of a section.
        conclude(&mut Stream::new(trace, Source::Runner, &last_words), &job, timeout, result)
    }
}

fn conclude(log: &mut Stream, job: &Job, timeout: Duration, result: Result<(), Failure>) -> Verdict {
    let Err(failure) = result else {
        log.push(b"\x1b[32;1mJob succeeded\x1b[0;m\n");
        return Verdict { failure_reason: None, exit_code: 0 };
    };
    let (reason, exit_code, text) = match failure {
        Failure::Exit(code) => ("script_failure", code, format!("Job failed: exit status {code}")),
        Failure::Stopped(Stop::Aborted | Stop::Canceled) => ("job_canceled", 0, "Job failed: canceled".to_owned()),
        Failure::Stopped(Stop::TimedOut) => (
            "job_execution_timeout",
            0,
            format!("Job failed: execution took longer than {} seconds", duration::print(timeout)),
        ),
        Failure::Stopped(Stop::Interrupted(signal)) => {
            ("runner_interrupted", 0, format!("Job failed: aborted: {signal}"))
        }
        Failure::ScriptTimeout => {
            ("job_execution_timeout", 0, "Job failed: script timeout: context deadline exceeded".to_owned())
        }
        Failure::Configuration(text) => ("runner_configuration_error", 0, format!("Job failed: {text}")),
        Failure::System(text) => ("runner_system_failure", 0, format!("Job failed (system failure): {text}")),
    };
    log.push(format!("\x1b[31;1mERROR: {text}\x1b[0;m\n").as_bytes());
    Verdict { failure_reason: Some(job.failure_reason(reason)), exit_code }
}

/// A job under way.
struct Run<'a> {
    prepared: Prepared,
    trace: &'a Arc<Trace>,
    control: &'a Arc<Control>,
    filter: Filter,
    log: Stream,
    sections: bool,
    deadline: Instant,
    /// What runs the author's scripts; none: this machine.
    containers: Option<Containers>,
    /// Why there is nothing that could.
    lacking: Option<&'static str>,
}

/// One stage: its name, for the section, and its title.
struct Stage<'a> {
    name: &'a str,
    title: &'a str,
    scope: Scope,
    deadline: Instant,
    /// Whether it runs where the author wants it.
    is_authors: bool,
}

impl Run<'_> {
    fn all(&mut self) -> Result<(), Failure> {
        self.head()?;
        if !self.prepared.job.run.is_empty() {
            return Err(Failure::Configuration("dayfly's stand-in runner knows no `run` steps"));
        }
        self.make_directories().map_err(|error| Failure::System(format!("prepare the project: {error}")))?;
        let mut hello = Script::new(&self.prepared.variables);
        hello.line("builtin echo \"Running on $(hostname)...\"");
        self.stage(&self.early("prepare_script", "Preparing environment"), hello)?;

        let mut result = self.get_everything();
        if let Err(Failure::Stopped(_)) = result {
            // Before the script, a cancel ends the whole job.
            return result;
        }
        if result.is_ok() {
            result = self.author_scripts();
            if is_over(&result) {
                return result;
            }
            let after = self.after_script(&result);
            if is_over(&after) {
                return after;
            }
            result = result.and(after);
        }
        let saved = self.save_cache(result.is_ok());
        if is_over(&saved) {
            return saved;
        }
        let uploaded = self.upload(result.is_ok());
        if is_over(&uploaded) {
            return uploaded;
        }
        self.clean_up();
        result.and(uploaded)
    }

    fn head(&mut self) -> Result<(), Failure> {
        let name = self.prepared.runner.name.clone();
        let lines = [
            format!("Running with gitlab-runner {VERSION} ({REVISION})"),
            format!("  on {name} {}, system ID: {}", self.prepared.runner.short_token(), self.prepared.system_id),
        ];
        for line in lines {
            self.say(&line);
        }
        if !self.prepared.timestamps {
            self.say("  feature flags: FF_TIMESTAMPS:false");
        }
        if let Some(lacking) = self.lacking {
            return Err(Failure::Configuration(lacking));
        }
        if let Some(containers) = &self.containers {
            let script = containers.prepare(&self.prepared.variables);
            return self.stage(&self.early("prepare_executor", "Preparing the \"docker\" executor"), script);
        }
        self.section("prepare_executor", "Preparing the \"shell\" executor", |run| {
            run.say("Using Shell (bash) executor of dayfly's stand-in runner...");
        });
        Ok(())
    }

    fn make_directories(&self) -> std::io::Result<()> {
        let Prepared { job, runner, variables, builds_dir, project_dir, .. } = &self.prepared;
        std::fs::create_dir_all(builds_dir)?;
        if let Some(parent) = project_dir.parent() {
            std::fs::create_dir_all(parent)?;
        }
        variables.write_files()?;
        let ca_file =
            variables.get("CI_SERVER_TLS_CA_FILE").map(|_| variables.files_dir().join("CI_SERVER_TLS_CA_FILE"));
        let config = sources::Remote::new(job, runner, variables).git_config(&job.correlation_id, ca_file.as_deref());
        crate::variables::write_private(&sources::git_config_file(variables), config.as_bytes())?;
        crate::variables::write_private(&script::environment_file(variables), b"")
    }

    /// Sources, and what earlier jobs left.
    fn get_everything(&mut self) -> Result<(), Failure> {
        let stage = self.early("get_sources", "Getting source from Git repository");
        self.attempts("GET_SOURCES_ATTEMPTS", |run| {
            let Prepared { job, runner, variables, project_dir, .. } = &run.prepared;
            let remote = sources::Remote::new(job, runner, variables);
            let script = sources::script(job, runner, variables, project_dir, &remote);
            run.stage(&stage, script)
        })?;
        self.restore_cache()?;
        let stage = self.early("download_artifacts", "Downloading artifacts");
        self.attempts("ARTIFACT_DOWNLOAD_ATTEMPTS", |run| {
            let program = program()?;
            let Prepared { job, runner, variables, project_dir, .. } = &run.prepared;
            let transfer = Transfer { program: &program, url: &runner.url, project_dir };
            match script::download(job, variables, &transfer) {
                Some(script) => run.stage(&stage, script),
                None => Ok(()),
            }
        })
    }

    /// `script`, then `release` and whatever else GitLab made a step, up to the first that fails.
    fn author_scripts(&mut self) -> Result<(), Failure> {
        let script_time = self
            .prepared
            .variables
            .get("RUNNER_SCRIPT_TIMEOUT")
            .and_then(duration::parse)
            .filter(|time| !time.is_zero());
        let deadline = script_time.map_or(self.deadline, |time| self.deadline.min(Instant::now() + time));
        let steps: Vec<Step> =
            self.prepared.job.steps.iter().filter(|step| step.name != "after_script").cloned().collect();
        for step in steps.iter().filter(|step| !step.script.is_empty()) {
            let name = format!("step_{}", step.name.to_lowercase());
            let title = format!("Executing \"{name}\" stage of the job script");
            let stage = Stage { name: &name, title: &title, scope: Scope::Script, deadline, is_authors: true };
            let result = self.stage(&stage, self.author_script(step));
            match result {
                Err(Failure::Stopped(Stop::Canceled)) => {
                    self.warn("script canceled externally (UI, API)");
                    return result;
                }
                Err(Failure::Stopped(Stop::TimedOut)) if Instant::now() < self.deadline => {
                    return Err(Failure::ScriptTimeout);
                }
                result => result?,
            }
        }
        Ok(())
    }

    fn after_script(&mut self, result: &Result<(), Failure>) -> Result<(), Failure> {
        let status = match result {
            Ok(()) => "success",
            Err(Failure::Stopped(Stop::Canceled)) => "canceled",
            Err(Failure::ScriptTimeout) => "timedout",
            Err(_) => "failed",
        };
        self.prepared.variables.set("CI_JOB_STATUS", status);
        let step = self.prepared.job.steps.iter().find(|step| step.name == "after_script").cloned();
        let Some(step) = step.filter(|step| !step.script.is_empty()) else { return Ok(()) };
        let variables = &self.prepared.variables;
        let time = variables.get("RUNNER_AFTER_SCRIPT_TIMEOUT").and_then(duration::parse).unwrap_or(AFTER_SCRIPT_MAX);
        let deadline = self.deadline.min(Instant::now() + time);
        let mut script = Script::new(variables);
        script.notice("Running after script...").enter(&self.prepared.project_dir).author_commands(&step.script);
        let ignored =
            variables.get("AFTER_SCRIPT_IGNORE_ERRORS").is_none_or(|_| variables.is_true("AFTER_SCRIPT_IGNORE_ERRORS"));
        let stage = Stage {
            name: "after_script",
            title: "Running after_script",
            scope: Scope::Rest,
            deadline,
            is_authors: true,
        };
        match self.stage(&stage, script) {
            Err(Failure::Stopped(Stop::TimedOut)) if Instant::now() < self.deadline => Ok(()),
            Err(Failure::Exit(code)) if ignored => {
                self.warn(&format!("after_script failed, but job will continue unaffected: exit status {code}"));
                Ok(())
            }
            other => other,
        }
    }

    /// What earlier jobs left. A cache that cannot be had fails no job.
    fn restore_cache(&mut self) -> Result<(), Failure> {
        let Prepared { job, runner, variables, project_dir, .. } = &self.prepared;
        if job.cache.is_empty() {
            return Ok(());
        }
        if runner.cache.kind != "s3" {
            self.section("restore_cache", "Restoring cache", |run| {
                run.warn("this runner has no store for caches; the job runs without");
            });
            return Ok(());
        }
        let program = program()?;
        let transfer = Transfer { program: &program, url: &runner.url, project_dir };
        match cache::restore(job, variables, &runner.cache, &transfer) {
            Some(script) => self.stage(&self.early("restore_cache", "Restoring cache"), script),
            None => Ok(()),
        }
    }

    fn save_cache(&mut self, succeeded: bool) -> Result<(), Failure> {
        let (name, title) = match succeeded {
            true => ("archive_cache", "Saving cache for successful job"),
            false => ("archive_cache_on_failure", "Saving cache for failed job"),
        };
        let Prepared { job, runner, variables, project_dir, .. } = &self.prepared;
        if runner.cache.kind != "s3" {
            return Ok(());
        }
        let program = program()?;
        let transfer = Transfer { program: &program, url: &runner.url, project_dir };
        match cache::save(job, variables, &runner.cache, &transfer, succeeded) {
            Some(script) => self
                .stage(&Stage { name, title, scope: Scope::Rest, deadline: self.deadline, is_authors: false }, script),
            None => Ok(()),
        }
    }

    fn upload(&mut self, succeeded: bool) -> Result<(), Failure> {
        let (name, title) = match succeeded {
            true => ("upload_artifacts_on_success", "Uploading artifacts for successful job"),
            false => ("upload_artifacts_on_failure", "Uploading artifacts for failed job"),
        };
        let program = program()?;
        let Prepared { job, runner, variables, project_dir, .. } = &self.prepared;
        let transfer = Transfer { program: &program, url: &runner.url, project_dir };
        match script::upload(job, variables, &transfer, succeeded) {
            Some(script) => {
                let stage = Stage { name, title, scope: Scope::Rest, deadline: self.deadline, is_authors: false };
                self.stage(&stage, script)
            }
            None => Ok(()),
        }
    }

    fn clean_up(&mut self) {
        let mut script = Script::new(&self.prepared.variables);
        script.command(&["rm", "-rf", &self.prepared.variables.files_dir().to_string_lossy()]);
        let title = "Cleaning up project directory and file based variables";
        let stage = Stage {
            name: "cleanup_file_variables",
            title,
            scope: Scope::Rest,
            deadline: self.deadline,
            is_authors: false,
        };
        if let Err(failure) = self.stage(&stage, script) {
            crate::log(&format!("WARNING: clean up: {failure:?}"));
        }
    }

    fn author_script(&self, step: &Step) -> Script {
        let Prepared { runner, variables, project_dir, .. } = &self.prepared;
        let mut script = Script::new(variables);
        script.enter(project_dir);
        if variables.is_true("CI_DEBUG_TRACE") {
            script.line("set -o xtrace");
        }
        if !runner.pre_build_script.is_empty() {
            script.line(&runner.pre_build_script);
        }
        // Of a release, the runner itself expands the variables.
        let commands = match step.name.as_str() {
            "release" => step.script.iter().map(|command| variables.expand(command)).collect(),
            _ => step.script.clone(),
        };
        script.author_commands(&commands);
        if !runner.post_build_script.is_empty() {
            script.line(&runner.post_build_script);
        }
        script
    }

    /// A stage before the author's script: a cancel ends it, and the job.
    fn early<'n>(&self, name: &'n str, title: &'n str) -> Stage<'n> {
        Stage { name, title, scope: Scope::Script, deadline: self.deadline, is_authors: false }
    }

    /// Repeats a stage that failed by its exit code, as often as this variable says (1 to 10).
    fn attempts(&mut self, key: &str, stage: impl Fn(&mut Self) -> Result<(), Failure>) -> Result<(), Failure> {
        let tries: u32 = self.prepared.variables.get(key).and_then(|tries| tries.parse().ok()).unwrap_or(1);
        for _ in 1..tries.clamp(1, 10) {
            match stage(self) {
                Err(Failure::Exit(_)) => {}
                result => return result,
            }
        }
        stage(self)
    }

    fn stage(&mut self, stage: &Stage<'_>, script: Script) -> Result<(), Failure> {
        if let Some(stop) = self.control.stop(stage.scope) {
            return Err(Failure::Stopped(stop));
        }
        let text = script.into_text();
        let ended = self.section(stage.name, stage.title, |run| {
            let file = tempfile::Builder::new().prefix("script-").suffix(".sh").tempfile()?;
            let outer = tempfile::Builder::new().prefix("container-").suffix(".sh").tempfile()?;
            let file = match &run.containers {
                Some(containers) if stage.is_authors => {
                    std::fs::write(file.path(), Containers::portable(&text))?;
                    std::fs::write(outer.path(), containers.around(file.path()))?;
                    &outer
                }
                _ => {
                    std::fs::write(file.path(), text)?;
                    &file
                }
            };
            let out = Stream::new(run.trace, Source::JobOut, &run.filter);
            let err = Stream::new(run.trace, Source::JobErr, &run.filter);
            let limits = Limits { control: run.control, scope: stage.scope, deadline: stage.deadline };
            run_bash(file.path(), out, err, &limits)
        });
        match ended {
            Ok(Ended::Exited(0)) => Ok(()),
            Ok(Ended::Exited(code)) => Err(Failure::Exit(code)),
            Ok(Ended::Stopped(stop)) => {
                if stop == Stop::TimedOut {
                    self.warn(&format!(
                        "{} could not run to completion because the timeout was exceeded. For more control over job \
                         and script timeouts see: \
                         https://docs.gitlab.com/ci/runners/configure_runners/#set-script-and-after_script-timeouts",
                        stage.name
                    ));
                }
                Err(Failure::Stopped(stop))
            }
            Err(error) => Err(Failure::System(format!("start bash: {error}"))),
        }
    }

    fn section<T>(&mut self, name: &str, title: &str, body: impl FnOnce(&mut Self) -> T) -> T {
        self.mark("section_start", name);
        self.say(&format!("\x1b[36;1m{title}\x1b[0;m"));
        let result = body(self);
        self.mark("section_end", name);
        result
    }

    fn mark(&mut self, kind: &str, name: &str) {
        if self.sections {
            let line = format!("{kind}:{}:{name}\r\x1b[0K", Timestamp::now().as_second());
            self.log.push(line.as_bytes());
        }
    }

    fn say(&mut self, text: &str) {
        self.log.push(format!("\x1b[0K{text}\x1b[0;m\n").as_bytes());
    }

    fn warn(&mut self, text: &str) {
        self.log.push(format!("\x1b[0;33mWARNING: {text}\x1b[0;m\n").as_bytes());
    }
}

/// Whether nothing more of the job may run: stopped from outside, but not by a cancel of the script alone.
fn is_over(result: &Result<(), Failure>) -> bool {
    matches!(result, Err(Failure::Stopped(stop)) if *stop != Stop::Canceled)
}

/// This program, for the scripts that call it.
fn program() -> Result<String, Failure> {
    match std::env::current_exe() {
        Ok(path) => Ok(path.to_string_lossy().into_owned()),
        Err(error) => Err(Failure::System(format!("find this program: {error}"))),
    }
}

/// The configured directory, or `builds`, in the working directory if it is relative.
fn absolute(builds_dir: &str) -> PathBuf {
    let path = PathBuf::from(if builds_dir.is_empty() { "builds" } else { builds_dir });
    std::path::absolute(&path).unwrap_or(path)
}
