//! Before any HTTP: who is let in, and what the others get to see (P10).

use super::support::{Door, Entrance, Setup, poll};
use dayfly::guest::Limits;
use dayfly_guest_config::{Greeting, Pass};
use std::io;
use std::time::Duration;
use tokio::time::Instant;

/// T25, P10: all the wrong greetings, whoever sends them. Each is closed in time, told at most the door's line, and counted.
#[tokio::test(start_paused = true)]
async fn nobody_comes_in_without_a_right_greeting() {
    let door = Door::new().await;
    let opening = format!("{}\r\n", Greeting::opening(&[3; 16]));
    let other = Greeting::relay_line_for_test(&Pass::new([9; 32]));
    let cases: Vec<(&str, Vec<u8>, bool)> = vec![
        ("HTTP at once", poll("x"), false),
        ("a TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(), false),
        ("161 bytes", vec![b'D'; 161], false),
        ("another version", opening.replace("DAYFLY 1", "DAYFLY 2").into_bytes(), false),
        ("a bare line feed", opening.replace('\r', "").into_bytes(), false),
        ("bytes behind the first line", format!("{opening}{other}\r\n").into_bytes(), false),
        ("silence", Vec::new(), false),
        ("half a line", b"DAYFLY 1 0303".to_vec(), false),
        ("silence after the first line", opening.clone().into_bytes(), true),
    ];
    let count = cases.len() as u64;
    for (name, bytes, answered) in cases {
        let (mut guest, begun) = (door.connect().await, Instant::now());
        guest.try_send(&bytes).await;
        let said = String::from_utf8(guest.rest().await).unwrap();
        assert!(begun.elapsed() <= Duration::from_secs(5), "{name}");
        assert_eq!(said.len(), if answered { 99 } else { 0 }, "{name}: {said}");
    }
    let metrics = door.metrics.guest();
    let failed: u64 = ["malformed", "hasty", "late", "wrong_proof", "closed"]
        .map(|word| metrics.greetings_failed.get(word))
        .iter()
        .sum();
    assert_eq!((failed, metrics.greetings.get(), door.gitlab.contacts()), (count, 0, 0));
    assert!(door.told().is_empty());
}

/// Makes a relay's proof without a door.
trait RelayLine {
    fn relay_line_for_test(pass: &Pass) -> String;
}

impl RelayLine for Greeting {
    fn relay_line_for_test(pass: &Pass) -> String {
        Greeting::door(pass, [2; 16], &Greeting::opening(&[3; 16])).unwrap().relay_line()
    }
}

/// P10, T4: the pass of another VM, a proof of another connection, the door's own proof.
#[tokio::test(start_paused = true)]
async fn a_wrong_proof_is_closed_and_counted() {
    let door = Door::new().await;
    let mut old = None;
    for case in ["right", "old", "other", "reflected", "empty"] {
        let mut guest = door.connect().await;
        let opening = Greeting::opening(&[3; 16]);
        guest.send(format!("{opening}\r\n")).await;
        let line = guest.line().await.unwrap();
        let right = Greeting::relay(&door.pass, [3; 16], &line).unwrap().relay_line();
        let proof = match case {
            "right" => old.insert(right).clone(),
            "old" => old.clone().unwrap(),
            "other" => Greeting::relay_line_for_test(&Pass::new([9; 32])),
            "reflected" => line.split_once(' ').unwrap().1.to_owned(),
            _ => String::new(),
        };
        guest.send(format!("{proof}\r\n")).await;
        if case == "right" {
            door.wait_told("greeted", 1).await;
        } else {
            assert!(guest.rest().await.is_empty(), "{case}");
        }
    }
    assert_eq!(door.metrics.guest().greetings_failed.get("wrong_proof"), 4);
}

/// P10: whichever byte of the relay's lines is spoilt, nobody comes in, and no more than the door's line is said.
#[tokio::test(start_paused = true)]
async fn a_greeting_with_any_byte_spoilt_lets_nobody_in() {
    let door = Door::new().await;
    let opening = Greeting::opening(&[7; 16]);
    let proof = Greeting::relay_line_for_test(&door.pass);
    let lines = opening.len() + proof.len() + 4;
    for at in 0..lines {
        let mut guest = door.connect().await;
        guest.0.spoil(move |before, bytes| {
            if let Some(byte) = at.checked_sub(before).and_then(|at| bytes.get_mut(at)) {
                *byte ^= 1;
            }
        });
        // A door that has closed already, or whose proof is of another nonce, ends it on this side.
        let _ = guest.0.greet(&door.pass, [7; 16], &poll("x")).await;
        assert!(guest.rest().await.is_empty(), "byte {at} was spoilt");
    }
    assert!(door.told().is_empty() && door.metrics.guest().greetings.get() == 0);
}

/// P10: byte by byte, in time and too slow.
#[tokio::test(start_paused = true)]
async fn a_greeting_byte_by_byte_must_still_be_in_time() {
    for (pause, comes_in) in [(Duration::from_millis(20), true), (Duration::from_millis(200), false)] {
        let door = Door::new().await;
        let (mut guest, begun) = (door.connect().await, Instant::now());
        let mut sent = true;
        for byte in format!("{}\r\n", Greeting::opening(&[3; 16])).bytes() {
            tokio::time::advance(pause).await;
            sent &= guest.try_send([byte]).await;
        }
        if comes_in {
            let line = guest.line().await.unwrap();
            let proof = Greeting::relay(&door.pass, [3; 16], &line).unwrap().relay_line();
            for byte in format!("{proof}\r\n").bytes() {
                tokio::time::advance(pause).await;
                guest.send([byte]).await;
            }
            door.wait_told("greeted", 1).await;
        } else {
            assert!(guest.rest().await.is_empty());
            assert!(!sent || begun.elapsed() >= Duration::from_secs(5));
            assert_eq!(door.metrics.guest().greetings_failed.get("late"), 1);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_first_greeting_is_told_once() {
    let door = Door::new().await;
    for _ in 0..3 {
        assert_eq!(door.ask(poll("x")).await.status, 401);
    }
    assert_eq!(door.told(), ["greeted"]);
    assert_eq!(door.metrics.guest().greetings.get(), 3);
}

/// P2, P10: the lobby has few seats, and the oldest connection loses its seat to the newest.
#[tokio::test(start_paused = true)]
async fn the_oldest_of_too_many_silent_connections_is_closed_first() {
    let door = Door::new().await;
    let begun = Instant::now();
    let mut silent = Vec::new();
    for _ in 0..16 {
        silent.push(door.connect().await);
    }
    // The VM's own connection comes in all the same.
    let mut own = door.guest().await;
    assert!(silent.remove(0).rest().await.is_empty());
    assert_eq!(begun.elapsed(), Duration::ZERO, "closed for room, not for time");
    own.send(poll("x")).await;
    assert_eq!(own.reply().await.status, 401);
    for mut guest in silent {
        assert!(guest.rest().await.is_empty());
    }
    assert_eq!(begun.elapsed().as_secs(), 5);
    let failed = &door.metrics.guest().greetings_failed;
    assert_eq!((failed.get("evicted"), failed.get("late")), (1, 15));
}

/// P2: at most 64 connections per VM.
#[tokio::test(start_paused = true)]
async fn the_65th_connection_is_closed() {
    let door = Door::new().await;
    let mut guests = Vec::new();
    for _ in 0..64 {
        guests.push(door.guest().await);
    }
    assert!(door.guest().await.rest().await.is_empty());
    assert_eq!(door.metrics.guest().connections_closed.get("too_many"), 1);
    drop(guests.pop());
    // The place is free once the door has seen the end.
    let mut refused = 0;
    loop {
        let mut guest = door.guest().await;
        if guest.try_send(poll("x")).await && guest.try_reply().await.is_some() {
            break;
        }
        refused += 1;
        assert!(refused < 100, "no place became free");
    }
}

/// E7: a failing accept is paused after, not spun on, and the door recovers by itself.
#[tokio::test(start_paused = true)]
async fn failed_accepts_are_paused_after() {
    let door = Door::new().await;
    let Entrance::Memory(sender) = &door.entrance else { unreachable!() };
    let begun = Instant::now();
    for _ in 0..8 {
        sender.send(Err(io::Error::from_raw_os_error(24))).await.unwrap();
    }
    assert_eq!(door.ask(poll("x")).await.status, 401);
    assert_eq!(door.metrics.guest().accept_errors.get(), 8);
    // 50 + 100 + 200 + 400 + 800 + 3 × 1000 ms.
    assert_eq!(begun.elapsed().as_millis(), 4550);
}

/// P1: a head that does not come, a pause that is too long.
#[tokio::test(start_paused = true)]
async fn slow_heads_and_long_pauses_are_closed_in_time() {
    for (bytes, seconds, word) in [("POST /api", 10, "head_timeout"), ("", 75, "idle")] {
        let door = Door::new().await;
        let (mut guest, begun) = (door.guest().await, Instant::now());
        guest.send(bytes).await;
        assert!(guest.rest().await.is_empty());
        assert_eq!(begun.elapsed().as_secs(), seconds, "{word}");
        assert_eq!(door.metrics.guest().connections_closed.get(word), 1);
    }
    // After an answer, too.
    let door = Door::new().await;
    let mut guest = door.guest().await;
    guest.send(poll("x")).await;
    assert_eq!(guest.reply().await.status, 401);
    let begun = Instant::now();
    assert!(guest.rest().await.is_empty());
    assert_eq!(begun.elapsed().as_secs(), 75);
}

/// T9: 100 connections that drip, half before the greeting and half after, over real sockets.
#[tokio::test]
async fn a_hundred_dripping_connections_are_closed_and_the_guest_is_served() {
    let short = Duration::from_millis(300);
    let limits = Limits { greeting: short, head: short, greeting_connections: 50, ..Limits::default() };
    let door = Setup { limits, tcp: true, ..Setup::default() }.open().await;
    let mut dripping = Vec::new();
    for n in 0..100 {
        let mut guest = if n % 2 == 0 { door.guest().await } else { door.connect().await };
        guest.send(if n % 2 == 0 { "POST /api/v4/jobs" } else { "DAYFLY" }).await;
        dripping.push(guest);
    }
    let begun = Instant::now();
    assert_eq!(door.ask(poll("x")).await.status, 401, "the guest's own call is served meanwhile");
    for guest in &mut dripping {
        assert!(guest.rest().await.is_empty());
    }
    assert!(begun.elapsed() < short + Duration::from_secs(1), "{:?}", begun.elapsed());
}
