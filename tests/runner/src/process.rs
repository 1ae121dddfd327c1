//! Runs one bash script in a process group of its own, its output into the log.

use crate::control::{Control, Scope, Stop};
use crate::trace::Stream;
use std::io::Read;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What a script may take after SIGTERM; the official runner's, and not configurable there.
const GRACE: Duration = Duration::from_secs(10 * 60);
/// What the kernel may take after SIGKILL.
const KILL_MAX: Duration = Duration::from_secs(10);
/// How a script ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Ended {
    /// By itself, with this exit code (128 + signal if one killed it).
    Exited(i32),
    /// Because of this.
    Stopped(Stop),
}

/// When and by whom a script may be ended.
pub(crate) struct Limits<'a> {
    /// Who wishes what.
    pub(crate) control: &'a Arc<Control>,
    /// Which wishes count.
    pub(crate) scope: Scope,
    /// When its time is over.
    pub(crate) deadline: Instant,
}

/// What is left of a script that runs.
struct Left {
    code: Option<i32>,
    /// Outputs that somebody can still write to.
    outputs: u32,
}

/// Runs `bash --login SCRIPT` to its end: until it has exited and nobody holds its outputs any more. A
/// process left in the background so keeps the stage going, as with the official runner.
///
/// A wish or the deadline sends SIGTERM to the whole group; the end is then waited for up to ten minutes,
/// as by the official runner, and forced.
///
/// # Errors
/// Bash cannot be started.
pub(crate) fn run_bash(script: &Path, out: Stream, err: Stream, limits: &Limits<'_>) -> std::io::Result<Ended> {
    let control = limits.control;
    if let Some(stop) = control.stop(limits.scope) {
        return Ok(Ended::Stopped(stop));
    }
    let mut child = Command::new("bash")
        .arg("--login")
        .arg(script)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()?;
    let group = rustix::process::Pid::from_child(&child);
    let left = Arc::new(Mutex::new(Left { code: None, outputs: 0 }));
    if let Some(pipe) = child.stdout.take() {
        copy(pipe, out, &left, control);
    }
    if let Some(pipe) = child.stderr.take() {
        copy(pipe, err, &left, control);
    }
    wait_in_thread(child, &left, control);
    let ended = || {
        let left = crate::locked(&left);
        left.code.is_some() && left.outputs == 0
    };

    let stop = control.wait(limits.scope, limits.deadline, ended);
    if stop.is_some() {
        // The group may be gone by itself in this moment.
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::TERM);
        if !control.wait_only(Instant::now() + GRACE, ended) {
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
            control.wait_only(Instant::now() + KILL_MAX, ended);
        }
    }
    let code = crate::locked(&left).code.unwrap_or(1);
    Ok(stop.map_or(Ended::Exited(code), Ended::Stopped))
}

/// Waits for the child on a thread of its own, notes its code and wakes waiters.
fn wait_in_thread(mut child: Child, left: &Arc<Mutex<Left>>, control: &Arc<Control>) {
    let (left, control) = (Arc::clone(left), Arc::clone(control));
    std::thread::spawn(move || {
        let code = match child.wait() {
            Ok(status) => status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1),
            Err(_) => 1,
        };
        crate::locked(&left).code = Some(code);
        control.wake();
    });
}

/// Copies an output into the log on a thread of its own, and wakes waiters at its end.
fn copy(mut pipe: impl Read + Send + 'static, mut stream: Stream, left: &Arc<Mutex<Left>>, control: &Arc<Control>) {
    let (left, control) = (Arc::clone(left), Arc::clone(control));
    crate::locked(&left).outputs += 1;
    std::thread::spawn(move || {
        let mut buffer = vec![0u8; 32 * 1024];
        while let Ok(count) = pipe.read(&mut buffer) {
            if count == 0 {
                break;
            }
            stream.push(&buffer[..count]);
        }
        // What was held back must be in the log before anybody takes the script for ended.
        drop(stream);
        crate::locked(&left).outputs -= 1;
        control.wake();
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lines::Source;
    use crate::trace::{Filter, Trace};

    fn log() -> Arc<Trace> {
        Arc::new(Trace::new(0))
    }

    fn text(log: &Trace) -> String {
        String::from_utf8(log.slice(0, usize::MAX).expect("in range")).expect("text")
    }

    fn run(script: &str, log: &Arc<Trace>, control: &Arc<Control>) -> Ended {
        let filter = Filter { masked: Vec::new(), token_prefixes: Vec::new(), timestamps: false };
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        std::fs::write(file.path(), script).expect("written");
        let limits = Limits { control, scope: Scope::Script, deadline: Instant::now() + Duration::from_secs(60) };
        let out = Stream::new(log, Source::JobOut, &filter);
        let err = Stream::new(log, Source::JobErr, &filter);
        run_bash(file.path(), out, err, &limits).expect("bash")
    }

    #[test]
    fn the_exit_code_and_both_outputs_arrive() {
        let log = log();
        assert_eq!(run("echo out; echo err >&2; exit 7", &log, &Arc::default()), Ended::Exited(7));
        let text = text(&log);
        assert!(text.contains("out\n") && text.contains("err\n"), "{text}");
    }

    #[test]
    fn a_canceled_script_is_terminated_with_its_children() {
        let (log, control) = (log(), Arc::new(Control::default()));
        let began = Instant::now();
        let ended = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !text(&log).contains("ready") {
                    assert!(began.elapsed() < Duration::from_secs(60), "bash never started");
                    std::thread::park_timeout(Duration::from_millis(5));
                }
                control.cancel();
            });
            run("trap 'echo got TERM; exit 0' TERM; sleep 100 & echo ready; wait", &log, &control)
        });
        assert_eq!(ended, Ended::Stopped(Stop::Canceled));
        assert!(text(&log).contains("got TERM"), "{}", text(&log));
        assert!(began.elapsed() < Duration::from_secs(60), "the sleep was in the group, so it ended too");
    }

    #[test]
    fn a_process_left_behind_is_waited_for() {
        let log = log();
        let ended = run(
            "(until [ -e \"$0.go\" ]; do sleep 0.01; done; rm \"$0.go\"; echo late) & touch \"$0.go\"; exit 5",
            &log,
            &Arc::default(),
        );
        assert_eq!((ended, text(&log).as_str()), (Ended::Exited(5), "late\n"));
    }

    #[test]
    fn nothing_starts_after_an_abort() {
        let (log, control) = (log(), Arc::new(Control::default()));
        control.abort();
        assert_eq!(run("echo never", &log, &control), Ended::Stopped(Stop::Aborted));
        assert_eq!(text(&log), "");
    }
}
