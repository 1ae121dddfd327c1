//! What a job finds in the image, and what the image costs.

use super::lab::{self, Lab, Options};
use dayfly_exec::standin::JobState;
use std::fs;
use std::os::unix::fs::MetadataExt as _;

/// Bytes of the image's disk at most, on the host's.
const DISK_BYTES_MAX: u64 = 400_000_000;

/// U49: what a job expects of a CI image is there and works, and the image's file stays small. `sudo` is there for
/// scripts that say it, and makes nobody root.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_finds_its_tools_in_a_small_image() {
    let disk = fs::metadata(lab::image_directory().join("debian-12-shell/disk.qcow2")).unwrap();
    assert!(disk.len().max(disk.blocks() * 512) <= DISK_BYTES_MAX, "{} bytes", disk.len());

    let mut lab = Lab::start(Options::default()).await;
    let job = lab.job(&[
        "for tool in uptime ps make gcc ld python3 jq sudo git curl wget xz bzip2 zstd unzip zip ssh rsync file patch gpg \
         less envsubst lsb_release; do command -v $tool >/dev/null || { echo no $tool; exit 1; }; done",
        "uptime",
        "printf '#include <stdio.h>\\nint main(void) { puts(\"compiled\"); }\\n' > a.c && make a && ./a",
        "python3 -c 'import json, ssl, sqlite3, venv; print(json.dumps({\"python\": [6 * 7]}))' | jq .python[0]",
        "sudo -n id -u && exit 1 || echo no root",
    ]);
    lab.until(job, JobState::Success).await;
    let trace = lab.trace(job);
    for text in ["load average:", "compiled", "42", "no root"] {
        assert!(trace.contains(text), "no {text:?}\n{trace}");
    }
    lab.assert_clean().await;
}

/// U49: the same word works where the class lets jobs be root.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_is_root_may_say_sudo() {
    let mut lab = Lab::start(Options { class: "run_as_root = true", ..Options::default() }).await;
    let job = lab.job(&["echo \"id $(sudo -n id -u)\""]);
    lab.until(job, JobState::Success).await;
    assert!(lab.trace(job).contains("id 0"), "{}", lab.trace(job));
    lab.assert_clean().await;
}

/// U47: the image's kernel tells of its panic through pvpanic, which a restart would else look like.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_kernel_panics_says_so() {
    let mut lab = Lab::start(Options { class: "run_as_root = true", ..Options::default() }).await;
    let job = lab.job(&[
        "echo begun",
        "sleep 2",
        "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger",
        "sleep 300",
    ]);
    let found = lab.until(job, JobState::Failed).await;
    let trace = lab.trace(job);
    assert_eq!(found.failure_reason.as_deref(), Some("runner_system_failure"), "{}", lab.story(job));
    for text in [
        "the virtual machine ended by a panic of its kernel in the middle of the job.",
        "the machine's console says: Kernel panic - not syncing: sysrq triggered crash",
    ] {
        assert!(trace.contains(text), "no {text:?}\n{}", lab.story(job));
    }
    lab.assert_clean().await;
}
