//! The e2e ring: real libvirt, QEMU and image, the real binary, GitLab's stand-in over TLS.
//!
//! One run per behaviour, for each boots a VM. `scripts/test e2e` prepares the image and the user.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a harness: it starts the daemon as a process and waits for it"
)]

#[path = "../support/canary.rs"]
#[allow(
    unreachable_pub,
    missing_docs,
    dead_code,
    reason = "shared by several test binaries, each of which uses a part"
)]
mod canary;
mod caches;
mod forwards;
mod clones;
mod lab;
mod leaks;
mod restarts;
mod restored;
mod times;
mod tools;

use dayfly_exec::standin::{JobSpec, JobState, Variable};
use lab::{Lab, Options, run};
use std::fs;
use std::time::Duration;

#[tokio::test(flavor = "multi_thread")]
async fn a_job_clones_uploads_an_artifact_and_succeeds() {
    let mut lab = Lab::start(Options::default()).await;
    let artifacts = serde_json::json!({"paths": ["out.txt"], "name": "result", "when": "always"});
    let job = lab.enqueue(lab.spec(&["cat file.txt", "echo made > out.txt", "id -un"]).with_artifacts(artifacts));
    let found = lab.until(job, JobState::Success).await;
    let trace = lab.trace(job);
    let first = trace.lines().next().unwrap();
    assert!(first.contains(" 00O section_start:") && first.contains(":dayfly_boot[collapsed=true]"), "{trace}");
    for text in
        ["disk ready", "machine started", "gitlab-runner asks for the job", "content", "gitlab-runner", "Job succeeded"]
    {
        assert!(trace.contains(text), "no {text:?}\n{trace}");
    }
    assert_eq!(found.artifacts.len(), 1, "{trace}");
    lab.assert_clean().await;
}

/// U1: the proof is the image's own kernel and initrd, in a real machine; `doctor` says so.
#[tokio::test(flavor = "multi_thread")]
async fn doctor_boots_the_images_own_kernel() {
    let mut lab = Lab::start(Options::default()).await;
    let found = lab.doctor();
    assert!(found.contains(" runs guests: a VM of the image's kernel spoke after "), "{found}");
    lab.assert_clean().await;
}

/// U41: while a job runs nobody listens at a port for doors, so there is none that a guest could come to.
#[tokio::test(flavor = "multi_thread")]
async fn a_running_job_has_no_door_at_a_port() {
    let mut lab = Lab::start(Options::default()).await;
    let job = lab.job(&["echo begun", "sleep 5"]);
    lab.until_trace(job, "begun").await;
    assert_eq!((lab.vms(), lab.doors_at_ports()), (1, Vec::new()));
    lab.until(job, JobState::Success).await;
    lab.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_script_reports_its_exit_code() {
    let mut lab = Lab::start(Options::default()).await;
    let job = lab.job(&["exit 42"]);
    let found = lab.until(job, JobState::Failed).await;
    assert_eq!(
        (found.failure_reason.as_deref(), found.exit_code),
        (Some("script_failure"), Some(42)),
        "{}",
        lab.story(job)
    );
    lab.assert_clean().await;
}

/// G14: a real boot.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_while_booting_starts_nothing() {
    let mut lab = Lab::start(Options::default()).await;
    let job = lab.job(&["echo never"]);
    lab.until_trace(job, "machine started").await;
    lab.standin.cancel(job, true);
    lab.until(job, JobState::Canceled).await;
    lab.until_trace(job, "canceled before it started").await;
    assert!(!lab.trace(job).contains("never"));
    lab.assert_clean().await;
    assert_eq!(lab.vms(), 0);
}

/// G15: a real runner.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_while_running_lets_after_script_run() {
    let mut lab = Lab::start(Options::default()).await;
    let job = lab.enqueue(lab.spec(&["echo begun", "sleep 300"]).with_after_script(["echo cleaned up"]));
    lab.until_trace(job, "begun").await;
    lab.standin.cancel(job, true);
    lab.until(job, JobState::Canceled).await;
    assert!(lab.trace(job).contains("cleaned up"), "{}", lab.story(job));
    lab.assert_clean().await;
}

/// G16: a real machine.
#[tokio::test(flavor = "multi_thread")]
async fn a_hard_cancel_takes_the_machine_at_once() {
    let mut lab = Lab::start(Options { limits: "cancel_grace = \"10s\"", ..Options::default() }).await;
    let job = lab.job(&["echo begun", "sleep 300"]);
    lab.until_trace(job, "begun").await;
    lab.standin.cancel(job, false);
    lab.until(job, JobState::Canceled).await;
    lab.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_overruns_times_out() {
    let mut lab = Lab::start(Options::default()).await;
    let job = lab.enqueue(lab.spec(&["echo begun", "sleep 300"]).with_timeout(Duration::from_secs(45)));
    let found = lab.until(job, JobState::Failed).await;
    assert_eq!(found.failure_reason.as_deref(), Some("job_execution_timeout"), "{}", lab.story(job));
    lab.assert_clean().await;
}

/// U3: a process of the job that the guest's kernel ends for want of memory costs that process, and its machine nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_eats_all_memory_is_killed_and_no_more() {
    let mut lab = Lab::start(Options::default()).await;
    // Without it the official runner's shell makes 1 of every code with which a line of the script fails.
    let whole = Variable::new("FF_USE_NEW_BASH_EVAL_STRATEGY", "true");
    let script = lab.spec(&["echo begun", "tail /dev/zero"]).with_after_script(["echo cleaned up"]);
    let job = lab.enqueue(script.with_variable(whole));
    let found = lab.until(job, JobState::Failed).await;
    assert_eq!(
        (found.failure_reason.as_deref(), found.exit_code),
        (Some("script_failure"), Some(137)),
        "{}",
        lab.story(job)
    );
    let trace = lab.trace(job);
    assert!(trace.contains("Killed") && trace.contains("cleaned up"), "{trace}");
    lab.assert_clean().await;
}

/// A job gets the size that it asks for, as its guest sees it; one that asks for too much, or that a rule denies, gets its
/// line and no machine.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_gets_the_size_that_it_asks_for_and_a_denied_one_none() {
    let class = "max_cpus = 2\nmax_memory_mib = 768\nmax_disk_gib = 10\n[[rule]]\nname = \"releases\"\nref = [\"release-*\"]\n\
                 deny = \"releases are built elsewhere\"\n";
    let mut lab = Lab::start(Options { class, ..Options::default() }).await;
    let wish = |name: &str, value: &str| Variable::new(name, value);
    let denied = lab.enqueue(JobSpec { git_ref: "release-1".into(), ..lab.spec(&["echo never"]) });
    let beyond = lab.enqueue(lab.spec(&["echo never"]).with_variable(wish("DAYFLY_CPUS", "3")));
    for (job, line) in [
        (denied, "this runner does not take the job: releases are built elsewhere. Ask your operators"),
        (beyond, "`DAYFLY_CPUS` asks for 3 CPUs; here jobs may have from 1 CPU to 2 CPUs. Change the job's variables"),
    ] {
        let found = lab.until(job, JobState::Failed).await;
        assert_eq!(found.failure_reason.as_deref(), Some("runner_configuration_error"), "{}", lab.story(job));
        assert!(lab.trace(job).contains(line), "no {line:?}\n{}", lab.trace(job));
    }
    let script = ["nproc | grep -qx 2", "awk '/^MemTotal:/ { exit !($2 > 600000 && $2 <= 786432) }' /proc/meminfo"];
    let spec = lab.spec(&script).with_variable(wish("DAYFLY_CPUS", "2")).with_variable(wish("DAYFLY_MEMORY", "768M"));
    let job = lab.enqueue(spec.with_variable(wish("DAYFLY_DISK", "10 GiB")));
    lab.until(job, JobState::Success).await;
    assert!(lab.trace(job).contains("asked for: 2 CPUs, 768 MiB memory, 10 GiB disk"), "{}", lab.trace(job));
    lab.assert_clean().await;
}

/// U45: a job that fills its disk has its verdict and its log, for the runner has room of its own; the job does not know
/// of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_fills_its_disk_gets_its_verdict_and_its_log() {
    let class = "keep_failed = \"30m\"\nkeep_failed_projects = [\"group/**\"]";
    let mut lab = Lab::start(Options { class, ..Options::default() }).await;
    let job = lab.enqueue(
        lab.spec(&[
            "echo \"temporary files: ${TMPDIR-nowhere special}\"",
            // Taken without being written, which takes minutes; the rest until there is none.
            "fallocate -l \"$(df --output=avail -B1 /tmp | tail -n 1)\" /tmp/all || true",
            "dd if=/dev/zero of=/tmp/rest bs=64k 2>/dev/null || echo the disk is full",
            "i=0; while [ $i -lt 200 ]; do echo \"line $i of a log that is read on a full disk\"; i=$((i+1)); done",
            "echo more > /tmp/more",
        ])
        .with_after_script(["echo after it"]),
    );
    let found = lab.until(job, JobState::Failed).await;
    assert_eq!(found.failure_reason.as_deref(), Some("script_failure"), "{}", lab.story(job));
    let trace = lab.trace(job);
    for text in ["temporary files: nowhere special", "the disk is full", "line 199 of a log", "after it"] {
        assert!(trace.contains(text), "no {text:?}\n{trace}");
    }
    look_inside(&lab, job, &trace).await;
    lab.assert_clean().await;
}

/// Its machine is kept, and a shell in it is root's, on a terminal, and recorded; then it is ended by a word.
async fn look_inside(lab: &Lab, job: dayfly::gitlab::JobId, trace: &str) {
    assert!(trace.contains("its machine is kept for 30 min"), "{trace}");
    let id = job.to_string();
    let (done, status) = lab.dayfly(&["status"], "").await;
    assert!(done && status.contains("kept"), "{status}");
    let script = "stty size; id -un; tty; ls /tmp/rest; pgrep -x gitlab-runner || echo no-$((6*7))-runner; printf '\\033]0;t\\007'; exit\n";
    let (done, shown) = lab.dayfly(&["shell", &id], script).await;
    for text in ["24 80", "root", "/dev/pts/", "/tmp/rest", "no-42-runner"] {
        assert!(done && shown.contains(text), "no {text:?}\n{shown}\n{}", lab.story(job));
    }
    assert!(!shown.contains("\u{1b}]"), "{shown:?}");
    let recordings: Vec<_> = fs::read_dir(lab.dir.path().join("state/shells")).unwrap().flatten().collect();
    assert_eq!(recordings.len(), 1);
    assert!(fs::read_to_string(recordings[0].path()).unwrap().contains("no-42-runner"));
    let (done, console) = lab.dayfly(&["console", "--all", &id], "").await;
    assert!(done && console.contains("runner for http://192.0.2.1"), "{console}");
    let (done, killed) = lab.dayfly(&["kill", &id], "").await;
    assert!(done, "{killed}");
}

/// V2: a real machine that says a word and waits.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_never_asks_fails_the_job_with_our_fault() {
    // The same disk, but a first process that says a word and waits: no runner ever asks.
    let images = tempfile::tempdir_in("/tmp").unwrap();
    fs::set_permissions(images.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let (from, to) = (lab::image_directory().join("debian-12-shell"), images.path().join("mute"));
    let copied = run("cp", &["-rL", "--reflink=auto", &from.display().to_string(), &to.display().to_string()]);
    assert!(copied.status.success());
    let manifest = fs::read_to_string(to.join("image.toml")).unwrap();
    let mute = manifest
        .replace("name = \"debian-12-shell\"", "name = \"mute\"")
        .replace("init=/usr/lib/systemd/systemd", "init=/bin/cat")
        .replace(" quiet", "");
    assert_ne!(mute, manifest);
    fs::write(to.join("image.toml"), mute).unwrap();
    let options = Options {
        image: "mute".into(),
        image_directory: images.path().to_owned(),
        limits: "boot_deadline = \"30s\"",
        ..Options::default()
    };
    let mut lab = Lab::start(options).await;
    let job = lab.job(&["echo never"]);
    let found = lab.until(job, JobState::Failed).await;
    assert_eq!(found.failure_reason.as_deref(), Some("runner_system_failure"));
    let trace = lab.trace(job);
    assert!(
        trace.contains("the virtual machine was not ready within 30 s. Your job is not the cause; please retry."),
        "{trace}"
    );
    assert!(trace.contains("the last lines of the machine's console:") && trace.contains("  | ["), "{trace}");
    lab.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_jobs_run_at_once_each_in_its_own_machine() {
    let mut lab = Lab::start(Options { concurrent: 2, ..Options::default() }).await;
    let script = ["cat /etc/machine-id /proc/sys/kernel/random/boot_id", "touch $HOME/mine", "sleep 20"];
    let (a, b) = (lab.job(&script), lab.job(&script));
    lab.until_trace(a, "touch $HOME/mine").await;
    lab.until_trace(b, "touch $HOME/mine").await;
    assert_eq!(lab.vms(), 2, "both run at once");
    lab.until(a, JobState::Success).await;
    lab.until(b, JobState::Success).await;
    let ids = |trace: String| {
        trace
            .lines()
            .filter_map(|l| l.get(32..))
            .filter(|l| l.len() >= 32 && l.chars().all(|c| c.is_ascii_hexdigit() || c == '-'))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let (a, b) = (ids(lab.trace(a)), ids(lab.trace(b)));
    assert!(a.len() >= 2 && b.len() >= 2 && a.iter().all(|id| !b.contains(id)), "{a:?} {b:?}");
    lab.assert_clean().await;
}
