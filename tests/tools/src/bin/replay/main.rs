//! `replay [PATH]`: replays recorded official runners, request by request and without their pauses,
//! through the relay against the door of a whole daemon, with the stand-in GitLab behind it.
//!
//! PATH is a folder of recordings or one compressed file of them. A recording is run if dayfly's door
//! would give every answer in it; the others are skipped, and it is said why. One line for each failure
//! and each skip; the last lines are figures. Fails if a recording failed, or none could be run.

mod choose;
mod compare;
mod gitlab;
mod message;
mod play;
mod recording;

use dayfly::telemetry::chain;
use dayfly_guest::relay::{Limits, Relay};
use play::Stage;
use std::io::{self, Write as _};
use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::process::ExitCode;

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
    let stage = match stage() {
        Ok(stage) => stage,
        Err(error) => {
            eprintln!("replay: failed to start the relay: {error}");
            return ExitCode::FAILURE;
        }
    };
    match judge_all(&stage, &recordings).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) | Err(_) => ExitCode::FAILURE,
    }
}

/// The relay of the guest program, on any port of the loopback instead of the guest's own address.
fn stage() -> io::Result<Stage> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    Ok(Stage { relay: Relay::start(listener, Limits::default(), || {})?, address })
}

/// Whether all that was run passed, and something was. Fails if nobody reads our output.
async fn judge_all(stage: &Stage, recordings: &[recording::Recording]) -> io::Result<bool> {
    let mut out = io::stdout();
    let (mut run, mut failed, mut skipped) = (0, 0, 0);
    for recording in recordings {
        let name = &recording.name;
        if let Some(reason) = choose::reason_to_skip(recording) {
            skipped += 1;
            writeln!(out, "skip {name}: {reason}")?;
            continue;
        }
        run += 1;
        if let Err(difference) = play::play(stage, recording).await {
            failed += 1;
            writeln!(out, "FAIL {name}: {difference}")?;
        }
    }
    writeln!(out, "figure replay.run {run}\nfigure replay.failed {failed}\nfigure replay.skipped {skipped}")?;
    Ok(failed == 0 && run > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use recording::{Body, Class, Recording};

    /// The shipped recording of this name.
    fn shipped(name: &str) -> Recording {
        let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join(recording::DEFAULT);
        recording::read(&path).unwrap().into_iter().find(|recording| recording.name == name).unwrap()
    }

    /// Plays a recording after a change to it; what was found wrong.
    async fn found(stage: &Stage, change: impl FnOnce(&mut Recording)) -> String {
        let mut recording = shipped("a1_success.v19.3.0");
        change(&mut recording);
        play::play(stage, &recording).await.err().unwrap_or_default()
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

    fn verdict(request: &recording::Request) -> bool {
        matches!(&request.body, Body::Json(json) if request.class == Class::Put && json.contains("\"success\""))
    }
}
