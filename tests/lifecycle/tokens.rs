//! Runner tokens that GitLab has given an end, or made anew.

use crate::support::world::World;
use dayfly::secret::Secret;
use dayfly_exec::standin::{Fault, JobState, Matcher, Model, Route};
use jiff::SignedDuration;
use std::time::Duration;
use tokio::time::sleep;

const HOUR: Duration = Duration::from_secs(3600);

impl World {
    /// Gives the runner's token an end, and what is made from then on too.
    fn tokens_live(&self, hours: u32) {
        let end = self.clock.now() + SignedDuration::try_from(HOUR * hours).unwrap();
        self.standin.edit(|model| {
            model.settings.long_poll = Duration::from_secs(50);
            model.settings.runner_token_expiry = Some(HOUR * hours);
            model.runners.values_mut().for_each(|runner| runner.token_expires_at = Some(end));
        });
    }

    fn token_in_file(&self) -> String {
        std::fs::read_to_string(&self.config.runner[0].token_file).unwrap().trim().to_owned()
    }

    fn is_known(&self, token: &str) -> bool {
        self.standin.edit(|model| model.runners.values().any(|runner| runner.token.matches(token)))
    }

    fn times_logged(&self, text: &str) -> usize {
        self.log.text().matches(text).count()
    }
}

/// U18: a token with an end is renewed before it, in file and memory, while jobs run and polls are under way.
#[tokio::test(start_paused = true)]
async fn a_token_that_ends_is_renewed_before_it_does() {
    let mut world = World::new(1);
    world.tokens_live(4);
    let first = world.token_in_file();
    world.start().await.unwrap();
    sleep(HOUR * 3 - Duration::from_secs(600)).await;
    assert_eq!(world.token_in_file(), first, "an hour before its end, and not before");
    let running = world.job(&["print started", "sleep 1800", "print done"]);
    world.until_trace(running, "started").await;
    sleep(Duration::from_secs(900)).await;
    let second = world.token_in_file();
    assert!(second != first && world.is_known(&second));
    world.until(running, JobState::Success).await;
    assert_eq!(world.times_logged("the runner token was renewed"), 1);
    // Far beyond the first one's end: again and again, and jobs go on.
    sleep(HOUR * 10).await;
    let job = world.job(&["print hello"]);
    world.until(job, JobState::Success).await;
    assert!(world.token_in_file() != second);
    assert_eq!(world.times_logged("the runner token was renewed"), 4);
    world.assert_clean().await;
}

/// U18: a place that cannot be written is said once, and the token in use stays good until it can.
#[tokio::test(start_paused = true)]
async fn a_renewal_that_fails_is_tried_again_and_said_once() {
    let mut world = World::new(1);
    world.tokens_live(4);
    world.expect_trouble(&["the runner token is not renewed yet"]);
    let (file, first) = (world.config.runner[0].token_file.clone(), world.token_in_file());
    world.start().await.unwrap();
    sleep(HOUR).await;
    // The way to the file is gone for a while.
    let aside = file.with_extension("aside");
    std::fs::rename(&file, &aside).unwrap();
    sleep(HOUR * 2 + HOUR / 2).await;
    assert!(world.is_known(&first), "no token is asked for without a place for it");
    assert_eq!(world.times_logged("the runner token is not renewed yet"), 1);
    std::fs::rename(&aside, &file).unwrap();
    sleep(Duration::from_secs(120)).await;
    assert!(world.is_known(&world.token_in_file()) && !world.is_known(&first));
    let job = world.job(&["print hello"]);
    world.until(job, JobState::Success).await;
    world.assert_clean().await;
}

/// U18: GitLab's answer is the only copy of a new token: a hand-over in the middle of a renewal waits for it.
#[tokio::test(start_paused = true)]
async fn a_hand_over_in_the_middle_of_a_renewal_loses_no_token() {
    let mut world = World::new(1);
    world.tokens_live(4);
    world.standin.script(Matcher::on(Route::ResetToken), Fault::DelayAnswer(Duration::from_secs(2)));
    let first = world.token_in_file();
    world.start().await.unwrap();
    let forgotten = |model: &Model| model.runners.values().all(|runner| !runner.token.matches(&first));
    world.standin.wait_for(forgotten, HOUR * 4).await.unwrap();
    assert_eq!(world.token_in_file(), first, "the answer is on its way");
    world.hand_over().await;
    assert!(world.is_known(&world.token_in_file()));
    world.start().await.unwrap();
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
