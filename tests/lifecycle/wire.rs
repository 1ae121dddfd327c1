//! The door behind a wire: nobody but its guest reaches it, and its sessions end and begin as they like.

use crate::support::guest::Guest;
use crate::support::world::World;
use dayfly_exec::standin::JobState;
use dayfly_guest_config::Pass;
use dayfly_test_guest::relay;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;
use tokio::time::{Instant, sleep, timeout};

/// U41: a neighbour reaches no door, whatever it floods: there is no port that it could come to, and behind its own wire
/// is its own door.
#[tokio::test(start_paused = true)]
async fn u41_no_door_is_reachable_by_a_neighbour() {
    let mut world = World::new(1);
    let reached: Arc<Mutex<Vec<u16>>> = Arc::default();
    let notes = reached.clone();
    world.set_guest(move |mut guest: Guest| {
        let notes = notes.clone();
        async move {
            let payload = guest.ask().await.unwrap();
            for port in 1024..=u16::MAX {
                if guest.machine.doors.connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).is_ok() {
                    notes.lock().unwrap().push(port);
                }
            }
            guest.work(&payload).await;
            guest.power_off().await;
        }
    });
    let jobs = [(); 2].map(|()| world.job(&["print hello", "sleep 30"]));
    world.start().await.unwrap();
    for job in jobs {
        world.until_trace(job, "hello").await;
    }
    assert_eq!((world.hypervisor.counts().vms, world.hypervisor.doors()), (2, Vec::new()), "no port is listened at");
    for job in jobs {
        world.until(job, JobState::Success).await;
    }
    assert_eq!(*reached.lock().unwrap(), [0_u16; 0]);
    world.assert_clean().await;
}

/// P10: who does not hold the pass gets no session, and the guest that does gets the next one.
#[tokio::test(start_paused = true)]
async fn a_relay_with_another_pass_gets_no_session() {
    let mut world = World::new(1);
    let entered: Arc<Mutex<Option<bool>>> = Arc::default();
    let notes = entered.clone();
    world.hypervisor.set_guest(move |mut machine: dayfly_doubles::fake::GuestMachine| {
        let notes = notes.clone();
        async move {
            let Some(config) = dayfly_test_guest::boot::boot(&mut machine.channel).await else { return };
            let (stranger, mut sessions) = relay();
            stranger.hand_over(Pass::new([9; 32]));
            let tries = async {
                let until = Instant::now() + Duration::from_secs(60);
                stranger.enter(Duration::from_secs(1), || Instant::now() < until).await.is_some()
            };
            let came_in = tokio::select! {
                biased;
                () = sessions.run(machine.door.clone(), || [3; 16]) => false,
                came_in = tries => came_in,
            };
            *notes.lock().unwrap() = Some(came_in);
            machine.relay.hand_over(Pass::from_text(&config.pass).unwrap());
            let right = machine.relay.enter(Duration::from_secs(1), || true).await;
            assert!(right.is_some());
            machine.power.off();
            std::future::pending::<()>().await;
        }
    });
    world.expect_trouble(&["before the guest asked for the job", "machine"]);
    let job = world.job(&["print never"]);
    world.start().await.unwrap();
    world.until(job, JobState::Failed).await;
    assert_eq!(*entered.lock().unwrap(), Some(false));
    world.assert_clean().await;
}

/// T9: a guest that throws away each session, and whatever it writes on its port, costs the log a bounded number of
/// lines, its neighbour nothing, and itself no byte.
#[tokio::test(start_paused = true)]
async fn a_guest_that_spoils_its_wire_again_and_again_harms_nobody() {
    let mut world = World::new(1);
    world.expect_trouble(&["of these lines the log has the first ten only"]);
    world.set_guest(|mut guest: Guest| async move {
        let payload = guest.ask().await.unwrap();
        let mut port = guest.machine.door.clone();
        let spoils = payload["steps"].to_string().contains("spoilt");
        let spoil = async {
            let mut noise = 0_u8;
            for _ in 0..100 {
                noise = noise.wrapping_mul(37).wrapping_add(11);
                let bytes = [noise; 300];
                let _ = timeout(Duration::from_millis(100), port.write_all(&bytes)).await;
                sleep(Duration::from_millis(700)).await;
            }
        };
        if spoils {
            tokio::join!(spoil, guest.work(&payload));
        } else {
            guest.work(&payload).await;
        }
        guest.power_off().await;
    });
    let spoilt = world.job(&["print spoilt", "sleep 60", "print to the end"]);
    let neighbour = world.job(&["print quiet", "sleep 20", "print to the end"]);
    world.start().await.unwrap();
    for job in [neighbour, spoilt] {
        world.until(job, JobState::Success).await;
        assert!(world.trace(job).contains("to the end\nJob succeeded\n"), "{}", world.trace(job));
    }
    let log = world.log.text();
    let lines = log.lines().filter(|line| line.contains("wire is") && !line.contains("of these lines")).count();
    assert!((4..=42).contains(&lines), "{lines} lines");
    world.assert_clean().await;
}
