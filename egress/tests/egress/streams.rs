//! Connections: their ends, what is refused by the name in their hello, and many of them.

use crate::support::{Egress, FarEnd, Resolver, Says, echoes, soon, spawn};
use std::io::ErrorKind;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy, sink};
use tokio::time::Instant;

fn to(far: &FarEnd) -> String {
    format!("127.0.0.1:{}", far.port)
}

/// The far ends of these tests are on loopback.
const LOOPBACK: &str = r#"{"allow":["127.0.0.0/8"]}"#;

fn allowing(far: &[&FarEnd]) -> String {
    let list: Vec<String> = far.iter().map(|far| format!("\"127.0.0.1:{}\"", far.port)).collect();
    format!(r#"{{"allow":[{}]}}"#, list.join(","))
}

#[tokio::test]
async fn a_closed_port_is_refused_and_an_open_one_is_not() {
    let far = FarEnd::echo().await;
    let mut egress = Egress::start(LOOPBACK, &[]).await;
    let guest = egress.guest().await;
    let closed = {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap()
    };
    let start = Instant::now();
    assert_eq!(guest.connect(closed).await.unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert!(start.elapsed() < Duration::from_secs(1));
    echoes(&mut guest.connect(to(&far)).await.unwrap(), b"hello").await;
    drop(guest);
    let (_, destinations) = egress.end().await;
    assert_eq!(destinations.iter().map(|to| to.failed).sum::<u64>(), 1);
}

/// A far end that never answers is not waited for longer than a job would; who gives up before is not waited for at all.
#[tokio::test]
async fn a_silent_far_end_is_late() {
    use rustix::net::{AddressFamily, SocketType, bind, getsockname, listen, socket};
    // Its queue is full, so that nobody else's connection begins.
    let full = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    bind(&full, &std::net::SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    listen(&full, 0).unwrap();
    let silent = std::net::SocketAddr::try_from(getsockname(&full).unwrap()).unwrap();
    let mut filling = Vec::new();
    while let Ok(connected) =
        tokio::time::timeout(Duration::from_millis(300), tokio::net::TcpStream::connect(silent)).await
    {
        filling.push(connected.unwrap());
        assert!(filling.len() < 10);
    }
    let mut egress = Egress::start(LOOPBACK, &[]).await;
    let guest = egress.guest().await;
    for _ in 0..100 {
        drop(guest.opener.open_to(&silent.to_string()).await.unwrap());
    }
    let start = Instant::now();
    assert_eq!(guest.connect(silent).await.unwrap_err().kind(), ErrorKind::TimedOut);
    let took = start.elapsed();
    assert!((Duration::from_secs(19)..Duration::from_secs(30)).contains(&took), "{took:?}");
}

/// How many bytes a far end has read, and how that ended.
type End = (usize, Option<ErrorKind>);

/// Each way ends by itself, and a cut on one side is a cut on the other.
#[tokio::test]
async fn ends_and_cuts_are_carried() {
    // Says how what it read ended, after it has said that it says no more.
    let ended: Arc<Mutex<Vec<End>>> = Arc::default();
    let heard = Arc::clone(&ended);
    let far = FarEnd::serve(move |mut stream| {
        let heard = Arc::clone(&heard);
        async move {
            let mut first = [0];
            let _ = stream.read_exact(&mut first).await;
            if first == *b"x" {
                let _ = rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO));
                return;
            }
            stream.write_all(b"said").await.unwrap();
            stream.shutdown().await.unwrap();
            let mut read = Vec::new();
            let end = stream.read_to_end(&mut read).await;
            heard.lock().unwrap().push((read.len(), end.err().map(|error| error.kind())));
        }
    })
    .await;
    let mut egress = Egress::start(&allowing(&[&far]), &[]).await;
    let guest = egress.guest().await;
    let until = async |count: usize| {
        soon(async {
            while ended.lock().unwrap().len() < count {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    };
    let mut stream = guest.connect(to(&far)).await.unwrap();
    stream.write_all(b"e").await.unwrap();
    let mut said = Vec::new();
    soon(stream.read_to_end(&mut said)).await.unwrap();
    assert_eq!(said, b"said");
    stream.write_all(&[1; 100_000]).await.unwrap();
    stream.shutdown().await.unwrap();
    until(1).await;
    assert_eq!(ended.lock().unwrap()[0], (100_000, None));

    let mut stream = guest.connect(to(&far)).await.unwrap();
    stream.write_all(b"e").await.unwrap();
    soon(stream.read_to_end(&mut said)).await.unwrap();
    stream.reset();
    until(2).await;
    assert_eq!(ended.lock().unwrap()[1].1, Some(ErrorKind::ConnectionReset));

    let mut stream = guest.connect(to(&far)).await.unwrap();
    stream.write_all(b"x").await.unwrap();
    assert_eq!(soon(stream.read(&mut [0])).await.unwrap_err().kind(), ErrorKind::ConnectionReset);

    // The guest's program dies: what it was sending is not whole.
    let mut stream = guest.connect(to(&far)).await.unwrap();
    stream.write_all(b"e").await.unwrap();
    soon(stream.read_to_end(&mut said)).await.unwrap();
    drop(guest);
    let _again = egress.guest().await;
    until(3).await;
    assert_eq!(ended.lock().unwrap()[2].1, Some(ErrorKind::ConnectionReset));
}

/// A hello, in one record, that asks for this name.
fn hello(name: &str) -> Vec<u8> {
    let wide = |bytes: &[u8]| [&u16::try_from(bytes.len()).unwrap().to_be_bytes()[..], bytes].concat();
    let names = wide(&[&[0][..], &wide(name.as_bytes())].concat());
    let extensions = [&[0, 0][..], &wide(&names)].concat();
    let body = [&[3, 3][..], &[7; 32], &[0], &wide(&[0x13, 1]), &[1, 0], &wide(&extensions)].concat();
    let length = u32::try_from(body.len()).unwrap().to_be_bytes();
    let message = [&[1][..], &length[1..], &body].concat();
    [&[22, 3, 1][..], &wide(&message)].concat()
}

/// Who asks TLS for another server than is listed is cut before a byte has left, however it arrives; who asks for a listed one is not.
#[tokio::test]
async fn the_server_of_a_hello_must_be_listed_in_enforce() {
    let far = FarEnd::echo().await;
    let resolver = Resolver::start(&[("listed.example", Says::Addresses(60, vec![vec![Ipv4Addr::LOCALHOST]]))]).await;
    let policy = format!(r#"{{"mode":"enforce","allow":["listed.example:{}"]}}"#, far.port);
    let mut egress = Egress::start(&policy, &[resolver.address]).await;
    let guest = egress.guest().await;
    guest.lookup("listed.example").await;
    for (name, good) in [("listed.example", true), ("hidden.example", false), ("hidden.listed.example", false)] {
        for pieces in [1, 7, 1000] {
            let hello = hello(name);
            let mut stream = guest.connect(to(&far)).await.unwrap();
            for piece in hello.chunks(pieces) {
                // It may be cut in the middle.
                if stream.write_all(piece).await.is_err() {
                    break;
                }
            }
            let mut came = vec![0; hello.len()];
            let end = soon(stream.read_exact(&mut came)).await;
            assert_eq!(end.is_ok(), good, "{name}: {end:?}");
            assert_eq!(came == hello, good, "nothing of it has left");
        }
    }
    // What only begins like one goes nowhere.
    let mut stream = guest.connect(to(&far)).await.unwrap();
    stream.write_all(&[22, 3, 1, 0, 4, 9, 9, 9, 9]).await.unwrap();
    assert!(soon(stream.read(&mut [0])).await.is_err());
    echoes(&mut guest.connect(to(&far)).await.unwrap(), b"SSH-2.0-x\r\n").await;
    drop(guest);
    let (_, destinations) = egress.end().await;
    let hidden = destinations.iter().find(|to| to.name.as_deref() == Some("hidden.example")).unwrap();
    assert_eq!((hidden.refused, hidden.up), (3, 0));
    let listed = destinations.iter().find(|to| to.name.as_deref() == Some("listed.example")).unwrap();
    assert_eq!(listed.connections, 4);
}

/// In `observe`, the server's name is what is written down.
#[tokio::test]
async fn the_server_of_a_hello_is_written_down() {
    let far = FarEnd::echo().await;
    let mut egress = Egress::start(&allowing(&[&far]), &[]).await;
    let guest = egress.guest().await;
    let hello = hello("Seen.Example");
    echoes(&mut guest.connect(to(&far)).await.unwrap(), &hello).await;
    drop(guest);
    let (_, destinations) = egress.end().await;
    assert_eq!(destinations.len(), 1);
    assert_eq!(destinations[0].name.as_deref(), Some("seen.example"));
    assert_eq!((destinations[0].up, destinations[0].connections), (hello.len() as u64, 1));
}

/// T9: ten thousand connections, given up in all stages, leave a running download alone.
#[tokio::test]
async fn ten_thousand_connections_leave_a_download_alone() {
    let (source, echo) = (FarEnd::source().await, FarEnd::echo().await);
    let mut egress = Egress::start(&allowing(&[&source, &echo]), &[]).await;
    let guest = egress.guest().await;
    let mut running = guest.connect(to(&source)).await.unwrap();
    let got = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let counted = Arc::clone(&got);
    let running = spawn(async move {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(count @ 1..) = running.read(&mut buffer).await {
            counted.fetch_add(count as u64, std::sync::atomic::Ordering::Relaxed);
        }
    });
    let closed = "127.0.0.1:1";
    for n in 0..100 {
        for m in 0..100 {
            let target = match m % 4 {
                0 => closed.to_owned(),
                1 => "10.0.0.1:80".to_owned(),
                _ => to(&echo),
            };
            let mut stream = soon(guest.opener.open_to(&target)).await.unwrap();
            match (n + m) % 5 {
                0 => drop(stream),
                1 => drop(stream.write_all(b"hello").await),
                2 => drop(soon(stream.accepted()).await),
                3 if m % 4 > 1 => {
                    echoes(&mut stream, b"hello").await;
                    stream.reset();
                }
                _ => stream.reset(),
            }
        }
    }
    let before = got.load(std::sync::atomic::Ordering::Relaxed);
    soon(async {
        while got.load(std::sync::atomic::Ordering::Relaxed) < before + 5_000_000 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert!(!running.is_finished());
    echoes(&mut guest.connect(to(&echo)).await.unwrap(), b"hello").await;
    running.abort();
    drop(guest);
    let (status, destinations) = egress.end().await;
    assert!(status.success());
    assert!(destinations.len() <= 4, "{destinations:?}");
}

/// Nearly as many streams as there may be, stalled both ways; another one moves, and the process holds little.
#[tokio::test]
async fn stalled_streams_hold_up_no_other() {
    let (source, stalled, echo) = (FarEnd::source().await, FarEnd::stalled().await, FarEnd::echo().await);
    let mut egress = Egress::start(&allowing(&[&source, &stalled, &echo]), &[]).await;
    let guest = egress.guest().await;
    let mut kept = Vec::new();
    for n in 0..300 {
        let mut stream = guest.connect(to(if n % 2 == 0 { &source } else { &stalled })).await.unwrap();
        if n % 2 == 1 {
            // Until neither the far side's buffers nor ours take any more.
            let mut bytes = tokio::io::repeat(b'u');
            let filling = copy(&mut bytes, &mut stream);
            let _ = tokio::time::timeout(Duration::from_millis(20), filling).await;
        }
        kept.push(stream);
    }
    let mut download = guest.connect(to(&source)).await.unwrap();
    assert_eq!(soon(copy(&mut (&mut download).take(20_000_000), &mut sink())).await.unwrap(), 20_000_000);
    echoes(&mut guest.connect(to(&echo)).await.unwrap(), &[b'e'; 10_000]).await;
}
