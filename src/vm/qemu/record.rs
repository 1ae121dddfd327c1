//! Which QEMU is whose, provably: a file per machine whose lock is the machine.
//!
//! The file is QEMU's standard input, and QEMU has inherited its lock from before it began. So the lock is held from the
//! fork to the last moment of the process, whoever started it and whatever became of that one, and no number of a
//! process is ever taken for a machine: the processes of a machine are those whose input is this file. Lines are only
//! ever added:
//!
//! ```text
//! {"installation":"…","vm":"…"}     whose it is, before anything is started
//! up                                QEMU has answered: it was a machine
//! ended powered-off                 how it ended, noted before QEMU is told to go
//! ```
//!
//! A file without a lock and without `up` is a start that was cut. All calls block; one at a time looks or starts, for a
//! look takes the lock for a moment.

use crate::files::plain;
use crate::vm::{Ending, InstallationId, Usage, VmId, VmName};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// Bytes of a record that are read: it has three lines.
const BYTES_MAX: u64 = 4096;

/// What follows `df-<id>.` in the names of a machine's own files, but for channel and console.
const OWN: [&str; 4] = ["vm", "qmp", "log", "mig"];

/// Whose a machine is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Owner {
    pub(super) installation: InstallationId,
    pub(super) vm: VmId,
}

/// What a look finds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// No such machine.
    Nothing,
    /// A process is there. `up`: it has answered once. `ended`: how, if it is about to go.
    Alive { owner: Owner, up: bool, ended: Option<Ending> },
    /// It has been, and is gone; how, if somebody noted it.
    Gone { ended: Option<Ending> },
}

const ENDINGS: [(Ending, &str); 8] = [
    (Ending::Unseen, "unseen"),
    (Ending::PoweredOff, "powered-off"),
    (Ending::Restarted, "restarted"),
    (Ending::Panicked, "panicked"),
    (Ending::Slept, "slept"),
    (Ending::Hung, "hung"),
    (Ending::Destroyed, "destroyed"),
    (Ending::Died, "died"),
];

/// The records of one directory.
#[derive(Clone, Debug)]
pub(super) struct Records {
    pub(super) directory: PathBuf,
}

impl Records {
    /// A file of a machine's: `vm`, `qmp`, `log` or `mig`.
    pub(super) fn path(&self, name: &VmName, what: &str) -> PathBuf {
        self.directory.join(format!("{name}.{what}"))
    }

    /// The machine of this name. What a cut start has left is removed.
    pub(super) fn look(&self, name: &VmName) -> io::Result<Found> {
        let mut file = match plain::open(&self.path(name, "vm")) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
            Err(error) => return Err(error),
        };
        let alive = match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => false,
            Err(rustix::io::Errno::WOULDBLOCK) => true,
            Err(error) => return Err(error.into()),
        };
        let mut text = String::new();
        (&mut file).take(BYTES_MAX).read_to_string(&mut text)?;
        let mut lines = text.lines();
        let owner = lines.next().and_then(|line| serde_json::from_str::<Owner>(line).ok());
        let owner = owner.filter(|owner| owner.vm == *name.id());
        let (mut up, mut ended) = (false, None);
        for line in lines {
            up |= line == "up";
            let told = line.strip_prefix("ended ");
            // The first word counts.
            ended = ended.or_else(|| ENDINGS.iter().find(|(_, word)| told == Some(word)).map(|(ending, _)| *ending));
        }
        match owner {
            Some(owner) if alive => Ok(Found::Alive { owner, up, ended }),
            // Nobody starts a QEMU before its owner is written down.
            None if alive => {
                Err(io::Error::new(io::ErrorKind::InvalidData, "a record that is held says not whose it is"))
            }
            _ if up || ended.is_some() => Ok(Found::Gone { ended }),
            _ => {
                self.remove(name)?;
                Ok(Found::Nothing)
            }
        }
    }

    /// Names of all records.
    pub(super) fn names(&self) -> io::Result<Vec<VmName>> {
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let name = entry?.file_name();
            names.extend(name.to_str().and_then(|name| VmName::parse(name.strip_suffix(".vm")?)));
        }
        names.sort();
        Ok(names)
    }

    /// A new record, locked: the lock goes with what is returned, which cannot be written to.
    pub(super) fn create(&self, name: &VmName, owner: &Owner) -> io::Result<File> {
        let path = self.path(name, "vm");
        let mut file = File::options().append(true).create_new(true).mode(0o600).open(&path)?;
        let lock = plain::open(&path)?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
        let mut line = serde_json::to_vec(owner)?;
        line.push(b'\n');
        file.write_all(&line)?;
        Ok(lock)
    }

    fn add(&self, name: &VmName, line: &str) -> io::Result<()> {
        let mut file = plain::open_with(File::options().append(true), &self.path(name, "vm"))?;
        file.write_all(format!("{line}\n").as_bytes())
    }

    /// QEMU has answered.
    pub(super) fn note_up(&self, name: &VmName) -> io::Result<()> {
        self.add(name, "up")
    }

    /// It has ended, like this.
    pub(super) fn note_ended(&self, name: &VmName, ending: Ending) -> io::Result<()> {
        let word = ENDINGS.iter().find(|(known, _)| *known == ending).map_or("unseen", |(_, word)| word);
        self.add(name, &format!("ended {word}"))
    }

    /// Removes a machine's own files, the record last.
    pub(super) fn remove(&self, name: &VmName) -> io::Result<()> {
        for what in OWN.iter().rev() {
            match fs::remove_file(self.path(name, what)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// What the kernel knows of the use of a machine's process.
    pub(super) fn usage(&self, name: &VmName) -> io::Result<Usage> {
        let record = fs::metadata(self.path(name, "vm"))?;
        for entry in fs::read_dir("/proc")? {
            let entry = entry?;
            let pid = entry.file_name().to_str().and_then(|pid| pid.parse().ok()).and_then(Pid::from_raw);
            if pid.is_some_and(|pid| is_input_of(Path::new("/proc"), pid, &record)) {
                let read = |what: &str| fs::read_to_string(entry.path().join(what));
                return Ok(Usage::of_process(&read("status")?, &read("stat")?));
            }
        }
        Ok(Usage::default())
    }

    /// Sends a signal to the processes of a machine.
    pub(super) fn signal(&self, name: &VmName, signal: Signal) -> io::Result<()> {
        let record = fs::metadata(self.path(name, "vm"))?;
        for entry in fs::read_dir("/proc")? {
            let Some(pid) = entry?.file_name().to_str().and_then(|pid| pid.parse().ok()).and_then(Pid::from_raw) else {
                continue;
            };
            let is_its = || is_input_of(Path::new("/proc"), pid, &record);
            if !is_its() {
                continue;
            }
            // The number may have become another's meanwhile; what is held now is looked at again, and stays itself.
            let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
            if is_its() {
                // It may end by itself in this very moment.
                let _ = pidfd_send_signal(&process, signal);
            }
        }
        Ok(())
    }
}

/// Whether this file is the standard input of a process, as far as we may look.
fn is_input_of(proc: &Path, pid: Pid, file: &fs::Metadata) -> bool {
    let input = fs::metadata(proc.join(pid.as_raw_nonzero().to_string()).join("fd/0"));
    input.is_ok_and(|input| (input.dev(), input.ino()) == (file.dev(), file.ino()))
}

#[cfg(test)]
mod tests;
