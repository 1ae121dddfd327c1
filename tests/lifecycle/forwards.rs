//! What of the host's network a machine reaches beside its door is its class's, and stays what its job was accepted with.

use crate::support::world::World;
use crate::wishes::{asking, generous, world};
use dayfly::config::Class;
use dayfly::network::ForwardConfig;
use dayfly::rules::Rule;
use dayfly_exec::standin::{JobSpec, JobState};

fn forward(name: &str, port: u16, classes: &[&str]) -> ForwardConfig {
    ForwardConfig {
        name: name.into(),
        address: ([127, 0, 0, 1], 3142).into(),
        port,
        classes: classes.iter().map(|class| (*class).to_owned()).collect(),
    }
}

/// What is kept of a job's machine below this name.
fn kept(world: &World, name: &str) -> String {
    let contents = world.files.contents();
    let (_, bytes) = contents.iter().find(|(path, _)| path.ends_with(name)).expect("it is kept");
    String::from_utf8_lossy(bytes).into_owned()
}

/// A job has the forwards of the class that it runs in, by rule or not; its guest is told the ports and nothing more, its
/// author where they are. A daemon with other forwards serves it as it was accepted.
#[tokio::test(start_paused = true)]
async fn a_machine_has_the_forwards_of_its_class() {
    let mut world = world(generous());
    world.config.class.push(Class { name: "big".into(), ..generous() });
    world.config.rule = vec![Rule {
        name: "release".into(),
        git_ref: vec!["release-*".into()],
        class: Some("big".into()),
        ..Rule::default()
    }];
    world.config.forward = vec![
        forward("apt", 3142, &["small", "big"]),
        forward("registry", 5000, &["big"]),
        forward("pip", 5000, &["small"]),
    ];
    let plain = world.job_of(asking(&[]));
    world.start().await.unwrap();
    world.until_trace(plain, "begun").await;
    let told = kept(&world, "guest");
    assert!(told.contains("\"forwards\":[3142,5000]"), "{told}");
    assert!(!told.contains("127.0.0.1"), "no address of the host's: {told}");
    let record = kept(&world, "record.json");
    assert!(record.contains("\"pip\"") && !record.contains("\"registry\""), "{record}");
    let line = "within reach: 192.0.2.1:3142 (apt), 192.0.2.1:5000 (pip)";
    assert!(world.trace(plain).contains(line), "{}", world.trace(plain));

    world.hand_over().await;
    world.config.forward = vec![forward("other", 7000, &["small"])];
    world.start().await.unwrap();
    assert_eq!(kept(&world, "guest"), told, "it is the one of before");
    assert!(kept(&world, "record.json").contains("\"pip\""));
    world.until(plain, JobState::Success).await;

    world.config.forward = vec![forward("registry", 5000, &["big"])];
    world.reload().await.unwrap();
    let release = world.job_of(JobSpec { git_ref: "release-1".into(), ..asking(&[]) });
    world.until_trace(release, "begun").await;
    let trace = world.trace(release);
    assert!(trace.contains("within reach: 192.0.2.1:5000 (registry)"), "{trace}");
    world.until(release, JobState::Success).await;
    let other = world.job_of(asking(&[]));
    world.until(other, JobState::Success).await;
    assert!(!world.trace(other).contains("within reach"), "its class has none");
    world.assert_clean().await;
}
