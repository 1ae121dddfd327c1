//! QEMUs that misbehave: shell scripts in their place. What a real one does is in `tests/backend`.

use super::*;
use crate::rng::Rng;
use crate::vm::{Accel, Attachment, Boot, Confinement, VmId};

/// Complains, and ends.
const FAILS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/vm/qemu/failing-qemu");

/// Says nothing to anybody, and does not end when it is asked to.
const DEAF: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/vm/qemu/deaf-qemu");

struct Bench {
    dir: tempfile::TempDir,
    emulator: &'static str,
    installation: InstallationId,
}

impl Bench {
    fn new(emulator: &'static str) -> Self {
        let dir = tempfile::Builder::new().prefix("dfq").tempdir_in("/tmp").unwrap();
        Self { dir, emulator, installation: VmId::random(&Rng::system()) }
    }

    /// As a daemon has it: another one each time.
    fn qemu(&self) -> Qemu {
        Qemu::with_emulator(self.dir.path(), Path::new(self.emulator))
    }

    fn spec(&self) -> VmSpec {
        VmSpec {
            id: VmId::random(&Rng::system()),
            installation: self.installation.clone(),
            bound: None,
            cpus: 1,
            memory_mib: 64,
            accel: Accel::Tcg,
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

    fn left(&self) -> usize {
        std::fs::read_dir(self.dir.path()).unwrap().count()
    }
}

/// V1: it cannot be made, and its own words say why.
#[tokio::test]
async fn v1_a_qemu_that_ends_at_once_is_quoted_and_leaves_nothing() {
    let bench = Bench::new(FAILS);
    let spec = bench.spec();
    let error = bench.qemu().start(&spec).await.unwrap_err();
    assert!(crate::telemetry::chain(&error).contains("-device: no such bus"), "{}", crate::telemetry::chain(&error));
    assert_eq!(bench.qemu().list(&bench.installation).await.unwrap(), []);
    assert_eq!(bench.left(), 0);
    let missing = Qemu::with_emulator(bench.dir.path(), Path::new("/nonexistent/qemu"));
    assert!(matches!(missing.start(&spec).await, Err(VmError::Refused { .. })));
    assert!(matches!(missing.probe().await, Err(VmError::Unreachable { .. })));
    assert_eq!(missing.state(&spec.id.into()).await.unwrap(), VmState::Gone);
    assert_eq!(bench.left(), 0);
}

/// H4, V14, H16: a start that was cut before QEMU answered; the next daemon finds it, and ends it, and no other.
#[tokio::test]
async fn h16_a_qemu_that_never_answers_is_found_by_the_next_daemon_and_ended() {
    let bench = Bench::new(DEAF);
    let (spec, other) = (bench.spec(), VmSpec { installation: VmId::random(&Rng::system()), ..bench.spec() });
    for spec in [&spec, &other] {
        assert!(timeout(Duration::from_millis(300), bench.qemu().start(spec)).await.is_err(), "it never comes up");
    }
    let next = bench.qemu();
    let name = VmName::from(spec.id.clone());
    let there = [VmSummary { name: name.clone(), state: VmState::Running }];
    assert_eq!(next.list(&bench.installation).await.unwrap(), there, "and nobody else's");
    let error = next.start(&VmSpec { installation: other.installation.clone(), ..spec.clone() }).await.unwrap_err();
    assert!(crate::telemetry::chain(&error).contains("somebody else's"), "{error}");
    for spec in [spec, other] {
        next.destroy(&spec.id.clone().into()).await.unwrap();
        next.destroy(&spec.id.clone().into()).await.unwrap();
        assert_eq!(next.state(&spec.id.into()).await.unwrap(), VmState::Gone);
    }
    assert_eq!(next.list(&bench.installation).await.unwrap(), []);
    assert_eq!(bench.left(), 0);
}

/// A log takes its bytes and no more, and who writes on is not held up.
#[tokio::test]
async fn a_flood_of_complaints_ends_at_the_logs_bound() {
    use std::io::Write as _;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let mut writer = bounded_log(&path, 1000).unwrap();
    let flood = tokio::task::spawn_blocking(move || {
        let mut written = 0;
        while let Ok(bytes) = writer.write(&[b'!'; 4096]) {
            written += bytes;
        }
        written
    });
    assert!(timeout(Duration::from_secs(20), flood).await.unwrap().unwrap() >= 1000);
    assert_eq!(log::Log::open(&path).read(), "!".repeat(1000));
}
