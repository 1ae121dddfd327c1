//! Who wants this job, or this program, to stop: GitLab's answers, signals, and the clock.
//!
//! One mutex and one condition for all of it: whoever waits (for a poll's pause, a script's end) waits
//! here, and whoever changes something wakes them.

use signal_hook::consts::{SIGINT, SIGQUIT, SIGTERM};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// What the official runner allows itself after a first SIGTERM; run-single cannot be told otherwise.
const SHUTDOWN_MAX: Duration = Duration::from_secs(30);

/// Why a stage was ended from outside.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stop {
    /// GitLab wants no more of this job: nothing else is run.
    Aborted,
    /// A user canceled: the script ends, `after_script` and uploads still run.
    Canceled,
    /// The job's or the script's time is over.
    TimedOut,
    /// This program was told to end; the signal's name.
    Interrupted(&'static str),
}

/// Which wishes end what is running now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Scope {
    /// Before and while the script runs: a cancel too.
    Script,
    /// After it: only an abort and a signal.
    Rest,
}

#[derive(Default)]
struct Wishes {
    interrupt: Option<&'static str>,
    quit: bool,
    abort: bool,
    cancel: bool,
}

/// All wishes; shared by the signal thread, the reporter and the job.
#[derive(Default)]
pub(crate) struct Control {
    wishes: Mutex<Wishes>,
    changed: Condvar,
}

impl Control {
    /// Forgets what the last job was told.
    pub(crate) fn begin_job(&self) {
        let mut wishes = crate::locked(&self.wishes);
        (wishes.abort, wishes.cancel) = (false, false);
    }

    /// GitLab canceled: see [`Stop::Canceled`].
    pub(crate) fn cancel(&self) {
        crate::locked(&self.wishes).cancel = true;
        self.changed.notify_all();
    }

    /// GitLab wants no more: see [`Stop::Aborted`].
    pub(crate) fn abort(&self) {
        crate::locked(&self.wishes).abort = true;
        self.changed.notify_all();
    }

    /// A signal asked for the end: TERM and INT at once, QUIT after the job.
    fn signal(&self, name: &'static str) {
        let mut wishes = crate::locked(&self.wishes);
        match name {
            "quit" => wishes.quit = true,
            _ => wishes.interrupt = Some(name),
        }
        drop(wishes);
        self.changed.notify_all();
    }

    /// Whether no further job may be asked for.
    pub(crate) fn is_finishing(&self) -> bool {
        let wishes = crate::locked(&self.wishes);
        wishes.quit || wishes.interrupt.is_some()
    }

    /// What ends a stage of this scope, if anything does.
    pub(crate) fn stop(&self, scope: Scope) -> Option<Stop> {
        crate::locked(&self.wishes).stop(scope)
    }

    /// Pauses, at most until TERM or INT; QUIT does not shorten it (recorded).
    pub(crate) fn pause(&self, time: Duration) {
        let wishes = crate::locked(&self.wishes);
        drop(self.changed.wait_timeout_while(wishes, time, |wishes| wishes.interrupt.is_none()));
    }

    /// Waits until `done` says so, something of this scope wants a stop, or the deadline passes. `None`: done.
    pub(crate) fn wait(&self, scope: Scope, deadline: Instant, done: impl Fn() -> bool) -> Option<Stop> {
        self.wait_for(deadline, |wishes| if done() { Some(None) } else { wishes.stop(scope).map(Some) })
            .unwrap_or(Some(Stop::TimedOut))
    }

    /// Waits until `done` says so, whatever anybody wishes. `false`: the deadline passed.
    pub(crate) fn wait_only(&self, deadline: Instant, done: impl Fn() -> bool) -> bool {
        self.wait_for(deadline, |_| done().then_some(())).is_some()
    }

    /// Wakes whoever waits: what they wait for may have happened.
    pub(crate) fn wake(&self) {
        // Under the lock, or a waiter between its look and its sleep would miss it.
        let _wishes = crate::locked(&self.wishes);
        self.changed.notify_all();
    }

    fn wait_for<T>(&self, deadline: Instant, look: impl Fn(&Wishes) -> Option<T>) -> Option<T> {
        let mut wishes = crate::locked(&self.wishes);
        loop {
            if let Some(found) = look(&wishes) {
                return Some(found);
            }
            let left = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
            wishes = self.changed.wait_timeout(wishes, left).unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
    }
}

impl Wishes {
    fn stop(&self, scope: Scope) -> Option<Stop> {
        match (self.interrupt, self.abort, self.cancel) {
            (Some(name), ..) => Some(Stop::Interrupted(name)),
            (None, true, _) => Some(Stop::Aborted),
            (None, false, true) if scope == Scope::Script => Some(Stop::Canceled),
            _ => None,
        }
    }
}

/// Starts the thread that turns signals into wishes, and ends the process on a second one, or 30 s after the first.
///
/// # Errors
/// The system refuses to deliver signals.
pub(crate) fn listen_for_signals(control: &Arc<Control>) -> std::io::Result<()> {
    let mut signals = signal_hook::iterator::Signals::new([SIGTERM, SIGINT, SIGQUIT])?;
    let control = Arc::clone(control);
    std::thread::spawn(move || {
        let mut exiting = false;
        for signal in signals.forever() {
            let name = match signal {
                SIGQUIT => "quit",
                SIGINT => "interrupt",
                _ => "terminated",
            };
            if exiting {
                crate::log(&format!("FATAL: forced exit: {name}"));
                std::process::exit(1);
            }
            crate::log(&format!("WARNING: requested to end: {name}"));
            control.signal(name);
            if name != "quit" {
                exiting = true;
                std::thread::spawn(|| {
                    std::thread::sleep(SHUTDOWN_MAX);
                    crate::log("FATAL: shutdown timed out");
                    std::process::exit(1);
                });
            }
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cancel_ends_the_script_and_nothing_after_it() {
        let control = Control::default();
        control.cancel();
        assert_eq!(control.stop(Scope::Script), Some(Stop::Canceled));
        assert_eq!(control.stop(Scope::Rest), None);
        control.abort();
        assert_eq!(control.stop(Scope::Rest), Some(Stop::Aborted));
    }

    #[test]
    fn the_next_job_starts_without_the_wishes_for_the_last() {
        let control = Control::default();
        control.abort();
        control.signal("terminated");
        control.begin_job();
        assert_eq!(control.stop(Scope::Rest), Some(Stop::Interrupted("terminated")), "a signal stays");
    }

    #[test]
    fn quit_ends_the_asking_but_not_the_job() {
        let control = Control::default();
        control.signal("quit");
        assert!(control.is_finishing());
        assert_eq!(control.stop(Scope::Script), None);
    }

    #[test]
    fn a_wait_ends_by_its_deadline() {
        let control = Control::default();
        let now = Instant::now();
        assert_eq!(control.wait(Scope::Script, now, || false), Some(Stop::TimedOut));
        assert_eq!(control.wait(Scope::Script, now, || true), None, "what is done counts first");
    }
}
