//! How do we run another program? The one place that starts one.
//!
//! A child gets a deadline, a cap on what it may print, an environment of exactly what the caller
//! names, and a process group of its own. On the deadline, on too much output and when the future
//! is dropped the whole group is killed; nothing that we start so outlives its caller. What must outlive it, as
//! a machine does, is started by `outliving`. No secret goes
//! into arguments: others can read them; give it by [`Program::stdin`]. Knows nothing of jobs or VMs.

mod find;
mod outliving;
mod replace;

pub(crate) use find::{find, find_program};
pub(crate) use outliving::bounded_log;
pub use outliving::start_outliving;
pub(crate) use replace::replace_by;

use rustix::process::{Pid, Signal, kill_process_group};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, ChildStdin};
use tokio::time::timeout;

/// Where programs are looked for; the service's own environment plays no part.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Kept of stderr for the error: enough for the last words of any program we start.
const STDERR_TAIL_BYTES: usize = 4096;

/// Bytes of one line given to a progress callback; the rest of a longer line is dropped.
const LINE_BYTES_MAX: usize = 4096;

/// Bytes of stdout that [`Program::run`] keeps unless told otherwise: `nft`, `qemu-img info` and
/// `--version` print less than 64 KiB.
const OUTPUT_BYTES_MAX: usize = 1024 * 1024;

/// From SIGTERM to SIGKILL after a deadline: a builder needs a moment to unmount and clean up.
const TERM_GRACE: Duration = Duration::from_secs(5);

/// Why a program did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// It could not be started: not installed, not executable.
    #[error("start `{program}` (is it installed?)")]
    Start {
        /// Program name.
        program: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// It ended with another code than 0, or by a signal.
    #[error("run `{program}`: {status}{}", tail(.stderr))]
    Failed {
        /// Program name.
        program: String,
        /// `exit status: 1`, `signal: 9 (SIGKILL)`.
        status: ExitStatus,
        /// The end of what it wrote to stderr.
        stderr: String,
    },
    /// It did not end in time, and was killed.
    #[error("run `{program}`: not done within {} s{}", .deadline.as_secs_f32(), tail(.stderr))]
    Deadline {
        /// Program name.
        program: String,
        /// The deadline.
        deadline: Duration,
        /// The end of what it wrote to stderr.
        stderr: String,
    },
    /// It printed more than it may, and was killed.
    #[error("run `{program}`: more than {bytes_max} bytes of output")]
    TooMuchOutput {
        /// Program name.
        program: String,
        /// The cap.
        bytes_max: usize,
    },
    /// A pipe to it broke in a way that its end does not explain.
    #[error("talk to `{program}`")]
    Pipe {
        /// Program name.
        program: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

impl ProcessError {
    /// Whether trying again may help without anybody's doing.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Deadline { .. })
    }
}

/// `: ` and the words, on one line; nothing for silence.
fn tail(stderr: &str) -> String {
    let words: Vec<&str> = stderr.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    if words.is_empty() { String::new() } else { format!(": {}", words.join(" / ")) }
}

/// What a program that ended with code 0 has said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// All of stdout; empty after [`Program::run_lines`].
    pub stdout: Vec<u8>,
    /// The end of stderr.
    pub stderr: String,
}

impl Output {
    /// stdout as text, white space at its ends removed.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim().to_owned()
    }
}

/// A program to be run once.
#[derive(Clone, Debug)]
pub struct Program {
    program: OsString,
    arguments: Vec<OsString>,
    environment: BTreeMap<OsString, OsString>,
    directory: Option<PathBuf>,
    stdin: Option<Vec<u8>>,
    stdout_file: Option<PathBuf>,
    deadline: Duration,
    output_bytes_max: usize,
}

impl Program {
    /// `program` (a path, or a name to be found in the usual directories), to end within `deadline`.
    #[must_use]
    pub fn new(program: impl AsRef<OsStr>, deadline: Duration) -> Self {
        Self {
            program: program.as_ref().to_owned(),
            arguments: Vec::new(),
            environment: BTreeMap::from([("PATH".into(), PATH.into()), ("LC_ALL".into(), "C.UTF-8".into())]),
            directory: None,
            stdin: None,
            stdout_file: None,
            deadline,
            output_bytes_max: OUTPUT_BYTES_MAX,
        }
    }

    /// One more argument. Never a secret.
    #[must_use]
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.arguments.push(argument.as_ref().to_owned());
        self
    }

    /// More arguments. Never a secret.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        self
    }

    /// One variable beside `PATH` and `LC_ALL`, the only ones there are.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.environment.insert(name.as_ref().to_owned(), value.as_ref().to_owned());
        self
    }

    /// Working directory; without it, ours.
    #[must_use]
    pub fn directory(mut self, directory: &Path) -> Self {
        self.directory = Some(directory.to_owned());
        self
    }

    /// Bytes for its stdin, which is closed after them; without it, stdin is `/dev/null`.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(bytes.into());
        self
    }

    /// Sends stdout to a new file instead of to us; the cap does not count there.
    #[must_use]
    pub fn stdout_file(mut self, path: &Path) -> Self {
        self.stdout_file = Some(path.to_owned());
        self
    }

    /// Cap on stdout for [`Program::run`]; 1 MiB without it.
    #[must_use]
    pub fn output_bytes_max(mut self, bytes_max: usize) -> Self {
        self.output_bytes_max = bytes_max;
        self
    }

    /// Runs it to its end and keeps what it prints.
    ///
    /// # Errors
    /// [`ProcessError`]; any exit code but 0 is one.
    ///
    /// # Cancel safety
    /// Dropping the future kills the child and its descendants in its process group.
    pub async fn run(self) -> Result<Output, ProcessError> {
        let bytes_max = self.output_bytes_max;
        self.drive(Sink::Keep { bytes: Vec::new(), bytes_max }).await
    }

    /// Runs it to its end and gives each line of stdout and stderr to `progress` as it comes,
    /// control characters removed, cut at 4 KiB.
    ///
    /// # Errors
    /// As [`Program::run`], but no amount of output is too much.
    ///
    /// # Cancel safety
    /// As [`Program::run`].
    pub async fn run_lines(self, progress: &mut (dyn FnMut(&str) + Send)) -> Result<Output, ProcessError> {
        self.drive(Sink::Lines(progress)).await
    }

    async fn drive(self, mut sink: Sink<'_>) -> Result<Output, ProcessError> {
        let name = Path::new(&self.program).file_name().unwrap_or(&self.program).to_string_lossy().into_owned();
        let start_error = |source| ProcessError::Start { program: name.clone(), source };
        let mut child = self.spawn().map_err(start_error)?;
        let mut group = Group::of(&child);
        let stdin = child.stdin.take();
        let stdout = child.stdout.take();
        let stderr = child.stderr.take();

        // What has been read so far lives out here: it is wanted when the deadline passes, too.
        let mut stderr_tail = Tail::default();
        let work = async {
            tokio::try_join!(
                biased; // No order matters: all three run to their ends.
                feed(stdin, self.stdin.unwrap_or_default()),
                listen(stdout, stderr, &mut sink, &mut stderr_tail),
                async { child.wait().await.map_err(Stop::Pipe) },
            )
        };
        let ended = timeout(self.deadline, work).await;
        let error = match ended {
            Ok(Ok(((), (), status))) => {
                group.ended();
                let stderr = stderr_tail.text();
                if status.success() {
                    return Ok(Output { stdout: sink.into_bytes(), stderr });
                }
                return Err(ProcessError::Failed { program: name, status, stderr });
            }
            Ok(Err(Stop::TooMuch(bytes_max))) => ProcessError::TooMuchOutput { program: name, bytes_max },
            Ok(Err(Stop::Pipe(source))) => ProcessError::Pipe { program: name, source },
            Err(_) => ProcessError::Deadline { program: name, deadline: self.deadline, stderr: stderr_tail.text() },
        };
        group.end(&mut child).await;
        Err(error)
    }

    #[expect(clippy::disallowed_methods, reason = "this is the place")]
    fn spawn(&self) -> io::Result<Child> {
        let mut command = tokio::process::Command::new(&self.program);
        command.args(&self.arguments).env_clear().envs(&self.environment);
        command.stdin(if self.stdin.is_some() { Stdio::piped() } else { Stdio::null() });
        command.stdout(match &self.stdout_file {
            Some(path) => Stdio::from(std::fs::File::create(path)?),
            None => Stdio::piped(),
        });
        command.stderr(Stdio::piped()).process_group(0).kill_on_drop(true);
        if let Some(directory) = &self.directory {
            command.current_dir(directory);
        }
        command.spawn()
    }
}

/// Why the work with a child stopped before its end.
enum Stop {
    TooMuch(usize),
    Pipe(io::Error),
}

async fn feed(stdin: Option<ChildStdin>, bytes: Vec<u8>) -> Result<(), Stop> {
    if let Some(mut stdin) = stdin {
        match stdin.write_all(&bytes).await {
            // A program that does not want all of its input says so by its exit code.
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(Stop::Pipe(error)),
            _ => {}
        }
    }
    Ok(())
}

async fn listen(
    mut stdout: Option<impl AsyncRead + Unpin>,
    mut stderr: Option<impl AsyncRead + Unpin>,
    sink: &mut Sink<'_>,
    stderr_tail: &mut Tail,
) -> Result<(), Stop> {
    let (mut out_buffer, mut err_buffer) = (vec![0; 16 * 1024], vec![0; 16 * 1024]);
    let (mut out_lines, mut err_lines) = (Lines::default(), Lines::default());
    while stdout.is_some() || stderr.is_some() {
        tokio::select! {
            // stdout first: its end usually comes first. Reads are cancel safe; a busy stdout can
            // delay stderr, but only until its pipe is empty.
            biased;
            count = read(&mut stdout, &mut out_buffer) => match count.map_err(Stop::Pipe)? {
                0 => stdout = None,
                count => sink.take(&out_buffer[..count], &mut out_lines)?,
            },
            count = read(&mut stderr, &mut err_buffer) => match count.map_err(Stop::Pipe)? {
                0 => stderr = None,
                count => {
                    stderr_tail.take(&err_buffer[..count]);
                    if let Sink::Lines(progress) = sink {
                        err_lines.take(&err_buffer[..count], *progress);
                    }
                }
            },
        }
    }
    if let Sink::Lines(progress) = sink {
        out_lines.end(*progress);
        err_lines.end(*progress);
    }
    Ok(())
}

/// Reads, or waits for ever if there is nothing to read from.
async fn read(stream: &mut Option<impl AsyncRead + Unpin>, buffer: &mut [u8]) -> io::Result<usize> {
    match stream {
        Some(stream) => stream.read(buffer).await,
        None => std::future::pending().await,
    }
}

/// Where stdout goes.
enum Sink<'a> {
    Keep { bytes: Vec<u8>, bytes_max: usize },
    Lines(&'a mut (dyn FnMut(&str) + Send)),
}

impl Sink<'_> {
    fn take(&mut self, new: &[u8], lines: &mut Lines) -> Result<(), Stop> {
        match self {
            Self::Keep { bytes, bytes_max } if bytes.len() + new.len() > *bytes_max => {
                return Err(Stop::TooMuch(*bytes_max));
            }
            Self::Keep { bytes, .. } => bytes.extend_from_slice(new),
            Self::Lines(progress) => lines.take(new, *progress),
        }
        Ok(())
    }

    fn into_bytes(self) -> Vec<u8> {
        match self {
            Self::Keep { bytes, .. } => bytes,
            Self::Lines(_) => Vec::new(),
        }
    }
}

/// Splits a stream into lines; carriage returns end one too, for progress bars.
#[derive(Default)]
struct Lines(Vec<u8>);

impl Lines {
    fn take(&mut self, new: &[u8], progress: &mut (dyn FnMut(&str) + Send)) {
        for byte in new {
            match byte {
                b'\n' | b'\r' => self.end(progress),
                byte if self.0.len() < LINE_BYTES_MAX => self.0.push(*byte),
                _ => {}
            }
        }
    }

    fn end(&mut self, progress: &mut (dyn FnMut(&str) + Send)) {
        let line: String = String::from_utf8_lossy(&self.0).chars().filter(|c| !c.is_control()).collect();
        self.0.clear();
        if !line.is_empty() {
            progress(&line);
        }
    }
}

/// The last bytes of a stream.
#[derive(Default)]
struct Tail(Vec<u8>);

impl Tail {
    fn take(&mut self, new: &[u8]) {
        self.0.extend_from_slice(new);
        let excess = self.0.len().saturating_sub(STDERR_TAIL_BYTES);
        self.0.drain(..excess);
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0).trim().to_owned()
    }
}

/// The process group of a child that has not been reaped. Dropped before its end, it is killed:
/// `kill_on_drop` reaches the child alone, not what that has started.
struct Group(Option<Pid>);

impl Group {
    fn of(child: &Child) -> Self {
        Self(child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?)))
    }

    /// The child has been reaped: its number may belong to somebody else from now on.
    fn ended(&mut self) {
        self.0 = None;
    }

    /// Asks, then kills, then reaps.
    async fn end(&mut self, child: &mut Child) {
        self.signal(Signal::TERM);
        if timeout(TERM_GRACE, child.wait()).await.is_err() {
            self.signal(Signal::KILL);
            // After SIGKILL only the kernel can delay the end; Tokio reaps what is not reaped here.
            let _ = timeout(TERM_GRACE, child.wait()).await;
        } else {
            // The leader is gone, what it left in its group is not wanted either.
            self.signal(Signal::KILL);
        }
        self.ended();
    }

    fn signal(&self, signal: Signal) {
        if let Some(group) = self.0 {
            // No such group: all of them ended by themselves.
            let _ = kill_process_group(group, signal);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

#[cfg(test)]
mod tests;
