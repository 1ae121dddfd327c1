//! The job whose lines are timed, and where its stamps come in.
//!
//! Each line carries the guest's own stamp, taken right before it is written, and the same stamp goes to this
//! process by a connection of the job's. So each line tells when it was written on the guest's clock, and all of
//! them together how that clock stands to ours (see [`super::times`]). The guest's clock is bash's
//! `EPOCHREALTIME`: microseconds, without a process, and nobody sets it once the machine has its config.

use dayfly::rng::Rng;
use dayfly_exec::standin::{JobSpec, Standin, Variable};
use jiff::Timestamp;
use std::fmt::Write as _;
use std::io;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::TcpListener;

/// Lines after the first.
pub(super) const LATER_LINES: usize = 24;

/// Pauses before later lines. Several lines fall between two ticks of 3 s, early and late ones: with fewer a few
/// that just miss a tick on one side would decide the median.
const PAUSE_MIN_MS: u64 = 100;
const PAUSE_MAX_MS: u64 = 1_000;

/// This host's loopback, as a guest reaches it: SLIRP maps it.
pub(super) const HOST: &str = "10.0.2.2";

/// The name of the last stamp, which no line of the log has: right before the script's end.
pub(super) const END: &str = "end";

/// The pauses before the later lines.
pub(super) struct Pauses(Vec<Duration>);

impl Pauses {
    pub(super) fn random(rng: &Rng) -> Self {
        Self(
            (0..LATER_LINES)
                .map(|_| Duration::from_millis(PAUSE_MIN_MS + rng.below(PAUSE_MAX_MS - PAUSE_MIN_MS)))
                .collect(),
        )
    }
}

/// One stamp as it came.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Stamp {
    /// The line's number, or [`END`].
    pub(super) name: String,
    /// The guest's words for when: what stands in the log, too.
    pub(super) text: String,
    /// When the stamp was here.
    pub(super) came: Timestamp,
}

/// What line `name` with this stamp looks like in the log.
pub(super) fn line(name: &str, text: &str) -> String {
    format!("line {name} of this job, written at {text}")
}

/// Where the stamps of jobs come in, one job after the other.
pub(super) struct Stamps {
    listener: TcpListener,
    port: u16,
}

impl Stamps {
    pub(super) async fn listen() -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let port = listener.local_addr()?.port();
        Ok(Self { listener, port })
    }

    /// The job that writes lines and ends well.
    pub(super) fn job(&self, pauses: &Pauses) -> JobSpec {
        let mut script = self.prologue();
        let mut add = |line: String| writeln!(script, "{line}").expect("a String takes all");
        add("say 0".into());
        for (at, pause) in pauses.0.iter().enumerate() {
            add(format!("sleep {:.3}\nsay {}", pause.as_secs_f64(), at + 1));
        }
        add(format!("at=$EPOCHREALTIME; echo {END} $at >&9"));
        spec(script)
    }

    /// The job that says one line and then nothing, for longer than anybody waits.
    pub(super) fn silent_job(&self) -> JobSpec {
        spec(format!("{}say 0\nsleep 3000\n", self.prologue()))
    }

    /// The stamp goes after the line, so that it holds nothing up.
    pub(super) fn prologue(&self) -> String {
        let line = line("$1", "$at");
        format!(
            "exec 9<>/dev/tcp/{HOST}/{}\nsay() {{ local at=$EPOCHREALTIME; echo \"{line}\"; echo $1 $at >&9; }}\n",
            self.port
        )
    }

    /// All stamps of the next job, up to the one of this name.
    pub(super) async fn until(&self, last: &str, standin: &Standin) -> io::Result<Vec<Stamp>> {
        let (stream, _) = self.listener.accept().await?;
        let mut lines = BufReader::new(stream).lines();
        let mut stamps = Vec::new();
        while let Some(line) = lines.next_line().await? {
            let came = standin.now();
            let Some((name, text)) = line.split_once(' ') else { continue };
            stamps.push(Stamp { name: name.into(), text: text.into(), came });
            if name == last {
                return Ok(stamps);
            }
        }
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

fn spec(script: String) -> JobSpec {
    JobSpec::script([script]).with_variable(Variable::new("GIT_STRATEGY", "none"))
}
