//! A hostile guest's frames, by hand: each known flood ends its session, or is read no faster than it may cost.

use super::ends::{door, serve, shake, soon};
use crate::limits::AUTHORITY;
use crate::{Limits, SessionError};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RESET: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut bytes = vec![length[1], length[2], length[3], kind, flags];
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// A header's name and value, or the value of one of HPACK's own names; nothing is kept.
fn literal(name: u8, value: &str) -> Vec<u8> {
    [&[name, u8::try_from(value.len()).unwrap()], value.as_bytes()].concat()
}

fn connect() -> Vec<u8> {
    // :method and :authority.
    [literal(2, "CONNECT"), literal(1, AUTHORITY)].concat()
}

/// Pours these after the preface until the session is over or `most` bytes were poured; what the session ended with, how
/// many bytes went in and how many streams came out.
async fn pour(frames: &[u8], most: usize) -> (Option<SessionError>, usize, usize) {
    let (host, guest) = duplex(64 * 1024);
    let (host, guest) = shake(host, guest).await;
    let (guest, _) = guest.into_parts();
    let (mut answers, mut guest) = tokio::io::split(guest);
    let streams = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&streams);
    let hostile = async {
        guest.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()).await.unwrap();
        let mut poured = 0;
        while poured < most && guest.write_all(frames).await.is_ok() {
            poured += frames.len();
        }
        // What came with an end is not looked at any more.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let _ = guest.shutdown().await;
        poured
    };
    let session = async {
        let host = host.serve(&Limits::default()).await.unwrap();
        serve(host, move |stream| {
            counted.fetch_add(1, Ordering::Relaxed);
            door(stream)
        })
        .await
    };
    let listening = async {
        let _ = tokio::io::copy(&mut answers, &mut tokio::io::sink()).await;
    };
    let work = async { tokio::join!(session, hostile, listening) };
    let (ended, poured, ()) = tokio::time::timeout(Duration::from_secs(3600), work).await.unwrap();
    (ended, poured, streams.load(Ordering::Relaxed))
}

fn is_protocol(ended: Option<SessionError>) -> bool {
    matches!(ended, Some(SessionError::Protocol(error)) if !error.is_io())
}

/// CVE-2023-44487: streams that are opened and reset at once.
#[tokio::test(start_paused = true)]
async fn rapid_resets_end_the_session() {
    let mut frames = Vec::new();
    for n in 0..500_u32 {
        frames.extend(frame(HEADERS, END_HEADERS, 2 * n + 1, &connect()));
        frames.extend(frame(RESET, 0, 2 * n + 1, &[0, 0, 0, 8]));
    }
    let (ended, _, streams) = pour(&frames, frames.len()).await;
    assert!(is_protocol(ended) && streams < 100, "{streams}");
}

/// CVE-2024-27316 and kin: headers without an end, and headers that are too many.
#[tokio::test(start_paused = true)]
async fn headers_without_end_end_the_session() {
    let first = frame(HEADERS, 0, 1, &connect());
    let more = frame(CONTINUATION, 0, 1, &literal(0, "").into_iter().chain(literal(0, "")).collect::<Vec<_>>());
    let (ended, poured, streams) = pour(&[first, more.repeat(20_000)].concat(), 1).await;
    assert!(is_protocol(ended) && streams == 0, "{poured}");
    let big = [connect(), [vec![0, 1, b'a', 100], vec![b'b'; 100]].concat().repeat(100)].concat();
    let (ended, _, streams) = pour(&frame(HEADERS, END_HEADERS, 1, &big), 1).await;
    assert!(streams == 0, "{ended:?}");
}

#[tokio::test(start_paused = true)]
async fn a_frame_that_is_too_long_ends_the_session() {
    let (ended, ..) = pour(&frame(DATA, 0, 1, &vec![0; 16 * 1024 + 1]), 1).await;
    assert!(is_protocol(ended));
}

/// More than the window lets through, on a stream that nobody reads: it is reset, and what still comes is thrown away.
#[tokio::test(start_paused = true)]
async fn data_beyond_the_window_ends_its_stream() {
    let open = frame(HEADERS, END_HEADERS, 1, &connect());
    let data = frame(DATA, 0, 1, &vec![b'S'; 16 * 1024]);
    let (host, guest) = duplex(64 * 1024);
    let (host, guest) = shake(host, guest).await;
    let (guest, _) = guest.into_parts();
    let (mut answers, mut guest) = tokio::io::split(guest);
    let hostile = async {
        guest.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, &[]), &open, &data.repeat(2000)].concat()).await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        guest.shutdown().await.unwrap();
        let _ = tokio::io::copy(&mut answers, &mut tokio::io::sink()).await;
    };
    let session = async {
        let mut host = host.serve(&Limits::default()).await.unwrap();
        let mut stream = host.accept().await.unwrap().unwrap();
        let ended = serve(host, door).await;
        let mut kept = Vec::new();
        let error = stream.read_to_end(&mut kept).await.unwrap_err();
        assert!(kept.len() <= 256 * 1024, "{} bytes were kept: {error}, {ended:?}", kept.len());
    };
    soon(async { tokio::join!(session, hostile) }).await;
}

/// What only asks or sets: each is read at the pace that is allowed, for as long as it likes, and costs no memory.
#[tokio::test(start_paused = true)]
async fn questions_without_end_are_read_at_their_pace() {
    for (what, frame) in [
        ("pings", frame(PING, 0, 0, &[1; 8])),
        ("settings", frame(SETTINGS, 0, 0, &[])),
        ("priorities", frame(PRIORITY, 0, 1, &[0, 0, 0, 3, 1])),
    ] {
        let start = tokio::time::Instant::now();
        let frames = frame.repeat(1000);
        let (ended, poured, _) = pour(&frames, 100_000 * frame.len()).await;
        let took = start.elapsed();
        // 100,000 of them at 12,500 a second, less what is allowed at once.
        assert!(took > Duration::from_secs(6) || is_protocol(ended), "{what}: {poured} bytes in {took:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn empty_data_without_end_ends_the_session() {
    let open = frame(HEADERS, END_HEADERS, 1, &connect());
    let (ended, ..) = pour(&[open, frame(DATA, 0, 1, &[]).repeat(1000)].concat(), 1).await;
    assert!(is_protocol(ended));
}

#[tokio::test(start_paused = true)]
async fn a_window_beyond_all_bounds_ends_the_session() {
    let (ended, ..) = pour(&frame(WINDOW_UPDATE, 0, 0, &[0x7f, 0xff, 0xff, 0xff]).repeat(2), 1).await;
    assert!(is_protocol(ended));
}

/// What is not a CONNECT to the door gets no stream, and costs the session nothing.
#[tokio::test(start_paused = true)]
async fn anything_but_a_connect_to_the_door_is_refused() {
    let get = [literal(2, "GET"), literal(1, AUTHORITY), literal(4, "/"), literal(6, "http")].concat();
    let elsewhere = [literal(2, "CONNECT"), literal(1, "gitlab.example:443")].concat();
    let nowhere = literal(2, "CONNECT");
    let mut frames = Vec::new();
    for (stream, headers) in [(1, get), (3, elsewhere), (5, nowhere), (7, connect())] {
        frames.extend(frame(HEADERS, END_HEADERS | END_STREAM, stream, &headers));
    }
    let (_, _, streams) = pour(&frames, 1).await;
    assert_eq!(streams, 1);
}

/// More streams than are allowed at once: those beyond are refused, the others go on.
#[tokio::test(start_paused = true)]
async fn streams_beyond_the_bound_are_refused() {
    let mut frames = Vec::new();
    for n in 0..200_u32 {
        frames.extend(frame(HEADERS, END_HEADERS, 2 * n + 1, &connect()));
        frames.extend(frame(DATA, 0, 2 * n + 1, b"S"));
    }
    let (ended, _, streams) = pour(&frames, 1).await;
    assert!(streams <= 64, "{streams} at once: {ended:?}");
    assert!(streams >= 64 || is_protocol(ended));
}

/// A guest that never reads: what is made for it stays in bounds, and the session ends.
#[tokio::test(start_paused = true)]
async fn a_guest_that_never_reads_is_left() {
    let (host, guest) = duplex(64 * 1024);
    let (host, guest) = shake(host, guest).await;
    let (guest, _) = guest.into_parts();
    let (_deaf, mut guest) = tokio::io::split(guest);
    let hostile = async {
        guest.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()).await.unwrap();
        loop {
            if guest.write_all(&frame(PING, 0, 0, &[1; 8])).await.is_err() {
                return;
            }
        }
    };
    let session = async { serve(host.serve(&Limits::default()).await.unwrap(), door).await };
    let (ended, ()) = soon(async { tokio::join!(session, hostile) }).await;
    assert!(matches!(ended, Some(SessionError::Silent)), "{ended:?}");
}

/// The host's answers go on beside a flood's: it is one session's own business.
#[tokio::test]
async fn a_pipe_that_breaks_is_no_panic() {
    let (host, guest) = duplex(64 * 1024);
    let (host, guest) = shake(host, guest).await;
    let (mut guest, _) = guest.into_parts();
    guest.write_all(&PREFACE[..10]).await.unwrap();
    drop(guest);
    assert!(host.serve(&Limits::default()).await.is_err());
}
