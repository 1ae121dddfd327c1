//! When is the next PATCH due?

use crate::spool::SpoolView;
use std::time::Duration;
use tokio::time::Instant;

/// A piece that came so short a time ago is the guest's newest.
const FRESH: Duration = Duration::from_millis(200);

/// So much later than its interval a guest's next piece may come.
const SLACK: Duration = Duration::from_millis(300);

/// When what GitLab lacks is to be sent. The first piece of a guest goes at once: its runner has let it wait already,
/// and so has ours at hand-out. Later ones go each `interval` of GitLab's, but with the guest's next piece if that is
/// near (`guest_interval` after the one before): sent just before it, that piece would wait a whole interval more.
/// What its verdict follows goes at once. `None`: now.
pub(super) fn patch_due(
    view: &SpoolView,
    sent: u64,
    last_patch: Option<Instant>,
    interval: Duration,
    guest_interval: Duration,
) -> Option<Instant> {
    if view.guest_closed {
        // The verdict is being kept meanwhile, and goes after all of this.
        return None;
    }
    let firsts = view.guest_base.is_some_and(|base| sent <= base && base < view.length);
    let due = last_patch.filter(|_| !firsts)? + interval;
    let Some(grown_at) = view.grown_at.filter(|_| view.guest_base.is_some()) else { return Some(due) };
    let age = due.saturating_duration_since(grown_at);
    let next_piece = guest_interval + SLACK;
    Some(if age > FRESH && age < next_piece { grown_at + next_piece } else { due })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn view(length: u64, grown_at: Instant) -> SpoolView {
        SpoolView { length, guest_base: Some(100), grown_at: Some(grown_at), ..SpoolView::default() }
    }

    /// U14: the first piece of a guest waits for nothing.
    #[tokio::test(start_paused = true)]
    async fn the_first_piece_of_a_guest_is_due_at_once() {
        let now = Instant::now();
        let due = |length, sent| patch_due(&view(length, now), sent, Some(now), 60 * SECOND, SECOND);
        assert_eq!((due(101, 100), due(101, 0)), (None, None));
        assert_eq!(due(100, 0), Some(now + 60 * SECOND), "own lines alone");
        assert!(due(102, 101).is_some(), "only the first");
        assert_eq!(patch_due(&view(150, now), 120, None, 3 * SECOND, SECOND), None, "nothing was sent yet");
        let closed = SpoolView { guest_closed: true, ..view(150, now) };
        assert_eq!(patch_due(&closed, 120, Some(now), 3 * SECOND, SECOND), None, "nothing more comes");
    }

    /// U14: a PATCH that is due goes with the guest's next piece, not just before it.
    #[tokio::test(start_paused = true)]
    async fn a_patch_waits_for_a_piece_that_is_near_and_for_no_other() {
        let due = Instant::now() + 3 * SECOND;
        let at = |age: Duration| patch_due(&view(300, due - age), 200, Some(due - 3 * SECOND), 3 * SECOND, SECOND);
        let ms = Duration::from_millis;
        assert_eq!(at(ms(0)), Some(due));
        assert_eq!(at(ms(200)), Some(due), "fresh");
        assert_eq!(at(ms(500)), Some(due + ms(800)));
        assert_eq!(at(ms(1299)), Some(due + ms(1)));
        assert_eq!(at(ms(1300)), Some(due), "nothing more came");
        assert_eq!(patch_due(&view(300, due + ms(700)), 200, Some(due - 3 * SECOND), 3 * SECOND, SECOND), Some(due));
    }
}
