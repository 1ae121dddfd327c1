//! One shell, from the operator's connection to the guest's, and back.

use super::{Recording, Screen};
use crate::rng::Rng;
use crate::telemetry::chain;
use crate::vm::sockets::Sockets;
use crate::vm::{Stream, VmId};
use dayfly_guest_config::{Pass, ShellFrame, ShellFrames, TerminalSize};
use dayfly_wire::{HostSession, Limits, host_handshake};
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::time::{Instant, sleep_until, timeout};

/// From the wish to the guest's stream: it looks for its host twice a second, and may be busy.
const OPEN_DEADLINE: Duration = Duration::from_secs(20);

/// A shell in which nothing is typed and nothing printed for so long is ended.
const IDLE: Duration = Duration::from_secs(30 * 60);

/// Bytes that are read at once, either way.
const BUFFER_BYTES: usize = 16 * 1024;

/// How long the operator's terminal may take for what is said last.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// The machine that a shell is in, as its host finds it.
pub struct Inside {
    /// Its sockets.
    pub sockets: Sockets,
    /// Where they are.
    pub directory: PathBuf,
    /// The VM.
    pub vm: VmId,
    /// What guest and host believe each other by.
    pub pass: Pass,
    /// For the session's nonce.
    pub rng: Rng,
}

/// One shell that is about to begin.
pub struct Shell {
    /// Where.
    pub inside: Inside,
    /// What is shown in it.
    pub recording: Recording,
    /// The operator's terminal.
    pub size: TerminalSize,
    /// Its `TERM`.
    pub term: String,
}

/// What one way of a shell tells the other: held for a line.
struct Told<T>(Mutex<T>);

impl<T: Copy> Told<T> {
    fn new(value: T) -> Self {
        Self(Mutex::new(value))
    }

    fn get(&self) -> T {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn replace(&self, value: T) -> T {
        std::mem::replace(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner), value)
    }

    fn set(&self, value: T) {
        self.replace(value);
    }
}

/// Why a shell has ended.
enum End {
    /// The shell itself: `exit`.
    Shell,
    /// The operator has gone.
    Operator,
    /// For this reason.
    Because(String),
}

impl End {
    fn words(&self) -> &str {
        match self {
            Self::Shell => "its shell has ended",
            Self::Operator => "its operator has gone",
            Self::Because(why) => why,
        }
    }
}

type Session = HostSession<Box<dyn Stream>>;

impl Inside {
    /// A session, and its one stream. The words are for the operator.
    async fn open(&self) -> Result<(Session, impl AsyncRead + AsyncWrite + Unpin + use<>), String> {
        let opening = async {
            let pipe = self.sockets.shell(&self.directory, &self.vm).await.map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => "this machine was made by an older dayfly, without a port for shells".into(),
                _ => format!("the machine's port for shells cannot be reached: {}", chain(&error)),
            })?;
            let proven = host_handshake(pipe, &self.pass, self.rng.bytes()).await.map_err(|error| error.to_string())?;
            let mut session = proven.serve(&Limits::default()).await.map_err(|error| error.to_string())?;
            match session.accept().await {
                Some(Ok(stream)) => Ok((session, stream)),
                Some(Err(error)) => Err(error.to_string()),
                None => Err("its guest program gives no shell".to_owned()),
            }
        };
        timeout(OPEN_DEADLINE, opening).await.unwrap_or_else(|_| {
            Err(format!(
                "its guest program does not answer within {} s; perhaps somebody else has a shell there",
                OPEN_DEADLINE.as_secs()
            ))
        })
    }
}

impl Shell {
    /// Serves the operator at this connection until one side ends it, nothing happens for long, or it cannot be recorded.
    /// Returns why, for the log.
    pub async fn run(self, operator: impl AsyncRead + AsyncWrite + Unpin) -> String {
        let Self { inside, mut recording, size, term } = self;
        let (mut typed, mut shown) = tokio::io::split(operator);
        let mut screen = Screen::default();
        let end = match inside.open().await {
            Err(why) => End::Because(why),
            Ok((mut session, stream)) => {
                let last = Told::new(Instant::now());
                let talking = talk(stream, (&mut typed, &mut shown), &mut screen, &mut recording, (size, &term), &last);
                tokio::select! {
                    biased;
                    end = talking => end,
                    // All bytes of the stream move in here; what else the guest opens is nobody's.
                    () = moves(&mut session) => End::Because("the machine is gone, or lets go of its port".into()),
                    () = idle(&last) => End::Because(format!("nothing has happened in it for {} min", IDLE.as_secs() / 60)),
                }
            }
        };
        let mut last_words = screen.end();
        if let End::Because(why) = &end {
            last_words.push_str(&format!("\r\n[dayfly: {why}]\r\n"));
        }
        let farewell = async {
            shown.write_all(last_words.as_bytes()).await?;
            shown.shutdown().await
        };
        // The operator may have gone.
        let _ = timeout(LAST_WORDS, farewell).await;
        if let Err(error) = recording.end().await {
            tracing::warn!(error = chain(&error), "make the recording of a shell durable");
        }
        end.words().to_owned()
    }
}

/// Moves a session's bytes until it is over.
async fn moves(session: &mut Session) {
    while let Some(Ok(stream)) = session.accept().await {
        drop(stream);
    }
}

/// Ends when nothing has happened for long.
async fn idle(last: &Told<Instant>) {
    loop {
        let until = last.get() + IDLE;
        sleep_until(until).await;
        if last.get() + IDLE <= until {
            return;
        }
    }
}

async fn talk(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    (typed, shown): (&mut (impl AsyncRead + Unpin), &mut (impl AsyncWrite + Unpin)),
    screen: &mut Screen,
    recording: &mut Recording,
    (size, term): (TerminalSize, &str),
    last: &Told<Instant>,
) -> End {
    let (mut from_guest, mut to_guest) = tokio::io::split(stream);
    let gone = |_: io::Error| End::Because("the guest has cut its shell off".into());
    if let Err(error) = to_guest.write_all(&ShellFrame::Begin { size, term: term.to_owned() }.to_bytes()).await {
        return gone(error);
    }
    // Each way by itself: a program that does not read what is typed may print all the same.
    let resized = Told::new(None);
    let up = async {
        let (mut frames, mut input) = (ShellFrames::default(), vec![0; BUFFER_BYTES]);
        loop {
            let count = match typed.read(&mut input).await {
                Ok(0) | Err(_) => return End::Operator,
                Ok(count) => count,
            };
            last.set(Instant::now());
            frames.push(&input[..count]);
            loop {
                match frames.next_frame() {
                    Ok(None) => break,
                    // One beginning is enough.
                    Ok(Some(ShellFrame::Begin { .. })) => {}
                    Ok(Some(frame)) => {
                        if let ShellFrame::Size(size) = &frame {
                            resized.set(Some(*size));
                        }
                        if let Err(error) = to_guest.write_all(&frame.to_bytes()).await {
                            return gone(error);
                        }
                    }
                    Err(error) => return End::Because(error.to_string()),
                }
            }
        }
    };
    let down = async {
        let mut out = vec![0; BUFFER_BYTES];
        loop {
            let count = match from_guest.read(&mut out).await {
                Ok(0) => return End::Shell,
                Ok(count) => count,
                Err(error) => return gone(error),
            };
            last.set(Instant::now());
            if let Some(size) = resized.replace(None)
                && let Err(error) = recording.resized(size).await
            {
                return unrecorded(&error);
            }
            let text = screen.show(&out[..count]);
            if text.is_empty() {
                continue;
            }
            if let Err(error) = recording.shown(&text).await {
                return unrecorded(&error);
            }
            if shown.write_all(text.as_bytes()).await.is_err() {
                return End::Operator;
            }
        }
    };
    tokio::select! {
        biased;
        // The operator first, who may want to end a flood. What is dropped here is over.
        end = up => end,
        end = down => end,
    }
}

fn unrecorded(error: &io::Error) -> End {
    End::Because(match error.kind() {
        io::ErrorKind::FileTooLarge => "its recording is as long as one may be".into(),
        _ => format!("it cannot be recorded: {}", chain(error)),
    })
}
