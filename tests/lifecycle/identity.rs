//! Each machine is its own: nothing of one is in the next, nothing of one is like another's.

use crate::support::guest::Guest;
use crate::support::world::World;
use dayfly::BoxFuture;
use dayfly::image::store::Image;
use dayfly::rng::Rng;
use dayfly::vm::paths::{Paths, RealPaths};
use dayfly::vm::{Stream, VmError, VmId, VmName, domain_xml, proof};
use dayfly_doubles::fake::FakeHypervisor;
use dayfly_doubles::images::{self, OneImage};
use dayfly_exec::standin::JobState;
use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// The fake's machines on real overlays: made by the product's own `qemu-img`, and written to as a
/// guest does.
struct RealDisks {
    fake: FakeHypervisor,
    made: Arc<Mutex<Vec<PathBuf>>>,
}

/// Real programs on a thread of their own: the paused clock waits for it.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}

/// The product's own disks.
fn block_on<T>(work: impl AsyncFnOnce(RealPaths) -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(work(RealPaths::default()))
}

impl Paths for RealDisks {
    fn make_overlay<'a>(
        &'a self,
        overlay: &'a Path,
        base: &'a Path,
        disk_gib: u64,
    ) -> BoxFuture<'a, Result<(), VmError>> {
        Box::pin(async move {
            self.fake.make_overlay(overlay, base, disk_gib).await?;
            self.made.lock().unwrap().push(overlay.to_owned());
            let (file, base) = (overlay.to_owned(), base.to_owned());
            aside(move || {
                block_on(async |disks| disks.make_overlay(&file, &base, disk_gib).await)?;
                // What its guest does to it: the first sector, which the base has too.
                let wrote = std::process::Command::new("qemu-io")
                    .args(["-f", "qcow2", "-c", "write -q -P 0x41 0 512"])
                    .arg(&file)
                    .output()
                    .unwrap();
                assert!(wrote.status.success(), "{}", String::from_utf8_lossy(&wrote.stderr));
                Ok(())
            })
            .await
        })
    }

    fn unlink<'a>(&'a self, overlay: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move {
            let file = overlay.to_owned();
            aside(move || block_on(async |disks| disks.unlink(&file).await)).await?;
            self.fake.unlink(overlay).await
        })
    }

    fn make_passable<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move { std::fs::create_dir_all(dir) })
    }

    fn make_private<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        self.fake.make_private(dir)
    }

    fn unlink_all_of<'a>(&'a self, dir: &'a Path, vm: &'a VmName) -> BoxFuture<'a, io::Result<()>> {
        self.fake.unlink_all_of(dir, vm)
    }

    fn names<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, io::Result<Vec<String>>> {
        self.fake.names(dir)
    }

    fn open_socket<'a>(&'a self, socket: &'a Path) -> BoxFuture<'a, io::Result<Box<dyn Stream>>> {
        self.fake.open_socket(socket)
    }
}

/// T17: two hundred machines write to their disks, and the base image is what it was.
#[tokio::test(start_paused = true)]
async fn two_hundred_jobs_leave_their_base_image_as_it_was() {
    use std::os::unix::fs::MetadataExt as _;
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.qcow2");
    std::fs::write(&base, proof::sector::disk_image()).unwrap();
    let facts = || {
        let file = std::fs::metadata(&base).unwrap();
        (std::fs::read(&base).unwrap(), file.ino(), file.mode(), file.mtime(), file.mtime_nsec())
    };
    let before = facts();
    let mut world = World::new(1);
    world.config.state_directory = dir.path().join("state");
    world.images = Arc::new(OneImage::new(Image { disk: base.clone(), ..images::image() }));
    let made: Arc<Mutex<Vec<PathBuf>>> = Arc::default();
    let makes = made.clone();
    world.before_paths = Some(Arc::new(move |fake| Arc::new(RealDisks { fake, made: makes.clone() })));
    let jobs: Vec<_> = (0..200).map(|_| world.job(&["print hello"])).collect();
    world.start().await.unwrap();
    for job in jobs {
        world.until(job, JobState::Success).await;
    }
    world.assert_clean().await;
    assert_eq!(facts(), before);
    let made = made.lock().unwrap();
    assert_eq!((made.len(), made.iter().collect::<BTreeSet<_>>().len()), (200, 200), "no path is used twice");
    assert_eq!(std::fs::read_dir(dir.path().join("state/overlays")).unwrap().count(), 0);
}

/// T19: twenty machines at once have nothing in common that must be a machine's own.
#[tokio::test(start_paused = true)]
async fn twenty_machines_are_twenty_identities() {
    let mut world = World::new(1);
    world.config.concurrent = 20;
    // With a network card each, which has an address of its own.
    world.config.class[0].network = Some(dayfly::network::Choice::User);
    let seen: Arc<Mutex<Vec<[String; 8]>>> = Arc::default();
    let sees = seen.clone();
    world.set_guest(move |mut guest: Guest| {
        let sees = sees.clone();
        async move {
            let (spec, config) = (guest.machine.spec.clone(), guest.config.clone());
            let xml = domain_xml::write(&spec, None).unwrap();
            assert!(xml.contains("<rng model=\"virtio\">") && xml.contains("/dev/urandom"), "{xml}");
            assert!(xml.contains(&spec.id.mac()) && xml.contains(&domain_xml::uuid(&spec.id)), "{xml}");
            sees.lock().unwrap().push([
                VmName::from(spec.id.clone()).to_string(),
                domain_xml::uuid(&spec.id),
                spec.id.mac(),
                config.machine_id,
                config.boot_id,
                config.pass,
                config.seed,
                config.hostname,
            ]);
            let payload = guest.ask().await.unwrap();
            guest.work(&payload).await;
            guest.power_off().await;
        }
    });
    let jobs: Vec<_> = (0..20).map(|_| world.job(&["print hello", "sleep 30"])).collect();
    world.start().await.unwrap();
    for job in jobs {
        world.until(job, JobState::Success).await;
    }
    assert_eq!(world.machines_at_once(), 20);
    world.assert_clean().await;
    let seen = seen.lock().unwrap();
    for facet in 0..8 {
        let different: BTreeSet<&String> = seen.iter().map(|machine| &machine[facet]).collect();
        assert_eq!(different.len(), 20, "facet {facet}: {different:?}");
    }
}

/// H17: ids are 80 random bits, and the MACs that follow from them 40: a hundred thousand find no pair.
#[test]
fn no_two_machines_of_a_host_have_the_same_mac() {
    let rng = Rng::seeded(5);
    let mut macs = BTreeSet::new();
    for _ in 0..100_000 {
        let mac = VmId::random(&rng).mac();
        let first = u8::from_str_radix(&mac[..2], 16).unwrap();
        assert_eq!((first & 0b11, mac.len()), (0b10, 17), "one machine's, and locally administered: {mac}");
        macs.insert(mac);
    }
    assert_eq!(macs.len(), 100_000);
}

/// V15: a guest is told the time at hand-out; what it makes of it, and what it writes into its lines, is its own affair.
#[tokio::test(start_paused = true)]
async fn a_guest_is_told_the_time_and_may_be_wrong_about_it() {
    let mut world = World::new(1);
    let clock = world.clock.clone();
    world.set_guest(move |mut guest: Guest| {
        let clock = clock.clone();
        async move {
            let told = jiff::Timestamp::from_microsecond(guest.config.clock_us).unwrap();
            let behind = clock.now().duration_since(told).as_secs();
            assert!((0..=10).contains(&behind), "told {told}, {behind} s ago");
            let payload = guest.ask().await.unwrap();
            guest.work(&payload).await;
            guest.power_off().await;
        }
    });
    let job =
        world.job(&["print 1970-01-01T00:00:00.000000Z 00O an old line", "sleep 5", "print 2106-02-07T06:28:15Z 00O+"]);
    world.start().await.unwrap();
    world.until(job, JobState::Success).await;
    assert!(world.trace(job).contains("\n1970-01-01T00:00:00.000000Z 00O an old line\n2106-02-07T06:28:15Z 00O+\n"));
    world.assert_clean().await;
}
