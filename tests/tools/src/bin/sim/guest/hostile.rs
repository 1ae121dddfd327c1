//! What bad guests do: to their VM, to their door, to their job. Each says what must not come of it.

use super::job::Runner;
use super::wire::{Line, Wire};
use super::{Guest, transfer};
use crate::event::GuestDoes;
use crate::kinds::Kind;
use dayfly::vm::Pause;
use dayfly_test_guest::http::{Framing, head, request};
use dayfly_test_guest::job::{patch_as, update};
use serde_json::{Value, json};
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;
use tokio::time::{sleep, timeout};

/// Connections of [`Kind::ManyConnections`]: more than a door serves.
const MANY: usize = 70;

/// In mid-job.
pub(crate) async fn act(runner: &mut Runner, guest: &mut Guest, kind: Kind) {
    let story = guest.line.story.clone();
    if kind != Kind::UploadVmDies {
        story.hit(kind);
    }
    match kind {
        Kind::CrashesRunning => guest.machine.power.crash(),
        Kind::PowersOff => guest.machine.power.off(),
        Kind::RebootsRunning => guest.machine.power.reboot(),
        Kind::DiskPaused => guest.machine.power.pause(Pause::Disk),
        Kind::QemuStops => guest.machine.power.pause(Pause::Itself),
        Kind::OperatorPauses => guest.machine.power.pause(Pause::Operator),
        Kind::KernelPanics => guest.machine.power.panic(),
        Kind::Sleeps => guest.machine.power.sleep(),
        Kind::UploadVmDies => transfer::dies(runner, guest).await,
        _ => {}
    }
    if matches!(
        kind,
        Kind::CrashesRunning
            | Kind::PowersOff
            | Kind::RebootsRunning
            | Kind::DiskPaused
            | Kind::QemuStops
            | Kind::OperatorPauses
            | Kind::KernelPanics
            | Kind::Sleeps
            | Kind::Hangs
            | Kind::UploadVmDies
    ) {
        std::future::pending::<()>().await;
    }
    match kind {
        Kind::AsksLate => asks_in_mid_job(runner, guest).await,
        Kind::BadOffsets => bad_offsets(runner, &mut guest.line).await,
        Kind::ParallelPatches => parallel_patches(runner, &mut guest.line).await,
        Kind::OthersJob => others_job(runner, &mut guest.line).await,
        Kind::StrangeVerdict => strange_verdicts(runner, &mut guest.line).await,
        Kind::LyingReports => {
            let lies: [&[u8]; 3] = [b"exited 0\n\x1b[2J\xff\xfe\n", b"ready\nready\napplied\n", &[b'x'; 9000]];
            for lie in lies {
                let _ = timeout(Duration::from_millis(50), guest.machine.channel.write_all(lie)).await;
            }
            let _ = timeout(Duration::from_millis(50), guest.machine.channel.write_all(b"\n")).await;
        }
        kind => raw(runner, &mut guest.line, kind).await,
    }
}

/// Nonsense in `Content-Range`. The door's offset must not move.
async fn bad_offsets(runner: &mut Runner, line: &mut Line) {
    runner.patch(line).await;
    let sent = runner.job.sent;
    let ranges = [
        format!("{}-{}", sent + 7, sent + 10),
        format!("{sent}-{}", sent + 100),
        format!("{}-{sent}", sent + 3),
        "18446744073709551615-18446744073709551619".to_owned(),
        "-1-3".to_owned(),
        "x".to_owned(),
    ];
    for range in ranges {
        let reply = line.call(&patch_as(runner.job.id, &runner.job.token, &range, b"evil", false)).await;
        if reply.is_some_and(|reply| reply.status < 300) {
            line.tell(GuestDoes::Wrong { invariant: 5, what: "a PATCH with a nonsense range was taken" });
        }
    }
}

/// The same piece twice at once: taken once.
async fn parallel_patches(runner: &mut Runner, line: &mut Line) {
    runner.print(line, 200, true);
    let piece = runner.job.trace[runner.job.sent..].to_vec();
    if piece.len() > 500_000 {
        return;
    }
    let mut other = line.another();
    let (a, b) = tokio::join!(
        runner.patch_at(line, runner.job.sent, &piece),
        runner.patch_at(&mut other, runner.job.sent, &piece)
    );
    if [a, b].into_iter().flatten().any(|reply| reply.status == 202) {
        runner.job.sent += piece.len();
        line.tell(GuestDoes::Taken(runner.job.sent));
    }
}

/// Another job's id, with this one's token and with none.
async fn others_job(runner: &Runner, line: &mut Line) {
    let other = line
        .story
        .inner()
        .ledger
        .jobs
        .iter()
        .map(|(id, note)| (id.0, note.token.clone()))
        .find(|(id, _)| *id != runner.job.id);
    let (id, theirs) = other.unwrap_or((runner.job.id + 1, "glcbt-64_nobody".to_owned()));
    for token in [runner.job.token.clone(), theirs, String::new()] {
        let body = json!({"state": "success", "token": token}).to_string();
        let json = [("Content-Type", "application/json"), ("Job-Token", token.as_str())];
        let text = [("Content-Type", "text/plain"), ("Job-Token", token.as_str()), ("Content-Range", "0-3")];
        let job = format!("/api/v4/jobs/{id}");
        let replies = [
            line.call(&request("PUT", &job, &json, body)).await,
            line.call(&request("PATCH", &format!("{job}/trace"), &text, "evil")).await,
            line.call(&request("POST", &format!("{job}/artifacts"), &json, "{}")).await,
            line.call(&request("GET", &format!("{job}/artifacts"), &json, "")).await,
        ];
        if replies.into_iter().flatten().any(|reply| reply.status < 400) {
            line.tell(GuestDoes::Wrong { invariant: 9, what: "a call for another job was served" });
        }
    }
}

/// States that are none.
async fn strange_verdicts(runner: &mut Runner, line: &mut Line) {
    for state in ["canceled", "done", "", "SUCCESS", "pending"] {
        let body = json!({"state": state});
        let status = runner.put(line, body).await;
        if status.is_some_and(|status| status == 200) {
            line.tell(GuestDoes::Wrong { invariant: 2, what: "a state that is none was taken" });
        }
    }
    for body in ["{", "[]", "{\"state\":7}", "null"] {
        line.call(&update(runner.job.id, &runner.job.token, body)).await;
    }
}

/// A guest that has begun to work gets no payload any more.
async fn asks_in_mid_job(runner: &mut Runner, guest: &mut Guest) {
    let spoke = runner.put(&mut guest.line, json!({"state": "running"})).await == Some(200);
    sleep(Duration::from_millis(1500)).await;
    let token = guest.token.clone();
    if let Some(again) = super::ask(&mut guest.line, &token).await.filter(|reply| reply.status == 201) {
        guest.line.tell(GuestDoes::Payload { bytes: &again.body, spoke });
    }
}

/// After the verdict was taken.
pub(crate) async fn after(runner: &mut Runner, guest: &mut Guest, kind: Kind, verdict: &Value) {
    let story = guest.line.story.clone();
    story.hit(kind);
    match kind {
        Kind::CrashesAfterFinal => {
            guest.machine.power.crash();
            std::future::pending::<()>().await;
        }
        Kind::IgnoresShutdown => std::future::pending::<()>().await,
        Kind::LateTrace => {
            let reply = runner.patch_at(&mut guest.line, runner.job.sent, b"too late\n").await;
            if reply.is_some_and(|reply| reply.status < 300) {
                guest.line.tell(GuestDoes::Wrong { invariant: 5, what: "trace was taken after the verdict" });
            }
            let token = guest.token.clone();
            if super::ask(&mut guest.line, &token).await.is_some_and(|reply| reply.status == 201) {
                guest.line.tell(GuestDoes::Wrong { invariant: 6, what: "a payload after the verdict" });
            }
        }
        Kind::SecondVerdict => {
            let other = if verdict["state"] == "success" { "failed" } else { "success" };
            let body = runner.job.verdict(other, None, 0);
            if runner.put(&mut guest.line, body).await == Some(200) {
                guest.line.tell(GuestDoes::Wrong { invariant: 2, what: "another verdict was taken" });
            }
            let again = runner.put(&mut guest.line, verdict.clone()).await;
            let over = story
                .inner()
                .ledger
                .jobs
                .get(&guest.line.job)
                .is_none_or(|n| n.over_known.is_some() || n.users.is_some());
            if again.is_some_and(|status| status != 200 && status < 500) && !over {
                guest.line.tell(GuestDoes::Wrong { invariant: 2, what: "the same verdict again was refused" });
            }
        }
        Kind::KeptOpen => {
            let connection = match guest.line.keep() {
                Some(connection) => Some(connection),
                None => guest.line.connect().await,
            };
            if let Some(connection) = connection {
                let (vm, job) = (guest.line.vm.clone(), guest.line.job);
                #[expect(clippy::disallowed_methods, reason = "outlives its VM on purpose; ends with the runtime")]
                tokio::spawn(hold(connection, story, vm, job));
            }
        }
        _ => {}
    }
}

/// Holds a connection beyond the end of its VM. It must be cut.
async fn hold(mut connection: Wire, story: crate::story::Story, vm: String, job: dayfly::gitlab::JobId) {
    let cut = connection.rest();
    // The longest way to a VM's end: grace, a stuck destroy, a daemon that is away.
    if timeout(Duration::from_secs(4000), cut).await.is_err() {
        let does = GuestDoes::Wrong { invariant: 13, what: "a connection outlived its VM" };
        story.tell(&crate::event::Event::Guest { vm: &vm, job, does });
    }
}

/// Wrong passes: nothing must come back but the door's own greeting line.
pub(crate) async fn wrong_pass(line: &mut Line) {
    line.story.hit(Kind::WrongPass);
    let others: Vec<String> = line
        .story
        .inner()
        .ledger
        .vms
        .values()
        .filter_map(|vm| vm.pass.clone())
        .filter(|pass| *pass != line.pass)
        .collect();
    let mut passes: Vec<String> = others.into_iter().take(2).collect();
    passes.push("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA".to_owned());
    for pass in passes {
        let Some(mut connection) = line.knock().await else { return };
        let nonce = line.nonce();
        // A relay with another pass does not get past the door's own proof; it goes on all the same.
        let opening = format!("{}\r\n", dayfly_guest_config::Greeting::opening(&nonce));
        let _ = connection.send(opening.as_bytes()).await;
        let _ = timeout(Duration::from_secs(6), connection.some()).await;
        let _ = connection.send(format!("DAYFLY1 {pass}\r\n").as_bytes()).await;
        let _ = connection.send(b"GET /api/v4/jobs/1/artifacts HTTP/1.1\r\nHost: x\r\n\r\n").await;
        served_nothing(line, connection).await;
    }
}

/// Reads to the end: an HTTP answer would be wrong.
async fn served_nothing(line: &Line, mut connection: Wire) {
    let all = timeout(Duration::from_secs(8), connection.rest()).await.unwrap_or_else(|_| connection.buffered());
    if all.windows(5).any(|window| window == b"HTTP/") {
        line.tell(GuestDoes::Wrong { invariant: 10, what: "HTTP was served without the pass" });
    }
}

/// Bytes that no HTTP client of good will sends.
async fn raw(runner: &Runner, line: &mut Line, kind: Kind) {
    let put = format!("/api/v4/jobs/{}", runner.job.id);
    let whole = runner.job.update(json!({"state": "running"}));
    match kind {
        Kind::NoGreeting => {
            let Some(mut connection) = line.knock().await else { return };
            let _ = connection.send(&whole).await;
            served_nothing(line, connection).await;
        }
        Kind::ManyConnections => {
            let mut held = Vec::new();
            for _ in 0..MANY {
                held.extend(line.connect().await);
            }
            sleep(Duration::from_millis(500)).await;
        }
        Kind::HalfClosed => {
            for part in [20, whole.len() - 3] {
                let Some(mut connection) = line.connect().await else { return };
                let _ = connection.send(&whole[..part]).await;
                let _ = connection.finish().await;
            }
        }
        Kind::Pipelined => {
            let Some(connection) = line.connect().await else { return };
            let many = whole.repeat(30);
            let (mut sending, mut reading) = connection.split();
            let write = async { drop(sending.write_all(&many).await) };
            let _ = tokio::join!(write, timeout(Duration::from_secs(3), reading.rest()));
        }
        Kind::SlowLoris => refused(line, &whole[..40], Duration::from_secs(100)).await,
        Kind::HugeHead => {
            let mut text = format!("PUT {put} HTTP/1.1\r\nHost: x\r\nX-Padding: ");
            text.extend(std::iter::repeat_n('p', 60_000));
            refused(line, text.as_bytes(), Duration::from_secs(20)).await;
        }
        Kind::HugeBody => {
            let text =
                [("Content-Type", "text/plain"), ("Job-Token", runner.job.token.as_str()), ("Content-Range", "0-1")];
            let head = head("PATCH", &format!("{put}/trace"), &text, Framing::Length(100 << 20));
            refused(line, head.as_bytes(), Duration::from_secs(100)).await;
        }
        Kind::Tunnel => {
            let all: [&[u8]; 4] = [
                b"CONNECT gitlab.example:443 HTTP/1.1\r\nHost: gitlab.example\r\n\r\n",
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                b"GET http://gitlab.example/api/v4/user HTTP/1.1\r\nHost: x\r\n\r\n",
                b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
            ];
            for bytes in all {
                refused(line, bytes, Duration::from_secs(100)).await;
            }
        }
        _ => {}
    }
}

/// Sends these bytes after a greeting: no 2xx may come of them.
async fn refused(line: &mut Line, bytes: &[u8], patience: Duration) {
    let Some(connection) = line.connect().await else { return };
    let (mut sending, mut reading) = connection.split();
    let write = async { drop(sending.write_all(bytes).await) };
    let (_, read) = tokio::join!(timeout(patience, write), timeout(patience, reading.some()));
    if read.is_ok_and(|read| read.is_ok_and(|first| first.starts_with(b"HTTP/1.1 2"))) {
        line.tell(GuestDoes::Wrong { invariant: 10, what: "a request that is none was served" });
    }
}
