//! Tests of `process`, with real programs that every Unix has.

use super::*;

fn sh(script: &str) -> Program {
    Program::new("sh", Duration::from_secs(20)).arg("-c").arg(script)
}

/// Waits until no process of this group is left; the limit fails the test.
async fn gone(pid_file: &Path) {
    let pid: i32 = std::fs::read_to_string(pid_file).unwrap().trim().parse().unwrap();
    let group = Pid::from_raw(pid).unwrap();
    timeout(Duration::from_secs(20), async {
        while rustix::process::test_kill_process_group(group).is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("the group must end");
}

#[tokio::test]
async fn stdin_goes_in_and_stdout_comes_out() {
    let big = vec![b'x'; 300_000];
    assert_eq!(sh("cat").stdin(big.clone()).run().await.unwrap().stdout, big);
    assert_eq!(sh("cat; echo ' done '").run().await.unwrap().text(), "done");
    // A program that does not read its input is no error.
    sh("exec <&-; true").stdin(big).run().await.unwrap();
}

#[tokio::test]
async fn the_environment_holds_what_the_caller_names_and_no_more() {
    let said = Program::new("env", Duration::from_secs(20)).env("TMPDIR", "/t").run().await.unwrap().text();
    let mut names: Vec<&str> = said.lines().filter_map(|line| line.split('=').next()).collect();
    names.sort_unstable();
    assert_eq!(names, ["LC_ALL", "PATH", "TMPDIR"]);
}

#[tokio::test]
async fn a_failure_carries_the_last_words() {
    let error = sh("echo lost >&2; head -c 9000 /dev/zero | tr '\\0' . >&2; echo; echo 'no space left' >&2; exit 3")
        .run()
        .await
        .unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("run `sh`: exit status: 3: ") && text.ends_with("no space left"), "{text}");
    assert!(!text.contains("lost") && text.len() < STDERR_TAIL_BYTES + 100, "{text}");
    let error = Program::new("dayfly-no-such-program", Duration::from_secs(1)).run().await.unwrap_err();
    assert_eq!(error.to_string(), "start `dayfly-no-such-program` (is it installed?)");
    assert!(!error.is_transient());
}

#[tokio::test]
async fn after_the_deadline_nothing_of_it_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let pid = dir.path().join("pid");
    // It ignores SIGTERM, and so does its child.
    let script = format!("trap '' TERM; echo $$ > {}; echo stuck >&2; sleep 600 & sleep 600", pid.display());
    let error = Program::new("sh", Duration::from_millis(500)).arg("-c").arg(script).run().await.unwrap_err();
    assert_eq!(error.to_string(), "run `sh`: not done within 0.5 s: stuck");
    assert!(error.is_transient());
    gone(&pid).await;
}

#[tokio::test]
async fn a_dropped_future_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let pid = dir.path().join("pid");
    let script = format!("sleep 600 & echo $$ > {0}.new; mv {0}.new {0}; echo up; wait", pid.display());
    let (seen, up) = tokio::sync::oneshot::channel::<()>();
    let mut seen = Some(seen);
    let mut progress = move |_: &str| drop(seen.take());
    {
        let run = sh(&script).run_lines(&mut progress);
        tokio::select! {
            biased; // The run never ends by itself.
            _ = run => unreachable!("it waits for its child"),
            _ = up => {}
        }
    }
    gone(&pid).await;
}

#[tokio::test]
async fn output_has_a_cap() {
    let error = sh("while :; do echo spam; done").output_bytes_max(10_000).run().await.unwrap_err();
    assert_eq!(error.to_string(), "run `sh`: more than 10000 bytes of output");
    assert_eq!(sh("printf 12345").output_bytes_max(5).run().await.unwrap().stdout, b"12345");
}

#[tokio::test]
async fn progress_comes_line_by_line() {
    let mut lines = Vec::new();
    sh("printf 'one\\r\\033[2Ktwo\\n'; printf 'three\\nfo' >&2; printf ur >&2; head -c 9000 /dev/zero | tr '\\0' .")
        .run_lines(&mut |line| lines.push(line.to_owned()))
        .await
        .unwrap();
    lines.sort();
    let mut expected =
        vec!["one".to_owned(), "[2Ktwo".into(), "three".into(), "four".into(), ".".repeat(LINE_BYTES_MAX)];
    expected.sort();
    assert_eq!(lines, expected);
}

#[tokio::test]
async fn stdout_may_go_to_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("out");
    let mut lines = Vec::new();
    sh("echo bytes; echo words >&2")
        .stdout_file(&file)
        .run_lines(&mut |line| lines.push(line.to_owned()))
        .await
        .unwrap();
    assert_eq!((std::fs::read(file).unwrap(), lines), (b"bytes\n".to_vec(), vec!["words".to_owned()]));
}
