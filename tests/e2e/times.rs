//! What time it is in a guest, and what times its log has.

use super::lab::{Lab, Options};
use dayfly_exec::standin::JobState;
use jiff::Timestamp;
use std::net::Ipv4Addr;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpListener;

/// How far a guest's clock may be off at the hand-out, in microseconds.
const OFF_MAX_US: i64 = 50_000;

/// Tells everybody who connects to this port the time of the host, in microseconds since 1970.
async fn time_server() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.write_all(format!("{}\n", Timestamp::now().as_microsecond()).as_bytes()).await;
        }
    });
    port
}

/// U24: the guest's clock is the host's to 50 ms when the job begins, and no line of the job's log, ours or the
/// runner's, is earlier than the one before.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_has_the_hosts_time_and_no_log_runs_backwards() {
    let mut lab = Lab::start(Options::default()).await;
    let port = time_server().await;
    // Bash's own, for a process takes tens of milliseconds to start under the translator. The host looked at its clock
    // at some moment between the guest's two looks.
    let ask = format!(
        "for i in 1 2 3 4 5; do a=$EPOCHREALTIME; exec 3<>/dev/tcp/10.0.2.2/{port}; read -r host <&3; b=$EPOCHREALTIME; \
         echo \"looked ${{a/[.,]/}} $host ${{b/[.,]/}}\"; done"
    );
    let job = lab.job(&[&ask, "sleep 2", "echo done"]);
    lab.until(job, JobState::Success).await;
    let received_us = Timestamp::now().as_microsecond();
    let trace = lab.trace(job);

    let looks: Vec<Vec<i64>> = trace
        .lines()
        .filter_map(|line| line.split_once("looked "))
        .filter_map(|(_, numbers)| numbers.split_whitespace().map(|number| number.parse().ok()).collect())
        .collect();
    assert_eq!(looks.len(), 5, "{trace}");
    for look in looks {
        let [before, host, after] = look[..] else { panic!("{look:?}\n{trace}") };
        assert!(before - OFF_MAX_US <= host && host <= after + OFF_MAX_US, "off by more than 50 ms: {look:?}");
        assert!(after <= received_us, "{look:?} is after it was received");
    }

    let mut last = None;
    for line in trace.lines() {
        let stamp: Option<Timestamp> = line.split(' ').next().and_then(|stamp| stamp.parse().ok());
        let Some(stamp) = stamp else { panic!("no time in {line:?}\n{trace}") };
        // The official runner 17.5 leaves out the zeroes that a fraction begins with: such a one is not compared.
        if line.find('Z') == Some("2026-01-02T12:03:11.052991".len()) {
            assert!(last.is_none_or(|last| last <= stamp), "the log runs backwards at {line:?}\n{trace}");
            last = Some(stamp);
        }
    }
    lab.assert_clean().await;
}
