//! The virtio-serial port: the guest config comes in, reports go out, and the time is asked for.
//!
//! Traps, all measured with QEMU 7.2: reads give 0 while nobody is connected on the host, and data
//! again once somebody is; a blocking write stands still as long as nobody is, so writes are
//! non-blocking and may be lost; the port can be opened once, so one descriptor serves both ways.
//! The host may write before the kernel runs, and writes the same config again when it is not sure.
#![expect(clippy::disallowed_types, reason = "no async runtime in the guest")]

use dayfly_guest_config::{CONFIG_BYTES_MAX, ClockQuestion, Report};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Between two looks at a port with nobody at its other end. A hand-out waits this long at worst.
const HUNG_UP_PAUSE: Duration = Duration::from_millis(20);

/// Between two answers to a host that keeps on writing: it may itself be answering our reports.
const ANSWER_PERIOD: Duration = Duration::from_secs(1);

/// A poll of a quiet port; it only bounds one system call.
const QUIET_POLL: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };

/// Finds the device of the port called `name`: `sys` is `/sys/class/virtio-ports`, `dev` is `/dev`.
#[must_use]
pub fn find(sys: &Path, dev: &Path, name: &str) -> Option<PathBuf> {
    let mut ports: Vec<_> = std::fs::read_dir(sys).ok()?.filter_map(|entry| Some(entry.ok()?.file_name())).collect();
    ports.sort();
    let is_it = |port: &&std::ffi::OsString| {
        std::fs::read_to_string(sys.join(port).join("name")).is_ok_and(|text| text.trim_end() == name)
    };
    ports.iter().find(is_it).map(|port| dev.join(port))
}

/// Sends reports; clones share the port. Without a port reports go nowhere.
#[derive(Clone)]
pub struct Reporter {
    port: Option<Arc<File>>,
    /// The last report, for a host that (re)connects. A mutex held for a few lines.
    last: Arc<Mutex<Option<Report>>>,
}

impl Reporter {
    /// One for a machine without a port.
    #[must_use]
    pub fn silent() -> Self {
        Self { port: None, last: Arc::default() }
    }

    /// Opens the port.
    ///
    /// # Errors
    /// The system's.
    pub fn open(device: &Path) -> io::Result<Self> {
        let flags = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).map_err(io::Error::other)?;
        let port = OpenOptions::new().read(true).write(true).custom_flags(flags).open(device)?;
        Ok(Self { port: Some(Arc::new(port)), last: Arc::default() })
    }

    /// Reports, if the host listens and has room.
    pub fn report(&self, report: Report) {
        let line = format!("{report}\n");
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(report);
        self.write(&line);
    }

    /// Asks, if the host listens. Not said again to one that comes back: the asker does that, with the time that it is then.
    pub fn ask(&self, question: ClockQuestion) {
        self.write(&format!("{question}\n"));
    }

    fn again(&self) {
        let line =
            self.last.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|report| format!("{report}\n"));
        if let Some(line) = line {
            self.write(&line);
        }
    }

    /// Answers a line of the host with the last report, now and then. Never with `ready`: the first
    /// config is the answer to that.
    fn answer(&self, answered: &mut Option<Instant>) {
        let waits = *self.last.lock().unwrap_or_else(PoisonError::into_inner) == Some(Report::Ready);
        if !waits && answered.is_none_or(|at| at.elapsed() >= ANSWER_PERIOD) {
            *answered = Some(Instant::now());
            self.again();
        }
    }

    fn write(&self, line: &str) {
        if let Some(port) = &self.port {
            // EAGAIN: nobody there, or no room. A report is worth no wait.
            let _ = port.as_ref().write_all(line.as_bytes());
        }
    }
}

/// Reads the port for as long as the machine lives and sends each line. A host that comes back gets
/// the last report again; so does one that writes its config once more when it has been applied.
///
/// # Errors
/// If no thread can be made, or there is no port.
pub fn read_lines(reporter: &Reporter, lines: SyncSender<Line>) -> io::Result<()> {
    let reporter = reporter.clone();
    let port = reporter.port.clone().ok_or(io::ErrorKind::NotFound)?;
    thread::Builder::new().name("channel".into()).spawn(move || {
        let mut splitter = Splitter::default();
        let mut buffer = vec![0; 64 * 1024];
        let mut answered = None;
        let mut connected = true; // the first report goes out by itself
        loop {
            match port.as_ref().read(&mut buffer) {
                Ok(0) => {
                    connected = false;
                    // Half a line of a host that went away is not the beginning of the next one's.
                    splitter.clear();
                    pause(HUNG_UP_PAUSE);
                }
                Ok(count) => {
                    for line in splitter.take(&buffer[..count]) {
                        // Nobody waits for lines once config and time have been taken.
                        let _ = lines.try_send(line);
                        reporter.answer(&mut answered);
                    }
                    connected = true;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !std::mem::replace(&mut connected, true) {
                        reporter.again();
                    }
                    let _ = poll(&mut [PollFd::new(port.as_ref(), PollFlags::IN)], Some(&QUIET_POLL));
                }
                Err(_) => pause(HUNG_UP_PAUSE),
            }
        }
    })?;
    Ok(())
}

#[expect(clippy::disallowed_methods, reason = "no runtime here, and a port that hung up cannot be polled")]
fn pause(duration: Duration) {
    thread::sleep(duration);
}

/// One line of the host, without its line break.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// Whole.
    Whole(Vec<u8>),
    /// Longer than [`CONFIG_BYTES_MAX`]; dropped.
    TooLong,
}

/// Cuts a stream into lines of bounded length.
#[derive(Default)]
struct Splitter {
    line: Vec<u8>,
    overflow: bool,
}

impl Splitter {
    fn take(&mut self, bytes: &[u8]) -> Vec<Line> {
        let mut lines = Vec::new();
        for byte in bytes {
            if *byte == b'\n' {
                let line = std::mem::take(&mut self.line);
                lines.push(if std::mem::take(&mut self.overflow) { Line::TooLong } else { Line::Whole(line) });
            } else if self.line.len() + 1 < CONFIG_BYTES_MAX {
                self.line.push(*byte);
            } else {
                self.overflow = true;
            }
        }
        lines
    }

    fn clear(&mut self) {
        self.line.clear();
        self.overflow = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_is_found_by_its_name() {
        let sys = tempfile::tempdir().unwrap();
        for (port, name) in [("vport0p1", "org.qemu.guest_agent.0\n"), ("vport0p2", "org.dayfly.guest.0\n")] {
            std::fs::create_dir(sys.path().join(port)).unwrap();
            std::fs::write(sys.path().join(port).join("name"), name).unwrap();
        }
        std::fs::create_dir(sys.path().join("vport1p0")).unwrap(); // not named yet
        assert_eq!(find(sys.path(), Path::new("/dev"), "org.dayfly.guest.0"), Some("/dev/vport0p2".into()));
        assert_eq!(find(sys.path(), Path::new("/dev"), "org.dayfly.guest"), None);
        assert_eq!(find(Path::new("/no/such"), Path::new("/dev"), "x"), None);
    }

    #[test]
    fn lines_come_out_however_they_are_cut() {
        let mut splitter = Splitter::default();
        assert_eq!(splitter.take(b"a"), []);
        assert_eq!(
            splitter.take(b"b\nc\n\nd"),
            [Line::Whole(b"ab".into()), Line::Whole(b"c".into()), Line::Whole(b"".into())]
        );
        splitter.clear();
        assert_eq!(splitter.take(b"e\n"), [Line::Whole(b"e".into())]);
    }

    #[test]
    fn a_line_without_end_costs_bounded_memory() {
        let mut splitter = Splitter::default();
        for _ in 0..5 {
            assert_eq!(splitter.take(&vec![b'x'; CONFIG_BYTES_MAX]), []);
            assert!(splitter.line.len() < CONFIG_BYTES_MAX);
        }
        assert_eq!(splitter.take(b"\nok\n"), [Line::TooLong, Line::Whole(b"ok".into())]);
        let longest = vec![b'x'; CONFIG_BYTES_MAX - 1];
        assert_eq!(splitter.take(&[&longest[..], b"\n"].concat()), [Line::Whole(longest)]);
    }

    #[test]
    fn reports_to_nobody_are_dropped_and_the_last_one_is_said_again() {
        // A pipe that is full stands for a port with nobody at its other end.
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("port");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
        let reporter = Reporter::open(&fifo).unwrap();
        let filler = [b'-'; 4096];
        while reporter.port.as_ref().unwrap().as_ref().write(&filler).is_ok() {}
        reporter.report(Report::Ready);
        let mut all = Vec::new();
        let drained = std::io::copy(&mut reporter.port.as_ref().unwrap().as_ref(), &mut all);
        assert_eq!(drained.unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert!(!all.ends_with(b"ready\n"));
        reporter.again();
        let mut said = [0; 64];
        let count = reporter.port.as_ref().unwrap().as_ref().read(&mut said).unwrap();
        assert_eq!(&said[..count], b"ready\n");
        // A config, which `ready` has asked for, is no question; later ones are, once a second.
        let mut answered = None;
        reporter.answer(&mut answered);
        let nothing = reporter.port.as_ref().unwrap().as_ref().read(&mut said).unwrap_err();
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
        reporter.report(Report::Applied);
        for _ in 0..100 {
            reporter.answer(&mut answered);
        }
        let count = reporter.port.as_ref().unwrap().as_ref().read(&mut said).unwrap();
        assert_eq!(&said[..count], b"applied\napplied\n");
    }
}
