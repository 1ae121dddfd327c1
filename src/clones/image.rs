//! Images of disks: an ext4 file system of packs, made by `mke2fs` from hard links, without root and without a mount.
//!
//! ```text
//! pack/pack-….pack, .idx    the packs
//! packs                     a line `<name> <bytes>` for each pack that the refs need, wherever it is
//! packed-refs               what the mirror has, for git in the guest
//! ```
//!
//! On the host they are written, digested and copied, and never mounted.

use super::meta::Pack;
use super::workshop::{Built, Contents};
use crate::hex::hex;
use crate::process::Program;
use dayfly_guest_config::{CLONE_PACKS, CLONE_REFS};
use sha2::{Digest as _, Sha256};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::watch;

/// `mke2fs` writes what it is given, 1 GiB in a few seconds.
const DEADLINE: Duration = Duration::from_secs(600);

/// A file system's block.
const BLOCK: u64 = 4096;

/// Its own tables, beside a hundredth of what is in it.
const TABLES_BYTES: u64 = 2 << 20;

/// What is copied at once.
const CHUNK: usize = 1 << 20;

/// Nobody looks for one by its id: all have the same.
const UUID: &str = "6461796f-666c-4979-8c6f-6e6573000001";

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

/// A directory that others can pass and nobody else list: what is in it has names that cannot be guessed.
pub(super) async fn make_directory(directory: &Path) -> io::Result<()> {
    let directory = directory.to_owned();
    blocking(move || {
        fs::DirBuilder::new().recursive(true).mode(0o711).create(&directory)?;
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o711))
    })
    .await
}

/// Makes an image. Nothing half-made is left.
pub(super) async fn build(mirror: &Path, contents: Contents<'_>, image: &Path) -> io::Result<Built> {
    let made = make(mirror, contents, image).await;
    if made.is_err() {
        let image = image.to_owned();
        blocking(move || remove(&image)).await?;
    }
    made
}

async fn make(mirror: &Path, contents: Contents<'_>, image: &Path) -> io::Result<Built> {
    let stage = Stage(image.with_extension("stage"));
    let (bytes, packs) = stage.fill(mirror.to_owned(), &contents).await?;
    let target = image.to_owned();
    blocking(move || {
        // Readable to QEMU's user, who is not ours; written by nobody else.
        let options = &mut File::options();
        let file = options.write(true).create(true).truncate(true).mode(0o644).open(&target)?;
        file.set_permissions(fs::Permissions::from_mode(0o644))?;
        file.set_len(bytes)
    })
    .await?;
    let files = (packs.len() * 2 + 32).to_string();
    Program::new("mke2fs", DEADLINE)
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-I", "256", "-U", UUID, "-L", "dayfly-clone"])
        .args(["-O", "^has_journal,^resize_inode,^huge_file,^metadata_csum,^orphan_file"])
        .args(["-E", &format!("root_owner=0:0,lazy_itable_init=0,hash_seed={UUID}"), "-N", &files, "-d"])
        .arg(&stage.0)
        .arg(image)
        .arg((bytes / BLOCK).to_string())
        .run()
        .await
        .map_err(io::Error::other)?;
    let (bytes, sha256) = digest(image).await?;
    let file = image.to_owned();
    blocking(move || File::open(&file)?.sync_all()).await?;
    Ok(Built { bytes, sha256, packs })
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// What goes into an image, in a directory that goes with this.
struct Stage(PathBuf);

impl Drop for Stage {
    fn drop(&mut self) {
        // Links and two small files; what is left is removed at the next start.
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Stage {
    /// Fills it, and says how many bytes a file system of that takes, and what the packs' digests are.
    async fn fill(&self, mirror: PathBuf, contents: &Contents<'_>) -> io::Result<(u64, Vec<Pack>)> {
        let stage = self.0.clone();
        let mut packs: Vec<Pack> = contents.packs.to_vec();
        let list = contents.all.iter().fold(String::new(), |mut text, pack| {
            writeln!(text, "{} {}", pack.name, pack.bytes).expect("a String takes all");
            text
        });
        let mut refs = "# pack-refs with: sorted \n".to_owned();
        for (n, tip) in contents.tips.iter().enumerate() {
            writeln!(refs, "{tip} refs/dayfly/{n:04}").expect("a String takes all");
        }
        blocking(move || {
            let _ = fs::remove_dir_all(&stage);
            fs::DirBuilder::new().mode(0o755).create(&stage)?;
            fs::DirBuilder::new().mode(0o755).create(stage.join("pack"))?;
            let mut bytes = TABLES_BYTES;
            for pack in &mut packs {
                let mut digest = Sha256::new();
                for suffix in ["pack", "idx"] {
                    let name = format!("{}.{suffix}", pack.name);
                    let link = stage.join("pack").join(&name);
                    fs::hard_link(mirror.join("objects/pack").join(&name), &link)?;
                    read_into(&mut digest, &link)?;
                    // A job in the guest is another user; on the host nobody comes past the mirror's directory.
                    fs::set_permissions(link, fs::Permissions::from_mode(0o444))?;
                }
                let is = hex(&digest.finalize());
                // Git would not look at it before a job does.
                if pack.sha256.as_ref().is_some_and(|was| *was != is) {
                    let what = format!("`{}` is not what it was", pack.name);
                    return Err(io::Error::new(io::ErrorKind::InvalidData, what));
                }
                pack.sha256 = Some(is);
                bytes += (pack.bytes + pack.index_bytes) / 100 * 101 + 4 * BLOCK;
            }
            for (name, text) in [(CLONE_PACKS, &list), (CLONE_REFS, &refs)] {
                fs::write(stage.join(name), text)?;
                fs::set_permissions(stage.join(name), fs::Permissions::from_mode(0o644))?;
                bytes += text.len() as u64 + BLOCK;
            }
            for directory in [stage.clone(), stage.join("pack")] {
                fs::set_permissions(directory, fs::Permissions::from_mode(0o755))?;
            }
            Ok((bytes.next_multiple_of(BLOCK), packs))
        })
        .await
    }
}

/// Length and digest of a file.
pub(super) async fn digest(path: &Path) -> io::Result<(u64, String)> {
    let path = path.to_owned();
    blocking(move || {
        let mut digest = Sha256::new();
        let bytes = read_into(&mut digest, &path)?;
        Ok((bytes, hex(&digest.finalize())))
    })
    .await
}

/// Reads a file to its end; its length.
fn read_into(digest: &mut Sha256, path: &Path) -> io::Result<u64> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; CHUNK];
    let mut bytes = 0;
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(bytes),
            count => {
                digest.update(&buffer[..count]);
                bytes += count as u64;
            }
        }
    }
}

/// An empty file of this length, which takes nothing yet. One that is there stays as it is.
pub(super) async fn make_slot(slot: &Path, bytes: u64) -> io::Result<()> {
    let slot = slot.to_owned();
    blocking(move || {
        let file = match File::options().write(true).create_new(true).mode(0o644).open(&slot) {
            // Its machine may run, and have it open.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
            file => file?,
        };
        file.set_permissions(fs::Permissions::from_mode(0o644))?;
        file.set_len(bytes)
    })
    .await
}

/// Copies an image into a slot, its first block last: by that the guest knows that all is there. What is nothing but zeros
/// stays a hole.
pub(super) async fn fill(image: &Path, slot: &Path, over: watch::Receiver<bool>) -> io::Result<bool> {
    let (image, slot) = (image.to_owned(), slot.to_owned());
    blocking(move || {
        let mut from = File::open(image)?;
        let mut to = crate::files::plain::open_with(File::options().write(true), &slot)?;
        if from.metadata()?.len() > to.metadata()?.len() {
            return Err(io::Error::other("it does not fit"));
        }
        let mut first = vec![0; usize::try_from(BLOCK).unwrap_or(CHUNK)];
        from.read_exact(&mut first)?;
        let mut buffer = vec![0; CHUNK];
        let mut at = BLOCK;
        loop {
            if *over.borrow() {
                return Ok(false);
            }
            let count = from.read(&mut buffer)?;
            if count == 0 {
                break;
            }
            let chunk = &buffer[..count];
            if chunk.iter().any(|byte| *byte != 0) {
                to.seek(SeekFrom::Start(at))?;
                to.write_all(chunk)?;
            }
            at += count as u64;
        }
        if *over.borrow() {
            return Ok(false);
        }
        to.seek(SeekFrom::Start(0))?;
        to.write_all(&first)?;
        Ok(true)
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mirror(dir: &Path, packs: &[(&str, usize)]) -> Vec<Pack> {
        fs::create_dir_all(dir.join("objects/pack")).unwrap();
        packs
            .iter()
            .map(|(name, bytes)| {
                let name = format!("pack-{}", name.repeat(40));
                for (suffix, bytes) in [("pack", *bytes), ("idx", 100)] {
                    fs::write(dir.join(format!("objects/pack/{name}.{suffix}")), vec![7; bytes]).unwrap();
                }
                Pack { name, bytes: *bytes as u64, index_bytes: 100, sha256: None }
            })
            .collect()
    }

    #[tokio::test]
    #[expect(clippy::disallowed_methods, reason = "what looks into a file system is a tool of the test's")]
    async fn an_image_is_a_file_system_with_the_packs_as_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("m.git");
        let packs = mirror(&source, &[("a", 3_000_000), ("b", 5_000_001)]);
        let tips = ["ab".repeat(20)];
        let contents = || Contents { packs: &packs[..1], all: &packs, tips: &tips };
        let image = dir.path().join("x.img");
        let built = build(&source, contents(), &image).await.unwrap();
        assert_eq!(fs::metadata(&image).unwrap().len(), built.bytes);
        assert_eq!(fs::metadata(&image).unwrap().permissions().mode() & 0o777, 0o644);
        assert!(built.bytes < 3_000_000 + 3 * TABLES_BYTES, "{}", built.bytes);
        let dump = |path: &str| {
            let command = format!("cat {path}");
            let mut debugfs = std::process::Command::new("debugfs");
            debugfs.args(["-R", &command]).arg(&image).output().unwrap().stdout
        };
        assert_eq!(dump(&format!("pack/{}.pack", packs[0].name)), vec![7; 3_000_000]);
        let list = String::from_utf8(dump(CLONE_PACKS)).unwrap();
        assert_eq!(list, format!("{} 3000000\n{} 5000001\n", packs[0].name, packs[1].name));
        assert!(String::from_utf8(dump(CLONE_REFS)).unwrap().contains(&format!("{} refs/dayfly/0000\n", tips[0])));
        let (bytes, sha256) = digest(&image).await.unwrap();
        assert_eq!((bytes, &sha256), (built.bytes, &built.sha256));
        assert!(!image.with_extension("stage").exists());
        // Again, now that the digest is known; and a pack of the same length that is not what it was.
        assert_eq!(built.packs.len(), 1);
        let known = Contents { packs: &built.packs, all: &packs, tips: &tips };
        assert_eq!(build(&source, known.clone(), &image).await.unwrap().packs, built.packs);
        let path = source.join(format!("objects/pack/{}.pack", packs[0].name));
        let mut bytes = fs::read(&path).unwrap();
        bytes[2_000_000] ^= 1;
        fs::remove_file(&path).unwrap();
        fs::write(&path, bytes).unwrap();
        let damaged = dir.path().join("z.img");
        assert_eq!(build(&source, known, &damaged).await.unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert!(!damaged.exists() && !damaged.with_extension("stage").exists());
        // Whatever else goes wrong, nothing half-made looks like a disk.
        fs::remove_file(source.join(format!("objects/pack/{}.pack", packs[0].name))).unwrap();
        let other = dir.path().join("y.img");
        assert!(build(&source, contents(), &other).await.is_err());
        assert!(!other.exists());
    }

    #[tokio::test]
    async fn a_slot_is_filled_whole_or_looks_empty() {
        let dir = tempfile::tempdir().unwrap();
        let (image, slot) = (dir.path().join("image"), dir.path().join("slot"));
        let mut bytes = vec![0; 5_000_000];
        bytes[1080] = 1;
        bytes[4_000_000] = 2;
        fs::write(&image, &bytes).unwrap();
        make_slot(&slot, 8_000_000).await.unwrap();
        let (over, watched) = watch::channel(true);
        assert!(!fill(&image, &slot, watched.clone()).await.unwrap());
        assert!(fs::read(&slot).unwrap().iter().all(|byte| *byte == 0));
        over.send_replace(false);
        assert!(fill(&image, &slot, watched.clone()).await.unwrap());
        let filled = fs::read(&slot).unwrap();
        assert!(filled[..5_000_000] == bytes[..] && filled.len() == 8_000_000);
        make_slot(&slot, 1_000_000).await.unwrap();
        assert_eq!(fs::metadata(&slot).unwrap().len(), 8_000_000, "as it was");
        fs::File::options().write(true).open(&slot).unwrap().set_len(1_000_000).unwrap();
        assert!(fill(&image, &slot, watched).await.is_err(), "larger than the disk");
    }
}
