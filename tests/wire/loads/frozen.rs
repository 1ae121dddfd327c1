//! A disk that hangs, as under `fsfreeze`, and guests that send and hang up meanwhile.

use super::scales::{Growth, alone, run};
use crate::door::support::{Door, LIMIT, Setup, patch};
use crate::gitlab_server::until;
use std::time::Duration;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

const MIB: usize = 1 << 20;
/// The most that a PATCH may carry.
const BODY: usize = 2 * MIB;
/// Tries while the disk hangs.
const TRIES: usize = 20;
/// How long each guest waits before it hangs up.
const PATIENCE: Duration = Duration::from_millis(300);
/// One body, and buffers of some connections.
const GROWTH_MIB: f64 = 8.0;

/// U6: a guest sends PATCHes of 2 MiB and hangs up, again and again, while the disk takes nothing: the daemon holds
/// one body and a few connections' buffers, not one body for each try; once the disk goes on, so does the trace, exact.
#[test]
fn a_guest_that_hangs_up_while_the_disk_hangs_fills_no_memory() {
    if !alone("loads::frozen::a_guest_that_hangs_up_while_the_disk_hangs_fills_no_memory") {
        return;
    }
    run(async {
        let door = Setup { tcp: true, ..Setup::default() }.open().await;
        // Everything has been done once before it is weighed.
        assert_eq!(door.ask(patch(0, &vec![b'a'; BODY])).await.status, 202);
        let piece = patch(BODY as u64, &vec![b'b'; BODY]);
        door.disk.freeze(true);
        let growth = Growth::begin();
        for _ in 0..TRIES {
            send_and_hang_up(&door, &piece).await;
        }
        assert_eq!(door.disk.waiting(), 1, "a body has come to its write");
        let grown = growth.mib();
        println!("figure load.frozen_mib {grown:.2} MiB");
        assert!(grown <= GROWTH_MIB, "{grown} MiB after {TRIES} tries");

        door.disk.freeze(false);
        until(|| door.spool.view().length >= 2 * BODY as u64).await;
        // The runner asks where it stands, and goes on there.
        assert_eq!(when_taken(&door, &piece).await, Some(format!("0-{}", 2 * BODY)));
        assert_eq!(door.ask(patch(2 * BODY as u64, b"end\n")).await.status, 202);
        let expected = [vec![b'a'; BODY], vec![b'b'; BODY], b"end\n".to_vec()].concat();
        assert!(door.guest_bytes().await == expected, "the trace is exact");
    });
}

/// A connection of its own, most or all of the request, and no patience.
async fn send_and_hang_up(door: &Door, piece: &[u8]) {
    let Ok(mut guest) = timeout(Duration::from_secs(1), door.guest()).await else { return };
    let hung_up = Instant::now() + PATIENCE;
    let _ = timeout_at(hung_up, guest.try_send(piece)).await;
    sleep_until(hung_up).await;
}

/// Sends until there is room for it; the range that the door names.
async fn when_taken(door: &Door, piece: &[u8]) -> Option<String> {
    let begun = Instant::now();
    loop {
        let reply = door.ask(piece).await;
        if reply.status == 202 {
            return reply.header("range").map(str::to_owned);
        }
        assert!(reply.status == 503 && begun.elapsed() < LIMIT, "{reply:?}");
        sleep(Duration::from_millis(50)).await;
    }
}
