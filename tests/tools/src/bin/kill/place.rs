//! The files of a run: for each state directory its image, configuration, token and machines.

use crate::CELLS;
use crate::leftovers::Places;
use crate::work::Source;
use dayfly::image::manifest::MANIFEST_FILE;
use dayfly_exec::standin::{Artifact, ArtifactContent, JobSpec, JobState, ProjectId, Standin};
use dayfly_test_tools::image::empty_image;
use dayfly_test_tools::killing::artifact;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

/// Jobs at once in one state directory.
pub(crate) const CONCURRENT: u16 = 4;

/// Ports of one state directory's doors.
const PORTS: u16 = 16;

/// The image, below the directory of the state directory.
const IMAGE: &str = "images/test";

/// Where memory is a file system, as the runtime directory of a service is.
const MEMORY: &str = "/dev/shm";

/// Bytes of the artifact that every job may fetch.
const SOURCE_BYTES: usize = 700_000;

/// What all state directories share.
#[derive(Clone, Debug)]
pub(crate) struct Paths {
    pub(crate) dayfly: PathBuf,
    pub(crate) guest: PathBuf,
    /// State and images.
    base: PathBuf,
    /// Runtime directories.
    memory: PathBuf,
    /// Whether daemons keep their jobs' repositories. The last version's does not know how.
    clones: bool,
}

impl Paths {
    /// Makes the directories.
    pub(crate) fn make(dayfly: &Path, guest: &Path, clones: bool) -> Result<Self, String> {
        let made = || -> io::Result<Self> {
            // Short paths: unix sockets end at 107 bytes.
            let base = tempfile::Builder::new().prefix("df-kill-").tempdir_in("/tmp")?.keep();
            fs::set_permissions(&base, fs::Permissions::from_mode(0o711))?;
            let memory = tempfile::Builder::new().prefix("df-kill-").tempdir_in(MEMORY);
            let memory = memory.map_or_else(|_| base.clone(), tempfile::TempDir::keep);
            Ok(Self { dayfly: fs::canonicalize(dayfly)?, guest: fs::canonicalize(guest)?, base, memory, clones })
        };
        made().map_err(|error| format!("make the directories: {error}"))
    }

    /// For people.
    pub(crate) fn describe(&self) -> String {
        format!("{} and {}", self.base.display(), self.memory.display())
    }

    /// Removes all.
    pub(crate) fn remove(&self) {
        for directory in [&self.base, &self.memory] {
            // What is left is in a temporary directory.
            let _ = fs::remove_dir_all(directory);
        }
    }

    /// Whether this state directory is on a disk, where each fsync waits; the others are in memory, where a kill meets
    /// other steps. To a SIGKILL they are the same.
    pub(crate) fn is_on_disk(&self, number: u16) -> bool {
        number < 2 || self.memory == self.base
    }

    /// Where the disk is.
    pub(crate) fn disk(&self) -> &Path {
        &self.base
    }

    /// Makes the files of one state directory; its configuration, and where its things will be.
    pub(crate) fn cell(&self, number: u16, url: &str, token: &str) -> Result<(PathBuf, Places), String> {
        let dir = if self.is_on_disk(number) { &self.base } else { &self.memory }.join(format!("c{number}"));
        let slot = u16::try_from(std::process::id() % 24).unwrap_or(0);
        // State directories that work side by side have numbers that follow each other.
        let first = 31_000 + slot * CELLS * PORTS + number % CELLS * PORTS;
        let places = Places {
            state: dir.join("state"),
            runtime: self.memory.join(format!("r{number}")),
            machines: dir.join("vms"),
            ports: first..=first + PORTS - 1,
        };
        let made = || -> io::Result<PathBuf> {
            fs::create_dir_all(&places.machines)?;
            boot_with(&places, &self.guest)?;
            empty_image(&dir.join(IMAGE), if self.clones { &["clone"] } else { &[] })?;
            let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(dir.join("token"))?;
            file.write_all(token.as_bytes())?;
            let config = dir.join("config.toml");
            fs::write(&config, self.config(&dir, &places, url))?;
            Ok(config)
        };
        let config = made().map_err(|error| format!("make {}: {error}", dir.display()))?;
        Ok((config, places))
    }

    fn config(&self, dir: &Path, places: &Places, url: &str) -> String {
        let mut text = String::new();
        let mut add = |line: String| {
            // Writing to a String never fails.
            let _ = writeln!(text, "{line}");
        };
        add(format!("state_directory = \"{}\"", places.state.display()));
        add(format!("runtime_directory = \"{}\"", places.runtime.display()));
        add(format!("image_directory = \"{}\"", dir.join("images").display()));
        add(format!("concurrent = {CONCURRENT}"));
        add("[log]\nformat = \"json\"".into());
        add(format!("[hypervisor]\nuri = \"processes://{}\"\naccel = \"kvm\"", places.machines.display()));
        add(format!("[network]\nguest_ports = \"{}-{}\"", places.ports.start(), places.ports.end()));
        add("[capacity]\nmemory_mib = 1000000\ndisk_gib = 1000000".into());
        if self.clones {
            add("[clones]\nenabled = true\nsize_gib = 1\nproject_gib = 1".into());
        }
        // A guest that a failed round forgets ends soon.
        add("[limits]\nkeepalive = \"2s\"\nguest_power_off = \"3m\"".into());
        add("[[class]]\nname = \"small\"\nimage = \"test\"\ncpus = 1\nmemory_mib = 512\ndisk_gib = 1".into());
        add(format!("[[runner]]\nname = \"kill\"\nurl = \"{url}\"\ntoken_file = \"{}\"", dir.join("token").display()));
        add("class = \"small\"\nallow_insecure_http = true\npoll_interval = \"200ms\"".into());
        text
    }
}

/// Lets machines that are started from now on run this program.
pub(crate) fn boot_with(places: &Places, guest: &Path) -> io::Result<()> {
    let (new, link) = (places.machines.join(".guest"), places.machines.join("guest"));
    symlink(guest, &new)?;
    fs::rename(new, link)
}

/// Writes the guest contract into the image's manifest as another version's build would: `None`: not at all, as those
/// did that did not count contracts.
pub(crate) fn build_again(config: &Path, contract: Option<u32>) -> io::Result<()> {
    let path = config.with_file_name(IMAGE).join(MANIFEST_FILE);
    let text = fs::read_to_string(&path)?;
    let mut lines: Vec<_> = text.lines().filter(|line| !line.starts_with("contract = ")).map(str::to_owned).collect();
    if let Some(contract) = contract {
        let before = lines.iter().position(|line| line.starts_with("executor = ")).unwrap_or_default();
        lines.insert(before, format!("contract = {contract}"));
    }
    // Whole or not at all: a daemon may be looking.
    let new = path.with_extension("new");
    fs::write(&new, lines.join("\n") + "\n")?;
    fs::rename(new, path)
}

/// A job that has ended long ago, whose artifact others may fetch.
pub(crate) fn source(standin: &Standin, project: ProjectId) -> Source {
    let job = standin.enqueue(project, JobSpec::script(["bytes 1"]));
    standin.edit(|model| {
        if let Some(job) = model.jobs.get_mut(&job) {
            (job.state, job.queued) = (JobState::Success, false);
            let content = ArtifactContent::Memory(artifact(job.id.0, SOURCE_BYTES).into());
            job.artifacts.insert(
                "archive".into(),
                Artifact {
                    kind: "archive".into(),
                    format: "zip".into(),
                    filename: "artifacts.zip".into(),
                    size: SOURCE_BYTES as u64,
                    sha256: String::new(),
                    accessibility: "public".into(),
                    remote: false,
                    content,
                },
            );
        }
    });
    Source { job, bytes: SOURCE_BYTES }
}
