//! What kind of disk is this? Asked before anything of it runs, and answered by its first bytes, its header and qemu-img.

use super::CloudError;
use crate::files::plain;
use crate::image::build::rootfs::Work;
use crate::image::build::{BuildError, file_error};
use crate::image::gpt;
use crate::image::qcow2::{self, Qcow2Error};
use crate::process::{ProcessError, Program};
use serde::{Deserialize, Serialize};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::Path;
use std::time::Duration;

/// Reading all tables of a disk of some GiB.
const DEADLINE: Duration = Duration::from_secs(120);

/// The size of a cloud image's disk: below there is no system, and above it is no base to start from.
const DISK_BYTES_MIN: u64 = 64 << 20;
const DISK_BYTES_MAX: u64 = 128 << 30;

/// Free disk that stays, so that no image fills the host's disk to the brim.
const SPARE_BYTES: u64 = 1 << 30;

/// A format that cloud images come in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// QEMU's own.
    #[default]
    Qcow2,
    /// The disk's bytes.
    Raw,
}

impl DiskFormat {
    /// As QEMU calls it.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// The disk's size.
    pub(super) bytes: u64,
    /// What is in use of it, unpacked.
    pub(super) needed: u64,
}

/// Other things that are published beside cloud images: their first bytes, and what to do.
const OTHERS: [(&[u8], &str); 8] = [
    (b"\xfd7zXZ\x00", "it is packed: unpack it first (`xz -d FILE`)"),
    (b"\x1f\x8b", "it is packed: unpack it first (`gzip -d FILE`)"),
    (b"\x28\xb5\x2f\xfd", "it is packed: unpack it first (`zstd -d FILE`)"),
    (b"BZh", "it is packed: unpack it first (`bzip2 -d FILE`)"),
    (b"PK\x03\x04", "it is packed: unpack it first (`unzip FILE`)"),
    (b"KDMV", "it is a disk of VMware's: make a qcow2 of it first (`qemu-img convert -f vmdk -O qcow2 FILE NEW`)"),
    (b"vhdxfile", "it is a disk of Hyper-V's: make a qcow2 of it first (`qemu-img convert -f vhdx -O qcow2 FILE NEW`)"),
    (b"conectix", "it is a disk of Hyper-V's: make a qcow2 of it first (`qemu-img convert -f vpc -O qcow2 FILE NEW`)"),
];

/// Looks at the disk at this absolute path.
pub(super) async fn look(disk: &Path, format: DiskFormat, work: &Work) -> Result<Found, BuildError> {
    let refused = |why: String| CloudError::Disk { path: disk.to_owned(), why };
    let first = read_at(disk, 0, 512).map_err(file_error("read", disk))?;
    let bytes = by_first_bytes(disk, &first, format).map_err(refused)?;
    if !(DISK_BYTES_MIN..=DISK_BYTES_MAX).contains(&bytes) {
        let why = format!(
            "its disk has {} MiB; a cloud image has from {} MiB to {} GiB, so it is none, or one to be shrunk first",
            bytes >> 20,
            DISK_BYTES_MIN >> 20,
            DISK_BYTES_MAX >> 30
        );
        return Err(refused(why).into());
    }
    let info: Info = ask(disk, &["info", "--output=json", "-f", format.word()]).await?;
    if info.size != bytes || info.backing.is_some() || info.specific.data.data_file.is_some() {
        let why = "qemu-img finds another file behind it, or another size than its header says; make a plain one of it \
                   (`qemu-img convert -O qcow2 FILE NEW`)";
        return Err(refused(why.into()).into());
    }
    if format == DiskFormat::Qcow2 {
        // 3: clusters that nobody uses, which is no harm.
        let checked = Program::new("qemu-img", DEADLINE).args(["check", "-q", "-f", "qcow2"]).arg(disk).run().await;
        match checked {
            Ok(_) => {}
            Err(ProcessError::Failed { status, .. }) if status.code() == Some(3) => {}
            Err(ProcessError::Failed { stderr, .. }) => {
                let last = stderr.lines().last().unwrap_or_default().to_owned();
                let why = format!("it is damaged or cut short ({last}): fetch it again, and give its --sha256");
                return Err(refused(why).into());
            }
            Err(error) => return Err(error.into()),
        }
    }
    let measured: Measured = ask(disk, &["measure", "--output=json", "-O", "qcow2", "-f", format.word()]).await?;
    let head = head(disk, format, work).await?;
    is_for_this_host(&head).map_err(refused)?;
    Ok(Found { bytes, needed: measured.required })
}

/// The disk's size by its header; or why it is no disk of this format.
fn by_first_bytes(disk: &Path, first: &[u8], format: DiskFormat) -> Result<u64, String> {
    if let Some((_, why)) = OTHERS.iter().find(|(magic, _)| first.starts_with(magic)) {
        return Err((*why).to_owned());
    }
    let is_qcow2 = first.starts_with(b"QFI\xfb");
    match format {
        DiskFormat::Qcow2 if is_qcow2 => match qcow2::check(disk) {
            Ok(bytes) => Ok(bytes),
            Err(Qcow2Error::Unfit(why)) => {
                Err(format!("{why}; make a plain one of it (`qemu-img convert -O qcow2 FILE NEW`), or fetch it again"))
            }
            Err(Qcow2Error::Read(error)) => Err(format!("its header cannot be read: {error}")),
        },
        DiskFormat::Qcow2 if gpt_or_mbr(first) => {
            Err("it is no qcow2, but may be a disk's plain bytes: if it is, say --format raw".into())
        }
        DiskFormat::Qcow2 => Err("it is no qcow2, and no image that `dayfly image export` has made".into()),
        DiskFormat::Raw if is_qcow2 => Err("it is a qcow2: leave --format raw out".into()),
        DiskFormat::Raw if gpt_or_mbr(first) => {
            let length = std::fs::metadata(disk).map_err(|error| format!("it cannot be looked at: {error}"))?.len();
            Ok(length / gpt::SECTOR * gpt::SECTOR)
        }
        DiskFormat::Raw => Err("it has no partition table, so it is no disk that starts by itself".into()),
    }
}

fn gpt_or_mbr(first: &[u8]) -> bool {
    first.get(510..512) == Some(&[0x55, 0xaa])
}

/// What the table says that it was made for; what starts it is a PC's BIOS.
fn is_for_this_host(head: &[u8]) -> Result<(), String> {
    let host = std::env::consts::ARCH;
    let roots: Vec<&str> = gpt::read(head).unwrap_or_default().iter().filter_map(gpt::Partition::root_of).collect();
    if let Some(other) = roots.iter().find(|root| **root != host)
        && !roots.contains(&host)
    {
        return Err(format!("it is for {other}, and this host is {host}: fetch the image for {host} (`amd64`)"));
    }
    if gpt::has_boot_code(head) {
        return Ok(());
    }
    Err(format!(
        "its first sector has no boot loader for a PC's BIOS: it is for another architecture than {host}, or starts by UEFI \
         alone; fetch the image for {host} that starts on both (`genericcloud-amd64`, `cloudimg-amd64`)"
    ))
}

/// The first sectors of the disk inside.
async fn head(disk: &Path, format: DiskFormat, work: &Work) -> Result<Vec<u8>, BuildError> {
    let to = work.path("head");
    let count = gpt::HEAD_BYTES / 512;
    let mut from = std::ffi::OsString::from("if=");
    from.push(disk);
    let mut into = std::ffi::OsString::from("of=");
    into.push(&to);
    Program::new("qemu-img", DEADLINE)
        .args(["dd", "-f", format.word(), "-O", "raw", "bs=512", &format!("count={count}")])
        .arg(from)
        .arg(into)
        .run()
        .await?;
    read_at(&to, 0, gpt::HEAD_BYTES).map_err(file_error("read", &to))
}

/// Up to so many bytes of a file.
pub(super) fn read_at(path: &Path, at: u64, bytes: usize) -> io::Result<Vec<u8>> {
    let mut file = plain::open_chosen(path)?;
    file.seek(SeekFrom::Start(at))?;
    let mut read = Vec::with_capacity(bytes);
    file.take(bytes as u64).read_to_end(&mut read)?;
    Ok(read)
}

/// Whether there is room for it twice, flattened and packed: what is packed in it may be much.
pub(super) fn has_room(disk: &Path, needed: u64, directory: &Path) -> Result<(), CloudError> {
    let refused = |why: String| CloudError::Disk { path: disk.to_owned(), why };
    let found =
        rustix::fs::statvfs(directory).map_err(|error| refused(format!("its room cannot be looked for: {error}")))?;
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    let wanted = needed.saturating_mul(2).saturating_add(SPARE_BYTES);
    if wanted <= free {
        return Ok(());
    }
    Err(refused(format!(
        "unpacked it has {} MiB, for which {} MiB have to be free, and {} are: make room, or take a smaller image",
        needed >> 20,
        wanted >> 20,
        free >> 20
    )))
}

async fn ask<T: serde::de::DeserializeOwned>(disk: &Path, question: &[&str]) -> Result<T, BuildError> {
    let answer = Program::new("qemu-img", DEADLINE).args(question).arg(disk).run().await?;
    serde_json::from_slice(&answer.stdout).map_err(|error| file_error("read what qemu-img says of", disk)(error.into()))
}

/// `qemu-img info`.
#[derive(Deserialize)]
struct Info {
    #[serde(rename = "virtual-size")]
    size: u64,
    #[serde(rename = "backing-filename")]
    backing: Option<String>,
    #[serde(rename = "format-specific", default)]
    specific: Specific,
}

#[derive(Default, Deserialize)]
struct Specific {
    #[serde(default)]
    data: Data,
}

#[derive(Default, Deserialize)]
struct Data {
    #[serde(rename = "data-file")]
    data_file: Option<String>,
}

/// `qemu-img measure`.
#[derive(Deserialize)]
struct Measured {
    required: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::gpt::tests as table;

    /// A qcow2 of these bytes, grown to a disk's size.
    async fn disk(dir: &Path, bytes: &[u8]) -> std::path::PathBuf {
        let (raw, disk) = (dir.join("raw"), dir.join("disk.qcow2"));
        std::fs::write(&raw, bytes).unwrap();
        std::fs::File::options().write(true).open(&raw).unwrap().set_len(128 << 20).unwrap();
        let convert = Program::new("qemu-img", DEADLINE).args(["convert", "-f", "raw", "-O", "qcow2"]);
        convert.arg(&raw).arg(&disk).run().await.unwrap();
        disk
    }

    async fn looked(disk: &Path, format: DiskFormat) -> Result<Found, String> {
        let work = Work::new(crate::image::build::rootfs::Privilege::of_us()).await.unwrap();
        let found = look(disk, format, &work).await.map_err(|error| crate::telemetry::chain(&error));
        work.release().await;
        found
    }

    #[tokio::test]
    async fn a_disk_for_this_kind_of_host_is_taken_and_another_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let good = disk(dir.path(), &table::head(0, true)).await;
        let found = looked(&good, DiskFormat::Qcow2).await.unwrap();
        assert!(found.bytes == 128 << 20 && found.needed < 32 << 20, "{found:?}");
        assert_eq!(looked(&dir.path().join("raw"), DiskFormat::Raw).await.unwrap().bytes, 128 << 20);
        let why = |found: Result<Found, String>| found.unwrap_err();
        let arm = disk(dir.path(), &table::head(1, true)).await;
        assert!(why(looked(&arm, DiskFormat::Qcow2).await).contains("it is for aarch64, and this host is x86_64"));
        let silent = disk(dir.path(), &table::head(0, false)).await;
        assert!(why(looked(&silent, DiskFormat::Qcow2).await).contains("no boot loader for a PC's BIOS"));
        let raw = why(looked(&dir.path().join("raw"), DiskFormat::Qcow2).await);
        assert!(raw.ends_with("say --format raw"), "{raw}");
        assert!(why(looked(&silent, DiskFormat::Raw).await).contains("it is a qcow2"));
    }

    #[tokio::test]
    async fn what_leads_elsewhere_or_is_damaged_is_refused_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let good = disk(dir.path(), &[table::head(0, true), vec![1; 4 << 20]].concat()).await;
        let with = |name: &str, arguments: &[&str]| {
            let path = dir.path().join(name);
            let made = Program::new("qemu-img", DEADLINE).args(["create", "-q", "-f", "qcow2"]).args(arguments);
            (path.clone(), made.arg(path))
        };
        let (overlay, made) = with("overlay", &["-F", "qcow2", "-b", good.to_str().unwrap()]);
        made.run().await.unwrap();
        let error = looked(&overlay, DiskFormat::Qcow2).await.unwrap_err();
        assert!(error.contains("it has a backing file; make a plain one of it"), "{error}");
        let data = dir.path().join("data");
        let (outside, made) = with("outside", &["-o", &format!("data_file={}", data.display())]);
        made.arg("128M").run().await.unwrap();
        let error = looked(&outside, DiskFormat::Qcow2).await.unwrap_err();
        assert!(error.contains("it keeps its data in another file"), "{error}");
        let (huge, made) = with("huge", &[]);
        made.arg("8T").run().await.unwrap();
        let error = looked(&huge, DiskFormat::Qcow2).await.unwrap_err();
        assert!(error.contains("from 64 MiB to 128 GiB"), "{error}");

        let whole = std::fs::read(&good).unwrap();
        let short = dir.path().join("short");
        std::fs::write(&short, &whole[..whole.len() - (2 << 20)]).unwrap();
        let error = looked(&short, DiskFormat::Qcow2).await.unwrap_err();
        assert!(error.contains("damaged or cut short") && error.contains("fetch it again"), "{error}");
        for (text, why) in
            [(&b"\xfd7zXZ\x00rest"[..], "xz -d"), (b"KDMV", "vmdk"), (b"hello", "it is no qcow2, and no")]
        {
            std::fs::write(&short, text).unwrap();
            let error = looked(&short, DiskFormat::Qcow2).await.unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn what_would_fill_the_hosts_disk_is_refused_before() {
        let dir = tempfile::tempdir().unwrap();
        has_room(Path::new("/i"), 1, dir.path()).unwrap();
        let error = has_room(Path::new("/i"), 1 << 60, dir.path()).unwrap_err().to_string();
        assert!(error.contains("make room, or take a smaller image"), "{error}");
    }
}
