//! A root shell for the host that asks for one, on a terminal of its own.
//!
//! ```text
//! host ──comes to the port, proves itself──► session ──one stream──► terminal ◄── /bin/bash
//!         frames: what is typed, sizes ─────────────────────────────►
//!         ◄───────────────────────── what the shell prints, byte for byte
//! ```
//!
//! Nobody in here asks for it: a session begins when a host comes to the port and proves that it holds the pass
//! ([`Pass::for_shell`]), and the only stream of a session is opened in answer to that. One shell at a time; it ends with
//! its stream, and what it has started with it, as far as that is still in its session. Of the job's it shares nothing.
#![expect(clippy::disallowed_methods, reason = "no process.rs in the guest, and a thread of its own")]

use crate::console::say;
use crate::relay::port::{Pipe, Port, pipe};
use crate::relay::{Limits, session};
use crate::runner;
use dayfly_guest_config::{Pass, ShellFrame, ShellFrames, TerminalSize};
use dayfly_wire::Opener;
use rustix::fs::OFlags;
use rustix::process::setsid;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use rustix::termios::{Winsize, tcsetwinsize};
use std::convert::Infallible;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::runtime::Builder;
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;

/// By this word this program becomes the shell: `shell-on TERMINAL TERM`.
pub const WORD: &str = "shell-on";

/// What is tried in this order.
const SHELLS: [&str; 2] = ["/bin/bash", "/bin/sh"];

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Bytes of a shell's that are on their way at once.
const BUFFER_BYTES: usize = 16 * 1024;

/// From the session to the host's first frame.
const BEGIN_DEADLINE: Duration = Duration::from_secs(30);

/// What a shell has printed last is still read for so long: something that it left behind may hold its terminal open.
const LAST_WORDS: Duration = Duration::from_millis(300);

/// Waits at the port for hosts, from now on. `program`: this one, which becomes the shell by [`WORD`].
///
/// # Errors
/// If runtime or thread cannot be made.
pub fn offer(port: Box<dyn Port>, pass: Pass, program: PathBuf) -> io::Result<()> {
    let runtime = Builder::new_current_thread().enable_io().enable_time().build()?;
    thread::Builder::new().name("shell".into()).spawn(move || {
        runtime.block_on(async {
            let (current, mut session) = watch::channel(None);
            let (limits, wire) = (Limits::default(), dayfly_wire::Limits::default());
            tokio::select! {
                biased;
                () = session::keep(port, &pass, &limits, &wire, || {}, &current) => {}
                () = serve(&mut session, &program) => {}
            }
        });
    })?;
    Ok(())
}

/// A shell for each session, one after the other. For ever.
async fn serve(session: &mut watch::Receiver<Option<Opener>>, program: &Path) {
    loop {
        let opener = match session.wait_for(Option::is_some).await {
            Ok(opener) => opener.clone(),
            Err(_) => return,
        };
        if let Some(opener) = opener {
            tokio::select! {
                biased;
                // A session that is over takes its shell with it.
                _ = session.changed() => continue,
                served = shell(&opener, program) => {
                    if let Err(error) = served {
                        say(&format!("shell: {error}"));
                    }
                }
            }
        }
        // One shell for each session.
        if session.changed().await.is_err() {
            return;
        }
    }
}

/// One shell, from the stream to its end.
async fn shell(opener: &Opener, program: &Path) -> io::Result<()> {
    let mut stream = opener.open().await.map_err(io::Error::other)?;
    stream.accepted().await?;
    let mut frames = ShellFrames::default();
    let begun = timeout(BEGIN_DEADLINE, next(&mut stream, &mut frames)).await??;
    let Some(ShellFrame::Begin { size, term }) = begun else { return Ok(()) };
    let terminal = Terminal::open(size)?;
    let mut running = Running::start(program, &terminal, &term)?;
    let (mut from_host, mut to_host) = tokio::io::split(stream);
    let (mut printed, mut typed) = tokio::io::split(terminal.pipe()?);
    let prints = async {
        let mut buffer = vec![0; BUFFER_BYTES];
        // The terminal's end is an error to whoever reads it.
        while let Ok(count @ 1..) = printed.read(&mut buffer).await {
            if to_host.write_all(&buffer[..count]).await.is_err() {
                return;
            }
        }
    };
    let types = async {
        while let Ok(Some(frame)) = next(&mut from_host, &mut frames).await {
            match frame {
                ShellFrame::Typed(bytes) => {
                    if typed.write_all(&bytes).await.is_err() {
                        return;
                    }
                }
                ShellFrame::Size(size) | ShellFrame::Begin { size, .. } => terminal.resize(size),
            }
        }
    };
    {
        let mut prints = std::pin::pin!(prints);
        tokio::select! {
            biased;
            () = &mut prints => {}
            () = types => {}
            () = running.ended() => {
                let _ = timeout(LAST_WORDS, &mut prints).await;
            }
        }
    }
    drop(running);
    to_host.shutdown().await
}

/// The host's next frame; `None`: it says no more.
async fn next(
    from: &mut (impl tokio::io::AsyncRead + Unpin),
    frames: &mut ShellFrames,
) -> io::Result<Option<ShellFrame>> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        if let Some(frame) = frames.next_frame().map_err(io::Error::other)? {
            return Ok(Some(frame));
        }
        match from.read(&mut buffer).await? {
            0 => return Ok(None),
            count => frames.push(&buffer[..count]),
        }
    }
}

/// A terminal of the kernel's; ours is the side that shows and types.
struct Terminal {
    ours: File,
    name: String,
}

impl Terminal {
    fn open(size: TerminalSize) -> io::Result<Self> {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&ours)?;
        unlockpt(&ours)?;
        let name = ptsname(&ours, Vec::new())?.into_string().map_err(io::Error::other)?;
        rustix::io::ioctl_fionbio(&ours, true)?;
        let terminal = Self { ours: File::from(ours), name };
        terminal.resize(size);
        Ok(terminal)
    }

    fn resize(&self, size: TerminalSize) {
        let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
        // A wrong size is ugly, no more.
        let _ = tcsetwinsize(&self.ours, size);
    }

    fn pipe(&self) -> io::Result<Box<dyn Pipe>> {
        pipe(self.ours.try_clone()?)
    }
}

/// A shell that runs. Dropped, it and all of its session are ended.
struct Running {
    leader: u32,
    ended: oneshot::Receiver<()>,
}

impl Running {
    fn start(program: &Path, terminal: &Terminal, term: &str) -> io::Result<Self> {
        let mut child = spawn(program, &terminal.name, term)?;
        let (leader, (told, ended)) = (child.id(), oneshot::channel());
        thread::Builder::new().name("shell".into()).spawn(move || {
            let _ = child.wait();
            let _ = told.send(());
        })?;
        Ok(Self { leader, ended })
    }

    async fn ended(&mut self) {
        // An error says that its thread has ended, and so has it.
        let _ = (&mut self.ended).await;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        runner::end(self.leader);
    }
}

fn spawn(program: &Path, terminal: &str, term: &str) -> io::Result<Child> {
    Command::new(program)
        .args([WORD, terminal, term])
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
}

/// Becomes a shell on this terminal, in a session of its own.
///
/// # Errors
/// If anything fails; on success it does not return.
pub fn become_shell(arguments: &[OsString]) -> io::Result<Infallible> {
    let [terminal, term] = arguments else { return Err(io::Error::other("shell-on TERMINAL TERM")) };
    // Our unit shields us from the OOM killer; what is done in a shell must not inherit that.
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "0") {
        say(&format!("shell: {error}"));
    }
    setsid()?;
    // The first terminal that the leader of a session opens is its own.
    let flags = i32::try_from(OFlags::empty().bits()).map_err(io::Error::other)?;
    let terminal = OpenOptions::new().read(true).write(true).custom_flags(flags).open(terminal)?;
    dup2_stdin(&terminal)?;
    dup2_stdout(&terminal)?;
    dup2_stderr(&terminal)?;
    let shell = SHELLS.iter().find(|shell| Path::new(shell).exists()).ok_or(io::ErrorKind::NotFound)?;
    let home = if Path::new("/root").is_dir() { "/root" } else { "/" };
    let error = Command::new(shell)
        .arg0("-shell")
        .env_clear()
        .env("PATH", PATH)
        .env("HOME", home)
        .env("USER", "root")
        .env("LOGNAME", "root")
        .env("LANG", "C.UTF-8")
        .env("TERM", term)
        .current_dir(home)
        .exec();
    Err(error)
}
