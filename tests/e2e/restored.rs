//! Machines that are restored from one that was frozen, with plain QEMU: each is its own, and what is damaged or half made
//! costs no job.

use crate::lab::{LIMIT, Lab, Options};
use crate::leaks;
use dayfly_exec::standin::JobState;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

/// Clones that are compared, and how many of them are there at once.
const CLONES: usize = 8;
const AT_ONCE: u32 = 4;

/// What a clone prints, a word before each: none of it may be another's.
const OWN: [(&str, &str); 8] = [
    ("machine-id", "cat /etc/machine-id"),
    ("boot-id", "cat /proc/sys/kernel/random/boot_id"),
    ("host-name", "hostname"),
    ("mac", "cat /sys/class/net/eth0/address"),
    ("uuid", "cat /proc/sys/kernel/random/uuid"),
    ("random", "head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \\n'"),
    ("directory", "mktemp -d /tmp/clone-XXXXXXXXXX"),
    ("key", "git config --global user.name x; head -c 16 /dev/random | od -An -v -tx1 | tr -d ' \\n'"),
];

fn options() -> Options {
    Options { backend: "qemu", start: "restored", concurrent: AT_ONCE, ..Options::default() }
}

/// What lies in the directory of goldens, but for where they are made.
fn goldens(lab: &Lab) -> Vec<PathBuf> {
    let entries = fs::read_dir(lab.dir.path().join("state/goldens")).into_iter().flatten().flatten();
    let named = entries.filter(|entry| !entry.file_name().to_string_lossy().starts_with('.'));
    named.map(|entry| entry.path()).filter(|path| path.join("golden.json").exists()).collect()
}

/// Where one is made now.
fn workspaces(lab: &Lab) -> Vec<PathBuf> {
    let entries = fs::read_dir(lab.dir.path().join("state/goldens/.machines")).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

/// QEMUs that have a file below this directory.
fn qemus(below: &str) -> usize {
    let of = |path: PathBuf| fs::read(path.join("cmdline")).unwrap_or_default();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let lines = processes.map(|entry| String::from_utf8_lossy(&of(entry.path())).into_owned());
    lines.filter(|line| line.contains("qemu-system") && line.contains(below)).count()
}

async fn until(lab: &Lab, what: &str, holds: impl Fn() -> bool) {
    let waited = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let in_time = tokio::time::timeout(LIMIT, waited).await;
    let log = || fs::read_to_string(lab.dir.path().join("log")).unwrap_or_default();
    assert!(in_time.is_ok(), "not {what} in time\n{}", log());
}

/// One that jobs may be restored from.
async fn until_frozen(lab: &Lab) -> PathBuf {
    until(lab, "frozen", || lab.says(&["status"]).contains("FROZEN")).await;
    let [golden] = &goldens(lab)[..] else { panic!("one golden") };
    golden.clone()
}

/// T19: a daemon that dies while it freezes a machine leaves nothing of it to the next one; and what comes of one golden has
/// nothing in common, of what a machine must have for itself.
#[tokio::test(flavor = "multi_thread")]
async fn clones_of_one_golden_share_no_random_byte_and_no_name() {
    let mut lab = Lab::start(options()).await;
    // It boots, and meanwhile a machine of its kind is about to be frozen.
    let job = lab.job(&["echo booted"]);
    let making = format!("{}/state/goldens/.machines/", lab.dir.path().display());
    until(&lab, "freezing", || qemus(&making) == 1).await;
    let [half] = &workspaces(&lab)[..] else { panic!("one is made at a time") };
    let half = half.clone();
    lab.stop_daemon("KILL").await;
    assert_eq!(qemus(&making), 1, "it lives without the daemon");
    lab.start_daemon().await;
    until(&lab, "taken down", || qemus(&making) == 0 && !half.exists()).await;
    lab.until(job, JobState::Success).await;
    assert!(!lab.trace(job).contains("restored"), "{}", lab.trace(job));

    // The job of before may have been begun anew, and another machine frozen beside it.
    let job = lab.job(&["echo once more"]);
    lab.until(job, JobState::Success).await;
    let golden = until_frozen(&lab).await;
    let state = fs::read(golden.join("state")).unwrap();
    assert_eq!(leaks::in_bytes("a frozen machine's memory", &state), Vec::<String>::new());
    drop(state);

    let mut script: Vec<String> = OWN.iter().map(|(word, print)| format!("echo \"own {word} $({print})\"")).collect();
    script.extend(["cat file.txt".into(), "echo \"clock $(date +%s)\"".into(), "sleep 3".into()]);
    let script: Vec<&str> = script.iter().map(String::as_str).collect();
    let began = SystemTime::now();
    let jobs: Vec<_> = (0..CLONES).map(|_| lab.job(&script)).collect();
    let mut seen = BTreeSet::new();
    for job in jobs {
        lab.until(job, JobState::Success).await;
        let trace = lab.trace(job);
        assert!(trace.contains("machine restored") && trace.contains("content"), "{}", lab.story(job));
        for (word, _) in OWN {
            let marker = format!("own {word} ");
            let told: Vec<&str> = trace.lines().filter_map(|line| Some(line.split_once(&marker)?.1.trim())).collect();
            let value = told.into_iter().find(|value| !value.contains('$') && value.len() > 5);
            let value = value.unwrap_or_else(|| panic!("no {word}\n{trace}"));
            assert!(seen.insert((word, value.to_owned())), "{word} {value} is another's, too\n{trace}");
        }
        let clock = trace.lines().filter_map(|line| line.split_once("clock ")?.1.trim().parse::<u64>().ok()).next();
        let (clock, now) = (clock.expect("a clock"), SystemTime::now());
        let seconds = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        assert!((seconds(began)..=seconds(now) + 1).contains(&clock), "a stale clock: {clock}\n{trace}");
    }
    assert_eq!(seen.len(), OWN.len() * CLONES);
    assert_eq!(goldens(&lab), [golden]);
    lab.assert_clean().await;
}

/// One bit of its memory: not one machine goes on from it, the job boots, and the operator hears of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_golden_that_is_damaged_by_a_bit_is_refused_and_the_job_boots() {
    let mut lab = Lab::start(options()).await;
    let job = lab.job(&["echo booted"]);
    lab.until(job, JobState::Success).await;
    let golden = until_frozen(&lab).await;
    let state = golden.join("state");
    assert_eq!(fs::metadata(&state).unwrap().permissions().mode() & 0o777, 0o400);
    let mut bytes = fs::read(&state).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::set_permissions(&state, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(&state, bytes).unwrap();

    let job = lab.job(&["echo all the same"]);
    lab.until(job, JobState::Success).await;
    let trace = lab.trace(job);
    assert_eq!(trace.matches("machine could not be restored; it boots").count(), 1, "{}", lab.story(job));
    let told = lab.says(&["status"]);
    assert!(told.contains("is not what was frozen any more"), "{told}");
    until(&lab, "thrown away", || {
        !state.exists() || fs::metadata(&state).unwrap().permissions().mode() & 0o777 == 0o400
    })
    .await;

    // The next one is whole.
    let job = lab.job(&["echo once more"]);
    lab.until(job, JobState::Success).await;
    until_frozen(&lab).await;
    let job = lab.job(&["echo and again"]);
    lab.until(job, JobState::Success).await;
    assert!(lab.trace(job).contains("machine restored"), "{}", lab.story(job));
    // It was said as an error, which is what it is.
    lab.until_released().await;
    assert_eq!(lab.stop_daemon("TERM").await, Some(0));
}
