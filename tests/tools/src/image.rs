//! An image for machines that are processes: they read no disk.

use dayfly::image::manifest::{ImageFile, MANIFEST_FILE, Manifest};
use dayfly_doubles::images;
use std::fs;
use std::io;
use std::path::Path;

/// A disk of no content: nothing boots from it. (QEMU's `docs/interop/qcow2.txt`.)
const DISK_BYTES: &str = "1M";

/// Makes a boot-tested image of an empty disk, whose guests have these abilities.
///
/// # Errors
/// The file system's, and those of `qemu-img`.
pub fn empty_image(dir: &Path, abilities: &[&str]) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let disk = dir.join("disk.qcow2");
    #[expect(clippy::disallowed_methods, reason = "a tool's set-up; it ends within milliseconds")]
    let made = std::process::Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&disk)
        .arg(DISK_BYTES)
        .status()?;
    if !made.success() {
        return Err(io::Error::other(format!("qemu-img ended with {made}")));
    }
    let file = ImageFile { file: "disk.qcow2".into(), bytes: fs::metadata(&disk)?.len(), sha256: String::new() };
    // The daemon of the last version knows no keys `networks` and `abilities`.
    let abilities = abilities.iter().map(|word| (*word).to_owned()).collect();
    let manifest = Manifest { disk: file, networks: Vec::new(), abilities, ..images::image().manifest };
    fs::write(dir.join(MANIFEST_FILE), manifest.to_text())
}
