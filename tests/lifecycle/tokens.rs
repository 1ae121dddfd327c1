//! Runner tokens that GitLab has given an end, or made anew.

use crate::support::world::World;
use dayfly::secret::Secret;
use dayfly_exec::standin::{JobState, Route};
use jiff::SignedDuration;
use std::time::Duration;
use tokio::time::sleep;

const DAY: Duration = Duration::from_secs(24 * 3600);

impl World {
    /// Gives the runner's token an end, and what is made from then on too.
    fn tokens_live(&self, days: u32) {
        let end = self.clock.now() + SignedDuration::try_from(DAY * days).unwrap();
        self.standin.edit(|model| {
            model.settings.runner_token_expiry = Some(DAY * days);
            model.runners.values_mut().for_each(|runner| runner.token_expires_at = Some(end));
        });
    }

    fn token_in_file(&self) -> String {
        std::fs::read_to_string(&self.config.runner[0].token_file).unwrap().trim().to_owned()
    }
}

/// U18: a token with an end is renewed before it, in file and memory, while jobs run and polls are under way.
#[tokio::test(start_paused = true)]
async fn a_token_that_ends_is_renewed_before_it_does() {
    let mut world = World::new(1);
    world.standin.configure(|settings| settings.long_poll = Duration::from_secs(50));
    world.tokens_live(8);
    let first = world.token_in_file();
    world.start().await.unwrap();
    let long = world.job(&["print started", "sleep 3000", "print done"]);
    sleep(DAY * 6 - Duration::from_secs(600)).await;
    assert_eq!(world.token_in_file(), first, "two days before its end, and not before");
    let running = world.job(&["print started", "sleep 1800", "print done"]);
    world.until_trace(running, "started").await;
    sleep(Duration::from_secs(900)).await;
    let second = world.token_in_file();
    assert_ne!(second, first);
    assert!(world.standin.edit(|model| model.runners.values().any(|runner| runner.token.matches(&second))));
    world.until(running, JobState::Success).await;
    world.until(long, JobState::Success).await;
    assert!(world.log.text().contains("the runner token was renewed"), "{}", world.log.text());
    // Far beyond the first one's end: again, and jobs go on.
    sleep(DAY * 20).await;
    let job = world.job(&["print hello"]);
    world.until(job, JobState::Success).await;
    assert_ne!(world.token_in_file(), second);
    assert!(world.requests(Route::ResetToken).len() >= 3);
    world.assert_clean().await;
}

/// U18: GitLab away, or a place that cannot be written, is said once, and the token in use stays good until it works.
#[tokio::test(start_paused = true)]
async fn a_renewal_that_fails_is_tried_again_and_said_once() {
    let mut world = World::new(1);
    world.tokens_live(8);
    world.expect_trouble(&["the runner token is not renewed yet"]);
    let file = world.config.runner[0].token_file.clone();
    world.start().await.unwrap();
    sleep(DAY).await;
    // The way to the file is gone for a while.
    let aside = file.with_extension("aside");
    std::fs::rename(&file, &aside).unwrap();
    sleep(DAY * 6).await;
    assert_eq!(world.requests(Route::ResetToken).len(), 0, "no token is asked for without a place for it");
    assert_eq!(world.log.text().matches("the runner token is not renewed yet").count(), 1);
    std::fs::rename(&aside, &file).unwrap();
    sleep(Duration::from_secs(120)).await;
    assert_eq!(world.requests(Route::ResetToken).len(), 1);
    let job = world.job(&["print hello"]);
    world.until(job, JobState::Success).await;
    world.assert_clean().await;
}

/// U18: registered anew while the daemon runs: the token is read again when GitLab refuses the one before.
#[tokio::test(start_paused = true)]
async fn a_token_that_was_changed_by_hand_is_read_again() {
    let mut world = World::new(1);
    world.expect_trouble(&["GitLab refuses this runner"]);
    world.start().await.unwrap();
    sleep(Duration::from_secs(60)).await;
    let token = "glrt-t1_anothertoken0000000000";
    world.standin.edit(|model| model.runners.values_mut().for_each(|runner| runner.token = Secret::new(token)));
    std::fs::write(&world.config.runner[0].token_file, token).unwrap();
    let job = world.job(&["print hello"]);
    world.until(job, JobState::Success).await;
    world.assert_clean().await;
}
