//! The benches that the contract runs on: a hypervisor, directories, and what may be expected.

use crate::sector;
use dayfly::rng::Rng;
use dayfly::vm::libvirt::Libvirt;
use dayfly::vm::proof::sector::LINE;
use dayfly::vm::{
    Accel, AccelChoice, Attachment, Backend, Boot, Config, Confinement, Ending, Host, Hypervisor, InstallationId,
    Stream, VmId, VmName, VmSpec, VmState,
};
use dayfly_doubles::fake::{FakeHypervisor, Timing};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::AsyncReadExt as _;
use tokio::time::{sleep, timeout};

/// For anything that a guest or libvirtd is waited for: minutes of a busy host under TCG.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);

/// Where a state is looked for again.
const GLANCE: Duration = Duration::from_millis(50);

pub(crate) struct Bench {
    pub(crate) host: Host,
    pub(crate) hypervisor: Arc<dyn Hypervisor>,
    pub(crate) installation: InstallationId,
    pub(crate) rng: Rng,
    /// The world of a host that is not a real one.
    fake: Option<FakeHypervisor>,
    dir: TempDir,
}

impl Bench {
    fn new(host: Host) -> Self {
        Self::with(|_| host)
    }

    /// A host whose machines are kept below the bench's own directory of sockets.
    fn with(host: impl FnOnce(&Path) -> Host) -> Self {
        let parent = std::env::var_os("DAYFLY_TEST_DIRECTORY").map_or_else(std::env::temp_dir, PathBuf::from);
        let dir = tempfile::Builder::new().prefix("df").tempdir_in(parent).unwrap();
        let mode = |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        // As the service's: QEMU's user passes the disks' directory, and not the sockets'.
        mode(dir.path(), 0o711);
        for (name, bits) in [("disks", 0o711), ("sockets", 0o700)] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
            mode(&dir.path().join(name), bits);
        }
        std::fs::write(dir.path().join("base.qcow2"), sector::disk()).unwrap();
        mode(&dir.path().join("base.qcow2"), 0o644);
        let rng = Rng::system();
        let host = host(&dir.path().join("sockets"));
        Self { hypervisor: host.hypervisor.clone(), host, installation: VmId::random(&rng), rng, fake: None, dir }
    }

    /// The fake, its guests doing what the boot sector does.
    pub(crate) fn fake() -> Self {
        let fake = FakeHypervisor::new();
        fake.set_timing(Timing { boot: Duration::from_secs(1), ..Timing::default() });
        fake.set_guest(sector::script);
        fake.set_freezes(true);
        Self { fake: Some(fake.clone()), ..Self::new(fake.host()) }
    }

    /// libvirt's test driver.
    pub(crate) fn test_driver() -> Self {
        let config = Config { uri: "test:///default".into(), accel: AccelChoice::Tcg, ..Config::default() };
        Self::new(Libvirt::new(&config).with_domain_type("test").host())
    }

    /// The libvirtd of the environment; `None` (and a line that says so) without one.
    pub(crate) fn real(test: &str) -> Option<Self> {
        let Ok(uri) = std::env::var("DAYFLY_TEST_LIBVIRT_URI") else {
            skipped(test, "DAYFLY_TEST_LIBVIRT_URI is not set");
            return None;
        };
        Some(Self::new(Libvirt::new(&Config { uri, accel: AccelChoice::Tcg, ..Config::default() }).host()))
    }

    /// Plain QEMU, where that is asked for; `None` (and a line that says so) elsewhere.
    pub(crate) fn qemu(test: &str) -> Option<Self> {
        if std::env::var("DAYFLY_TEST_BACKEND").as_deref() != Ok("qemu") {
            skipped(test, "DAYFLY_TEST_BACKEND is not qemu");
            return None;
        }
        Some(Self::with(qemu))
    }

    /// The same bench in the next daemon's eyes, which has plain QEMU, and knows nothing yet.
    pub(crate) fn next_daemon(&mut self) {
        self.host = qemu(&self.sockets());
        self.hypervisor = self.host.hypervisor.clone();
    }

    pub(crate) fn disks(&self) -> PathBuf {
        self.dir.path().join("disks")
    }

    pub(crate) fn sockets(&self) -> PathBuf {
        self.dir.path().join("sockets")
    }

    pub(crate) fn base(&self) -> PathBuf {
        self.dir.path().join("base.qcow2")
    }

    /// A kernel and an initrd beside the base image, for QEMU's user to read.
    pub(crate) fn direct_boot(&self, kernel: &[u8]) -> Boot {
        let file = |name: &str, bytes: &[u8]| {
            let path = self.dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
            path
        };
        Boot::Direct { kernel: file("vmlinuz", kernel), initrd: file("initrd", &[0; 512]), cmdline: "quiet".into() }
    }

    /// Base image, kernel and initrd belong to whom they belonged.
    pub(crate) fn assert_image_is_ours(&self, boot: &Boot) {
        let Boot::Direct { kernel, initrd, .. } = boot else { panic!("a kernel") };
        let ours = std::fs::metadata(self.dir.path()).unwrap().uid();
        for path in [&self.base(), kernel, initrd] {
            assert_eq!(std::fs::metadata(path).unwrap().uid(), ours, "{}", path.display());
        }
    }

    pub(crate) fn overlay(&self, id: &VmId) -> PathBuf {
        self.disks().join(format!("df-{id}.qcow2"))
    }

    /// A file for what is frozen.
    pub(crate) fn frozen_state(&self) -> PathBuf {
        self.dir.path().join("frozen-state")
    }

    /// Puts the disk of a machine that was frozen aside, once its QEMU has gone.
    pub(crate) async fn keep_disk(&self, spec: &VmSpec) -> PathBuf {
        let kept = self.disks().join("frozen.qcow2");
        self.hypervisor.destroy(&spec.id.clone().into()).await.unwrap();
        if self.fake.is_none() {
            std::fs::rename(&spec.overlay, &kept).unwrap();
        }
        kept
    }

    /// One bit of what was frozen is another.
    pub(crate) async fn damage(&self, state: &Path) {
        if let Some(fake) = &self.fake {
            return fake.damage(state);
        }
        let mut bytes = std::fs::read(state).unwrap();
        let last = bytes.len() / 2;
        bytes[last] ^= 1;
        std::fs::remove_file(state).unwrap();
        std::fs::write(state, bytes).unwrap();
    }

    /// A small machine of the boot sector.
    pub(crate) fn spec(&self) -> VmSpec {
        let id = VmId::random(&self.rng);
        VmSpec {
            installation: self.installation.clone(),
            bound: Some(("a <runner>".into(), 42)),
            cpus: 1,
            memory_mib: 64,
            accel: Accel::Tcg,
            boot: Boot::Disk,
            overlay: self.overlay(&id),
            base: self.base(),
            frozen: None,
            attachment: Attachment::User,
            read_only: Vec::new(),
            nested: false,
            confine: Confinement::default(),
            socket_dir: self.sockets(),
            id,
        }
    }

    /// Makes the overlay of a machine and starts it.
    pub(crate) async fn started(&self) -> (VmSpec, VmName) {
        let spec = self.spec();
        self.host.disks.create(&spec.overlay, &spec.base, 1).await.unwrap();
        self.hypervisor.start(&spec).await.unwrap();
        let name = spec.id.clone().into();
        (spec, name)
    }

    /// Destroys it and removes all that is its.
    pub(crate) async fn end(&self, spec: &VmSpec) {
        self.hypervisor.destroy(&spec.id.clone().into()).await.unwrap();
        self.host.disks.remove(&spec.overlay).await.unwrap();
        self.host.sockets.remove(&spec.socket_dir, &spec.id).await.unwrap();
    }

    pub(crate) async fn channel(&self, spec: &VmSpec) -> Box<dyn Stream> {
        self.host.sockets.channel(&spec.socket_dir, &spec.id).await.unwrap()
    }

    pub(crate) async fn door(&self, spec: &VmSpec) -> Box<dyn Stream> {
        self.host.sockets.door(&spec.socket_dir, &spec.id).await.unwrap()
    }

    pub(crate) async fn console(&self, spec: &VmSpec) -> Box<dyn Stream> {
        self.host.sockets.console(&spec.socket_dir, &spec.id).await.unwrap()
    }

    pub(crate) async fn listed(&self) -> Vec<VmName> {
        self.hypervisor.list(&self.installation).await.unwrap().into_iter().map(|vm| vm.name).collect()
    }

    /// The first state that is told, by a libvirtd that may be on its way down or up.
    pub(crate) async fn first_state(&self, name: &VmName) -> VmState {
        let told = async {
            loop {
                match self.hypervisor.state(name).await {
                    Ok(state) => return state,
                    Err(error) => assert!(error.is_transient(), "{error}"),
                }
                sleep(GLANCE).await;
            }
        };
        timeout(LIMIT, told).await.unwrap_or_else(|_| panic!("nobody tells the state of {name}"))
    }

    pub(crate) async fn await_state(&self, name: &VmName, wanted: VmState) {
        let reached = async {
            while self.first_state(name).await != wanted {
                sleep(GLANCE).await;
            }
        };
        timeout(LIMIT, reached).await.unwrap_or_else(|_| panic!("{name} did not become {wanted:?}"));
    }

    /// Waits for the end of a VM, and says how it was.
    pub(crate) async fn await_ending(&self, name: &VmName) -> Ending {
        let ended = async {
            loop {
                if let Some(ending) = self.first_state(name).await.ending() {
                    return ending;
                }
                sleep(GLANCE).await;
            }
        };
        timeout(LIMIT, ended).await.unwrap_or_else(|_| panic!("{name} did not end"))
    }

    /// All is given back: no VM of this bench, no file.
    pub(crate) async fn assert_clean(&self) {
        assert_eq!(self.listed().await, []);
        for dir in [self.disks(), self.sockets()] {
            let left: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
            assert!(left.is_empty(), "{left:?}");
        }
    }
}

/// Plain QEMU's host.
pub(crate) fn qemu(directory: &Path) -> Host {
    Config { backend: Backend::Qemu, accel: AccelChoice::Tcg, ..Config::default() }.host(directory)
}

/// Waits until a console prints the boot sector's line from now on.
pub(crate) async fn await_line(console: &mut Box<dyn Stream>) {
    await_bytes(console, LINE.as_bytes()).await;
}

pub(crate) async fn await_bytes(stream: &mut Box<dyn Stream>, wanted: &[u8]) {
    let mut seen = Vec::new();
    let came = async {
        while !seen.ends_with(wanted) {
            seen.push(stream.read_u8().await.unwrap());
        }
    };
    let came = timeout(LIMIT, came).await;
    assert!(came.is_ok(), "no {:?} in {:?}", String::from_utf8_lossy(wanted), String::from_utf8_lossy(&seen));
}

/// Waits for the end of a stream, whatever comes before it.
pub(crate) async fn await_end(stream: &mut Box<dyn Stream>) {
    // A killed QEMU may leave a reset behind instead of an end.
    let _ = timeout(LIMIT, stream.read_to_end(&mut Vec::new())).await.expect("the stream ends with the VM");
}

/// Says, past the harness's capture, that a test did not run, and how many have not so far.
pub(crate) fn skipped(test: &str, why: &str) {
    static SKIPPED: AtomicUsize = AtomicUsize::new(0);
    let n = SKIPPED.fetch_add(1, Ordering::Relaxed) + 1;
    // In one piece, for the harness writes at the same time.
    let line = format!("backend: skipped {test}: {why} ({n} skipped so far)\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
}
