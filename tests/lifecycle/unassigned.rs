//! VMs that belong to no job: what a dead owner has left is taken down, and what a living one uses is not.

use crate::support::world::World;
use dayfly::boot_test::{BootTest, BootTestError, Booted};
use dayfly::files::Files as _;
use dayfly::vm::{AccelChoice, Host};
use dayfly_doubles::fake::{FakeHypervisor, GuestMachine};
use dayfly_doubles::images;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{sleep, timeout};

type Test = Pin<Box<dyn Future<Output = Result<Booted, BootTestError>>>>;

/// A boot test whose guest never says a word. Dropped, it is as if its process were killed.
fn boot_test(world: &World, images: &Path, deadline: Duration) -> Test {
    world.hypervisor.set_guest(|machine: GuestMachine| async move {
        let _machine = machine;
        std::future::pending::<()>().await;
    });
    let (hypervisor, config): (FakeHypervisor, _) = (world.hypervisor.clone(), world.config.clone());
    let (directory, sockets) = (images.to_owned(), images.join("sockets"));
    Box::pin(async move {
        let test = BootTest {
            host: Host::new(Arc::new(hypervisor.clone()), Arc::new(hypervisor.clone())),
            hypervisor: &config.hypervisor,
            listen: Arc::new(hypervisor),
            accel: AccelChoice::Tcg,
            image_directory: &directory,
            socket_dir: &sockets,
            network: config.network.clone(),
            deadline,
        };
        test.run(&images::image(), &mut |_| {}).await
    })
}

/// Lets it go on for so long.
async fn goes_on(test: &mut Test, seconds: u64) {
    let ended = timeout(Duration::from_secs(seconds), test).await;
    assert!(ended.is_err(), "it has ended: {ended:?}");
}

/// The workspaces below an image directory.
fn workspaces(images: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(images.join(".machines")).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[tokio::test(start_paused = true)]
async fn a_daemon_takes_down_what_a_killed_boot_test_has_left_and_nothing_of_a_living_one() {
    let images = tempfile::tempdir().unwrap();
    let mut world = World::new(1);
    world.config.image_directory = images.path().to_owned();
    world.expect_trouble(&["the owner of a VM without a job is gone"]);
    let mut test = boot_test(&world, images.path(), Duration::from_secs(3600));
    goes_on(&mut test, 10).await;
    // The daemon's files are in memory, and the lock is on the disk.
    world.files.create_dir(&workspaces(images.path())[0]).await.unwrap();
    world.start().await.unwrap();
    // Over its first sweep, and two more.
    goes_on(&mut test, 130).await;
    assert_eq!(world.hypervisor.counts().vms, 1, "its owner lives");
    drop(test);
    assert_eq!(world.hypervisor.counts().vms, 1);
    sleep(Duration::from_secs(70)).await;
    let counts = world.hypervisor.counts();
    assert_eq!((counts.vms, counts.overlays), (0, 0), "{}", world.histories());
    assert_eq!(workspaces(images.path()), [""; 0].map(PathBuf::from));
}

#[tokio::test(start_paused = true)]
async fn a_boot_test_takes_down_what_the_one_before_has_left_and_itself() {
    let images = tempfile::tempdir().unwrap();
    let world = World::new(1);
    let mut killed = boot_test(&world, images.path(), Duration::from_secs(3600));
    goes_on(&mut killed, 10).await;
    drop(killed);
    let counts = world.hypervisor.counts();
    assert_eq!((counts.vms, counts.overlays), (1, 1));
    let ended = boot_test(&world, images.path(), Duration::from_secs(20)).await;
    assert!(matches!(ended, Err(BootTestError::Silent { .. })), "{ended:?}");
    assert!(world.hypervisor.counts().is_clean(), "{}", world.histories());
    assert_eq!(workspaces(images.path()), [""; 0].map(PathBuf::from));
}
