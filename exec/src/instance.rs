//! Where does this run live, and what have dead ones left?
//!
//! Each run is an installation of its own: a directory with a lock that is held while it lives, and
//! below it the state directory of its daemon, with an installation id that no other has. The next
//! run reaps those whose lock is free: their VMs, known by *their* installation id, and their files.
//! A service's VMs carry its own id, so nothing here can touch them; runs beside each other neither.
//!
//! ```text
//! <work>/lock                 held while runs are made and reaped
//! <work>/k3x9q2ab/lock        held by the run
//! <work>/k3x9q2ab/place.json  which hypervisor, which runtime directory
//! <work>/k3x9q2ab/state/      the daemon's
//! <runtime>/k3x9q2ab/         sockets: short, for their paths end at 107 bytes
//! ```

use dayfly::daemon::{self, DaemonError, Installation};
use dayfly::files::{Files, child, plain};
use dayfly::rng::Rng;
use dayfly::telemetry::chain;
use dayfly::vm::{Hypervisor, VmError, VmId};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// How long one run waits while others are made and reaped: a VM that does not go takes 30 s.
const WAIT: Duration = Duration::from_secs(120);
/// Pause between two tries.
const WAIT_STEP: Duration = Duration::from_millis(100);
/// `df-<id>.egress` in `vm/` below it must fit into 107 bytes.
const RUNTIME_BYTES_MAX: usize = 77;
/// Bytes of `place.json` at most.
const PLACE_BYTES_MAX: u64 = 16 * 1024;

/// The hypervisor of the run with this runtime directory: without libvirt each has its own.
pub type Machines<'a> = dyn Fn(&Path) -> Arc<dyn Hypervisor> + Sync + 'a;

/// Why there is no place for this run.
#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    /// A directory or file of ours.
    #[error("{what} `{}`", path.display())]
    Files {
        /// What was tried.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A directory that belongs to somebody else.
    #[error("`{}` is not a directory of yours alone; remove it, or set XDG_RUNTIME_DIR", .0.display())]
    Foreign(PathBuf),
    /// The path is too long for sockets.
    #[error("`{}` is too long a path for the sockets in it (at most {RUNTIME_BYTES_MAX} bytes); set XDG_RUNTIME_DIR to a shorter one", .0.display())]
    TooLong(PathBuf),
    /// Another run does not come to an end with its own start.
    #[error("wait for another dayfly exec that is starting; see `{}`", .0.display())]
    Busy(PathBuf),
    /// The lock of the run.
    #[error("claim a place for this run")]
    Lock(#[source] DaemonError),
}

/// What a later run must know to reap this one.
#[derive(Debug, Serialize, Deserialize)]
struct Place {
    /// libvirt URI: its VMs are there and nowhere else.
    uri: String,
    runtime: PathBuf,
}

/// Where runs live.
#[derive(Clone, Debug)]
pub struct Directories {
    /// States of runs.
    pub work: PathBuf,
    /// Sockets of runs.
    pub runtime: PathBuf,
}

/// The place of one run.
#[derive(Debug)]
pub struct Instance {
    /// Where both are, unless `runtime` is elsewhere; the one that is there from the start.
    pub root: PathBuf,
    /// The daemon's state directory.
    pub state: PathBuf,
    /// The daemon's runtime directory.
    pub runtime: PathBuf,
    _lock: daemon::Lock,
}

impl Directories {
    /// `work` if given, else the user's state directory; the runtime directory of the session, else a
    /// directory of the user's in `/tmp`. For root the system's directories, where QEMU's own user
    /// can reach overlays.
    ///
    /// # Errors
    /// [`InstanceError::Foreign`]: somebody else has made our directory in `/tmp`.
    pub fn choose(work: Option<PathBuf>) -> Result<Self, InstanceError> {
        let variable = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
        let user = rustix::process::geteuid();
        let home = || variable("HOME").map(|home| home.join(".local/state"));
        let work = match (work, variable("XDG_STATE_HOME").or_else(home)) {
            (Some(path), _) => std::path::absolute(&path).unwrap_or(path),
            (None, _) if user.is_root() => "/var/lib/dayfly/exec".into(),
            (None, Some(state)) => state.join("dayfly/exec"),
            (None, None) => {
                let path = PathBuf::from(format!("/tmp/dayfly-{}", user.as_raw()));
                // Directories in it are removed: they must not be somebody else's, nor ours behind a link.
                make_private(&path)?;
                path
            }
        };
        let session = variable("XDG_RUNTIME_DIR").filter(|dir| dir.is_dir() && dir.as_os_str().len() < 50);
        let runtime = match session {
            Some(session) => session.join("dayfly-exec"),
            None if user.is_root() => "/run/dayfly-exec".into(),
            None => format!("/tmp/dayfly-exec-{}", user.as_raw()).into(),
        };
        make_private(&runtime)?;
        Ok(Self { work, runtime })
    }

    /// Reaps dead runs at `uri`, then makes a place for this one. `machines`: those of the run with this runtime
    /// directory.
    ///
    /// # Errors
    /// [`InstanceError`]. What cannot be reaped is logged and left for the next run.
    pub async fn claim(
        &self,
        uri: &str,
        machines: &Machines<'_>,
        files: &dyn Files,
        rng: &Rng,
    ) -> Result<Instance, InstanceError> {
        make_directory(&self.work)?;
        let _starting = self.wait_for_turn().await?;
        self.reap(uri, machines).await;
        let name: String = VmId::random(rng).as_str().chars().take(8).collect();
        let root = child(&self.work, &name);
        let runtime = child(&self.runtime, &name);
        if runtime.as_os_str().len() > RUNTIME_BYTES_MAX {
            return Err(InstanceError::TooLong(runtime));
        }
        make_directory(&root)?;
        let lock = daemon::lock(&root).map_err(InstanceError::Lock)?;
        let place = Place { uri: uri.to_owned(), runtime: runtime.clone() };
        let file = root.join("place.json");
        let bytes = serde_json::to_vec(&place).expect("two strings always serialise");
        files.replace(&file, bytes).await.map_err(|source| InstanceError::Files {
            what: "write",
            path: file,
            source,
        })?;
        make_directory(&runtime)?;
        Ok(Instance { state: root.join("state"), root, runtime, _lock: lock })
    }

    /// One run at a time is made: a place without its lock would look like a dead one's.
    async fn wait_for_turn(&self) -> Result<daemon::Lock, InstanceError> {
        let until = Instant::now() + WAIT;
        loop {
            match daemon::lock(&self.work) {
                Ok(lock) => return Ok(lock),
                Err(DaemonError::Locked { .. }) if Instant::now() < until => tokio::time::sleep(WAIT_STEP).await,
                Err(DaemonError::Locked { .. }) => return Err(InstanceError::Busy(self.work.clone())),
                Err(error) => return Err(InstanceError::Lock(error)),
            }
        }
    }

    async fn reap(&self, uri: &str, machines: &Machines<'_>) {
        let Ok(entries) = std::fs::read_dir(&self.work) else { return };
        let mut roots: Vec<PathBuf> = entries.flatten().map(|e| e.path()).filter(|p| p.is_dir()).collect();
        roots.sort();
        for root in roots {
            // Held: it lives. The lock is let go before the directory is removed, under our turn's.
            let Ok(_lock) = daemon::lock(&root) else { continue };
            match self.reap_one(&root, uri, machines).await {
                Ok(true) => tracing::info!(path = %root.display(), "removed what an interrupted run left"),
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(path = %root.display(), error = chain(&*error), "an interrupted run's leftovers stay for now")
                }
            }
        }
    }

    /// `false`: it is another hypervisor's matter.
    async fn reap_one(
        &self,
        root: &Path,
        uri: &str,
        machines: &Machines<'_>,
    ) -> Result<bool, Box<dyn std::error::Error + Send + Sync>> {
        let place: Option<Place> = read_json(&root.join("place.json"))?;
        if let Some(place) = &place {
            if place.uri != uri {
                return Ok(false);
            }
            if let Some(installation) = read_json::<Installation>(&root.join("state/installation.json"))? {
                destroy_all(&*machines(&place.runtime), &installation).await?;
            }
            // Only below the directory where we would have made it.
            if place.runtime.parent() == Some(self.runtime.as_path()) {
                remove(&place.runtime)?;
            }
        }
        remove(root)?;
        Ok(true)
    }
}

impl Instance {
    /// Removes the place if no VM is left in it; else the next run does.
    pub async fn close(self, hypervisor: &dyn Hypervisor) {
        let ended = async {
            if let Some(installation) = read_json::<Installation>(&self.state.join("installation.json"))? {
                destroy_all(hypervisor, &installation).await?;
            }
            remove(&self.runtime)?;
            remove(&self.root)?;
            Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
        };
        if let Err(error) = ended.await {
            tracing::warn!(path = %self.root.display(), error = chain(&*error), "leftovers stay for the next run to remove");
        }
    }
}

async fn destroy_all(hypervisor: &dyn Hypervisor, installation: &Installation) -> Result<(), VmError> {
    for vm in hypervisor.list(&installation.id).await? {
        tracing::info!(vm = %vm.name, "destroying a VM that an interrupted run left");
        hypervisor.destroy(&vm.name).await?;
    }
    Ok(())
}

/// `None`: no such file. One that cannot be read as what it should be is an error: somebody must look.
fn read_json<T: serde::de::DeserializeOwned>(
    path: &Path,
) -> Result<Option<T>, Box<dyn std::error::Error + Send + Sync>> {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    match plain::open(path) {
        Ok(file) => file.take(PLACE_BYTES_MAX).read_to_end(&mut bytes)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    Ok(Some(serde_json::from_slice(&bytes)?))
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// A directory that others may pass through but not list: QEMU's own user, in system mode.
fn make_directory(path: &Path) -> Result<(), InstanceError> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o711).create(path);
    made.map_err(|source| InstanceError::Files { what: "make directory", path: path.to_owned(), source })
}

/// A directory in a place where anybody may make one: it must be ours, no link, and closed to others.
fn make_private(path: &Path) -> Result<(), InstanceError> {
    let failed = |source| InstanceError::Files { what: "make directory", path: path.to_owned(), source };
    match std::fs::DirBuilder::new().mode(0o711).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
        _ => {}
    }
    let metadata = path.symlink_metadata().map_err(failed)?;
    let ours =
        metadata.is_dir() && metadata.uid() == rustix::process::geteuid().as_raw() && metadata.mode() & 0o022 == 0;
    if ours { Ok(()) } else { Err(InstanceError::Foreign(path.to_owned())) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dayfly::files::RealFiles;
    use dayfly::vm::{Accel, Attachment, Boot, Confinement, VmSpec};
    use dayfly_doubles::fake::FakeHypervisor;

    const URI: &str = "qemu:///session";

    struct Scene {
        dir: tempfile::TempDir,
        hypervisor: FakeHypervisor,
        rng: Rng,
    }

    impl Scene {
        fn new() -> Self {
            let dir = tempfile::Builder::new().prefix("e").tempdir_in("/tmp").unwrap();
            std::fs::create_dir(dir.path().join("run")).unwrap();
            Self { dir, hypervisor: FakeHypervisor::new(), rng: Rng::seeded(1) }
        }

        fn directories(&self) -> Directories {
            Directories { work: self.dir.path().join("work"), runtime: self.dir.path().join("run") }
        }

        async fn claim(&self, uri: &str) -> Instance {
            self.directories().claim(uri, &|_| Arc::new(self.hypervisor.clone()), &RealFiles, &self.rng).await.unwrap()
        }

        /// A VM of this installation.
        async fn vm(&self, installation: &Installation) -> VmId {
            let id = VmId::random(&self.rng);
            let spec = VmSpec {
                id: id.clone(),
                installation: installation.id.clone(),
                bound: None,
                cpus: 1,
                memory_mib: 512,
                accel: Accel::Tcg,
                boot: Boot::Disk,
                overlay: "/o.qcow2".into(),
                base: "/b.qcow2".into(),
                frozen: None,
                attachment: Attachment::User,
                read_only: Vec::new(),
                nested: false,
                confine: Confinement::default(),
                socket_dir: "/s".into(),
            };
            self.hypervisor.host().disks.create(&spec.overlay, &spec.base, 1).await.unwrap();
            self.hypervisor.start(&spec).await.unwrap();
            id
        }

        async fn installation(&self, instance: &Instance) -> Installation {
            Installation::open(&RealFiles, &instance.state, &self.rng).await.unwrap()
        }

        fn vms(&self) -> Vec<VmId> {
            self.hypervisor.vms().into_iter().map(|(spec, _)| spec.id).collect()
        }

        fn runs(&self) -> usize {
            std::fs::read_dir(self.directories().work).unwrap().filter(|e| e.as_ref().unwrap().path().is_dir()).count()
        }
    }

    /// T38: a run reaps what dead runs have left, and nothing of a daemon's.
    #[tokio::test(start_paused = true)]
    async fn a_dead_runs_vms_and_files_are_reaped_and_no_others() {
        let scene = Scene::new();
        let dead = scene.claim(URI).await;
        let dead_installation = scene.installation(&dead).await;
        let (root, runtime) = (dead.root.clone(), dead.runtime.clone());
        let living = scene.claim(URI).await;
        let living_vm = scene.vm(&scene.installation(&living).await).await;
        let foreign = Installation { id: VmId::random(&scene.rng), machine_id: "0".repeat(32) };
        let foreign_vm = scene.vm(&foreign).await;
        scene.vm(&dead_installation).await;
        assert_eq!(scene.vms().len(), 3);
        drop(dead);

        let next = scene.claim(URI).await;
        let mut left = scene.vms();
        left.sort();
        let mut expected = vec![living_vm, foreign_vm];
        expected.sort();
        assert_eq!(left, expected);
        assert!(!root.exists() && !runtime.exists());
        assert!(living.root.exists() && living.runtime.exists() && next.root.exists());
        assert_ne!(scene.installation(&next).await.id, scene.installation(&living).await.id);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_at_another_hypervisor_or_cannot_be_reached_stays() {
        let scene = Scene::new();
        let dead = scene.claim("qemu:///system").await;
        scene.vm(&scene.installation(&dead).await).await;
        drop(dead);
        let other = scene.claim(URI).await;
        assert_eq!((scene.vms().len(), scene.runs()), (1, 2), "another hypervisor's VMs are not ours to judge");
        drop(other);
        scene.hypervisor.set_reachable(false);
        let unlucky = scene.claim("qemu:///system").await;
        assert_eq!(scene.runs(), 3, "all three: nobody can say what the dead ones left");
        drop(unlucky);
        scene.hypervisor.set_reachable(true);
        scene.claim("qemu:///system").await.close(&scene.hypervisor).await;
        assert_eq!((scene.vms().len(), scene.runs()), (0, 1), "the one of {URI}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_run_that_ends_well_leaves_nothing() {
        let scene = Scene::new();
        let run = scene.claim(URI).await;
        scene.vm(&scene.installation(&run).await).await;
        let runtime = run.runtime.clone();
        run.close(&scene.hypervisor).await;
        assert_eq!((scene.vms().len(), scene.runs()), (0, 0));
        assert!(!runtime.exists());
    }

    #[tokio::test(start_paused = true)]
    async fn a_place_that_was_never_finished_is_removed() {
        let scene = Scene::new();
        drop(scene.claim(URI).await);
        let half = scene.directories().work.join("half");
        std::fs::create_dir(&half).unwrap();
        let run = scene.claim(URI).await;
        assert!(!half.exists());
        // A path that another has put into the file leads nowhere.
        let elsewhere = scene.dir.path().join("precious");
        std::fs::create_dir(&elsewhere).unwrap();
        let place = Place { uri: URI.into(), runtime: elsewhere.clone() };
        std::fs::write(run.root.join("place.json"), serde_json::to_vec(&place).unwrap()).unwrap();
        drop(run);
        let _next = scene.claim(URI).await;
        assert!(elsewhere.exists());
        assert_eq!(scene.runs(), 1);
    }

    #[test]
    fn a_directory_in_tmp_must_be_ours_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d");
        make_private(&path).unwrap();
        make_private(&path).unwrap();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        std::fs::set_permissions(&path, open).unwrap();
        assert!(matches!(make_private(&path), Err(InstanceError::Foreign(_))));
        std::os::unix::fs::symlink("/tmp", dir.path().join("link")).unwrap();
        assert!(matches!(make_private(&dir.path().join("link")), Err(InstanceError::Foreign(_))));
    }
}
