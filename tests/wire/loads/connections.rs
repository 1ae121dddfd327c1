//! More connections than a VM may have: slow ones, very many, and ones that say too much at once.

use super::scales::{Growth, Neighbour, alone, assert_unaffected, open_files, run, sized, until_files_are};
use crate::door::support::{Door, Entrance, Guest, LIMIT, Setup, request};
use dayfly::guest::Limits;
use dayfly_guest_config::Pass;
use dayfly_test_guest::Connection;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

fn address(door: &Door) -> SocketAddr {
    let Entrance::Tcp(address) = door.entrance else { unreachable!("it listens on TCP") };
    address
}

/// The relay's half of the greeting; `None` if the door closed instead, for want of room.
async fn greeted(address: SocketAddr, pass: &Pass) -> Option<TcpStream> {
    let mut connection = Connection::new(TcpStream::connect(address).await.unwrap());
    connection.greet(pass, [7; 16], b"").await.ok()?;
    Some(connection.into_stream())
}

/// Sends `text` byte by byte, slowly and over again, until the door closes; how long that took.
async fn drip(mut stream: TcpStream, text: &str, pause: Duration) -> Duration {
    let begun = Instant::now();
    let mut bytes = text.bytes().cycle();
    let mut answer = [0; 256];
    loop {
        // A write into a closed connection is seen by the next read.
        let _ = stream.write_all(&[bytes.next().unwrap()]).await;
        if let Ok(Ok(0) | Err(_)) = timeout(pause, stream.read(&mut answer)).await {
            return begun.elapsed();
        }
        assert!(begun.elapsed() < LIMIT, "nobody closes a dripping connection");
    }
}

/// T9, P1: a thousand slow-loris connections, half before the greeting and half after, each
/// made anew when it was closed: none outlives its limit by a second, memory and files stay bounded,
/// and another VM's p99 is what it was.
#[test]
fn slow_connections_without_number_cost_neither_memory_nor_neighbours() {
    if !alone("loads::connections::slow_connections_without_number_cost_neither_memory_nor_neighbours") {
        return;
    }
    run(async {
        let (number, lasting) = sized((100, Duration::from_secs(3)), (1000, Duration::from_secs(60)));
        let usual = Limits::default();
        let short = Limits { greeting: Duration::from_millis(300), head: Duration::from_millis(300), ..usual.clone() };
        let limits = sized(short, usual);
        let (greeting, head) = (limits.greeting, limits.head);
        let door = Setup { limits, tcp: true, ..Setup::default() }.open().await;
        let mut neighbour = Neighbour::new().await;
        let before = neighbour.p99(sized(100, 1000)).await;
        let (files, growth) = (open_files(), Growth::begin());

        let (address, pass) = (address(&door), door.pass.clone());
        let load = async {
            let end = Instant::now() + lasting;
            let mut attackers = JoinSet::new();
            for n in 0..number {
                let pass = pass.clone();
                attackers.spawn(async move {
                    let (mut silent, mut slow) = (Duration::ZERO, Duration::ZERO);
                    while Instant::now() < end {
                        if n % 2 == 0 {
                            let stream = TcpStream::connect(address).await.unwrap();
                            silent = silent.max(drip(stream, "DAYFLY 1 ", greeting / 5).await);
                        } else if let Some(stream) = greeted(address, &pass).await {
                            slow = slow.max(drip(stream, "POST /api/v4/jobs/request?", head / 5).await);
                        }
                        // A thousand times a second is often enough.
                        sleep(greeting / 5).await;
                    }
                    (silent, slow)
                });
            }
            let ended = attackers.join_all().await;
            ended.into_iter().fold((Duration::ZERO, Duration::ZERO), |a, b| (a.0.max(b.0), a.1.max(b.1)))
        };
        let (neighbour, beside, (silent, slow)) = neighbour.p99_beside(load).await;

        println!("figure load.slow_connections_mib {:.2} MiB", growth.mib());
        let closed = |word| door.metrics.guest().connections_closed.get(word);
        assert!(closed("head_timeout") > 0 && closed("too_many") + closed("head_timeout") >= number / 2);
        assert!(silent <= greeting + Duration::from_secs(1), "{silent:?} without a greeting");
        assert!(slow > Duration::ZERO && slow <= head + Duration::from_secs(1), "{slow:?} without a head");
        assert!(growth.mib() <= 50.0, "{} MiB", growth.mib());
        assert_unaffected(before, beside);
        neighbour.assert_whole().await;
        until_files_are(files).await;
    });
}

/// P2: ten thousand connections to one door: those that have a place keep it and are served, all others
/// are closed, and nobody else notices.
#[test]
fn ten_thousand_connections_leave_sixty_four() {
    if !alone("loads::connections::ten_thousand_connections_leave_sixty_four") {
        return;
    }
    run(async {
        let number: u64 = sized(1_000, 10_000);
        let limits = Limits { head: LIMIT, idle: LIMIT, requests_burst: 1000, ..Limits::default() };
        let door = Setup { limits, tcp: true, ..Setup::default() }.open().await;
        let mut neighbour = Neighbour::new().await;
        let before = neighbour.p99(sized(100, 1000)).await;
        let (files, growth) = (open_files(), Growth::begin());
        let (address, pass) = (address(&door), door.pass.clone());
        let mut places = Vec::new();
        for _ in 0..64 {
            let mut guest = Guest::new(greeted(address, &pass).await.expect("the lobby is empty"));
            guest.send(request("GET", "/", &[], "")).await;
            assert_eq!(guest.reply().await.status, 404);
            places.push(guest);
        }

        let load = async {
            // No more at once than the lobby has seats, or they would push each other out of it.
            let room = Arc::new(Semaphore::new(8));
            let mut others = JoinSet::new();
            for _ in 0..number {
                let (pass, room) = (pass.clone(), Arc::clone(&room));
                others.spawn(async move {
                    let place = room.acquire_owned().await.unwrap();
                    let mut stream = greeted(address, &pass).await.expect("there is a seat in the lobby");
                    drop(place);
                    // Closed, or reset: there is nothing to read.
                    let read = timeout(LIMIT, stream.read(&mut [0; 16])).await.expect("it is closed");
                    assert!(matches!(read, Ok(0) | Err(_)));
                });
            }
            while let Some(ended) = others.join_next().await {
                ended.unwrap();
            }
        };
        let (neighbour, beside, ()) = neighbour.p99_beside(load).await;

        println!("figure load.many_connections_mib {:.2} MiB", growth.mib());
        assert_eq!(door.metrics.guest().connections_closed.get("too_many"), number);
        for guest in &mut places {
            guest.send(request("GET", "/", &[], "")).await;
            assert_eq!(guest.reply().await.status, 404);
        }
        assert!(growth.mib() <= 50.0, "{} MiB", growth.mib());
        assert_unaffected(before, beside);
        neighbour.assert_whole().await;
        drop(places);
        until_files_are(files).await;
    });
}

/// P5, T9: a thousand requests at once on each of eight connections: the answers come one by one and in
/// order, no faster than the rate; memory stays bounded, and nobody else notices.
#[test]
fn a_thousand_requests_at_once_are_answered_in_order_at_the_rate() {
    if !alone("loads::connections::a_thousand_requests_at_once_are_answered_in_order_at_the_rate") {
        return;
    }
    run(async {
        const CONNECTIONS: usize = 8;
        const REQUESTS: usize = 1000;
        let rate = sized(4_000, 250);
        let limits = Limits { requests_per_second: rate, requests_burst: 100, ..Limits::default() };
        let door = Setup { limits, tcp: true, ..Setup::default() }.open().await;
        let mut neighbour = Neighbour::new().await;
        let before = neighbour.p99(sized(100, 1000)).await;
        let (files, growth) = (open_files(), Growth::begin());
        let (address, pass) = (address(&door), door.pass.clone());
        let load = async {
            let (mut guests, begun) = (JoinSet::new(), Instant::now());
            for _ in 0..CONNECTIONS {
                let stream = greeted(address, &pass).await.expect("the lobby is empty");
                guests.spawn(async move {
                    let (mut sending, mut reading) = Guest::new(stream).split();
                    let send = async {
                        // Two kinds in turn, so that an answer can be told from the next.
                        let kinds = [request("GET", "/", &[], ""), request("DELETE", "/api/v4/jobs/42", &[], "")];
                        for kind in kinds.iter().cycle().take(REQUESTS) {
                            sending.write_all(kind).await.unwrap();
                        }
                    };
                    let read = async {
                        for n in 0..REQUESTS {
                            assert_eq!(reading.reply().await.status, [404, 405][n % 2], "{n}");
                        }
                    };
                    tokio::join!(send, read);
                });
            }
            while let Some(ended) = guests.join_next().await {
                ended.unwrap();
            }
            begun.elapsed()
        };
        let (neighbour, beside, took) = neighbour.p99_beside(load).await;

        println!("figure load.pipelines_mib {:.2} MiB", growth.mib());
        // All but the burst wait for their turn.
        let least = Duration::from_secs_f64((CONNECTIONS * REQUESTS - 100) as f64 / f64::from(rate));
        assert!(took + Duration::from_millis(100) >= least, "{took:?}");
        assert!(growth.mib() <= 50.0, "{} MiB", growth.mib());
        assert_unaffected(before, beside);
        neighbour.assert_whole().await;
        until_files_are(files).await;
    });
}
