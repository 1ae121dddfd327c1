//! Images killed in mid-change: each command of the image store, ended at each of its system calls that change a file
//! system, and again with a full disk at each. What is left must be whole, and the next command must go on from there.
//!
//! ```text
//! store-torn                       sweeps, and prints `figure images.torn` and how many were tried
//! store-torn step DIRECTORY WHAT   one change, by the product's own code: what is killed
//! ```
//!
//! strace(1) ends the step, or fails its call, at the N-th call of a kind, for each kind and each N until the step comes
//! through. So there is no list of places that could be too short. One step is planted that writes in place: it must be
//! found torn, or nothing here is proven.
#![allow(
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a tool: its output is its result, and it starts programs that end by themselves"
)]

use dayfly::image::build::{export, import};
use dayfly::image::manifest::{
    BootKind, BuildInputs, ExecutorKind, FORMAT_VERSION, ImageFile, ImageRunner, Learnt, MANIFEST_FILE, Manifest,
    RunnerOrigin,
};
use dayfly::image::store::{ImageError, ImageStore};
use sha2::{Digest as _, Sha256};
use std::error::Error;
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

/// System calls that change a file system, as far as the store makes them. Those that are missing in a kernel are no harm.
const CALLS: [&str; 16] = [
    "openat",
    "mkdir",
    "mkdirat",
    "write",
    "pwrite64",
    "copy_file_range",
    "sendfile",
    "ftruncate",
    "fsync",
    "fchmod",
    "rename",
    "renameat2",
    "symlink",
    "unlink",
    "unlinkat",
    "rmdir",
];

/// The changes, each from a store with two versions, of which the newer one is in use.
const STEPS: [&str; 9] =
    ["import", "import-tar", "keep", "promote", "rollback", "learn", "remove", "remove-version", "export"];

/// What writes in place.
const PLANTED: &str = "planted";

/// Calls of one kind that one step makes at most: a step without an end would be a bug of this program.
const CALLS_MAX: u32 = 400;

type Failure = Box<dyn Error + Send + Sync>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let done = match arguments.as_slice() {
        [word, directory, what] if word == "step" => step(Path::new(directory), what).map(|()| true),
        [] => sweep(),
        _ => Err("usage: store-torn [step DIRECTORY WHAT]".into()),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("store-torn: {error}");
            ExitCode::FAILURE
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// An image of a few bytes, told apart by `content`, in a new directory.
fn write_image(directory: &Path, content: &str) -> Result<(), Failure> {
    let mut disk = vec![0; 8192];
    disk[..4].copy_from_slice(b"QFI\xfb");
    disk[7] = 3;
    disk[23] = 16;
    disk[24..32].copy_from_slice(&(1_u64 << 30).to_be_bytes());
    disk[4096..4096 + content.len()].copy_from_slice(content.as_bytes());
    let manifest = Manifest {
        format_version: FORMAT_VERSION,
        name: "shell".into(),
        architecture: std::env::consts::ARCH.into(),
        boot: BootKind::Disk,
        cmdline: None,
        contract: dayfly_guest_config::CONTRACT,
        executor: ExecutorKind::Shell,
        networks: Vec::new(),
        info: Some("{}".into()),
        runner: ImageRunner {
            version: "19.3.0".into(),
            revision: None,
            origin: RunnerOrigin::Standin,
            sha256: "cd".repeat(32),
        },
        disk: ImageFile { file: "disk.qcow2".into(), bytes: disk.len() as u64, sha256: hex(&Sha256::digest(&disk)) },
        kernel: None,
        initrd: None,
        docker: None,
        build: BuildInputs { kernel: content.into(), ..BuildInputs::default() },
    };
    fs::create_dir_all(directory)?;
    fs::write(directory.join("disk.qcow2"), disk)?;
    fs::write(directory.join(MANIFEST_FILE), manifest.to_text())?;
    Ok(())
}

fn store(directory: &Path) -> ImageStore {
    ImageStore::new(directory.join("images"))
}

/// Two versions, `two` in use, and `three` outside, as a directory and as a file.
fn lay_out(directory: &Path) -> Result<(), Failure> {
    let store = store(directory);
    for content in ["one", "two"] {
        let from = directory.join(format!("from-{content}"));
        write_image(&from, content)?;
        let mut staged = import(&from, &store, None, &mut |_| ())?;
        staged.learn(learnt())?;
        staged.promote()?;
    }
    write_image(&directory.join("three"), "three")?;
    let third = ImageStore::new(directory.join("elsewhere"));
    let image = import(&directory.join("three"), &third, None, &mut |_| ())?.promote()?;
    export(&third, &image, &directory.join("three.tar"))?;
    Ok(())
}

fn learnt() -> Learnt {
    Learnt { info: "{}".into(), contract: dayfly_guest_config::CONTRACT, relay: true }
}

/// The version that is not in use.
fn other_version(store: &ImageStore) -> Result<String, Failure> {
    store.versions("shell")?.get(1).cloned().ok_or_else(|| "there is no other version".into())
}

/// One change.
fn step(directory: &Path, what: &str) -> Result<(), Failure> {
    let store = store(directory);
    match what {
        "import" | "import-tar" | "keep" => {
            let from = directory.join(if what == "import-tar" { "three.tar" } else { "three" });
            let mut staged = import(&from, &store, None, &mut |_| ())?;
            staged.learn(learnt())?;
            if what == "keep" {
                staged.keep()?
            } else {
                staged.promote()?
            };
        }
        "promote" => drop(store.promote_version(&other_version(&store)?)?),
        "rollback" => drop(store.roll_back("shell")?),
        "learn" => store.learn(&store.get("shell")?, Learnt { info: "{\"a\":1}".into(), ..learnt() })?,
        "remove" => store.remove("shell")?,
        "remove-version" => store.remove_version(&other_version(&store)?)?,
        "export" => export(&store, &store.get("shell")?, &directory.join("out"))?,
        PLANTED => {
            // As somebody might who has not thought of it: into the version in use.
            let image = store.get("shell")?;
            fs::write(&image.disk, fs::read(directory.join("three/disk.qcow2"))?)?;
            fs::write(image.dir.join(MANIFEST_FILE), fs::read(directory.join("three").join(MANIFEST_FILE))?)?;
        }
        other => return Err(format!("no step `{other}`").into()),
    }
    Ok(())
}

/// What is wrong with what a step has left; then the next one must go on from there.
fn judge(directory: &Path, what: &str) -> Result<(), Failure> {
    let images = store(directory);
    match images.get("shell") {
        Ok(image) => {
            images.verify(&image)?;
            if !["one", "two", "three"].contains(&image.manifest.build.kernel.as_str()) {
                return Err("it is an image that nobody has made".into());
            }
        }
        Err(ImageError::Missing { .. }) if what == "remove" => {}
        Err(error) => return Err(error.into()),
    }
    for version in images.versions("shell")? {
        images.verify(&images.named(&version)?)?;
    }
    for (name, listed) in images.list()? {
        listed.map_err(|error| format!("{name}: {error}"))?;
    }
    let out = directory.join("out");
    if out.exists() {
        // There as a whole, or not at all.
        import(&out, &ImageStore::new(directory.join("again")), None, &mut |_| ())?.promote()?;
    }
    // The next command.
    step(directory, "import")?;
    let images = store(directory);
    if images.get("shell")?.manifest.build.kernel != "three" {
        return Err("the next import was not put into use".into());
    }
    let left: Vec<String> = fs::read_dir(images.directory())?
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with('.') && !name.ends_with(".lock"))
        .collect();
    if left.is_empty() { Ok(()) } else { Err(format!("the next import has left {left:?}").into()) }
}

/// How a step is met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Killed,
    DiskFull,
}

impl How {
    fn injection(self, call: &str, n: u32) -> String {
        match self {
            Self::Killed => format!("inject={call}:signal=KILL:when={n}"),
            Self::DiskFull => format!("inject={call}:error=ENOSPC:when={n}"),
        }
    }
}

/// One step, met at the N-th call of a kind. `None`: it came through without having made so many.
fn met(directory: &Path, what: &str, how: How, call: &str, n: u32) -> Result<Option<()>, Failure> {
    let log = directory.join("strace");
    let own = std::env::current_exe()?;
    let status = Command::new("strace")
        .args(["-f", "-qq", "-o"])
        .arg(&log)
        .args(["-e", &format!("trace={call}"), "-e", &how.injection(call, n)])
        .arg(own)
        .arg("step")
        .arg(directory)
        .arg(what)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()?;
    let was_met = match how {
        How::Killed => status.signal().is_some() || status.code() == Some(128 + 9),
        How::DiskFull => fs::read_to_string(&log).unwrap_or_default().contains("(INJECTED)"),
    };
    if !was_met && !status.success() {
        return Err(format!("the step {what} ends with {status} by itself, {call} {n}").into());
    }
    Ok(was_met.then_some(()))
}

/// Figures of a sweep.
#[derive(Default)]
struct Swept {
    tried: u32,
    torn: u32,
}

/// A fresh copy of the beginning.
fn copy(from: &Path) -> Result<tempfile::TempDir, Failure> {
    let to = tempfile::tempdir()?;
    let copied = Command::new("cp").arg("-a").arg(from.join(".")).arg(to.path()).status()?;
    if copied.success() { Ok(to) } else { Err("copy the beginning".into()) }
}

fn sweep_step(beginning: &Path, what: &str, how: How, swept: &mut Swept) -> Result<(), Failure> {
    for call in CALLS {
        for n in 1..=CALLS_MAX {
            let directory = copy(beginning)?;
            if met(directory.path(), what, how, call, n)?.is_none() {
                break;
            }
            swept.tried += 1;
            if let Err(error) = judge(directory.path(), what) {
                swept.torn += 1;
                println!("torn: {what}, {how:?} at {call} {n}: {}", dayfly::telemetry::chain(&*error));
            }
        }
    }
    Ok(())
}

/// Two commands at once: each ends well, or says that another one is at it; what is left is whole.
fn two_at_once(beginning: &Path, swept: &mut Swept) -> Result<(), Failure> {
    let own: PathBuf = std::env::current_exe()?;
    for (one, other) in [
        ("import", "import-tar"),
        ("import", "rollback"),
        ("promote", "rollback"),
        ("keep", "remove-version"),
        ("learn", "import"),
        ("remove", "import"),
        ("export", "import"),
    ] {
        for _ in 0..5 {
            let directory = copy(beginning)?;
            let begin = |what: &str| {
                let mut command = Command::new(&own);
                command.arg("step").arg(directory.path()).arg(what);
                command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()
            };
            let mut both = [begin(one)?, begin(other)?];
            for child in &mut both {
                child.wait()?;
            }
            swept.tried += 1;
            // Either may be first; whether there is an image after a removal depends on that.
            if let Err(error) = judge(directory.path(), if one == "remove" { "remove" } else { one }) {
                swept.torn += 1;
                println!("torn: {one} beside {other}: {}", dayfly::telemetry::chain(&*error));
            }
        }
    }
    Ok(())
}

fn sweep() -> Result<bool, Failure> {
    let beginning = tempfile::tempdir()?;
    lay_out(beginning.path())?;
    let mut planted = Swept::default();
    sweep_step(beginning.path(), PLANTED, How::Killed, &mut planted)?;
    let mut swept = Swept::default();
    for what in STEPS {
        for how in [How::Killed, How::DiskFull] {
            sweep_step(beginning.path(), what, how, &mut swept)?;
        }
    }
    let swept_alone = swept.tried;
    two_at_once(beginning.path(), &mut swept)?;
    println!("figure images.planted_found {}", u32::from(planted.torn > 0));
    println!("figure images.tried {}", swept.tried);
    println!("figure images.torn {}", swept.torn);
    // As many as there are calls in it: fewer, and nothing was swept.
    Ok(swept.torn == 0 && planted.torn > 0 && swept_alone > 100)
}
