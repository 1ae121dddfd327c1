//! Overlays by the real `qemu-img` where it counts, and by shell scripts where it must misbehave.

use super::*;
use crate::vm::paths::RealPaths;
use crate::vm::proof::sector::disk_image;
use std::error::Error as _;
use std::os::unix::fs::MetadataExt as _;
use tempfile::TempDir;
use tokio::io::AsyncReadExt as _;

struct Bench {
    dir: TempDir,
    disks: Disks,
}

fn disks(qemu_img: &Path) -> Disks {
    Disks::new(Arc::new(RealPaths { qemu_img: qemu_img.into() }))
}

impl Bench {
    fn new(qemu_img: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("base.qcow2"), disk_image()).unwrap();
        Self { dir, disks: disks(Path::new(qemu_img)) }
    }

    /// A `qemu-img` that is this shell script. What is executed is a file of the source tree: one
    /// that was just written may be "busy", while another test's fork still holds it open.
    fn scripted(script: &str) -> Self {
        let mut bench = Self::new("");
        let program = bench.path("qemu-img");
        std::fs::write(bench.path("qemu-img.sh"), script).unwrap();
        let player = concat!(env!("CARGO_MANIFEST_DIR"), "/src/vm/disks/qemu-img-script");
        std::os::unix::fs::symlink(player, &program).unwrap();
        bench.disks = disks(&program);
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn overlay(&self) -> PathBuf {
        self.path("df-abcdefghijklmnop.qcow2")
    }

    async fn create(&self, disk_gib: u64) -> Result<(), VmError> {
        self.disks.create(&self.overlay(), &self.path("base.qcow2"), disk_gib).await
    }

    /// The failure's words and its cause's; nothing is left behind.
    async fn failure(&self) -> String {
        let error = self.create(1).await.unwrap_err();
        assert!(!self.overlay().exists(), "no half-made overlay is left");
        error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
    }
}

async fn size(overlay: &Path) -> u64 {
    let mut header = [0; 32];
    let mut file = tokio::fs::File::open(overlay).await.unwrap();
    file.read_exact(&mut header).await.unwrap();
    u64::from_be_bytes(header[24..32].try_into().unwrap())
}

#[tokio::test]
async fn an_overlay_is_private_and_no_smaller_than_its_base() {
    let bench = Bench::new("qemu-img");
    bench.create(3).await.unwrap();
    assert_eq!(size(&bench.overlay()).await, 3 * GIB);
    assert_eq!(std::fs::metadata(bench.overlay()).unwrap().mode() & 0o777, 0o600);
    bench.create(0).await.unwrap();
    assert_eq!(size(&bench.overlay()).await, 1 << 20, "the base's own size");
    assert_eq!(bench.disks.list(bench.dir.path()).await.unwrap(), [bench.overlay()]);
    bench.disks.remove(&bench.overlay()).await.unwrap();
    bench.disks.remove(&bench.overlay()).await.expect("gone counts as removed");
    assert!(bench.disks.list(bench.dir.path()).await.unwrap().is_empty());
    assert!(bench.disks.list(&bench.path("nowhere")).await.unwrap().is_empty());
}

/// T16: nobody opens what a guest has written.
#[tokio::test]
async fn t16_a_used_overlay_is_replaced_and_removed_unopened() {
    // The script logs what it is asked, and what stands at the overlay's path when it is called.
    let bench = Bench::scripted(r#"for a; do echo "$a"; done >> "$0.log"; eval "wc -c < \${$(($# - 1))}" >> "$0.log""#);
    let mut crafted = disk_image();
    crafted[8..20].copy_from_slice(&[0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 11]);
    crafted[256..267].copy_from_slice(b"/etc/shadow");
    std::fs::write(bench.overlay(), &crafted).unwrap();
    bench.create(1).await.unwrap();
    let log = std::fs::read_to_string(bench.path("qemu-img.log")).unwrap();
    let (base, overlay) = (bench.path("base.qcow2"), bench.overlay());
    let asked = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-F",
        "qcow2",
        "-b",
        base.to_str().unwrap(),
        overlay.to_str().unwrap(),
        "1073741824",
        "0",
    ];
    assert_eq!(log.lines().collect::<Vec<_>>(), asked, "formats are explicit, and the file is a new, empty one");
    std::fs::write(bench.overlay(), &crafted).unwrap();
    bench.disks.remove(&bench.overlay()).await.unwrap();
    assert_eq!(std::fs::read_to_string(bench.path("qemu-img.log")).unwrap(), log, "nothing was run to remove it");
}

/// H12: a base image that is no qcow2, is encrypted, or names another file.
#[tokio::test]
async fn h12_a_base_that_is_unfit_is_refused_by_name() {
    let bench = Bench::scripted("touch \"$0.ran\"");
    let with = |at: usize, bytes: &[u8]| {
        let mut image = disk_image();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        image
    };
    let mut external = with(7, &[3]);
    external[79] = 4;
    for (image, says) in [
        (with(8, &[0, 0, 0, 0, 0, 0, 1, 0]), "has a backing file of its own"),
        (with(35, &[2]), "is encrypted"),
        (with(7, &[9]), "is of an unknown qcow2 version"),
        (with(0, b"MZ"), "is no qcow2 image"),
        (external, "has its data in another file"),
        (b"QFI\xfb".to_vec(), "is no qcow2 image"),
        (Vec::new(), "is no qcow2 image"),
    ] {
        std::fs::write(bench.path("base.qcow2"), image).unwrap();
        let failure = bench.failure().await;
        assert!(failure.contains(says) && failure.contains("base.qcow2"), "{failure}");
    }
    std::fs::remove_file(bench.path("base.qcow2")).unwrap();
    let failure = bench.failure().await;
    assert!(failure.contains("read base image"), "{failure}");
    std::fs::create_dir(bench.path("base.qcow2")).unwrap();
    let failure = bench.failure().await;
    assert!(failure.contains("is no file"), "{failure}");
    let relative = bench.disks.create(&bench.overlay(), Path::new("base.qcow2"), 1).await.unwrap_err();
    assert!(relative.source().unwrap().to_string().contains("not absolute"));
    assert!(!bench.path("qemu-img.ran").exists(), "qemu-img never saw them");
}

/// U29: a base image that is a FIFO keeps no machine waiting.
#[test]
fn a_base_that_is_a_fifo_is_refused_at_once() {
    let failure = crate::files::plain::tests::in_time(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let bench = Bench::scripted("touch \"$0.ran\"");
        std::fs::remove_file(bench.path("base.qcow2")).unwrap();
        crate::files::plain::tests::fifo(&bench.path("base.qcow2"));
        runtime.block_on(bench.failure())
    });
    assert!(failure.contains("is no file"), "{failure}");
}

/// H13: missing, exit 1, killed, a gigabyte of output: nothing half-made is left.
#[tokio::test]
async fn h13_a_qemu_img_that_is_missing_fails_or_floods_is_our_failure() {
    let failure = Bench::new("/nonexistent/qemu-img").failure().await;
    assert!(failure.contains("start `qemu-img`"), "{failure}");
    let failure = Bench::scripted("echo 'No space left on device' >&2; exit 1").failure().await;
    assert!(failure.contains("No space left on device"), "{failure}");
    let failure = Bench::scripted("kill -9 $$").failure().await;
    assert!(failure.contains("signal: 9"), "{failure}");
    let failure = Bench::scripted("exec head -c 1000000000 /dev/zero").failure().await;
    assert!(failure.contains("more than 65536 bytes"), "{failure}");
}

/// H13: a minute, and no more.
#[tokio::test(start_paused = true)]
async fn h13_a_qemu_img_that_hangs_is_killed_at_the_deadline() {
    // A child counts as idle: the paused clock jumps straight to the deadline.
    let bench = Bench::scripted("echo $$ > \"$0.pid\"; sleep 1000");
    let error = bench.create(1).await.unwrap_err();
    assert!(matches!(error, VmError::Deadline { seconds: 60, .. }) && error.is_transient(), "{error}");
    assert!(!bench.overlay().exists());
}
