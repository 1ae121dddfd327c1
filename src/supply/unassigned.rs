//! VMs that belong to no job: whose are they, and who takes down what a dead owner has left?
//!
//! What a job makes stands in the job's record. A VM without a job has an owner with a workspace of its own: an
//! installation id that no other has, and a directory with a record, written before anything is made. The owner holds a
//! lock on it for as long as it lives; whoever finds the lock free takes down what is left, by that installation id, and
//! only then removes the record. The daemon looks every minute, an image command when it has a workspace of its own.
//!
//! ```text
//! <image directory>/.machines/<installation id>/               its owner holds a flock on it
//! <image directory>/.machines/<installation id>/record.json    owner, hypervisor, sockets, claim
//! <image directory>/.machines/<installation id>/df-<id>.qcow2  the overlay, and what else the owner keeps there
//! ```

use super::{Claim, Setup, Supply, Users, overlay_id};
use crate::files::{Files, RealFiles, child, plain};
use crate::rng::Rng;
use crate::telemetry::chain;
use crate::vm::{self, Accel, InstallationId, VmError, VmId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

/// Below the image directory; no name of an image.
const WORKSPACES: &str = ".machines";

const RECORD_FILE: &str = "record.json";

/// Bytes of a record at most; a real one has 300.
const RECORD_BYTES_MAX: u64 = 16 * 1024;

/// Version of the records that are written here.
const RECORD_VERSION: u32 = 1;

/// Tries to make a workspace: a look for dead owners may take a new one for such.
const TRIES: u32 = 3;

/// Whose a VM is that belongs to no job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Owner {
    /// The boot test of an image.
    BootTest,
    /// A machine that is being frozen, and the first that is restored from it.
    Golden,
}

/// What is known of such a VM, durable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    version: u32,
    owner: Owner,
    /// The hypervisor's name: its VMs are there and nowhere else.
    hypervisor: String,
    installation: InstallationId,
    socket_dir: PathBuf,
    /// Its VM, once one is planned.
    claim: Option<Claim>,
}

/// The workspace of a living owner.
pub struct Workspace {
    directory: PathBuf,
    record: Record,
    lock: File,
}

impl Workspace {
    /// A new workspace, its record written. `hypervisor` names where its VMs will be.
    ///
    /// # Errors
    /// The file system's.
    pub async fn new(
        owner: Owner,
        image_directory: &Path,
        hypervisor: &vm::Config,
        socket_dir: &Path,
        rng: &Rng,
    ) -> io::Result<Self> {
        let mut tries = 0;
        loop {
            tries += 1;
            let installation = VmId::random(rng);
            let directory = image_directory.join(WORKSPACES).join(installation.as_str());
            let made = tokio::task::spawn_blocking({
                let directory = directory.clone();
                move || {
                    // Passable: QEMU may run as a user of its own.
                    DirBuilder::new().recursive(true).mode(0o711).create(&directory)?;
                    lock(&directory)
                }
            });
            let Some(lock) = made.await.map_err(io::Error::other)?? else {
                if tries == TRIES {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                continue;
            };
            let record = Record {
                version: RECORD_VERSION,
                owner,
                hypervisor: hypervisor.name().to_owned(),
                installation,
                socket_dir: socket_dir.to_owned(),
                claim: None,
            };
            let workspace = Self { directory, record, lock };
            workspace.write().await?;
            return Ok(workspace);
        }
    }

    async fn write(&self) -> io::Result<()> {
        let bytes = serde_json::to_vec(&self.record)?;
        RealFiles.replace(&self.directory.join(RECORD_FILE), bytes).await
    }

    /// Writes the names of its VM down; before anything of it is made.
    ///
    /// # Errors
    /// The file system's.
    pub async fn plan(&mut self, claim: &Claim) -> io::Result<()> {
        self.record.claim = Some(claim.clone());
        self.write().await
    }

    /// Where its overlay is, and what else it keeps.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// As a supply knows it.
    #[must_use]
    pub fn setup(&self, accel: Accel) -> Setup {
        setup(&self.directory, &self.record, accel)
    }

    /// Its owner's end: what is left is to be taken down.
    #[must_use]
    pub fn abandon(self) -> Abandoned {
        Abandoned { directory: self.directory, record: Some(self.record), _lock: self.lock }
    }
}

fn setup(directory: &Path, record: &Record, accel: Accel) -> Setup {
    Setup {
        installation: record.installation.clone(),
        accel,
        overlay_dir: directory.to_owned(),
        socket_dir: record.socket_dir.clone(),
        users: Users::default(),
    }
}

/// The lock of a workspace; `None`: somebody else has it, or has removed the workspace meanwhile.
fn lock(directory: &Path) -> io::Result<Option<File>> {
    let gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    let file = match plain::open_directory(directory) {
        Err(error) if gone(&error) => return Ok(None),
        file => file?,
    };
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
        locked => locked?,
    }
    match fs::symlink_metadata(directory) {
        Ok(found) if found.ino() == file.metadata()?.ino() => Ok(Some(file)),
        Ok(_) => Ok(None),
        Err(error) if gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The workspace of a dead owner, locked for whoever takes it down.
pub struct Abandoned {
    directory: PathBuf,
    /// None: it died before it made anything.
    record: Option<Record>,
    _lock: File,
}

/// The workspaces of dead owners whose VMs are at this hypervisor. What cannot be read is said, and left to somebody who
/// looks.
pub async fn abandoned(files: &dyn Files, image_directory: &Path, hypervisor: &vm::Config) -> Vec<Abandoned> {
    let workspaces = image_directory.join(WORKSPACES);
    let entries = match files.list(&workspaces).await {
        Ok(entries) => entries,
        // Nobody has made one, or another user.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) => Vec::new(),
        Err(error) => {
            tracing::warn!(path = %workspaces.display(), error = chain(&error), "look for VMs that belong to no job");
            Vec::new()
        }
    };
    let mut found = Vec::new();
    for entry in entries {
        let (directory, hypervisor) = (child(&workspaces, &entry.name), hypervisor.name().to_owned());
        let path = directory.clone();
        let looked = tokio::task::spawn_blocking(move || look(&directory, &hypervisor)).await;
        match looked.map_err(io::Error::other).and_then(|looked| looked) {
            Ok(workspace) => found.extend(workspace),
            Err(error) => {
                tracing::warn!(path = %path.display(), error = chain(&error), "look at a VM that belongs to no job; it is left alone");
            }
        }
    }
    found
}

/// `None`: it is not ours to take down.
fn look(directory: &Path, hypervisor: &str) -> io::Result<Option<Abandoned>> {
    // Another user's is theirs, with its VMs.
    if fs::symlink_metadata(directory)?.uid() != rustix::process::geteuid().as_raw() {
        return Ok(None);
    }
    let Some(lock) = lock(directory)? else { return Ok(None) };
    let mut bytes = Vec::new();
    match plain::open(&directory.join(RECORD_FILE)) {
        Ok(file) => file.take(RECORD_BYTES_MAX).read_to_end(&mut bytes)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(Some(Abandoned { directory: directory.to_owned(), record: None, _lock: lock }));
        }
        Err(error) => return Err(error),
    };
    let record: Record = serde_json::from_slice(&bytes)?;
    let ours = record.version == RECORD_VERSION && record.hypervisor == hypervisor;
    Ok(ours.then(|| Abandoned { directory: directory.to_owned(), record: Some(record), _lock: lock }))
}

/// Why a workspace could not be taken down yet.
#[derive(Debug, thiserror::Error)]
pub enum AbandonedError {
    /// The hypervisor's.
    #[error("look for the VMs of a dead owner")]
    Hypervisor(#[from] VmError),
    /// Files.
    #[error("remove the workspace of a dead owner")]
    Files(#[from] io::Error),
    /// Something is there again.
    #[error("a VM of a dead owner came back")]
    Back,
}

impl Abandoned {
    /// Where it is.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Takes down whatever there is of it, for ever trying. Dropped half-way, it is found again.
    ///
    /// # Errors
    /// [`AbandonedError`]; likewise.
    pub async fn take_down(self, supply: &Supply, hypervisor: &vm::Config) -> Result<(), AbandonedError> {
        if let Some(record) = &self.record {
            let host = hypervisor.host_of(supply.host(), &record.socket_dir);
            let supply = supply.at(host, setup(&self.directory, record, supply.setup().accel));
            let mut all = left(&supply).await?;
            all.extend(record.claim.as_ref().map(|claim| claim.id.clone()));
            let mut machines: Vec<_> = all.into_iter().map(|id| supply.reap_orphan(id)).collect();
            for machine in &mut machines {
                machine.release().await;
            }
            // A call of the dead may have taken effect since.
            if !left(&supply).await?.is_empty() {
                return Err(AbandonedError::Back);
            }
            // All goldens are made in one: the next one's owner is about to use it.
            if record.owner == Owner::BootTest {
                match tokio::fs::remove_dir(&record.socket_dir).await {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        tracing::warn!(path = %record.socket_dir.display(), error = chain(&error), "remove a directory of sockets");
                    }
                    _ => {}
                }
            }
        }
        Ok(RealFiles.remove(&self.directory).await?)
    }
}

/// What there is at a workspace: VMs of its installation, and overlays.
async fn left(supply: &Supply) -> Result<BTreeSet<VmId>, VmError> {
    let setup = supply.setup();
    let vms = supply.hypervisor().list(&setup.installation).await?;
    let overlays = supply.host().disks.list(&setup.overlay_dir).await?;
    let vms = vms.into_iter().map(|vm| vm.name.id().clone());
    Ok(vms.chain(overlays.iter().filter_map(|path| overlay_id(path))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(uri: &str) -> vm::Config {
        vm::Config { uri: uri.into(), ..vm::Config::default() }
    }

    fn here() -> vm::Config {
        at("qemu:///session")
    }

    async fn own(dir: &Path) -> Workspace {
        Workspace::new(Owner::BootTest, dir, &here(), &dir.join("sockets"), &Rng::system()).await.unwrap()
    }

    async fn found(dir: &Path, hypervisor: &vm::Config) -> Vec<PathBuf> {
        abandoned(&RealFiles, dir, hypervisor).await.iter().map(|workspace| workspace.directory.clone()).collect()
    }

    #[tokio::test]
    async fn a_place_is_found_when_its_owner_is_dead_and_only_then() {
        let dir = tempfile::tempdir().unwrap();
        assert!(found(dir.path(), &here()).await.is_empty(), "there is none yet");
        let mut workspace = own(dir.path()).await;
        let claim: Claim = serde_json::from_str(r#"{"id":"abcdefghijklmnop","lease":{"port":20000}}"#).unwrap();
        workspace.plan(&claim).await.unwrap();
        let directory = workspace.directory().to_owned();
        assert!(found(dir.path(), &here()).await.is_empty(), "its owner lives");
        drop(workspace);
        assert_eq!(found(dir.path(), &here()).await, std::slice::from_ref(&directory));
        assert!(found(dir.path(), &at("qemu:///system")).await.is_empty(), "its VMs are elsewhere");
        let held = abandoned(&RealFiles, dir.path(), &here()).await;
        assert_eq!(held[0].record.as_ref().unwrap().claim, Some(claim));
        assert!(found(dir.path(), &here()).await.is_empty(), "somebody takes it down already");
    }

    #[tokio::test]
    async fn what_cannot_be_read_is_left_alone_and_what_was_never_used_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let workspace = own(dir.path()).await;
        let directory = workspace.directory().to_owned();
        drop(workspace);
        let record = directory.join(RECORD_FILE);
        let written = fs::read_to_string(&record).unwrap();
        for other in [written.replace("boot_test", "stock"), written.replace("\"version\":1", "\"version\":2")] {
            assert_ne!(other, written);
            fs::write(&record, other).unwrap();
            assert!(found(dir.path(), &here()).await.is_empty(), "of a newer dayfly");
        }
        fs::remove_file(&record).unwrap();
        let all = abandoned(&RealFiles, dir.path(), &here()).await;
        assert!(all[0].record.is_none(), "it died before it made anything");
    }
}
