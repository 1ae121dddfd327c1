//! `replay [PATH]`: replays recorded official runners, request by request and without their pauses,
//! through the relay against the door of a whole daemon, with the stand-in GitLab behind it.
//!
//! PATH is a folder of recordings or one compressed file of them. A recording is run whole if dayfly's
//! door would give every answer in it. Another one is replayed up to the first answer that the door would
//! not give, and from there a stand-in runner takes its job to the end: those count as finished. What
//! can be neither is skipped, and it is said why. One line for each failure and each skip; the last lines
//! are figures. Fails if a recording failed, or none could be run.

mod choose;
mod compare;
mod finish;
mod gitlab;
mod message;
mod play;
mod recording;

use dayfly::telemetry::chain;
use dayfly_guest::relay::{Limits, Relay};
use play::Stage;
use recording::Recording;
use std::io::{self, Write as _};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

#[tokio::main]
async fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let path = arguments.next().map_or_else(|| recording::DEFAULT.into(), PathBuf::from);
    if arguments.next().is_some() || path.as_os_str().as_encoded_bytes().starts_with(b"-") {
        eprintln!("usage: replay [PATH]");
        return ExitCode::from(64);
    }
    let recordings = match recording::read(&path) {
        Ok(recordings) => recordings,
        Err(error) => {
            eprintln!("replay: failed to {}", chain(&error));
            return ExitCode::FAILURE;
        }
    };
    let runner = match finish::runner() {
        Ok(runner) => runner,
        Err(error) => {
            eprintln!("replay: {error}");
            return ExitCode::FAILURE;
        }
    };
    match judge_all(recordings, runner).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("replay: failed to start a relay, or to write: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The relay of the guest program, on any port of the loopback instead of the guest's own address.
fn stage() -> io::Result<Stage> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    Ok(Stage { relay: Relay::start(listener, Limits::default(), || {})?, address })
}

/// Recordings at work at once: most of each is waiting.
const AT_ONCE: usize = 4;

/// What became of one recording.
enum Judged {
    Run(Result<(), String>),
    Finished(Result<(), String>),
    Skipped(String),
}

async fn judge(stage: &Stage, recording: &Recording, runner: &Path) -> Judged {
    let (until, why) = match choose::reach(recording) {
        choose::Reach::Whole => return Judged::Run(play::play(stage, recording, None).await),
        choose::Reach::Until(until, why) => (until, why),
        choose::Reach::No(why) => return Judged::Skipped(why),
    };
    if let Some(reason) = finish::reason_not_to(recording) {
        return Judged::Skipped(format!("{why}, and {reason}"));
    }
    let played = play::play(stage, recording, Some(until)).await;
    Judged::Finished(match played {
        Ok(()) => {
            finish::finish(stage, recording, runner).await.map_err(|end| format!("{why}; finished after that: {end}"))
        }
        wrong => wrong,
    })
}

/// Whether all that was run passed, and something was. Fails if nobody reads our output.
async fn judge_all(recordings: Vec<Recording>, runner: PathBuf) -> io::Result<bool> {
    let mut out = io::stdout();
    let (mut run, mut finished, mut failed, mut skipped) = (0, 0, 0, 0);
    let (recordings, runner) = (Arc::new(recordings), Arc::new(runner));
    let next = Arc::new(AtomicUsize::new(0));
    let (judged_in, mut judged) = mpsc::channel(AT_ONCE);
    let mut workers = JoinSet::new();
    for _ in 0..AT_ONCE {
        let (recordings, runner, next, judged) = (recordings.clone(), runner.clone(), next.clone(), judged_in.clone());
        // A relay has one target at a time: each has its own.
        let stage = stage()?;
        workers.spawn(async move {
            while let Some(recording) = recordings.get(next.fetch_add(1, Ordering::Relaxed)) {
                let result = judge(&stage, recording, &runner).await;
                if judged.send((recording.name.clone(), result)).await.is_err() {
                    return;
                }
            }
        });
    }
    drop(judged_in);
    while let Some((name, result)) = judged.recv().await {
        let wrong = match result {
            Judged::Skipped(reason) => {
                skipped += 1;
                writeln!(out, "skip {name}: {reason}")?;
                continue;
            }
            Judged::Run(result) => {
                run += 1;
                result
            }
            Judged::Finished(result) => {
                finished += u64::from(result.is_ok());
                result
            }
        };
        if let Err(difference) = wrong {
            failed += 1;
            writeln!(out, "FAIL {name}: {difference}")?;
        }
    }
    while let Some(ended) = workers.join_next().await {
        ended.map_err(io::Error::other)?;
    }
    writeln!(out, "figure replay.run {run}\nfigure replay.finished {finished}")?;
    writeln!(out, "figure replay.failed {failed}\nfigure replay.skipped {skipped}")?;
    Ok(failed == 0 && run > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use recording::{Body, Class};

    /// The shipped recording of this name.
    fn shipped(name: &str) -> Recording {
        let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join(recording::DEFAULT);
        recording::read(&path).unwrap().into_iter().find(|recording| recording.name == name).unwrap()
    }

    /// Plays a recording after a change to it; what was found wrong.
    async fn found(stage: &Stage, change: impl FnOnce(&mut Recording)) -> String {
        let mut recording = shipped("a1_success.v19.3.0");
        change(&mut recording);
        play::play(stage, &recording, None).await.err().unwrap_or_default()
    }

    fn first(recording: &mut Recording, class: Class) -> &mut recording::Request {
        recording.requests.iter_mut().find(|request| request.class == class).unwrap()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_replay_sees_each_kind_of_difference() {
        let stage = stage().unwrap();
        assert_eq!(found(&stage, |_| {}).await, "");
        let patch = |r: &mut Recording| first(r, Class::Patch).answer.status = Some(200);
        assert!(found(&stage, patch).await.contains("answered 202 instead of 200"));
        let trace = |r: &mut Recording| {
            let trace = r.trace.as_mut().unwrap();
            trace.bytes.truncate(trace.bytes.len() - 1);
        };
        assert!(found(&stage, trace).await.contains("recorded checksum"));
        let part = |r: &mut Recording| {
            let trace = r.trace.as_mut().unwrap();
            trace.bytes[10] ^= 1;
            trace.crc = format!("crc32:{:08x}", crc32fast::hash(&trace.bytes));
        };
        assert!(found(&stage, part).await.contains("GitLab's trace lacks the recorded one"));
        let silent = |r: &mut Recording| r.requests.retain(|request| !verdict(request));
        assert_eq!(found(&stage, silent).await, "", "without a verdict of its own it is a system failure");
        let offset = |r: &mut Recording| first(r, Class::Patch).headers.retain(|(name, _)| name != "Content-Range");
        assert!(found(&stage, offset).await.contains("answered 400 instead of 202"));
    }

    /// Up to any request the door's answers are those that were recorded.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_replay_may_stop_at_any_request() {
        let stage = stage().unwrap();
        let recording = shipped("a1_success.v19.3.0");
        let first = recording.requests.iter().position(|r| r.answer.status == Some(201)).unwrap() + 1;
        for until in [first, first + 2] {
            assert_eq!(play::play(&stage, &recording, Some(until)).await, Ok(()));
        }
    }

    fn verdict(request: &recording::Request) -> bool {
        matches!(&request.body, Body::Json(json) if request.class == Class::Put && json.contains("\"success\""))
    }
}
