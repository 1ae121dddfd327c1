//! The seed: one FAT disk with the label `CIDATA`, as cloud-init's NoCloud, FreeBSD's nuageinit and Windows' cloudbase-init
//! read it, with what is put in beside. `vm-images/cloud/README.md` lists its files.

use super::{CloudRequest, STEP_DEADLINE};
use crate::image::build::rootfs::Work;
use crate::image::build::{BuildError, file_error};
use crate::process::Program;
use std::fs;
use std::path::{Path, PathBuf};

/// The disk's label, by which all of them find it.
const LABEL: &str = "CIDATA";

/// Room for tables and for what is rounded up.
const ROOM_BYTES: u64 = 8 << 20;

/// A FAT32 has 65525 clusters at least. Empty, they take nothing of this host.
const BYTES_MIN: u64 = 128 << 20;
const CLUSTER_SECTORS: &str = "2";

const USER_DATA: &str = include_str!("../../../../vm-images/cloud/user-data");
const TAKE_IN: &str = include_str!("../../../../vm-images/cloud/take-in.sh");
const SERVICE_CONF: &str = include_str!("../../../../vm-images/cloud/service.conf");
const SERVICE: &str = include_str!("../../../../vm-images/debian/dayfly-guest.service");
const TARGET: &str = include_str!("../../../../vm-images/debian/dayfly.target");
const LIMITS: &str = include_str!("../../../../vm-images/debian/limits.conf");

/// Makes it.
pub(super) async fn make(request: &CloudRequest, work: &Work) -> Result<PathBuf, BuildError> {
    let directory = work.path("seed");
    lay_out(request, &directory)?;
    let disk = work.path("seed.img");
    format(&directory, &disk).await?;
    Ok(disk)
}

/// Its files, as they lie on it.
fn lay_out(request: &CloudRequest, directory: &Path) -> Result<(), BuildError> {
    let ours = directory.join("dayfly");
    fs::create_dir_all(&ours).map_err(file_error("make", &ours))?;
    let packages: String = request.packages.iter().map(|name| format!("{name}\n")).collect();
    // Another one than any before, so that cloud-init takes it for a new machine's.
    let meta_data = format!("instance-id: dayfly-{}\nlocal-hostname: localhost\n", request.name);
    for (path, text) in [
        (directory.join("meta-data"), meta_data.as_str()),
        (directory.join("user-data"), USER_DATA),
        (ours.join("take-in.sh"), TAKE_IN),
        (ours.join("service"), SERVICE),
        (ours.join("service.conf"), SERVICE_CONF),
        (ours.join("target"), TARGET),
        (ours.join("limits"), LIMITS),
        (ours.join("packages"), &packages),
    ] {
        fs::write(&path, text).map_err(file_error("write", &path))?;
    }
    let programs = [(&request.guest_program, "guest"), (&request.runner.path, "runner")];
    for (from, name) in programs.into_iter().chain(request.ca.as_ref().map(|ca| (ca, "ca.pem"))) {
        fs::copy(from, ours.join(name)).map_err(file_error("copy", from))?;
    }
    Ok(())
}

/// FAT by mtools, which need no root.
async fn format(directory: &Path, disk: &Path) -> Result<(), BuildError> {
    let mut bytes = ROOM_BYTES;
    for directory in [directory.to_owned(), directory.join("dayfly")] {
        for entry in fs::read_dir(&directory).map_err(file_error("read", &directory))?.flatten() {
            bytes += entry.metadata().map_err(file_error("read", &directory))?.len();
        }
    }
    let file = fs::File::create_new(disk).map_err(file_error("make", disk))?;
    // Whole cylinders of what mtools believe that a disk has.
    let sectors = bytes.max(BYTES_MIN).div_ceil(512).next_multiple_of(63 * 16);
    file.set_len(sectors * 512).map_err(file_error("make", disk))?;
    // FAT32 (-F) is what every system reads at any size; the sectors are told, so that nothing is asked of a disk.
    let mtools = |program: &str| Program::new(program, STEP_DEADLINE).env("MTOOLS_SKIP_CHECK", "1");
    mtools("mformat")
        .args(["-F", "-c", CLUSTER_SECTORS, "-v", LABEL, "-T", &sectors.to_string(), "-i"])
        .arg(disk)
        .arg("::")
        .run()
        .await?;
    let names = ["meta-data", "user-data", "dayfly"].map(|name| directory.join(name));
    mtools("mcopy").args(["-s", "-i"]).arg(disk).args(&names).arg("::").run().await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::build::cloud::tests::request;

    /// As all readers of such a seed expect it: a FAT with this label, two files with these names in its root.
    #[tokio::test]
    async fn the_seed_is_a_fat_disk_with_the_names_that_its_readers_look_for() {
        let dir = tempfile::tempdir().unwrap();
        let mut request = request(dir.path());
        request.packages = vec!["git".into(), "curl".into()];
        let (directory, disk) = (dir.path().join("seed"), dir.path().join("seed.img"));
        lay_out(&request, &directory).unwrap();
        format(&directory, &disk).await.unwrap();
        let bytes = fs::read(&disk).unwrap();
        // FAT32's boot sector: its label at 71, its name at 82, and a whole number of sectors.
        assert_eq!(
            (&bytes[71..82], &bytes[82..90], &bytes[510..512]),
            (&b"CIDATA     "[..], &b"FAT32   "[..], &[0x55, 0xaa][..])
        );
        assert_eq!(u32::from_le_bytes(bytes[32..36].try_into().unwrap()) as usize * 512, bytes.len());
        let read = |name: &'static str| {
            let disk = disk.clone();
            async move {
                let mtype = Program::new("mtype", STEP_DEADLINE).args(["-i"]).arg(disk).arg(format!("::{name}"));
                mtype.run().await.unwrap().text()
            }
        };
        assert_eq!(read("meta-data").await, "instance-id: dayfly-cloud\nlocal-hostname: localhost");
        assert!(read("user-data").await.starts_with("#cloud-config\n"));
        assert_eq!(read("dayfly/packages").await, "git\ncurl");
        assert_eq!(read("dayfly/runner").await, "the runner");
        assert!(read("dayfly/service").await.contains("ExecStart=/usr/lib/dayfly/dayfly-guest"));
    }

    /// The first line is how cloud-init, nuageinit and cloudbase-init know what it is; what it runs lies on the disk.
    #[test]
    fn the_user_data_runs_the_steps_beside_it_and_makes_no_users() {
        assert!(USER_DATA.starts_with("#cloud-config\n") && USER_DATA.contains("\nusers: []\n"));
        let command = USER_DATA.split_once("\nruncmd:\n  - - sh\n    - -c\n    - |\n").unwrap().1;
        assert!(command.lines().all(|line| line.starts_with("      ")), "{command}");
        assert!(command.contains("exec sh \"$seed/dayfly/take-in.sh\" \"$seed/dayfly\""));
        assert!(!USER_DATA.contains('\t') && USER_DATA.contains("/dev/disk/by-label/CIDATA"));
    }
}
