//! `dayfly shell`: a root shell in a job's machine, on this terminal. What comes from the daemon was filtered there; what is
//! typed goes as it is. Ctrl-] ends it.

use super::jobs::Which;
use super::print;
use crate::config::Config;
use crate::control::{self, Answer, Request};
use crate::gitlab::JobId;
use crate::shell::ShellOutcome;
use anyhow::{Context as _, bail};
use dayfly_guest_config::{ShellFrame, TYPED_BYTES_MAX, TerminalSize};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use std::io::{self, IsTerminal as _, Read as _, Write as _};
use std::path::Path;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

/// Ctrl-], as `virsh console` and telnet have it.
const LEAVE: u8 = 0x1d;

/// Ctrl-D: no more is typed.
const NO_MORE: u8 = 0x04;

/// Of what is no terminal.
const SIZE: TerminalSize = TerminalSize { rows: 24, columns: 80 };

/// Pieces of what is typed that may wait.
const TYPED_MAX: usize = 16;

/// A terminal that hands over each key, until this is dropped.
struct Raw(Termios);

impl Raw {
    fn new() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Flush, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // What the guest's last words have set is put back by what the daemon has said last.
        let _ = tcsetattr(io::stdin(), OptionalActions::Flush, &self.0);
    }
}

/// Opens a shell and serves it to its end.
pub(super) async fn shell(config: &Path, which: Which) -> anyhow::Result<()> {
    let Which { job, runner } = which;
    let loaded = Config::load_or_default(config)?;
    let is_terminal = io::stdin().is_terminal();
    let TerminalSize { rows, columns } = size();
    let term = std::env::var("TERM").unwrap_or_default();
    let request = Request::Shell { job: JobId(job), runner, rows, columns, term };
    let (answer, mut stream) = control::open(&control::socket(&loaded.config.runtime_directory), &request).await?;
    let recording = match answer {
        Answer::Shell { outcome: ShellOutcome::Opened { recording, .. } } => recording,
        Answer::Shell { outcome: ShellOutcome::Refused { why } } => {
            bail!("open a shell in the machine of job {job}: {why}")
        }
        Answer::Shell { outcome: ShellOutcome::Unknown } => {
            bail!("open a shell in the machine of job {job}: no such job is under way here; `dayfly jobs` lists them")
        }
        Answer::Shell { outcome: ShellOutcome::Ambiguous { runners } } => {
            bail!(
                "open a shell in the machine of job {job}: runners {} each have one; say which by --runner",
                runners.join(", ")
            )
        }
        other => return super::operate::unexpected(&other),
    };
    if is_terminal {
        print(&format!("root shell in the machine of job {job}, recorded; Ctrl-] leaves it\n"))?;
    }
    let raw = if is_terminal { Some(Raw::new().context("set up this terminal")?) } else { None };
    let talked = talk(&mut stream, is_terminal).await;
    drop(raw);
    if is_terminal {
        print(&format!("\nthe shell has ended; its recording is {recording}\n"))?;
    }
    talked.context("talk to the shell")
}

fn size() -> TerminalSize {
    match tcgetwinsize(io::stdin()) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => TerminalSize { rows: size.ws_row, columns: size.ws_col },
        _ => SIZE,
    }
}

async fn talk(stream: &mut tokio::io::BufReader<tokio::net::UnixStream>, is_terminal: bool) -> io::Result<()> {
    let mut keys = keys()?;
    let mut resized = signal(SignalKind::window_change())?;
    let mut shown = vec![0; 16 * 1024];
    let mut more = true;
    loop {
        let frame = tokio::select! {
            biased;
            // All are cancel safe.
            read = stream.read(&mut shown) => match read? {
                0 => return Ok(()),
                count => {
                    let mut out = io::stdout().lock();
                    out.write_all(&shown[..count])?;
                    out.flush()?;
                    continue;
                }
            },
            typed = keys.recv(), if more => match typed {
                Some(typed) if is_terminal && typed.contains(&LEAVE) => return Ok(()),
                Some(typed) => ShellFrame::Typed(typed),
                None => {
                    more = false;
                    ShellFrame::Typed(vec![NO_MORE])
                }
            },
            _ = resized.recv(), if is_terminal => ShellFrame::Size(size()),
        };
        stream.write_all(&frame.to_bytes()).await?;
    }
}

/// What is typed, read by a thread of its own: nothing else can wait for a terminal and be left waiting.
fn keys() -> io::Result<mpsc::Receiver<Vec<u8>>> {
    let (typed, keys) = mpsc::channel(TYPED_MAX);
    std::thread::Builder::new().name("keys".into()).spawn(move || {
        let mut buffer = [0; TYPED_BYTES_MAX];
        while let Ok(count @ 1..) = io::stdin().lock().read(&mut buffer) {
            if typed.blocking_send(buffer[..count].to_vec()).is_err() {
                return;
            }
        }
    })?;
    Ok(keys)
}
