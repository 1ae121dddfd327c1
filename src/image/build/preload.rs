//! What does the image's Docker have when a machine starts? Container images, put in while the image is built.
//!
//! ```text
//! files of the recipe, the runner's helper image ─► one tar archive, a disk
//!                                                     └─► a VM of the new root file system, with Docker ─► the same, with images
//! ```
//!
//! The VM runs on the disk itself, before it becomes qcow2, and powers off by itself (`preload` of the recipe
//! `debian-12-docker`). It is QEMU as it is, without libvirt: nobody but this build has to do with it. No container runs.

use super::recipe::{Preload, Recipe};
use super::rootfs::{PROXY_VARIABLES, Work};
use super::{BuildError, Progress, file_error};
use crate::process::{ProcessError, Program};
use crate::telemetry::printable;
use crate::vm::AccelChoice;
use dayfly_guest_config::{PROOF_LINE, PROOF_WORD};
use serde_json::json;
use std::collections::VecDeque;
use std::fs;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Under QEMU's translator Docker needs 10 s to start and 20 s for 200 MB; the rest is for many, and for slow registries.
const DEADLINE: Duration = Duration::from_secs(30 * 60);

/// To say one line; a kernel under KVM needs a second.
const PROOF_DEADLINE: Duration = Duration::from_secs(20);

/// Copying what goes in.
const STEP_DEADLINE: Duration = Duration::from_secs(3 * 60);

/// The unit that does the work, in the image.
const UNIT: &str = "dayfly-preload.service";

/// Lines of its console that are kept for an error.
const LINES_MAX: usize = 5;

/// Names of container images that are kept.
const INSIDE_MAX: usize = 1000;

/// Beginning of the lines that it says.
const SAYS: &str = "dayfly-preload: ";

/// Where a build has the runner's helper image from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HelperSource {
    /// A docker archive, or the file system of one as GitLab packs it, compressed or not.
    pub path: PathBuf,
}

/// How a VM of the build's boots.
pub(super) struct Machine<'a> {
    /// The root file system.
    pub(super) disk: &'a Path,
    pub(super) kernel: &'a Path,
    pub(super) initrd: &'a Path,
    pub(super) cmdline: &'a str,
    pub(super) accel: AccelChoice,
}

/// What is wanted of it, in words of the VM's.
struct Wanted {
    list: String,
    /// By the number of its line.
    files: Vec<(usize, PathBuf)>,
    /// Whether a registry is asked.
    is_online: bool,
}

/// The name of the runner's helper image in an image.
pub(super) fn helper_name(runner_version: &str) -> String {
    // A version may have what a tag may not (`19.3.0~beta.1+dfsg`).
    let tag: String =
        runner_version.chars().map(|c| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' }).collect();
    format!("dayfly/helper:{}", tag.trim_start_matches(['.', '-']))
}

impl Wanted {
    fn of(recipe: &Recipe, helper: Option<(&HelperSource, &str)>) -> Self {
        let (mut lines, mut files) = (Vec::new(), Vec::new());
        let is_online = recipe.inputs.preload.iter().any(|preload| matches!(preload, Preload::Pull(_)));
        if is_online {
            // Before the first pull: Docker reads them when it starts.
            let value = |name: &str| std::env::var(name).ok().filter(|text| !text.contains(char::is_control));
            lines.extend(PROXY_VARIABLES.iter().filter_map(|name| Some(format!("env {name}={}", value(name)?))));
        }
        if let Some((source, name)) = helper {
            lines.push(format!("helper {name}"));
            files.push((lines.len(), source.path.clone()));
        }
        for preload in &recipe.inputs.preload {
            match preload {
                Preload::Archive(path) => {
                    lines.push(format!(
                        "archive {}",
                        printable(&path.file_name().unwrap_or_default().to_string_lossy())
                    ));
                    files.push((lines.len(), path.clone()));
                }
                Preload::Pull(name) => lines.push(format!("pull {name}")),
            }
        }
        Self { list: lines.iter().flat_map(|line| [line, "\n"]).collect(), files, is_online }
    }
}

/// Puts in what recipe and build want, and says what is inside then; none: there is nothing to put in.
pub(super) async fn run(
    work: &Work,
    recipe: &Recipe,
    helper: Option<(&HelperSource, &str)>,
    machine: &Machine<'_>,
    progress: &mut Progress<'_>,
) -> Result<Vec<String>, BuildError> {
    let wanted = Wanted::of(recipe, helper);
    if wanted.files.is_empty() && !wanted.is_online {
        return Ok(Vec::new());
    }
    let archive = pack(work, &wanted).await?;
    let is_kvm = match machine.accel {
        AccelChoice::Kvm => true,
        AccelChoice::Tcg => false,
        AccelChoice::Auto => kvm_runs(machine).await,
    };
    progress(&format!(
        "container images: put in by a machine of the new image{}",
        if is_kvm { "" } else { ", under TCG" }
    ));
    let what = json!({ "driver": "raw", "node-name": "what", "read-only": true,
        "file": { "driver": "file", "filename": archive, "read-only": true } });
    let mut said = Said::default();
    let ended = qemu(machine, is_kvm, DEADLINE, &format!("systemd.unit={UNIT}"))
        .args(["-blockdev", &what.to_string(), "-device", "virtio-blk-pci,drive=what"])
        .args(if wanted.is_online {
            &["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="][..]
        } else {
            &[]
        })
        .run_lines(&mut |line| said.hear(line, progress))
        .await;
    match ended {
        Err(ProcessError::Deadline { .. }) => {
            Err(BuildError::Preload(format!("they were not there within {} min", DEADLINE.as_secs() / 60)))
        }
        Err(error) => Err(error.into()),
        Ok(_) => said.end(),
    }
}

/// The archive that is the machine's second disk.
async fn pack(work: &Work, wanted: &Wanted) -> Result<PathBuf, BuildError> {
    let (directory, archive) = (work.path("preload"), work.path("preload.tar"));
    let list = directory.join("list");
    fs::create_dir(&directory).map_err(file_error("make", &directory))?;
    // The address of a proxy may have its password.
    for path in [&list, &archive] {
        let made = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        made.map_err(file_error("make", path))?;
    }
    fs::write(&list, &wanted.list).map_err(file_error("write", &list))?;
    let mut names = vec!["list".to_owned()];
    for (number, path) in &wanted.files {
        let link = directory.join(number.to_string());
        let target = std::path::absolute(path).map_err(file_error("find", path))?;
        symlink(target, &link).map_err(file_error("link", &link))?;
        names.push(number.to_string());
    }
    let tar = Program::new("tar", STEP_DEADLINE).args(["--create", "--dereference", "--file"]).arg(&archive);
    tar.arg("-C").arg(&directory).args(names).run().await?;
    Ok(archive)
}

/// Whether KVM runs guests, by the kernel's own word (decision D16).
async fn kvm_runs(machine: &Machine<'_>) -> bool {
    let mut proven = false;
    let booted = qemu(machine, true, PROOF_DEADLINE, PROOF_WORD)
        .run_lines(&mut |line| proven |= line.contains(PROOF_LINE))
        .await;
    // A kernel that hangs says nothing until the deadline; QEMU without KVM ends at once.
    proven && booted.is_ok()
}

/// A machine of the build's, with its console on standard output. Its clock is the host's.
fn qemu(machine: &Machine<'_>, is_kvm: bool, deadline: Duration, words: &str) -> Program {
    // The disk is thrown away if the host fails meanwhile.
    let disk = json!({ "driver": "raw", "node-name": "root", "discard": "unmap", "file": {
        "driver": "file", "filename": machine.disk, "discard": "unmap", "cache": { "direct": false, "no-flush": true } } });
    Program::new("qemu-system-x86_64", deadline)
        .args(["-no-user-config", "-nodefaults", "-display", "none", "-no-reboot", "-machine", "q35"])
        .args(if is_kvm { ["-accel", "kvm", "-cpu", "host"] } else { ["-accel", "tcg", "-cpu", "qemu64"] })
        .args(["-m", "1024M", "-smp", "2", "-rtc", "base=utc", "-chardev", "stdio,id=console,signal=off"])
        .args(["-serial", "chardev:console", "-object", "rng-random,id=rng,filename=/dev/urandom"])
        .args([
            "-device",
            "virtio-rng-pci,rng=rng",
            "-blockdev",
            &disk.to_string(),
            "-device",
            "virtio-blk-pci,drive=root",
        ])
        .arg("-kernel")
        .arg(machine.kernel)
        .arg("-initrd")
        .arg(machine.initrd)
        .arg("-append")
        .arg(format!("{} {words}", machine.cmdline))
}

/// What the machine has said of its work.
#[derive(Default)]
struct Said {
    inside: Vec<String>,
    failed: Option<String>,
    is_done: bool,
    /// The last lines that were not ours, for a machine that says nothing else.
    last: VecDeque<String>,
}

impl Said {
    fn hear(&mut self, line: &str, progress: &mut Progress<'_>) {
        let Some(at) = line.find(SAYS) else {
            if self.last.len() == LINES_MAX {
                self.last.pop_front();
            }
            self.last.push_back(line.to_owned());
            return;
        };
        let text = &line[at + SAYS.len()..];
        match text.split_once(' ') {
            Some(("failed:", why)) => self.failed = Some(why.to_owned()),
            // As many as a recipe may name, and those of an archive: a bound for what a machine says, too.
            Some(("inside", name)) if self.inside.len() < INSIDE_MAX => self.inside.push(name.to_owned()),
            _ if text == "done" => self.is_done = true,
            // It may have a proxy's password.
            Some(("env", _)) => {}
            _ => progress(&format!("container images: {text}")),
        }
    }

    fn end(self) -> Result<Vec<String>, BuildError> {
        match self {
            Self { failed: Some(why), .. } => Err(BuildError::Preload(why)),
            Self { is_done: true, inside, .. } => Ok(inside),
            Self { last, .. } => {
                let last: Vec<String> = last.into();
                Err(BuildError::Preload(format!("the machine ended before; its last lines: {}", last.join(" / "))))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::build::Recipes;

    fn recipe(preload: Vec<Preload>) -> Recipe {
        let mut recipe = Recipes::default().find("debian-12-docker").unwrap();
        recipe.inputs.preload = preload;
        recipe
    }

    #[test]
    fn files_have_the_numbers_of_their_lines() {
        let helper = HelperSource { path: "/h/prebuilt.tar.xz".into() };
        let preload = vec![
            Preload::Archive("/r/a\nb.tar".into()),
            Preload::Pull("alpine:3".into()),
            Preload::Archive("/r/c".into()),
        ];
        let wanted = Wanted::of(&recipe(preload), Some((&helper, "dayfly/helper:19.3.0")));
        let lines: Vec<&str> = wanted.list.lines().filter(|line| !line.starts_with("env ")).collect();
        assert_eq!(
            (lines[0], lines[2], lines[3], lines.len()),
            ("helper dayfly/helper:19.3.0", "pull alpine:3", "archive c", 4)
        );
        assert!(lines[1].starts_with("archive a") && wanted.is_online);
        for (number, path) in &wanted.files {
            let line = wanted.list.lines().nth(number - 1).unwrap();
            assert!(line.starts_with("helper") || line.starts_with("archive"), "{line}: {}", path.display());
        }
        assert_eq!(wanted.files.len(), 3);
        let nothing = Wanted::of(&recipe(Vec::new()), None);
        assert!(nothing.list.is_empty() && nothing.files.is_empty() && !nothing.is_online);
    }

    #[test]
    fn a_helper_image_has_the_runners_version_in_its_name() {
        assert_eq!(helper_name("19.3.0"), "dayfly/helper:19.3.0");
        assert_eq!(helper_name("19.3.0~beta.1+dfsg"), "dayfly/helper:19.3.0-beta.1-dfsg");
    }

    #[test]
    fn a_machine_is_believed_when_it_says_that_it_has_ended() {
        let hear = |lines: &[&str]| {
            let (mut said, mut told) = (Said::default(), Vec::new());
            lines.iter().for_each(|line| said.hear(line, &mut |line: &str| told.push(line.to_owned())));
            (said.end().map_err(|error| error.to_string()), told)
        };
        let (inside, told) = hear(&[
            "\u{1b}[0m Linux",
            "dayfly-preload: env HTTP_PROXY=http://u:secret@p",
            "dayfly-preload: helper dayfly/helper:1",
            "dayfly-preload: inside dayfly/helper:1",
            "dayfly-preload: done",
        ]);
        assert_eq!(
            (inside, told),
            (Ok(vec!["dayfly/helper:1".to_owned()]), vec!["container images: helper dayfly/helper:1".to_owned()])
        );
        let failed = hear(&["dayfly-preload: inside a:1", "dayfly-preload: failed: Docker could not fetch a:2"]).0;
        assert_eq!(failed.unwrap_err(), "put container images into the image: Docker could not fetch a:2");
        let cut = hear(&["dayfly-preload: inside a:1", "Kernel panic"]).0.unwrap_err();
        assert!(cut.contains("ended before") && cut.ends_with("Kernel panic"), "{cut}");
    }
}
