//! Does a guest run here at all? Proven by bytes from one, and by nothing less (design D16): a
//! host exists on which `/dev/kvm` opens and creates a VM, and the guest never says a word.
//!
//! The guest is a boot sector of ours, 132 bytes that the firmware loads and that print one line
//! on the serial console. It needs no image, and comes up by the same calls as any VM: overlay,
//! domain, console. Used by `doctor`, and by the daemon at start where `accel = "auto"`.

use super::{Accel, Attachment, Boot, Hypervisor, InstallationId, VmError, VmId, VmSpec};
use crate::rng::Rng;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::AsyncReadExt as _;
use tokio::time::{Instant, timeout};

/// What the boot sector prints, twice a second.
pub const LINE: &str = "dayfly: boot sector runs\r\n";

/// From the VM's start to the line. KVM needs 0.2 s, TCG 1 s; the rest is for a busy host. A host
/// whose KVM is silent costs this once, at start.
const DEADLINE: Duration = Duration::from_secs(15);

/// More than SeaBIOS and the sector need.
const MEMORY_MIB: u64 = 64;

/// The boot sector, for BIOS, in 16-bit real mode. It prints [`LINE`] every nine ticks of the
/// BIOS timer (18.2 a second): again and again, for nobody may be listening yet. In between it
/// echoes what it receives, and `q` powers the machine off.
#[rustfmt::skip]
const CODE: &[u8] = &[
    0xfa,                               //      cli
    0x31, 0xc0,                         //      xor  ax, ax
    0x8e, 0xd8,                         //      mov  ds, ax
    0x8e, 0xd0,                         //      mov  ss, ax
    0xbc, 0x00, 0x7c,                   //      mov  sp, 0x7c00
    0xea, 0x0f, 0x7c, 0x00, 0x00,       //      jmp  0:0x7c0f
    0xba, 0xfb, 0x03,                   //      mov  dx, 0x3fb      COM1, line control:
    0xb0, 0x80, 0xee,                   //      out  dx, 0x80         divisor next
    0xba, 0xf8, 0x03,                   //      mov  dx, 0x3f8
    0xb0, 0x01, 0xee,                   //      out  dx, 1            115200 baud
    0x42, 0x30, 0xc0, 0xee,             //      out  dx + 1, 0
    0xba, 0xfb, 0x03,                   //      mov  dx, 0x3fb
    0xb0, 0x03, 0xee,                   //      out  dx, 3            8 data bits, no parity, 1 stop bit
    0xfb,                               //      sti
    0xbe, 0x6a, 0x7c,                   // say: mov  si, line
    0xac,                               // nxt: lodsb
    0x84, 0xc0,                         //      test al, al
    0x74, 0x05,                         //      jz   end
    0xe8, 0x1f, 0x00,                   //      call put
    0xeb, 0xf6,                         //      jmp  nxt
    0xb9, 0x09, 0x00,                   // end: mov  cx, 9
    0xf4,                               // slp: hlt                  until the next tick
    0xba, 0xfd, 0x03,                   // get: mov  dx, 0x3fd       COM1, line status
    0xec,                               //      in   al, dx
    0xa8, 0x01,                         //      test al, 1           anything received?
    0x74, 0x0d,                         //      jz   tck
    0xba, 0xf8, 0x03,                   //      mov  dx, 0x3f8
    0xec,                               //      in   al, dx
    0x3c, b'q',                         //      cmp  al, 'q'
    0x74, 0x1a,                         //      je   off
    0xe8, 0x06, 0x00,                   //      call put
    0xeb, 0xeb,                         //      jmp  get
    0xe2, 0xe8,                         // tck: loop slp
    0xeb, 0xd6,                         //      jmp  say
    0x88, 0xc4,                         // put: mov  ah, al
    0xba, 0xfd, 0x03,                   //      mov  dx, 0x3fd
    0xec,                               // ful: in   al, dx
    0xa8, 0x20,                         //      test al, 0x20        room to send?
    0x74, 0xfb,                         //      jz   ful
    0x88, 0xe0,                         //      mov  al, ah
    0xba, 0xf8, 0x03,                   //      mov  dx, 0x3f8
    0xee,                               //      out  dx, al
    0xc3,                               //      ret
    0xba, 0x04, 0x06,                   // off: mov  dx, 0x604       ACPI PM1a control, where SeaBIOS puts it
    0xb8, 0x00, 0x20,                   //      mov  ax, 0x2000      sleep enable, type 0: QEMU's S5
    0xef,                               //      out  dx, ax
    0xeb, 0xf7,                         //      jmp  off
]; // line:

/// Smallest cluster that qcow2 allows.
const CLUSTER: usize = 512;

/// Size of the disk: one of a single sector has a geometry that SeaBIOS does not boot from.
const DISK_BYTES: u64 = 1 << 20;

/// A qcow2 image (version 2) of a 1 MiB disk that holds the boot sector: six clusters, in order
/// header, refcount table, refcount block, L1 table, L2 table, the sector.
#[must_use]
pub fn disk_image() -> Vec<u8> {
    const COPIED: u64 = 1 << 63;
    let at = |cluster: u64| cluster * CLUSTER as u64;
    let mut header = b"QFI\xfb".to_vec();
    header.extend(2_u32.to_be_bytes()); // version
    header.extend([0; 12]); // no backing file
    header.extend(9_u32.to_be_bytes()); // cluster bits
    header.extend(DISK_BYTES.to_be_bytes());
    header.extend(0_u32.to_be_bytes()); // not encrypted
    header.extend(32_u32.to_be_bytes()); // L1 entries: each L2 table leads to 64 clusters
    header.extend(at(3).to_be_bytes()); // L1 table
    header.extend(at(1).to_be_bytes()); // refcount table
    header.extend(1_u32.to_be_bytes()); // its clusters
    header.extend([0; 12]); // no snapshots

    let mut sector = CODE.to_vec();
    sector.extend(LINE.as_bytes());
    sector.resize(CLUSTER - 2, 0);
    sector.extend([0x55, 0xaa]);

    let refcounts = [1_u16; 6].iter().flat_map(|count| count.to_be_bytes()).collect();
    let clusters = [
        header,
        at(2).to_be_bytes().to_vec(),
        refcounts,
        (at(4) | COPIED).to_be_bytes().to_vec(),
        (at(5) | COPIED).to_be_bytes().to_vec(),
        sector,
    ];
    let mut image = Vec::with_capacity(clusters.len() * CLUSTER);
    for mut cluster in clusters {
        cluster.resize(CLUSTER, 0);
        image.extend(cluster);
    }
    image
}

/// A guest that ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Proof {
    /// From the request to start it to its first line.
    pub took: Duration,
}

/// Why nothing was proven.
#[derive(Debug, thiserror::Error)]
pub enum ProofError {
    /// The boot sector's disk could not be written.
    #[error("write boot disk `{}`", .path.display())]
    Disk {
        /// Where.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The VM could not be made.
    #[error("start a VM of one boot sector")]
    Start(#[source] VmError),
    /// Its console could not be read.
    #[error("read the console of a VM of one boot sector")]
    Console(#[source] io::Error),
    /// It ended before it said its line.
    #[error("a VM of one boot sector ended without a word")]
    Ended,
    /// It runs, to no effect: the acceleration is broken.
    #[error("a VM of one boot sector said nothing within {} s", DEADLINE.as_secs())]
    Silent,
}

/// Where a proof may put its files. Both directories exist.
#[derive(Clone, Copy, Debug)]
pub struct Places<'a> {
    /// For the disks: QEMU's user must be able to pass it.
    pub disks: &'a Path,
    /// For the sockets: a short path.
    pub sockets: &'a Path,
}

/// Whether KVM runs guests here. Leaves nothing behind; what a daemon that dies in it leaves
/// carries `installation` and is reaped like any VM and overlay (and a file of 3 KiB,
/// `proof-<id>.qcow2`, stays).
///
/// # Errors
/// [`ProofError`]; within 15 s of a start that worked.
pub async fn prove_kvm(
    hypervisor: &dyn Hypervisor,
    places: Places<'_>,
    installation: &InstallationId,
    rng: &Rng,
) -> Result<Proof, ProofError> {
    prove(hypervisor, Accel::Kvm, places, installation, rng).await
}

/// [`prove_kvm`], of any acceleration.
///
/// # Errors
/// As [`prove_kvm`].
pub async fn prove(
    hypervisor: &dyn Hypervisor,
    accel: Accel,
    places: Places<'_>,
    installation: &InstallationId,
    rng: &Rng,
) -> Result<Proof, ProofError> {
    let id = VmId::random(rng);
    let spec = VmSpec {
        installation: installation.clone(),
        bound: None,
        cpus: 1,
        memory_mib: MEMORY_MIB,
        accel,
        boot: Boot::Disk,
        overlay: places.disks.join(format!("df-{id}.qcow2")),
        base: places.disks.join(format!("proof-{id}.qcow2")),
        attachment: Attachment::User,
        socket_dir: places.sockets.to_owned(),
        id,
    };
    let proof = boot(hypervisor, &spec).await;
    // What cannot be removed now is an orphan, and the sweep's.
    let _ = hypervisor.destroy(&spec.id.clone().into()).await;
    let _ = hypervisor.remove_overlay(&spec.overlay).await;
    let _ = hypervisor.remove_sockets(&spec.socket_dir, &spec.id).await;
    let _ = tokio::fs::remove_file(&spec.base).await;
    proof
}

async fn boot(hypervisor: &dyn Hypervisor, spec: &VmSpec) -> Result<Proof, ProofError> {
    write_disk(&spec.base).await.map_err(|source| ProofError::Disk { path: spec.base.clone(), source })?;
    hypervisor.create_overlay(&spec.overlay, &spec.base, 1).await.map_err(ProofError::Start)?;
    let since = Instant::now();
    hypervisor.start(spec).await.map_err(ProofError::Start)?;
    timeout(DEADLINE, first_line(hypervisor, spec)).await.map_err(|_| ProofError::Silent)??;
    Ok(Proof { took: since.elapsed() })
}

async fn write_disk(path: &Path) -> io::Result<()> {
    tokio::fs::write(path, disk_image()).await?;
    // QEMU's user reads it, whatever our umask.
    tokio::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644)).await
}

async fn first_line(hypervisor: &dyn Hypervisor, spec: &VmSpec) -> Result<(), ProofError> {
    let mut console = hypervisor.open_console(&spec.socket_dir, &spec.id).await.map_err(ProofError::Console)?;
    let (mut seen, mut chunk) = (Vec::new(), [0; 256]);
    loop {
        match console.read(&mut chunk).await.map_err(ProofError::Console)? {
            0 => return Err(ProofError::Ended),
            n => seen.extend_from_slice(&chunk[..n]),
        }
        if seen.windows(LINE.len()).any(|window| window == LINE.as_bytes()) {
            return Ok(());
        }
        // The firmware may say something first; the beginning of a line must stay whole.
        seen.drain(..seen.len().saturating_sub(LINE.len()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::fake::{FakeHypervisor, Fault, GuestMachine, Op};
    use tokio::io::AsyncWriteExt as _;

    async fn check(fake: &FakeHypervisor) -> Result<Proof, ProofError> {
        let dir = tempfile::tempdir().unwrap();
        let places = Places { disks: dir.path(), sockets: Path::new("/s") };
        let rng = Rng::seeded(1);
        let proof = prove_kvm(fake, places, &VmId::random(&rng), &rng).await;
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left behind");
        proof
    }

    #[test]
    fn the_image_is_six_clusters_with_the_sector_last() {
        let image = disk_image();
        assert_eq!(image.len(), 6 * CLUSTER);
        assert_eq!(CODE.len(), 0x6a, "where the code looks for the line");
        assert!(image[5 * CLUSTER + CODE.len()..].starts_with(LINE.as_bytes()));
        assert!(image.ends_with(&[0x55, 0xaa]));
    }

    #[tokio::test(start_paused = true)]
    async fn only_the_line_proves_a_guest() {
        let fake = FakeHypervisor::new();
        fake.set_guest(|mut machine: GuestMachine| async move {
            machine.console.write_all(b"SeaBIOS\r\nday").await.unwrap();
            machine.console.write_all(LINE.as_bytes()).await.unwrap();
            std::future::pending().await
        });
        assert!(check(&fake).await.unwrap().took > Duration::from_secs(5));

        fake.set_guest(|_| std::future::pending());
        assert!(matches!(check(&fake).await, Err(ProofError::Silent)));
        fake.set_guest(|mut machine: GuestMachine| async move { machine.console.write_all(b"almost").await.unwrap() });
        assert!(matches!(check(&fake).await, Err(ProofError::Ended)));
        fake.fail_nth(Op::Start, 1, Fault::Refused("no /dev/kvm"));
        assert!(matches!(check(&fake).await, Err(ProofError::Start(_))));
        fake.fail_nth(Op::OpenConsole, 1, Fault::Refused("no"));
        assert!(matches!(check(&fake).await, Err(ProofError::Console(_))));
        assert!(fake.counts().is_clean(), "{:#?}", fake.history());
    }
}
