//! The search for runner tokens finds them, in every encoding and in every place where a world looks.

use crate::support::canary::{RUNNER_CANARY, Search, runner_token};
use crate::support::world::World;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE, URL_SAFE_NO_PAD};

fn finds(text: &str, encoding: &str) {
    let search = Search::new(RUNNER_CANARY);
    assert!(search.find(text.as_bytes()).contains(&encoding), "not found as {encoding}: {text}");
    let broken = &text[1..];
    assert!(search.find(broken.as_bytes()).is_empty(), "found in {broken}");
}

/// T1: whoever looks for nothing finds nothing; this one finds each encoding.
#[test]
fn a_canary_is_found_in_every_encoding() {
    finds("RuNnErCaNaRy", "raw");
    finds("yRaNaCrEnNuR", "reversed");
    finds("52754e6e457243614e615279", "hex");
    finds("52754E6E457243614E615279", "hex");
    finds("52 75 4e 6e 45 72 43 61 4e 61 52 79", "hex, spaced");
    finds("%52%75%4E%6E%45%72%43%61%4E%61%52%79", "URL-escaped");
    finds(r"\u0052\u0075\u004e\u006e\u0045\u0072\u0043\u0061\u004e\u0061\u0052\u0079", "JSON-escaped");
    finds("82, 117, 78, 110, 69, 114, 67, 97, 78, 97, 82, 121", "list of numbers");
    finds(r"\x52\x75\x4e\x6e\x45\x72\x43\x61\x4e\x61\x52\x79", "escaped bytes");
    for before in ["", "g", "gl", "glr", "glrt-public007"] {
        for after in ["", "1", "12", "\n"] {
            let secret = format!("{before}{RUNNER_CANARY}{after}");
            for engine in [&STANDARD, &STANDARD_NO_PAD, &URL_SAFE, &URL_SAFE_NO_PAD] {
                let search = Search::new(RUNNER_CANARY);
                let text = format!("AAAA{}", engine.encode(&secret));
                assert!(search.find(text.as_bytes()).contains(&"base64"), "not found in {text}");
            }
        }
    }
}

#[test]
fn a_canary_is_found_among_any_bytes() {
    let mut bytes = vec![0xff, 0xfe, 0, 13];
    bytes.extend_from_slice(runner_token(7).as_bytes());
    bytes.extend_from_slice(&[0xc3, 0x28]);
    assert_eq!(Search::new(RUNNER_CANARY).find(&bytes), ["raw"]);
    assert!(Search::new("another secret").find(&bytes).is_empty());
}

/// What may be known of a token is no secret.
#[test]
fn the_public_part_of_a_token_is_no_canary() {
    let token = runner_token(12);
    assert!(Search::new(RUNNER_CANARY).find(&token.as_bytes()["glrt-".len()..][..9]).is_empty());
    assert_eq!(token.find(RUNNER_CANARY), Some("glrt-".len() + 9));
}

/// T1: where a runner token leaks, [`World::assert_clean`] says so: in a log line, here.
#[tokio::test(start_paused = true)]
async fn a_world_notices_a_runner_token_in_its_log() {
    let mut world = World::new(1);
    world.start().await.unwrap();
    assert!(world.leaks().is_empty(), "{:?}", world.leaks());
    tracing::debug!(token = runner_token(1), "a line that should not be");
    assert_eq!(world.leaks(), ["the log: a runner token, raw"]);
}

/// T1: and in a file, in a byte to a machine, and in a trace at GitLab.
#[tokio::test(start_paused = true)]
async fn a_world_notices_a_runner_token_in_files_machines_and_traces() {
    let mut world = World::new(1);
    let job = world.job(&[&format!("print {}", runner_token(1))]);
    world.start().await.unwrap();
    world.until(job, dayfly_exec::standin::JobState::Success).await;
    let leaks = world.leaks();
    for place in ["a file", "a byte to a machine", "GitLab's copy of a trace"] {
        assert!(leaks.iter().any(|leak| leak.starts_with(place)), "not noticed in {place}: {leaks:?}");
    }
}
