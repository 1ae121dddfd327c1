//! Machines whose program is a shell that says that it is up, and sleeps.

use super::*;
use dayfly::rng::Rng;
use dayfly::vm::VmId;
use dayfly::vm::{Accel, Attachment, Boot, Confinement};
use std::os::unix::fs::symlink;

struct Bench {
    dir: tempfile::TempDir,
    installation: InstallationId,
}

impl Bench {
    /// A link, not a file of ours: one that was just written may not be run while another test forks.
    fn new(program: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        symlink(program, dir.path().join("guest")).unwrap();
        Self { dir, installation: VmId::random(&Rng::system()) }
    }

    /// As a daemon has it: another one each time.
    fn hypervisor(&self) -> Processes {
        let uri = format!("processes://{}", self.dir.path().display());
        Processes::of(&Config { uri, ..Config::default() }).unwrap()
    }

    fn spec(&self) -> VmSpec {
        VmSpec {
            id: VmId::random(&Rng::system()),
            installation: self.installation.clone(),
            bound: Some(("runner".into(), 42)),
            cpus: 1,
            memory_mib: 64,
            accel: Accel::Kvm,
            boot: Boot::Disk,
            overlay: self.dir.path().join("overlay"),
            base: self.dir.path().join("base"),
            frozen: None,
            attachment: Attachment::User,
            read_only: Vec::new(),
            nested: false,
            confine: Confinement::default(),
            socket_dir: self.dir.path().to_owned(),
        }
    }
}

/// Says that it is up, and does nothing for long.
const SLEEPS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/processes/sleeping-guest");

#[test]
fn only_its_own_addresses_choose_it() {
    let of = |uri: &str| Processes::of(&Config { uri: uri.into(), ..Config::default() }).map(|chosen| chosen.directory);
    assert_eq!(of("processes:///some/where"), Some("/some/where".into()));
    assert_eq!(of("qemu:///session"), None);
}

#[tokio::test]
async fn a_machine_outlives_its_maker_and_is_ended_by_the_next() {
    let bench = Bench::new(SLEEPS);
    let spec = bench.spec();
    let name = VmName::from(spec.id.clone());
    bench.hypervisor().start(&spec).await.unwrap();
    let next = bench.hypervisor();
    let found = [VmSummary { name: name.clone(), state: VmState::Running }];
    assert_eq!(next.list(&bench.installation).await.unwrap(), found);
    assert_eq!(next.list(&VmId::random(&Rng::system())).await.unwrap(), [], "of nobody else");
    next.start(&spec).await.unwrap();
    assert_eq!(next.list(&bench.installation).await.unwrap(), found, "it counts as started, and is one still");
    next.destroy(&name).await.unwrap();
    assert_eq!(next.state(&name).await.unwrap(), VmState::Gone);
    assert!(!next.description(&name).exists());
    next.destroy(&name).await.unwrap();
}

#[tokio::test]
async fn a_machine_whose_program_ends_is_gone_and_one_that_never_comes_up_was_not_started() {
    let bench = Bench::new("/bin/false");
    let hypervisor = bench.hypervisor();
    let spec = bench.spec();
    let name = VmName::from(spec.id.clone());
    let error = hypervisor.start(&spec).await.unwrap_err();
    assert!(matches!(error, VmError::Refused { what: "start VM", .. }), "{error:?}");
    assert_eq!(hypervisor.state(&name).await.unwrap(), VmState::Gone);
    assert_eq!(hypervisor.list(&bench.installation).await.unwrap(), []);
    assert!(!hypervisor.description(&name).exists());
}

#[tokio::test]
async fn what_a_start_that_was_cut_has_left_is_no_machine() {
    let bench = Bench::new(SLEEPS);
    let hypervisor = bench.hypervisor();
    let spec = bench.spec();
    let name = VmName::from(spec.id.clone());
    fs::write(hypervisor.description(&name), "{\"installation\":\"").unwrap();
    assert_eq!(hypervisor.state(&name).await.unwrap(), VmState::Gone);
    fs::write(hypervisor.description(&name), "").unwrap();
    hypervisor.start(&spec).await.unwrap();
    assert_eq!(hypervisor.state(&name).await.unwrap(), VmState::Running);
    hypervisor.destroy(&name).await.unwrap();
}
