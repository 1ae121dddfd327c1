//! Doors at an address, of all kinds, on loopback.

use super::super::*;
use super::{LIMIT, limits, pass, relay, wait_idle};
use dayfly_guest_config::Greeting;
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::net::Shutdown;
use std::sync::mpsc;

fn target(door: SocketAddr, patience: Duration) -> Target {
    Target { door: Door::Address(door), pass: pass(1), patience, forwards: Vec::new() }
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// A port that refuses: nobody listens there any more.
fn refusing() -> SocketAddr {
    listener().1
}

/// The door's side of the greeting, with the pass `n`; returns the stream, all lines read.
fn door(listener: &TcpListener, n: u8) -> Result<BufReader<TcpStream>, String> {
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let mut reader = BufReader::new(stream);
    let line = |reader: &mut BufReader<TcpStream>| {
        let mut line = String::new();
        reader.read_line(&mut line).map_err(|error| error.to_string())?;
        line.strip_suffix("\r\n").map(str::to_owned).ok_or(format!("no line: {line:?}"))
    };
    let greeting = Greeting::door(&pass(n), [9; 16], &line(&mut reader)?).map_err(|error| error.to_string())?;
    assert_eq!(reader.buffer(), b"", "the relay must wait for the door's proof");
    reader.get_mut().write_all(format!("{}\r\n", greeting.door_line()).as_bytes()).unwrap();
    greeting.finish(&line(&mut reader)?).map_err(|error| error.to_string())?;
    Ok(reader)
}

fn read_to_end(mut stream: impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    // A reset ends it as well as an end does.
    let _ = stream.read_to_end(&mut bytes);
    bytes
}

#[test]
fn bytes_go_both_ways_and_each_way_ends_by_itself() {
    let (listener, address) = listener();
    let (relay, front) = relay(limits());
    relay.hand_over(target(address, LIMIT)).unwrap();
    let request = vec![b'q'; 300_000];
    let answer = vec![b'a'; 500_000];
    let (sent, expected) = (request.clone(), answer.clone());
    let served = thread::spawn(move || {
        let mut door = door(&listener, 1).unwrap();
        // The runner's end arrives while the answer has not begun.
        assert_eq!(read_to_end(&mut door), request);
        door.get_mut().write_all(&answer).unwrap();
    });
    let mut runner = connect(front);
    runner.write_all(&sent).unwrap();
    runner.shutdown(Shutdown::Write).unwrap();
    assert!(read_to_end(&runner) == expected, "the answer must come whole");
    served.join().unwrap();
    wait_idle(&relay);
}

#[test]
fn a_connection_is_held_until_there_is_a_target() {
    let (listener, address) = listener();
    let front = TcpListener::bind("127.0.0.1:0").unwrap();
    let front_address = front.local_addr().unwrap();
    let (first, seen) = mpsc::channel();
    let relay = Relay::start(front, limits(), move || first.send(()).unwrap()).unwrap();
    let mut runner = connect(front_address);
    runner.write_all(b"POST /poll").unwrap();
    seen.recv_timeout(LIMIT).unwrap();
    listener.set_nonblocking(true).unwrap();
    assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock, "no target, no connection");
    listener.set_nonblocking(false).unwrap();
    relay.hand_over(target(address, LIMIT)).unwrap();
    let mut door = door(&listener, 1).unwrap();
    let mut begin = [0; 10];
    door.read_exact(&mut begin).unwrap();
    assert_eq!(&begin, b"POST /poll");
}

#[test]
fn a_wrong_door_gets_neither_a_proof_nor_a_byte_of_the_runner() {
    let (listener, address) = listener();
    let (relay, front) = relay(limits());
    relay.hand_over(target(address, Duration::ZERO)).unwrap();
    let mut runner = connect(front);
    runner.write_all(b"PRIVATE-TOKEN: secret").unwrap();
    // It holds another pass: the relay must leave after the door's line.
    assert_eq!(door(&listener, 2).unwrap_err(), "no line: \"\"");
    assert_eq!(read_to_end(&runner), b"", "the runner sees a closed connection");
    wait_idle(&relay);
}

#[test]
fn the_pass_is_never_sent_and_a_silent_door_is_left() {
    let (listener, address) = listener();
    let (relay, front) = relay(limits());
    relay.hand_over(target(address, Duration::ZERO)).unwrap();
    let mut runner = connect(front);
    runner.write_all(b"PATCH").unwrap();
    // All that a process on the door's port could collect without a proof.
    let heard = String::from_utf8(read_to_end(listener.accept().unwrap().0)).unwrap();
    assert!(heard.starts_with("DAYFLY 1 ") && heard.ends_with("\r\n") && heard.lines().count() == 1, "{heard:?}");
    assert!(!heard.contains(&pass(1).to_text()) && !heard.contains("PATCH"), "{heard:?}");
    assert_eq!(read_to_end(&runner), b"");
    wait_idle(&relay);
}

#[test]
fn a_door_that_talks_nonsense_is_left() {
    for nonsense in [
        "HTTP/1.1 400 Bad Request\r\n\r\n".to_owned(),
        "x".repeat(100_000),
        "\r\n".into(),
        "a\n".into(),
        format!("{}\r\nmore", "0".repeat(97)),
    ] {
        let (listener, address) = listener();
        let (relay, front) = relay(limits());
        relay.hand_over(target(address, Duration::ZERO)).unwrap();
        let runner = connect(front);
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let _ = stream.write_all(nonsense.as_bytes());
        assert_eq!(read_to_end(&runner), b"", "{:.40}", nonsense);
        wait_idle(&relay);
    }
}

#[test]
fn a_door_that_refuses_is_waited_for() {
    let address = refusing();
    let (relay, front) = relay(limits());
    relay.hand_over(target(address, LIMIT)).unwrap();
    let mut runner = connect(front);
    runner.write_all(b"upload").unwrap();
    runner.shutdown(Shutdown::Write).unwrap();
    // The daemon comes back: first somebody else has the port for one connection, then the door.
    let listener = TcpListener::bind(address).unwrap();
    door(&listener, 2).unwrap_err();
    let mut door = door(&listener, 1).unwrap();
    assert_eq!(read_to_end(&mut door), b"upload");
    door.get_mut().write_all(b"201").unwrap();
    drop(door);
    assert_eq!(read_to_end(&runner), b"201");
    wait_idle(&relay);
}

#[test]
fn patience_ends() {
    let (relay, front) = relay(limits());
    relay.hand_over(target(refusing(), Duration::from_millis(100))).unwrap();
    let start = Instant::now();
    assert_eq!(read_to_end(connect(front)), b"");
    assert!(start.elapsed() >= Duration::from_millis(50), "it must have tried again");
    wait_idle(&relay);
}

#[test]
fn a_connection_cut_on_one_side_is_cut_on_the_other() {
    let (listener, address) = listener();
    let (relay, front) = relay(limits());
    relay.hand_over(target(address, LIMIT)).unwrap();
    // The door goes away: the runner must not wait for an answer.
    let mut runner = connect(front);
    runner.write_all(b"GET").unwrap();
    drop(door(&listener, 1).unwrap());
    assert_eq!(read_to_end(&runner), b"");
    drop(runner);
    // The runner goes away: the door must see an end.
    let runner = connect(front);
    let door = door(&listener, 1).unwrap();
    drop(runner);
    assert_eq!(read_to_end(door), b"");
    wait_idle(&relay);
}

#[test]
fn connections_have_a_bound_and_the_next_one_waits() {
    let (listener, address) = listener();
    let (relay, front) = relay(Limits { connections: 3, ..limits() });
    relay.hand_over(target(address, LIMIT)).unwrap();
    let runners: Vec<_> = (0..3).map(|_| connect(front)).collect();
    let doors: Vec<_> = (0..3).map(|_| door(&listener, 1).unwrap()).collect();
    let mut waiting = connect(front);
    waiting.write_all(b"later").unwrap();
    waiting.shutdown(Shutdown::Write).unwrap();
    assert_eq!(relay.open_connections(), 3);
    drop((runners, doors));
    assert_eq!(read_to_end(door(&listener, 1).unwrap()), b"later");
    assert!(relay.open_connections() <= 3);
}

/// E4: by this a guest knows when to power off, should its daemon never come back.
#[test]
fn silence_is_measured_from_the_last_byte_of_a_proven_door() {
    let (listener, address) = listener();
    let (relay, front) = relay(limits());
    relay.hand_over(target(address, LIMIT)).unwrap();
    let handed_over = relay.0.heard_ms.load(Ordering::Relaxed);
    let wait_heard = |after: u64| {
        let start = Instant::now();
        while relay.0.heard_ms.load(Ordering::Relaxed) <= after {
            assert!(start.elapsed() < LIMIT, "nothing heard");
            thread::yield_now();
        }
        relay.0.heard_ms.load(Ordering::Relaxed)
    };
    let _runner = connect(front);
    door(&listener, 2).unwrap_err(); // a wrong one does not count: the relay asks again …
    let mut door = door(&listener, 1).unwrap(); // … and this one does
    let greeted = wait_heard(handed_over);
    while relay.0.start.elapsed().as_millis() <= u128::from(greeted) {
        thread::yield_now();
    }
    door.get_mut().write_all(b"204").unwrap();
    let answered = wait_heard(greeted);
    assert!(answered > greeted && relay.silent_for() < LIMIT);
}
