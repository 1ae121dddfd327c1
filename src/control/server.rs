//! The daemon's end of the control socket.

use super::group;
use super::{
    ANSWER_BYTES_MAX, Answer, EXCHANGE_DEADLINE, KillOutcome, REASON_CHARACTERS_MAX, REQUEST_BYTES_MAX, Request,
};
use crate::BoxFuture;
use crate::cache::{Caches, CachesFound};
use crate::gitlab::JobId;
use crate::history::Suggestion;
use crate::metrics::Form;
use crate::shell::{Shell, ShellOutcome};
use crate::status::{JobList, Reports};
use crate::telemetry::{chain, printable};
use dayfly_guest_config::TerminalSize;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Shells that are open at once, at most.
const SHELLS_MAX: usize = 8;

/// Pause after an accept that failed: out of descriptors, it would fail again at once (threats.md E7).
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// What `daemon` does for the operator. Calls come one at a time and must not block.
pub trait ControlHandler: Reports {
    /// Begins a drain; one that has begun goes on. The jobs whose machines are kept, which it ends.
    fn drain(&self) -> Vec<JobId>;
    /// A shell in a job's machine, for this user: what becomes of it, and it itself if it is opened.
    fn shell<'a>(&'a self, wish: ShellWish<'a>) -> BoxFuture<'a, Opened>;
    /// Tells the job to end; `runner` is the name of a runner entry, `reason` a line that its author reads.
    fn kill(&self, job: JobId, runner: Option<&str>, reason: Option<String>) -> KillOutcome;
    /// The caches that are kept; `None`: none are to be.
    fn caches(&self) -> Option<Caches>;
    /// What jobs of this class have reached in the last so many days, as a list that would let them.
    fn suggest<'a>(&'a self, class: &'a str, days: u32) -> BoxFuture<'a, Suggestion>;
    /// Why nobody is served the status elsewhere, for the status; `None`: all is well with that.
    fn status_is_not_served(&self, why: Option<String>);
}

/// Who wants a shell, and where.
#[derive(Clone, Copy, Debug)]
pub struct ShellWish<'a> {
    /// The job.
    pub job: JobId,
    /// Name of its runner entry, if it is said.
    pub runner: Option<&'a str>,
    /// The user id of who asks, by the kernel.
    pub user: u32,
    /// Their terminal.
    pub size: TerminalSize,
    /// Its `TERM`.
    pub term: &'a str,
}

/// What becomes of that.
pub enum Opened {
    /// This is answered, and nothing follows.
    No(ShellOutcome),
    /// And this goes on.
    Yes(ShellOutcome, Box<Shell>),
}

/// Why there is no control socket; for the operator.
#[derive(Debug, thiserror::Error)]
#[error("open control socket `{}`", path.display())]
pub struct ServeError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// The control socket, bound; who connects waits until it is served.
#[derive(Debug)]
pub struct ControlSocket {
    listener: UnixListener,
    path: PathBuf,
}

/// Binds the control socket, for this group too. One that an earlier process left is replaced: the lock on the state
/// directory says that no other daemon lives. Done before anything is asked of GitLab, so that a
/// daemon that nobody could talk to takes no job.
///
/// # Errors
/// [`ServeError`].
///
/// # Panics
/// Outside a runtime of Tokio's.
pub fn bind(socket: &Path, group: Option<&str>) -> Result<ControlSocket, ServeError> {
    let listener = match group {
        None => group::admit(directory(socket), None).and_then(|()| crate::socket::bind(socket, 0o600, None)),
        Some(name) => with_group(socket, name).or_else(|error| {
            // Jobs of before wait for us: that a group may not command us is no reason to keep them waiting.
            tracing::error!(
                error = chain(&error),
                group = name,
                "let the group of operators in (`control.group`); is this daemon's user a member? Only root and that user are served"
            );
            crate::socket::bind(socket, 0o600, None)
        }),
    };
    let listener = listener.map_err(|source| ServeError { path: socket.to_owned(), source })?;
    Ok(ControlSocket { listener, path: socket.to_owned() })
}

fn directory(socket: &Path) -> &Path {
    socket.parent().unwrap_or(Path::new("/"))
}

fn with_group(socket: &Path, name: &str) -> io::Result<UnixListener> {
    let group = group::group_id(name)?;
    group::admit(directory(socket), Some(group))?;
    crate::socket::bind(socket, 0o660, Some(group))
}

/// Serves the socket until `stop`, then removes it.
///
/// # Cancel safety
/// Dropping it closes the socket and leaves its file, which the next start replaces.
pub async fn serve(socket: ControlSocket, handler: Arc<dyn ControlHandler>, stop: CancellationToken) {
    serve_within(EXCHANGE_DEADLINE, socket, handler, stop).await;
}

/// [`serve`] with a deadline that tests choose.
pub(super) async fn serve_within(
    deadline: Duration,
    socket: ControlSocket,
    handler: Arc<dyn ControlHandler>,
    stop: CancellationToken,
) {
    let ControlSocket { listener, path } = socket;
    let mut shells = JoinSet::new();
    loop {
        // Stop first: a flood of connections must not delay it. All branches are cancel safe.
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            Some(_) = shells.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(error = %chain(&error), "control socket does not accept");
                // Both branches are cancel safe; stop first, as above.
                tokio::select! {
                    biased;
                    () = stop.cancelled() => break,
                    () = tokio::time::sleep(ACCEPT_PAUSE) => continue,
                }
            }
        };
        // Not interrupted by `stop`: it is the answer to `drain` that may come with it.
        let room = shells.len() < SHELLS_MAX;
        match tokio::time::timeout(deadline, exchange(stream, handler.as_ref(), room)).await {
            Ok(Ok(None)) => {}
            Ok(Ok(Some((shell, stream)))) => {
                shells.spawn(attend(shell, stream));
            }
            Ok(Err(error)) => tracing::debug!(error = %chain(&error), "control connection broke"),
            Err(_) => tracing::debug!("control connection took too long"),
        }
    }
    // A shell goes with the daemon that serves it; the machine's own end of it notices.
    shells.shutdown().await;
    if let Err(error) = std::fs::remove_file(&path) {
        tracing::debug!(error = %chain(&error), "control socket is gone already");
    }
}

/// A shell, until it has ended.
async fn attend(shell: Whole, stream: UnixStream) {
    let Whole { shell, job, user } = shell;
    let since = Instant::now();
    let recording = shell.recording.path().display().to_string();
    let why = shell.run(stream).await;
    tracing::warn!(%job, user, recording, seconds = since.elapsed().as_secs(), why, "a shell in a job's machine has ended");
}

/// A shell, and whose it is.
struct Whole {
    shell: Shell,
    job: JobId,
    user: u32,
}

/// `room`: one more shell may be opened. With it comes the shell that goes on behind the answer.
async fn exchange(
    stream: UnixStream,
    handler: &dyn ControlHandler,
    room: bool,
) -> io::Result<Option<(Whole, UnixStream)>> {
    let user = stream.peer_cred()?.uid();
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    (&mut stream).take(REQUEST_BYTES_MAX).read_line(&mut line).await?;
    let mut opened = None;
    let answer = match serde_json::from_str(&line) {
        Ok(Request::Shell { .. }) if !room => {
            let why = format!("{SHELLS_MAX} shells are open already");
            Answer::Shell { outcome: ShellOutcome::Refused { why } }
        }
        Ok(Request::Shell { job, runner, rows, columns, term }) => {
            let size = TerminalSize { rows, columns };
            let wish = ShellWish { job, runner: runner.as_deref(), user, size, term: &term };
            match handler.shell(wish).await {
                Opened::No(outcome) => {
                    tracing::warn!(%job, user, why = outcome.words(), "no shell in a job's machine for this user");
                    Answer::Shell { outcome }
                }
                Opened::Yes(outcome, shell) => {
                    let recording = shell.recording.path().display().to_string();
                    tracing::warn!(%job, user, recording, "an operator opens a shell in a job's machine");
                    opened = Some(Whole { shell: *shell, job, user });
                    Answer::Shell { outcome }
                }
            }
        }
        Ok(request) => obey(request, handler).await,
        Err(error) => Answer::Error { message: format!("not a request: {error}") },
    };
    let mut answer = serde_json::to_vec(&answer)?;
    if answer.len() as u64 >= ANSWER_BYTES_MAX {
        answer = serde_json::to_vec(&Answer::Error { message: "the answer is too long".into() })?;
    }
    answer.push(b'\n');
    stream.write_all(&answer).await?;
    match opened {
        // Who asked says nothing before it has the answer.
        Some(shell) => Ok(Some((shell, stream.into_inner()))),
        None => stream.shutdown().await.map(|()| None),
    }
}

async fn obey(request: Request, handler: &dyn ControlHandler) -> Answer {
    match request {
        Request::Status => Answer::Status { status: Box::new(handler.status()) },
        Request::Metrics => Answer::Metrics { text: handler.metrics(Form::Classic) },
        Request::Jobs { ended_max } => {
            let ended = ended_max.map(|max| handler.ended(usize::try_from(max).unwrap_or(usize::MAX)));
            Answer::Jobs { jobs: Box::new(JobList { running: handler.status().jobs, ended }) }
        }
        Request::Job { job, runner } => Answer::Job { found: handler.job(job, runner.as_deref()).await },
        Request::Console { job, runner, from } => {
            Answer::Console { found: handler.console(job, runner.as_deref(), from).await }
        }
        Request::Caches => Answer::Caches { list: handler.caches().map(|caches| Box::new(caches.list())) },
        Request::CacheShow { whose } => {
            let found = handler.caches().map_or(CachesFound::Disabled, |caches| caches.show(&whose));
            Answer::Cache { found }
        }
        Request::CacheClear { whose, key } => {
            tracing::info!(whose, key, "the operator throws caches away");
            let found = match handler.caches() {
                Some(caches) => caches.clear(whose.as_deref(), key.as_deref()).await,
                None => CachesFound::Disabled,
            };
            Answer::Cache { found }
        }
        Request::ConsoleLog { job, runner } => {
            Answer::Console { found: handler.console_log(job, runner.as_deref()).await }
        }
        Request::Shell { .. } => Answer::Error { message: "a shell is asked for on a connection of its own".into() },
        Request::Suggest { class, days } => Answer::Suggest { suggestion: handler.suggest(&class, days).await },
        Request::Drain => {
            tracing::info!("the operator asks for a drain");
            Answer::Draining { kept: handler.drain() }
        }
        Request::Kill { job, runner, reason } => {
            // One line of the job's log, whatever it is.
            let reason =
                reason.map(|text| printable(text.trim()).chars().take(REASON_CHARACTERS_MAX).collect::<String>());
            let reason = reason.filter(|text| !text.is_empty());
            tracing::info!(%job, runner, reason, "the operator kills a job");
            Answer::Kill { outcome: handler.kill(job, runner.as_deref(), reason) }
        }
    }
}
