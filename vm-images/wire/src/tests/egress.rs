//! Sessions by which a job reaches the world: streams to many places, of which the host refuses some, a thousand at once.

use super::ends::{LIMIT, serve, shake, soon, spawn};
use crate::{Asked, GuestSession, HostSession, Limits, Opener, SessionError};
use std::future::poll_fn;
use std::io::ErrorKind;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy, duplex, repeat, sink};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

struct Ends {
    opener: Opener,
    host: JoinHandle<Option<SessionError>>,
    guest: JoinHandle<SessionError>,
}

/// A host that does what the name says which a stream is for.
async fn start() -> Ends {
    let (host, guest) = UnixStream::pair().unwrap();
    let (host, guest) = shake(host, guest).await;
    let limits = Limits::egress();
    let (host, guest) = soon(async { tokio::join!(host.serve(&limits), guest.connect(&limits, || {})) }).await;
    let (opener, guest) = guest.unwrap();
    Ends { opener, host: spawn(requests(host.unwrap())), guest: spawn(GuestSession::run(guest)) }
}

async fn requests(mut host: HostSession<UnixStream>) -> Option<SessionError> {
    while let Some(asked) = host.request().await {
        match asked {
            Ok(asked) => drop(spawn(answer(asked))),
            Err(error) => return Some(error),
        }
    }
    None
}

async fn answer(mut asked: Asked) {
    let name = asked.authority().split(':').next().unwrap().to_owned();
    match &*name {
        "echo" => {
            let (mut reading, mut writing) = tokio::io::split(asked.accept().unwrap());
            let _ = copy(&mut reading, &mut writing).await;
            let _ = writing.shutdown().await;
        }
        "source" => drop(copy(&mut repeat(b'd'), &mut asked.accept().unwrap()).await),
        "stall" => {
            let Some((reading, mut writing)) = asked.accept_halves() else { return };
            poll_fn(|cx| writing.poll_reset(cx)).await;
            drop(reading);
        }
        "cut" => {
            let mut stream = asked.accept().unwrap();
            // Once the answer has arrived: a reset overtakes what was not sent yet.
            let _ = stream.read_u8().await;
            stream.reset();
        }
        "raw" => {
            // Takes all that comes before it makes room for more.
            let (mut reading, mut writing) = asked.accept_halves().unwrap();
            let mut came = 0;
            while let Ok(bytes) =
                tokio::time::timeout(Duration::from_millis(300), poll_fn(|cx| reading.poll_bytes(cx))).await
            {
                came += bytes.unwrap().len();
            }
            reading.release(came);
            assert!(poll_fn(|cx| writing.poll_room(cx, 8)).await.unwrap() >= 8);
            writing.send((came as u64).to_be_bytes().to_vec().into()).unwrap();
            while poll_fn(|cx| reading.poll_bytes(cx)).await.is_ok_and(|bytes| !bytes.is_empty()) {}
            writing.end().unwrap();
        }
        "late" => {
            asked.given_up().await;
        }
        status => asked.refuse(status.parse().unwrap()),
    }
}

#[tokio::test]
async fn a_stream_is_opened_to_what_it_is_for_or_refused() {
    let ends = start().await;
    let mut echo = soon(ends.opener.open_to("echo:7")).await.unwrap();
    soon(echo.accepted()).await.unwrap();
    echo.write_all(b"hello").await.unwrap();
    echo.shutdown().await.unwrap();
    let mut came = Vec::new();
    soon(echo.read_to_end(&mut came)).await.unwrap();
    assert_eq!(came, b"hello");
    for (status, kind) in [
        ("403", ErrorKind::ConnectionRefused),
        ("502", ErrorKind::ConnectionRefused),
        ("504", ErrorKind::TimedOut),
        ("500", ErrorKind::ConnectionRefused),
    ] {
        let mut stream = soon(ends.opener.open_to(&format!("{status}:443"))).await.unwrap();
        assert_eq!(soon(stream.accepted()).await.unwrap_err().kind(), kind, "{status}");
        assert_eq!(soon(stream.read(&mut [0])).await.unwrap(), 0);
    }
    assert!(matches!(ends.opener.open_to("no authority").await, Err(SessionError::Authority)));
    // The door's streams are for none of these.
    let mut door = soon(ends.opener.open()).await.unwrap();
    assert!(soon(door.accepted()).await.is_err());
}

/// Ten thousand refusals, a hundred at a time, and as many that are given up unanswered: the session lives, and no place is lost.
#[tokio::test]
async fn refusals_and_retreats_cost_no_place() {
    let ends = start().await;
    for n in 0..100 {
        let mut all = Vec::new();
        for m in 0..100 {
            let target = ["403:1", "502:1", "504:1", "echo:1"][(n + m) % 4];
            let mut stream = soon(ends.opener.open_to(target)).await.unwrap();
            match m % 3 {
                0 => assert_eq!(soon(stream.accepted()).await.is_ok(), target == "echo:1"),
                1 => stream.reset(),
                _ => all.push(stream),
            }
        }
    }
    let mut late = Vec::new();
    for _ in 0..999 {
        late.push(soon(ends.opener.open_to("stall:1")).await.unwrap());
    }
    let mut last = soon(ends.opener.open_to("echo:7")).await.unwrap();
    soon(last.accepted()).await.unwrap();
    assert!(!ends.host.is_finished() && !ends.guest.is_finished());
}

/// A cut of either side is seen at the other as one, and not as an end.
#[tokio::test]
async fn a_reset_is_no_end() {
    let ends = start().await;
    let mut cut = soon(ends.opener.open_to("cut:1")).await.unwrap();
    soon(cut.accepted()).await.unwrap();
    cut.write_all(b"?").await.unwrap();
    let mut came = Vec::new();
    assert_eq!(soon(cut.read_to_end(&mut came)).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    // The other way.
    let (host, guest) = duplex(64 * 1024);
    let (host, guest) = shake(host, guest).await;
    let limits = Limits::egress();
    let (host, guest) = soon(async { tokio::join!(host.serve(&limits), guest.connect(&limits, || {})) }).await;
    let (told, hears) = tokio::sync::mpsc::unbounded_channel();
    let (opener, guest) = guest.unwrap();
    let _host = spawn(serve(host.unwrap(), move |mut stream| {
        let told = told.clone();
        async move {
            let end = stream.read_to_end(&mut Vec::new()).await;
            told.send(end.map_err(|error| error.kind())).unwrap();
        }
    }));
    let _guest = spawn(guest.run());
    let mut hears = hears;
    for reset in [true, false] {
        let mut stream = soon(opener.open()).await.unwrap();
        soon(stream.accepted()).await.unwrap();
        stream.write_all(b"some").await.unwrap();
        if reset {
            stream.reset();
        } else {
            stream.shutdown().await.unwrap();
        }
        let end = soon(hears.recv()).await.unwrap();
        assert_eq!(end, if reset { Err(ErrorKind::ConnectionReset) } else { Ok(4) });
    }
}

/// What was taken and not released fills the window: no more comes than that, and it goes on after the release. The
/// window is that of few streams, or of many.
#[tokio::test]
async fn nothing_comes_beyond_the_window_until_it_is_released() {
    let ends = start().await;
    let limits = Limits::egress();
    let few = limits.few.unwrap();
    let told = async || {
        let mut stream = soon(ends.opener.open_to("raw:1")).await.unwrap();
        soon(stream.accepted()).await.unwrap();
        let (mut reading, mut writing) = tokio::io::split(stream);
        let upload = async {
            // The host throws the rest away without making room.
            let _ = tokio::time::timeout(Duration::from_secs(1), copy(&mut repeat(b'u'), &mut writing)).await;
        };
        let told = async { reading.read_u64().await.unwrap() };
        soon(async { tokio::join!(upload, told) }).await.1
    };
    assert_eq!(told().await, u64::from(few.window));
    let mut many = Vec::new();
    for _ in 0..few.streams {
        many.push(soon(ends.opener.open_to("stall:1")).await.unwrap());
        soon(many.last_mut().unwrap().accepted()).await.unwrap();
    }
    assert_eq!(told().await, u64::from(limits.host.window));
    // Those that have begun in a large window move on in a small one.
    let mut echo = soon(ends.opener.open_to("echo:1")).await.unwrap();
    soon(echo.accepted()).await.unwrap();
    many.into_iter().for_each(crate::Stream::reset);
    // Once the host has heard of it.
    soon(async { while told().await < u64::from(few.window) {} }).await;
    let (mut reading, mut writing) = tokio::io::split(echo);
    let up = async { copy(&mut repeat(b'e').take(3_000_000), &mut writing).await.unwrap() };
    let down = async { copy(&mut (&mut reading).take(3_000_000), &mut sink()).await.unwrap() };
    assert_eq!(soon(async { tokio::join!(up, down) }).await, (3_000_000, 3_000_000));
}

/// Streams come and go by the hundred while others move: the windows change under them, and no byte is lost.
#[tokio::test]
async fn windows_change_under_running_streams() {
    let ends = start().await;
    let mut running = Vec::new();
    for _ in 0..4 {
        let opener = ends.opener.clone();
        running.push(spawn(async move {
            let mut stream = opener.open_to("echo:1").await.unwrap();
            stream.accepted().await.unwrap();
            let (mut reading, mut writing) = tokio::io::split(stream);
            let up = async {
                for n in 0..2000u32 {
                    writing.write_all(&n.to_be_bytes().repeat(2000)).await.unwrap();
                }
                writing.shutdown().await.unwrap();
            };
            let down = async {
                let mut came = vec![0; 8000];
                for n in 0..2000u32 {
                    reading.read_exact(&mut came).await.unwrap();
                    assert_eq!(came, n.to_be_bytes().repeat(2000));
                }
                assert_eq!(reading.read(&mut came).await.unwrap(), 0);
            };
            tokio::join!(up, down);
        }));
    }
    for count in [30, 1, 200, 3, 40, 14, 13, 12].repeat(4) {
        let mut all = Vec::new();
        for _ in 0..count {
            let mut stream = soon(ends.opener.open_to("stall:1")).await.unwrap();
            soon(stream.accepted()).await.unwrap();
            let _ = tokio::time::timeout(Duration::from_millis(1), stream.write_all(&[7; 40_000])).await;
            all.push(stream);
        }
        for stream in all {
            stream.reset();
        }
    }
    for one in running {
        soon(one).await.unwrap();
    }
    assert!(!ends.host.is_finished() && !ends.guest.is_finished());
}

/// As many streams as a guest opens, all full both ways and standing still, but for one: that one moves.
#[tokio::test]
async fn a_thousand_stalled_streams_hold_up_no_other() {
    let ends = start().await;
    let mut stalled = Vec::new();
    for n in 0..999 {
        let mut stream = soon(ends.opener.open_to(if n % 2 == 0 { "stall:1" } else { "source:1" })).await.unwrap();
        soon(stream.accepted()).await.unwrap();
        if n % 2 == 0 {
            let mut bytes = repeat(1);
            let filling = copy(&mut bytes, &mut stream);
            assert!(tokio::time::timeout(Duration::from_millis(2), filling).await.is_err());
        }
        stalled.push(stream);
    }
    let moved = async {
        let mut source = ends.opener.open_to("source:1").await.unwrap();
        copy(&mut (&mut source).take(5_000_000), &mut sink()).await.unwrap()
    };
    assert_eq!(tokio::time::timeout(LIMIT, moved).await.unwrap(), 5_000_000);
    assert!(!ends.host.is_finished() && !ends.guest.is_finished());
}
