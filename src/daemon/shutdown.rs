//! How a daemon is told to stop. See the table in the parent module.

use tokio::sync::watch;

/// What the daemon is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// It works.
    Run,
    /// It takes no more jobs and finishes those it has.
    Drain,
    /// It ends those it has, with an honest verdict.
    End,
    /// It lets go of everything for the next daemon.
    HandOver,
    /// The same without waiting for anything.
    HandOverNow,
}

impl Mode {
    /// As the log says it.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Run => "run",
            Self::Drain => "drain",
            Self::End => "end the jobs",
            Self::HandOver => "hand over",
            Self::HandOverNow => "hand over at once",
        }
    }
}

/// The switch. Clones share it.
#[derive(Clone, Debug)]
pub struct Shutdown(watch::Sender<Mode>);

impl Default for Shutdown {
    fn default() -> Self {
        Self::new()
    }
}

impl Shutdown {
    /// Nothing said yet.
    #[must_use]
    pub fn new() -> Self {
        Self(watch::channel(Mode::Run).0)
    }

    /// SIGTERM: hands over; during a drain it ends the jobs, during a hand-over it skips the wait.
    pub fn hand_over(&self) {
        self.0.send_modify(|mode| {
            *mode = match *mode {
                Mode::Run => Mode::HandOver,
                Mode::HandOver => Mode::HandOverNow,
                Mode::Drain => Mode::End,
                other => other,
            }
        });
    }

    /// SIGQUIT: drains; during a drain it ends the jobs.
    pub fn drain_or_end(&self) {
        self.0.send_modify(|mode| {
            *mode = match *mode {
                Mode::Run => Mode::Drain,
                Mode::Drain => Mode::End,
                other => other,
            }
        });
    }

    /// `dayfly drain`: begins a drain; one that has begun goes on.
    pub fn drain(&self) {
        self.0.send_if_modified(|mode| {
            let begins = *mode == Mode::Run;
            if begins {
                *mode = Mode::Drain;
            }
            begins
        });
    }

    /// Ends all jobs and then the daemon.
    pub fn end(&self) {
        self.0.send_modify(|mode| {
            if !matches!(*mode, Mode::HandOver | Mode::HandOverNow) {
                *mode = Mode::End;
            }
        });
    }

    /// A part of the daemon itself has failed: hands over, whatever was wished before, for nobody
    /// here can bring a drain to its end.
    pub fn fail(&self) {
        self.0.send_modify(|mode| {
            if *mode != Mode::HandOverNow {
                *mode = Mode::HandOver;
            }
        });
    }

    /// The mode, to read and to wait for.
    #[must_use]
    pub fn mode(&self) -> watch::Receiver<Mode> {
        self.0.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_signal_means_more_than_the_first() {
        let check = |steps: &[fn(&Shutdown)], expected| {
            let shutdown = Shutdown::new();
            steps.iter().for_each(|step| step(&shutdown));
            assert_eq!(*shutdown.mode().borrow(), expected);
        };
        check(&[Shutdown::hand_over], Mode::HandOver);
        check(&[Shutdown::hand_over, Shutdown::hand_over], Mode::HandOverNow);
        check(&[Shutdown::drain, Shutdown::drain], Mode::Drain);
        check(&[Shutdown::drain_or_end, Shutdown::drain_or_end], Mode::End);
        check(&[Shutdown::drain, Shutdown::hand_over], Mode::End);
        check(&[Shutdown::hand_over, Shutdown::end], Mode::HandOver);
        check(&[Shutdown::drain, Shutdown::fail], Mode::HandOver);
        check(&[Shutdown::hand_over, Shutdown::hand_over, Shutdown::fail], Mode::HandOverNow);
    }
}
