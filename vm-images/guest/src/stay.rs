//! A machine whose job has failed stays for a while, if its host says so, and powers off by itself when that is over: a
//! host that has forgotten it is not waited for. The host's word may come again, and counts from then.
#![expect(clippy::disallowed_types, reason = "no async runtime in the guest")]

use dayfly_guest_config::Stay;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

/// Waits so long for the word. `None`: it did not come.
pub fn word<T>(inbox: &Receiver<T>, deadline: Duration, of: impl Fn(T) -> Option<Stay>) -> Option<Stay> {
    let since = Instant::now();
    loop {
        match inbox.recv_timeout(deadline.saturating_sub(since.elapsed())) {
            Ok(event) => {
                if let Some(stay) = of(event) {
                    return Some(stay);
                }
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return None,
        }
    }
}

/// Stays until the last word's time is over.
pub fn stay<T>(first: Stay, inbox: &Receiver<T>, of: impl Fn(T) -> Option<Stay>) {
    let mut left = Duration::from_secs(first.seconds);
    while let Some(again) = word(inbox, left, &of) {
        left = Duration::from_secs(again.seconds);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::sync_channel;

    /// The word ends the wait for it, other events do not; and the last word counts.
    #[test]
    fn a_machine_stays_as_long_as_it_was_told_last() {
        let (events, inbox) = sync_channel(4);
        let short = Duration::from_millis(20);
        events.send(None).unwrap();
        assert_eq!(word(&inbox, short, |event| event), None);
        events.send(None).unwrap();
        events.send(Some(Stay::of(3600))).unwrap();
        let first = word(&inbox, Duration::from_secs(60), |event| event).unwrap();
        assert_eq!(first, Stay::of(3600));
        events.send(Some(Stay::of(0))).unwrap();
        // An hour, but for the second word.
        stay(first, &inbox, |event| event);
        assert!(inbox.try_recv().is_err());
    }
}
