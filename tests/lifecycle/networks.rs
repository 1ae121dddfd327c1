//! What network a job's machine has: by its class, by what the image can, and by its record from then on.

use crate::support::world::{World, paused};
use dayfly::image::store::Image;
use dayfly::network::Choice;
use dayfly::status::RunnerState;
use dayfly::vm::Attachment;
use dayfly_doubles::images::{self, OneImage};
use dayfly_exec::standin::JobState;
use std::sync::Arc;

/// An image whose guest program speaks to its door by a wire, and knows no machine without a card.
fn without_relay() -> Image {
    let mut image = images::image();
    image.manifest.networks.clear();
    image
}

fn attachments(world: &World) -> Vec<Attachment> {
    world.hypervisor.vms().into_iter().map(|(spec, _)| spec.attachment).collect()
}

/// What this world keeps in files of this name, as text.
fn kept(world: &World, name: &str) -> String {
    let contents = world.files.contents();
    let found = contents.iter().find(|(path, _)| path.ends_with(name)).unwrap_or_else(|| panic!("{name} is kept"));
    String::from_utf8_lossy(&found.1).into_owned()
}

/// Whose class says nothing and whose image can has no network card, and its guest is told so.
#[test]
fn a_machine_has_no_network_card_where_its_image_can_do_without() {
    paused(async {
        let mut world = World::new(1);
        let job = world.job(&["print begun", "sleep 60"]);
        world.start().await.unwrap();
        world.until_trace(job, "begun").await;
        assert_eq!(attachments(&world), [Attachment::Egress]);
        assert!(world.hypervisor.doors().is_empty());
        let guest = kept(&world, "guest");
        assert!(guest.contains("\"relay\":true") && guest.contains("\"198.18.0.2/32\""), "{guest}");
        let record = kept(&world, "record.json");
        assert!(record.contains("\"network\":\"relay\"") && record.contains("\"lease\":\"relay\""), "{record}");
        assert_eq!(world.status().daemon.problems, [""; 0]);
        world.until(job, JobState::Success).await;
        world.assert_clean().await;
    });
}

/// A class that says nothing, on an image of before: its jobs run as they did, and operators read what to rebuild.
#[test]
fn an_image_of_before_keeps_its_network_and_operators_are_told() {
    paused(async {
        let mut world = World::new(1);
        world.images = Arc::new(OneImage::new(without_relay()));
        world.expect_trouble(&["was built before jobs could do without a network card"]);
        world.add_runner("second");
        let job = world.job(&["print begun", "sleep 60"]);
        world.start().await.unwrap();
        world.until_trace(job, "begun").await;
        assert_eq!(attachments(&world), [Attachment::User]);
        let guest = kept(&world, "guest");
        assert!(guest.contains("\"10.0.2.15/24\"") && !guest.contains("relay"), "{guest}");
        let problems = world.status().daemon.problems;
        assert_eq!(problems.len(), 1, "once for all runners of a class: {problems:?}");
        assert!(problems[0].ends_with("rebuild it with `dayfly image build test`"), "{problems:?}");
        world.until(job, JobState::Success).await;
        world.images = Arc::new(OneImage::new(images::image()));
        world.hand_over().await;
        world.start().await.unwrap();
        world.until_status(|status| status.daemon.problems.is_empty()).await;
        world.assert_clean().await;
    });
}

/// A class that says `relay` takes no job in an image that cannot: nobody gets less than he has written down.
#[test]
fn a_class_that_wants_no_network_card_takes_no_job_in_an_image_of_before() {
    paused(async {
        let mut world = World::new(1);
        world.images = Arc::new(OneImage::new(without_relay()));
        world.config.class[0].network = Some(Choice::Relay);
        world.expect_trouble(&["no job is asked for"]);
        let job = world.job(&["print begun"]);
        world.start().await.unwrap();
        world
            .until_status(|status| {
                let reason =
                    "which `network = \"relay\"` of class `small` means; rebuild it with `dayfly image build test`";
                matches!(&status.runners[0].state, RunnerState::Blocked { reason: said } if said.ends_with(reason))
            })
            .await;
        assert_eq!(world.machines_started(), 0);
        world.config.class[0].network = Some(Choice::User);
        world.reload().await.unwrap();
        world.until(job, JobState::Success).await;
        assert_eq!(world.status().daemon.problems, [""; 0], "somebody wants it so");
        world.assert_clean().await;
    });
}

/// U4: the network is the record's: neither another class nor another image changes what a job has.
#[test]
fn a_job_keeps_the_network_that_it_was_accepted_for() {
    for choice in [Choice::Relay, Choice::User] {
        paused(async move {
            let mut world = World::new(1);
            world.config.class[0].network = Some(choice);
            let job = world.job(&["print begun", "sleep 60"]);
            world.start().await.unwrap();
            world.until_trace(job, "begun").await;
            let before = (attachments(&world), kept(&world, "guest"));
            world.kill();
            world.config.class[0].network = Some(if choice == Choice::User { Choice::Relay } else { Choice::User });
            world.start().await.unwrap();
            world.until(job, JobState::Running).await;
            assert_eq!((attachments(&world), kept(&world, "guest")), before);
            world.until(job, JobState::Success).await;
            assert_eq!(world.machines_started(), 1);
            world.assert_clean().await;
        });
    }
}
