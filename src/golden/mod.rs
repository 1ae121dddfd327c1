//! Which machines are frozen, for others to be restored from?
//!
//! A golden is made in the background, one at a time, once a job boots that could have been restored, in room that is
//! reserved as a job's is. It counts when a machine that was restored from it has asked for a job. Its directory is this
//! host's and this installation's, and is of no use anywhere else:
//!
//! ```text
//! <state directory>/goldens/<key>/golden.json   what it is; written last
//! <state directory>/goldens/<key>/state         memory and devices
//! <state directory>/goldens/<key>/disk.qcow2    its disk, on the base image
//! <state directory>/goldens/.machines/…         where one is made: `supply::unassigned`
//! ```
//!
//! What is known of them, and who is restored, is `supply::goldens`'. No golden has ever seen a job, a pass that counts, or
//! anything of GitLab but the token that only looks right.

mod make;

use self::make::MakeError;
use crate::capacity::{Capacity, Resources};
use crate::clock::Clock;
use crate::files::{Files as _, RealFiles, plain};
use crate::hex::hex;
use crate::image::store::Images;
use crate::machine_spec::ImageRef;
use crate::rng::Rng;
use crate::supply::Supply;
use crate::supply::goldens::{Golden, HostTraits, Key, Wanted};
use crate::telemetry::chain;
use crate::vm::{self, Frozen};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Whose room a golden takes while it is made, in the list of runner entries.
const NOBODY: &str = "(freezing a machine)";

/// How often it is looked whether an image was replaced, or there is too much.
const LOOK_INTERVAL: Duration = Duration::from_secs(60);

/// For all that making one takes: a minute under TCG on a busy host.
const MAKE_DEADLINE: Duration = Duration::from_secs(600);

const RECORD: &str = "golden.json";
const STATE: &str = "state";
const DISK: &str = "disk.qcow2";

/// Version of the records that are written and read here.
const VERSION: u32 = 1;

/// Bytes of one at most.
const RECORD_BYTES_MAX: u64 = 64 * 1024;

/// Digests and files are handled in pieces of this.
const PIECE_BYTES: usize = 1 << 20;

/// `golden.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    version: u32,
    key: Key,
    host: String,
    image: ImageRef,
    runner: String,
    made_s: i64,
    bytes: u64,
    /// Hex.
    state_sha256: String,
    /// Hex.
    disk_sha256: String,
}

/// Who makes goldens, and throws them away.
pub struct Keeper {
    /// Whose machines they are for.
    pub supply: Supply,
    /// Where room is reserved.
    pub capacity: Capacity,
    /// Their images.
    pub images: Arc<dyn Images>,
    /// What the hypervisor is called.
    pub hypervisor: vm::Config,
    /// Where they are.
    pub directory: PathBuf,
    /// Where the sockets are of the one that is made: a short path, of nobody else.
    pub socket_dir: PathBuf,
    /// What the hypervisor takes besides a guest's memory.
    pub overhead_mib: u64,
    /// Bytes of all of them together.
    pub bytes_max: u64,
    /// This host.
    pub host: HostTraits,
    /// Wall time.
    pub clock: Clock,
    /// Randomness.
    pub rng: Rng,
}

impl Keeper {
    /// Takes up those of before, makes others when they are wished for, and throws away what is of no use, until `stop`.
    /// What is half made then is taken down, by the next daemon if this one has no time for it.
    pub async fn keep(self, stop: CancellationToken) {
        self.supply.goldens().begin(self.host.clone());
        self.take_up().await;
        while !stop.is_cancelled() {
            self.throw_away().await;
            match self.supply.goldens().wanted() {
                Some(wanted) => self.make_one(&wanted, &stop).await,
                None => {
                    // It is looked again in a minute. Both are cancel safe.
                    let changed = tokio::time::timeout(LOOK_INTERVAL, self.supply.goldens().changed());
                    stop.run_until_cancelled(changed).await;
                }
            }
        }
    }

    /// The goldens of before that are whole, and of this host as it is now; what else is there goes.
    async fn take_up(&self) {
        let entries = match RealFiles.list(&self.directory).await {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => return tracing::warn!(error = chain(&error), "look for frozen machines of before"),
        };
        for entry in entries.into_iter().filter(|entry| !entry.name.starts_with('.')) {
            let directory = self.directory.join(&entry.name);
            let (path, host) = (directory.clone(), self.host_word());
            let read = tokio::task::spawn_blocking(move || read(&path, &host)).await;
            match read.map_err(io::Error::other).and_then(|read| read) {
                Ok((key, golden)) => self.supply.goldens().add(key, golden),
                Err(error) => {
                    tracing::info!(path = %directory.display(), error = chain(&error), "a frozen machine of before is of no use any more");
                    remove(&directory).await;
                }
            }
        }
    }

    fn host_word(&self) -> String {
        let host = serde_json::to_vec(&self.host).unwrap_or_default();
        // Another dayfly may give its machines other devices.
        hex(&Sha256::new().chain_update(env!("CARGO_PKG_VERSION")).chain_update(host).finalize())
    }

    /// What is too much, or of an image that was replaced, goes, and what nobody is restored from any more.
    async fn throw_away(&self) {
        let goldens = self.supply.goldens();
        let mut in_use = BTreeMap::new();
        for golden in goldens.list() {
            if !in_use.contains_key(&golden.image.name) {
                let loaded = self.images.load(&golden.image.name).await;
                in_use.insert(golden.image.name.clone(), loaded.ok().map(|image| image.digest()));
            }
        }
        goldens.keep_within(self.bytes_max, |golden| {
            // One that cannot be looked at now may be the same.
            in_use.get(&golden.image.name).and_then(Option::as_ref).is_none_or(|digest| *digest == golden.image.digest)
        });
        for key in goldens.discarded() {
            tracing::info!(%key, "a frozen machine is thrown away");
            // QEMUs that have its disk open keep it.
            if remove(&self.directory.join(key.as_str())).await {
                goldens.forget(&key);
            }
        }
    }

    async fn make_one(&self, wanted: &Wanted, stop: &CancellationToken) {
        let goldens = self.supply.goldens();
        let resources = Resources {
            cpus: wanted.spec.cpus,
            memory_mib: wanted.spec.memory_mib.saturating_add(self.overhead_mib),
            disk_gib: wanted.spec.disk_gib,
        };
        // Cancel safe: a place in the queue is given up.
        let Some(room) = stop.run_until_cancelled(self.capacity.reserve(NOBODY, 1, resources)).await else { return };
        let Ok(mut room) = room else { return goldens.not_made(&wanted.key, "there is never room for it") };
        room.is_for_a_job();
        let image = &wanted.spec.image.name;
        tracing::info!(key = %wanted.key, image, runner = wanted.spec.runner.name, "freezing a machine");
        let made = self.make(wanted, stop).await;
        drop(room);
        match made {
            Ok(made) => {
                tracing::info!(
                    key = %wanted.key,
                    image,
                    bytes = made.golden.bytes,
                    took_ms = millis(made.took),
                    restored_ms = millis(made.restored),
                    "a machine is frozen, and one that was restored from it has asked for a job"
                );
                goldens.add(wanted.key.clone(), made.golden);
            }
            Err(MakeError::Stopped) => {}
            Err(error) => {
                let error = chain(&error);
                tracing::warn!(key = %wanted.key, image, error, "freeze a machine; jobs boot, and it is tried again later");
                goldens.not_made(&wanted.key, &error);
            }
        }
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Removes a golden's files. `false`: they are still there.
async fn remove(directory: &Path) -> bool {
    let removed = RealFiles.remove(directory).await;
    removed
        .inspect_err(|error| {
            tracing::warn!(path = %directory.display(), error = chain(error), "remove the files of a frozen machine");
        })
        .is_ok()
}

/// Reads a golden's record, and looks whether its disk is what it was. Its memory is looked at whenever it is sent. Blocks.
fn read(directory: &Path, host: &str) -> io::Result<(Key, Golden)> {
    let invalid = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
    let mut bytes = Vec::new();
    plain::open(&directory.join(RECORD))?.take(RECORD_BYTES_MAX).read_to_end(&mut bytes)?;
    let record: Record = serde_json::from_slice(&bytes)?;
    if record.version != VERSION || directory.file_name().is_none_or(|name| name != record.key.as_str()) {
        return Err(invalid("its record is another's"));
    }
    if record.host != host {
        return Err(invalid("it was frozen before dayfly, hypervisor, kernel or processor of this host changed"));
    }
    let (state, disk) = (directory.join(STATE), directory.join(DISK));
    if hex(&digest_of(&disk)?) != record.disk_sha256 {
        return Err(invalid("its disk is not what it was"));
    }
    plain::open(&state)?;
    let sha256 = from_hex(&record.state_sha256).ok_or_else(|| invalid("its digest is none"))?;
    let frozen = Frozen { state, sha256, disk };
    let Record { key, image, runner, bytes, made_s, .. } = record;
    Ok((key, Golden { frozen, image, runner, bytes, made_s }))
}

/// Blocks.
fn digest_of(path: &Path) -> io::Result<[u8; 32]> {
    let (mut file, mut digest, mut piece) = (plain::open(path)?, Sha256::new(), vec![0; PIECE_BYTES]);
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(digest.finalize().into()),
            count => digest.update(&piece[..count]),
        }
    }
}

/// Bytes that a file takes on its disk.
fn bytes_on_disk(path: &Path) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt as _;
    Ok(fs::metadata(path)?.blocks().saturating_mul(512))
}

fn from_hex(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    let bytes: Option<Vec<u8>> = (0..64).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect();
    bytes?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(directory: &Path, change: impl FnOnce(&mut Record)) -> PathBuf {
        let key = "ab".repeat(16);
        let golden = directory.join(&key);
        fs::create_dir(&golden).unwrap();
        fs::write(golden.join(DISK), b"a disk").unwrap();
        fs::write(golden.join(STATE), b"a state").unwrap();
        let mut record = Record {
            version: VERSION,
            key: serde_json::from_value(key.into()).unwrap(),
            host: "here".into(),
            image: ImageRef { name: "test".into(), digest: "d".into() },
            runner: "r".into(),
            made_s: 7,
            bytes: 13,
            state_sha256: hex(&Sha256::digest(b"a state")),
            disk_sha256: hex(&Sha256::digest(b"a disk")),
        };
        change(&mut record);
        fs::write(golden.join(RECORD), serde_json::to_vec(&record).unwrap()).unwrap();
        golden
    }

    fn looked(change: impl FnOnce(&mut Record), spoil: impl FnOnce(&Path)) -> Result<Golden, String> {
        let directory = tempfile::tempdir().unwrap();
        let golden = written(directory.path(), change);
        spoil(&golden);
        read(&golden, "here").map(|(_, golden)| golden).map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_whole_and_of_this_host_is_taken_up_and_nothing_else() {
        let golden = looked(|_| {}, |_| {}).unwrap();
        assert_eq!(golden.frozen.sha256, <[u8; 32]>::from(Sha256::digest(b"a state")));
        assert_eq!((golden.bytes, golden.made_s, golden.image.name.as_str()), (13, 7, "test"));
        let bad = |change: fn(&mut Record)| looked(change, |_| {}).unwrap_err();
        assert!(bad(|record| record.host = "elsewhere".into()).contains("of this host changed"));
        assert!(bad(|record| record.version = 2).contains("another's"));
        assert!(bad(|record| record.state_sha256 = "zz".repeat(32)).contains("digest"));
        // A bit of its disk, a torn golden: the record comes last.
        assert!(
            looked(|_| {}, |golden| fs::write(golden.join(DISK), b"a disj").unwrap()).unwrap_err().contains("disk")
        );
        for gone in [RECORD, STATE, DISK] {
            assert!(looked(|_| {}, |golden| fs::remove_file(golden.join(gone)).unwrap()).is_err(), "{gone}");
        }
        let moved = |golden: &Path| fs::rename(golden, golden.with_file_name("cd".repeat(16))).unwrap();
        assert!(looked(|_| {}, moved).is_err());
    }
}
