//! The isolation ring: a machine of a built image without a network card, `dayfly-egress` at its third port, and a world in
//! a network namespace of the test's own, where public addresses are ours.
//!
//! `scripts/test isolation` prepares image, programs and namespaces. In the tests of this file no daemon takes part: who
//! starts the machine, and who is its door, is the test; behind the door is GitLab's stand-in, so that jobs run as
//! everywhere. Those of `whole` have a host of their own in that world, and a whole daemon.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    clippy::print_stdout,
    reason = "a harness: it starts machines and programs, and prints figures"
)]

#[path = "../support/canary.rs"]
#[allow(
    unreachable_pub,
    missing_docs,
    dead_code,
    reason = "shared by several test binaries, each of which uses a part"
)]
mod canary;
#[path = "../e2e/lab.rs"]
#[allow(unreachable_pub, dead_code, reason = "shared with the ring e2e; each uses a part")]
mod lab;
#[path = "../e2e/leaks.rs"]
#[allow(unreachable_pub, reason = "shared with the ring e2e")]
mod leaks;
mod machine;
mod mirror;
mod names;
mod site;
mod ssh;
mod whole;
mod world;

use machine::{Machine, OUTPUT};
use std::time::Duration;
use world::{FORBIDDEN, OPEN, World};

/// For a boot under TCG and a job behind it.
const LIMIT: Duration = Duration::from_secs(180);

/// What the guest's client prints, one line each; what else the job says stands around it.
fn line<'a>(trace: &'a str, what: &str) -> &'a str {
    let prefix = format!("{OUTPUT}{what} ");
    let found = trace.lines().find_map(|line| line.split_once(&prefix).map(|(_, rest)| rest.trim_end()));
    found.unwrap_or_else(|| panic!("no line of `{what}` in\n{trace}"))
}

/// What a job reaches without a network card, what not, and that it sees the truth of both.
#[tokio::test(flavor = "multi_thread")]
async fn a_machine_without_a_card_has_a_network() {
    let world = World::new().await;
    let mut machine = Machine::start(&world).await;
    let trace = machine.job(&["python3 /tmp/client.py basic"], LIMIT).await;
    let says = |what: &str| line(&trace, what).to_owned();

    assert_eq!(says("devices"), "lo", "there is a card");
    // Where the far end answers, and where it does not.
    assert_eq!(says("open"), "connected hello");
    assert_eq!(says("closed"), "ConnectionRefusedError");
    assert_eq!(says("name"), OPEN.ip().to_string());
    assert_eq!(says("unknown"), "no such name");
    assert_eq!(says("by-name"), "connected hello");
    assert_eq!(says("many"), "100 connected, 100 ConnectionRefusedError");
    // What is neither TCP nor DNS, at once.
    assert_eq!(says("udp"), "PermissionError");
    assert_eq!(says("ping"), "PermissionError");
    let slowest: f64 = says("refused-after-ms").parse().unwrap();
    assert!(slowest < 2000.0, "refused after {slowest} ms");
    // Whole, both ways, and a cut is none of an end.
    assert_eq!(says("download"), says("download-wanted"));
    assert_eq!(says("upload"), says("upload-wanted"));
    assert_eq!(says("cut"), "ConnectionResetError");
    // The job's own limits are those of any machine.
    assert_eq!(says("files"), "1024");

    // No way to the host, whatever it is called; it listens on all of them.
    let reached: Vec<&str> = trace.lines().filter(|line| line.contains(&format!("{OUTPUT}reached-host"))).collect();
    println!("figure isolation.host_ports {}", reached.len());
    assert_eq!(reached, [""; 0]);
    let tried: usize = says("host-ports-tried").parse().unwrap();
    assert!(tried >= 100 * FORBIDDEN.len(), "{tried}");
    assert_eq!(world.forbidden_connections(), 0);

    // The table of the rules has an owner.
    assert_eq!(says("flush"), "0");
    assert_eq!(says("delete"), "PermissionError");
    assert_eq!(says("open-after-flush"), "connected hello");
    assert_eq!(says("closed-after-flush"), "ConnectionRefusedError");

    // All of it is written down.
    let seen = machine.destinations();
    assert!(seen.iter().any(|line| line.contains(&OPEN.ip().to_string())), "{seen:?}");
}

/// The host's program dies: what it carried is cut, and the next connection works.
#[tokio::test(flavor = "multi_thread")]
async fn the_next_connection_works_when_egress_has_died() {
    let world = World::new().await;
    let mut machine = Machine::start(&world).await;
    let job = machine.begin(&["python3 /tmp/client.py restart"]);
    machine.until_trace(&job, &format!("{OUTPUT}bound"), LIMIT).await;
    machine.kill_egress();
    machine.until_trace(&job, &format!("{OUTPUT}cut"), LIMIT).await;
    machine.start_egress().await;
    let trace = machine.end_of(&job, LIMIT).await;
    assert_eq!(line(&trace, "cut"), "ConnectionResetError");
    assert_eq!(line(&trace, "again"), "connected hello");
    assert_eq!(line(&trace, "name"), OPEN.ip().to_string());
}
