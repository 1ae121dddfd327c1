//! What a restart costs a job: nothing. Of the daemon, handed over or killed, and of libvirtd.

use super::lab::{LIMIT, Lab, Options, run};
use dayfly_exec::standin::{Fault, JobState, Matcher, Route};
use std::time::Duration;

/// E1: SIGTERM in the middle of a job, exit 0, and the next one goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_restart_of_the_daemon_costs_no_job() {
    let mut lab = Lab::start(Options::default()).await;
    let job = lab.job(&["echo before", "sleep 30", "echo after"]);
    lab.until_trace(job, "before").await;
    assert_eq!(lab.stop_daemon("TERM").await, Some(0));
    assert_eq!(lab.vms(), 1, "the VM lives on");
    tokio::time::sleep(Duration::from_secs(3)).await;
    lab.start_daemon().await;
    lab.until(job, JobState::Success).await;
    let trace = lab.trace(job);
    assert!(trace.contains("after") && trace.contains("Job succeeded"), "{trace}");
    assert_eq!(trace.matches("Running with gitlab-runner").count(), 1, "{trace}");
    lab.assert_clean().await;
}

/// Kills the daemon without a word in the middle of a job, which ends well under the next one.
async fn killed_outright(options: Options) -> Lab {
    let mut lab = Lab::start(options).await;
    let job = lab.job(&["echo before", "sleep 20", "echo after"]);
    lab.until_trace(job, "before").await;
    assert_eq!(lab.stop_daemon("KILL").await, None);
    assert_eq!(lab.vms(), 1, "the VM lives on");
    lab.start_daemon().await;
    lab.until(job, JobState::Success).await;
    let trace = lab.trace(job);
    assert!(trace.contains("after") && trace.contains("Job succeeded"), "{trace}");
    assert_eq!(trace.matches("Running with gitlab-runner").count(), 1, "{trace}");
    lab.assert_clean().await;
    lab
}

/// E4, E8: SIGKILL of the daemon in mid-job, and the next one finishes it.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_killed_outright_costs_no_job() {
    killed_outright(Options::default()).await;
}

/// E4: SIGKILL of the daemon where there is no libvirt. QEMU was its child, and lives on.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_with_plain_qemu_killed_outright_costs_no_job() {
    let lab = killed_outright(Options { backend: "qemu", ..Options::default() }).await;
    assert_eq!(lab.vms(), 0);
}

/// U4: the daemon dies while a machine boots, and the next one finds another class, another name for it and another
/// entry: the job's machine is the one that it was promised, as the jobs' user.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_of_before_gets_the_machine_of_its_record_whatever_the_configuration_says_now() {
    let mut lab = Lab::start(Options::default()).await;
    let job = lab.job(&["echo cpus $(nproc), memory $(free -m | awk '/Mem:/ {print $2}'), uid $(id -u)"]);
    // Not sooner: a job that was handed out is nobody's until it is in the journal.
    lab.until_trace(job, "preparing a fresh virtual machine").await;
    assert_eq!(lab.stop_daemon("KILL").await, None);
    lab.change_config("cpus = 1\nmemory_mib = 512", "cpus = 2\nmemory_mib = 1536\nrun_as_root = true");
    lab.change_config("\"small\"", "\"large\"");
    lab.start_daemon().await;
    lab.until(job, JobState::Success).await;
    let trace = lab.trace(job);
    // The last, for a runner shows the command before.
    let told = trace.lines().rev().find_map(|line| line.split("cpus ").nth(1).filter(|rest| rest.contains("uid ")));
    let told = told.unwrap();
    let number = |word: &str| -> u64 {
        let rest = told.split(word).nth(1).unwrap().trim_start();
        rest.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
    };
    assert!(told.starts_with("1,") && number("memory") < 512 && number("uid") != 0, "{trace}");
    lab.assert_clean().await;
}

/// K13, E4: killed while an artifact is on its way. The guest's next try waits at its relay for the next daemon.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_killed_while_an_artifact_uploads_costs_no_job() {
    let mut lab = Lab::start(Options::default()).await;
    // GitLab reads nothing of the first upload, and 24 MiB fit in no buffer on the way.
    lab.standin.script(Matcher::on(Route::UploadArtifacts), Fault::Delay(Duration::from_secs(600)));
    let artifacts = serde_json::json!({"paths": ["out.bin"], "name": "result", "when": "always"});
    let script = ["dd if=/dev/urandom of=out.bin bs=1M count=24 status=none", "sha256sum out.bin"];
    let job = lab.enqueue(lab.spec(&script).with_artifacts(artifacts));
    let begun = lab.standin.wait_for(|m| m.history.iter().any(|r| r.route == Route::UploadArtifacts), LIMIT).await;
    assert!(begun.is_ok(), "no upload began\n{}", lab.story(job));
    assert_eq!(lab.stop_daemon("KILL").await, None);
    assert_eq!(lab.vms(), 1, "the VM lives on");
    lab.start_daemon().await;
    let found = lab.until(job, JobState::Success).await;
    assert_eq!(found.artifacts.len(), 1, "{}", lab.story(job));
    assert!(found.artifacts.values().all(|a| a.size > 24 << 20), "it came whole: {:?}", found.artifacts);
    let trace = lab.trace(job);
    assert!(trace.contains("Job succeeded"), "{trace}");
    assert_eq!(trace.matches("Running with gitlab-runner").count(), 1, "{trace}");
    lab.assert_clean().await;
}

/// U7: the daemon's process is stopped for longer than a guest may be silent, and goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_was_stopped_for_a_while_blames_no_guest() {
    // A silent runner speaks every 30 s.
    let mut lab = Lab::start(Options { limits: "silence_deadline = \"40s\"", ..Options::default() }).await;
    let job = lab.job(&["echo before", "sleep 75", "echo after"]);
    lab.until_trace(job, "before").await;
    lab.signal("STOP");
    tokio::time::sleep(Duration::from_secs(55)).await;
    lab.signal("CONT");
    lab.until(job, JobState::Success).await;
    let trace = lab.trace(job);
    assert!(trace.contains("after") && trace.contains("Job succeeded"), "{trace}");
    lab.assert_clean().await;
}

/// H1: libvirtd is stopped in the middle of a job, and started again by the next call to it.
#[tokio::test(flavor = "multi_thread")]
async fn a_restart_of_libvirtd_costs_no_job() {
    let Some(pid_file) = std::env::var_os("DAYFLY_TEST_LIBVIRTD_PID") else {
        // Past the harness's capture.
        use std::io::Write as _;
        let _ =
            writeln!(std::io::stderr(), "skipped: DAYFLY_TEST_LIBVIRTD_PID is not set, no libvirtd is ours to stop");
        return;
    };
    let mut lab = Lab::start(Options { alone: true, ..Options::default() }).await;
    let job = lab.job(&["echo before", "sleep 25", "echo after"]);
    lab.until_trace(job, "before").await;
    let pid = || std::fs::read_to_string(&pid_file).unwrap_or_default().trim().to_owned();
    let before = pid();
    assert!(!before.is_empty(), "libvirtd's pid file names it");
    run("kill", &[&before]);
    let restarted = async {
        while pid().is_empty() || pid() == before {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    // Nobody but the daemon calls it: this is the daemon's own coming back.
    let restarted = tokio::time::timeout(Duration::from_secs(20), restarted).await;
    assert!(restarted.is_ok(), "the daemon called no libvirtd\n{}", lab.story(job));
    assert_eq!(lab.vms(), 1, "the VM lives on");
    lab.until(job, JobState::Success).await;
    let trace = lab.trace(job);
    assert!(trace.contains("after") && trace.contains("Job succeeded"), "{trace}");
    assert_eq!(trace.matches("Running with gitlab-runner").count(), 1, "{trace}");
    lab.assert_clean().await;
    assert_eq!(lab.vms(), 0);
}
