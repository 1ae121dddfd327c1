//! The process around the daemon: lock, log, signals, systemd, control socket.

use super::listener::Listener;
use super::{Backends, DaemonError, Reloader, Shutdown, places, socket_directory, start};
use crate::clock::Clock;
use crate::clones::RealWorkshop;
use crate::config::{Config, Loaded};
use crate::control;
use crate::files::{RealFiles, plain};
use crate::gitlab::RealOpenTransport;
use crate::guest;
use crate::image::store::ImageStore;
use crate::network::{EgressProcesses, SERVICE_SOCKET, Tcp};
use crate::rng::Rng;
use crate::telemetry::chain;
use std::fs::File;
use std::io::{Read, Seek as _, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How long the control socket may take to close: of the 5 s of a hand-over.
const SOCKET_PATIENCE: Duration = Duration::from_millis(100);

/// How long a lock of a process that is no more is waited for.
const DEAD_HOLDER_PATIENCE: Duration = Duration::from_secs(5);

/// Between two tries.
const DEAD_HOLDER_PAUSE: Duration = Duration::from_millis(20);

/// Keeps other daemons away from a state directory while it lives.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "the open file is the lock")] File);

/// Takes the lock of a state directory (flock, so that a killed holder leaves none behind).
///
/// # Errors
/// [`DaemonError::Locked`], naming the holder; [`DaemonError::Files`].
pub fn lock(state_directory: &Path) -> Result<Lock, DaemonError> {
    let path = state_directory.join("lock");
    let failed = |what| {
        let path = path.clone();
        move |source| DaemonError::Files { what, path, source }
    };
    // QEMU's own user must pass it on the way to its overlay.
    let mut directory = std::fs::DirBuilder::new();
    directory.recursive(true).mode(0o711).create(state_directory).map_err(failed("make the directory of"))?;
    let mut file = plain::open_lock(&path).map_err(failed("open"))?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut pid = String::new();
            // The holder's number is a help, no more.
            let _ = (&file).take(20).read_to_string(&mut pid);
            let pid = if pid.trim().is_empty() { "unknown" } else { pid.trim() };
            return Err(DaemonError::Locked { directory: state_directory.to_owned(), pid: pid.to_owned() });
        }
        Err(error) => return Err(failed("lock")(error.into())),
    }
    let written = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| write!(file, "{}", std::process::id()));
    if let Err(error) = written {
        // On a full disk the jobs of before are served all the same.
        tracing::warn!(path = %path.display(), error = chain(&error), "write our process's number down");
    }
    Ok(Lock(file))
}

/// [`lock`], after a holder that was killed: a program that it was about to start holds the lock, too, until it is
/// started. That takes milliseconds, or more on a busy host; a living holder is told of at once.
async fn lock_after_the_dead(state_directory: &Path) -> Result<Lock, DaemonError> {
    let until = Instant::now() + DEAD_HOLDER_PATIENCE;
    loop {
        match lock(state_directory) {
            Err(DaemonError::Locked { pid, .. }) if !is_alive(&pid) && Instant::now() < until => {
                tokio::time::sleep(DEAD_HOLDER_PAUSE).await;
            }
            result => return result,
        }
    }
}

/// Whether there is a process with this number, as far as can be told.
fn is_alive(pid: &str) -> bool {
    let pid = pid.parse().ok().and_then(rustix::process::Pid::from_raw);
    pid.is_none_or(|pid| rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH))
}

impl Backends {
    /// The real ones.
    ///
    /// # Errors
    /// [`DaemonError::Hypervisor`].
    pub fn real(config: &Config) -> Result<Self, DaemonError> {
        let rng = Rng::system();
        Ok(Self {
            host: config.hypervisor.host(&socket_directory(&config.runtime_directory)),
            listen: Arc::new(Tcp),
            egress: Arc::new(EgressProcesses::new(config.hypervisor.is_system().then(|| Path::new(SERVICE_SOCKET)))),
            transport: Arc::new(RealOpenTransport::default()),
            files: Arc::new(RealFiles),
            clock: Clock::system(),
            rng,
            workshop: Arc::new(RealWorkshop::default()),
            images: Arc::new(ImageStore::new(&config.image_directory)),
            door_limits: guest::Limits::default(),
        })
    }
}

/// What makes the seams of a configuration: [`Backends::real`], in all programs but those of tests.
pub type Connect = fn(&Config) -> Result<Backends, DaemonError>;

/// Runs the daemon as a service until it is told to stop.
///
/// # Errors
/// [`DaemonError`].
pub async fn main(loaded: Loaded, connect: Connect) -> anyhow::Result<()> {
    let Loaded { config, file, .. } = loaded;
    places::check(&config)?;
    let _lock = lock_after_the_dead(&config.state_directory).await?;
    let shutdown = Shutdown::new();
    // Signals first: one that comes during a long start must not kill us half-way.
    let signals = listen(&shutdown)?;
    let hangups = signal(SignalKind::hangup())?;
    let socket = control::bind(&control::socket(&config.runtime_directory), config.control.group.as_deref())?;
    let (status, runtime_directory) = (config.status.clone(), config.runtime_directory.clone());
    let backends = connect(&config)?;
    let transport = backends.transport.clone();
    let daemon = start(config, backends, shutdown.clone()).await?;
    let handler = daemon.handler();
    let mut listener = Listener::open(handler.clone(), transport, (&status, &runtime_directory)).await;
    let stop = CancellationToken::new();
    let serve_stop = stop.clone();
    let mut served = std::pin::pin!(control::serve(socket, handler, serve_stop));
    // Errors mean that nobody waits for us: no systemd.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    tracing::info!(version = env!("CARGO_PKG_VERSION"), pid = std::process::id(), "dayfly runs");
    let hangups = reload_on(hangups, daemon.reloader(), file, &mut listener);
    let run = daemon.run();
    let watchdog = watchdog();
    tokio::select! {
        biased;
        // The daemon's own end is the only one that is expected.
        well = run => if !well {
            return Err(DaemonError::Failed.into());
        },
        () = &mut served => {}
        () = watchdog => {}
        () = signals => {}
        () = hangups => {}
    }
    stop.cancel();
    // Removes the sockets; an exchange that is under way has its own deadline.
    let _ = tokio::time::timeout(SOCKET_PATIENCE, async { tokio::join!(served, listener.close()) }).await;
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    tracing::info!("dayfly ends");
    Ok(())
}

/// Turns signals into the shutdown's modes, for ever.
fn listen(shutdown: &Shutdown) -> std::io::Result<impl Future<Output = ()>> {
    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    let mut quit = signal(SignalKind::quit())?;
    let shutdown = shutdown.clone();
    Ok(async move {
        loop {
            tokio::select! {
                biased;
                // All are cancel safe; the order does not matter.
                _ = term.recv() => shutdown.hand_over(),
                _ = int.recv() => shutdown.hand_over(),
                _ = quit.recv() => shutdown.drain_or_end(),
            }
            tracing::info!(mode = shutdown.mode().borrow().word(), "told to stop");
        }
    })
}

/// SIGHUP: reads the file again, for ever. One that makes no sense changes nothing (threats.md E10).
async fn reload_on(mut hangups: Signal, reloader: Reloader, file: Option<PathBuf>, listener: &mut Listener) {
    while hangups.recv().await.is_some() {
        let Some(file) = file.clone() else { continue };
        let loaded = tokio::task::spawn_blocking(move || {
            let loaded = Config::load(&file)?;
            loaded.check_for_running()?;
            Ok::<_, anyhow::Error>(loaded)
        });
        match loaded.await {
            Ok(Ok(loaded)) => {
                for warning in &loaded.warnings {
                    tracing::warn!("configuration: {warning}");
                }
                let config = loaded.config;
                let next = match listener.prepare(&config.status, &config.runtime_directory).await {
                    Ok(next) => next,
                    Err(error) => {
                        tracing::error!(error = chain(&error), "reload the configuration; that of before stays");
                        continue;
                    }
                };
                // The daemon says how it went.
                if reloader.reload(config).await.is_ok() {
                    listener.exchange(next).await;
                }
            }
            Ok(Err(error)) => {
                tracing::error!(error = chain(&*error), "reload the configuration; that of before stays");
            }
            Err(error) => tracing::error!(error = chain(&error), "reload the configuration; that of before stays"),
        }
    }
}

/// Tells systemd that the event loop turns (threats.md E6), if it wants to know.
async fn watchdog() {
    match sd_notify::watchdog_enabled() {
        Some(interval) if interval > Duration::ZERO => loop {
            let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
            tokio::time::sleep(interval / 3).await;
        },
        _ => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// T33, E11: at once, and by the holder's number; a killed holder leaves no lock behind.
    #[test]
    fn a_second_daemon_is_refused_and_told_whose_directory_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let first = lock(dir.path()).unwrap();
        let error = lock(dir.path()).unwrap_err();
        assert_eq!(error.exit_code(), 1);
        assert!(error.to_string().contains(&format!("(process {})", std::process::id())), "{error}");
        assert!(error.to_string().contains(&dir.path().display().to_string()), "{error}");
        drop(first);
        lock(dir.path()).unwrap();
    }

    /// E11, E15: the daemon was killed while it started a program, which holds its lock for a moment longer.
    #[tokio::test(start_paused = true)]
    async fn the_lock_of_a_killed_daemon_is_waited_for_and_that_of_a_living_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let held = lock(dir.path()).unwrap();
        let since = Instant::now();
        assert!(lock_after_the_dead(dir.path()).await.is_err() && since.elapsed().is_zero(), "we live");
        // Beyond the largest number that Linux gives out.
        std::fs::write(dir.path().join("lock"), "4999999").unwrap();
        let ends = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            drop(held);
        };
        let (taken, ()) = tokio::join!(lock_after_the_dead(dir.path()), ends);
        let _taken = taken.unwrap();
        assert!((1000..1100).contains(&since.elapsed().as_millis()), "{:?}", since.elapsed());
    }

    /// U29: a lock that is a link empties no file of ours.
    #[test]
    fn a_lock_is_taken_through_no_link() {
        let dir = tempfile::tempdir().unwrap();
        let precious = dir.path().join("precious");
        std::fs::write(&precious, "kept").unwrap();
        std::os::unix::fs::symlink(&precious, dir.path().join("lock")).unwrap();
        assert!(matches!(lock(dir.path()), Err(DaemonError::Files { what: "open", .. })));
        assert_eq!(std::fs::read(&precious).unwrap(), b"kept");
    }
}
