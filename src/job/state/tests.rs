//! Every event in every state, and every sequence of events, to a disk that takes what it likes.

use super::*;
use proptest::prelude::*;

fn success() -> Verdict {
    Verdict { success: true, failure_reason: None, exit_code: None, runtime_environment_key: None }
}

fn check(state: State, event: Event, commands: &[Command]) -> State {
    let (next, got) = state.on(event.clone());
    assert_eq!(got, commands, "after {event:?}");
    next
}

fn fails(failure: Failure) -> Vec<Command> {
    vec![Command::Explain(failure), Command::Write, Command::CloseGuest, Command::Deliver, Command::ReleaseMachine]
}

#[test]
fn a_job_that_goes_well_takes_five_steps() {
    let state = check(State::Accepted, Event::Started, &[Command::Write, Command::TakeMachine]);
    let state = check(
        state,
        Event::GuestAsked(Ask::Idle),
        &[Command::BeginGuest, Command::Commit, Command::Answer(Answer::Job)],
    );
    let state = check(
        state,
        Event::GuestVerdict(success()),
        &[
            Command::Commit,
            Command::CloseGuest,
            Command::Answer(Answer::Taken),
            Command::Deliver,
            Command::Arm(Grace::PowerOff),
        ],
    );
    let state = check(state, Event::MachineStopped(Ending::Died), &[Command::ReleaseMachine]);
    let state = check(state, Event::MachineReleased, &[Command::Write]);
    assert_eq!(check(state, Event::Delivered, &[Command::Write, Command::Finish]), State::Ended);
}

/// G6, H6: a job that is not run ends as every other, with nothing to take down.
#[test]
fn a_refused_job_is_released_like_any_other() {
    let state = check(State::Accepted, Event::Refused(Failure::Unreadable), &fails(Failure::Unreadable));
    let state = check(state, Event::MachineReleased, &[Command::Write]);
    assert_eq!(check(state, Event::Delivered, &[Command::Write, Command::Finish]), State::Ended);
    // Given up after its verdict: that stands.
    let (state, _) = State::Running { canceling: false }.on(Event::GuestVerdict(success()));
    let again = [Command::CloseGuest, Command::Deliver, Command::ReleaseMachine];
    check(state, Event::Refused(Failure::BugTwice), &again);
}

/// V5: the same job again to a guest that has shown no work of it, and to no other.
#[test]
fn a_guest_that_asks_again_is_answered_by_what_it_has_shown() {
    let runs = State::Running { canceling: false };
    check(runs.clone(), Event::GuestAsked(Ask::Idle), &[Command::Answer(Answer::Job)]);
    check(runs.clone(), Event::GuestAsked(Ask::Busy), &[Command::Answer(Answer::NoJob)]);
    let turned_away = |failure| [vec![Command::Answer(Answer::NoJob)], fails(failure)].concat();
    check(runs, Event::GuestAsked(Ask::Untaken), &turned_away(Failure::NotTaken));
    let canceling = State::Running { canceling: true };
    check(canceling.clone(), Event::GuestAsked(Ask::Idle), &turned_away(Failure::CanceledBooting));
    check(canceling, Event::GuestAsked(Ask::Busy), &[Command::Answer(Answer::NoJob)]);
    let boots = State::Booting { replaced: false };
    check(boots, Event::GuestAsked(Ask::TooLate), &turned_away(Failure::BootDeadline));
}

#[test]
fn a_machine_that_dies_booting_is_replaced_once() {
    let state = check(
        State::Booting { replaced: false },
        Event::MachineStopped(Ending::Died),
        &[Command::Write, Command::ReplaceMachine],
    );
    check(state, Event::MachineStopped(Ending::Died), &fails(Failure::DiedBooting(Ending::Died)));
}

/// U50: only an I/O error is a disk; what somebody at the host has paused is waited for.
#[test]
fn each_reason_of_a_pause_ends_a_job_in_its_own_way() {
    let (boots, again, runs) =
        (State::Booting { replaced: false }, State::Booting { replaced: true }, State::Running { canceling: false });
    check(boots.clone(), Event::MachinePaused(Pause::Disk), &fails(Failure::HostDisk));
    check(boots.clone(), Event::MachinePaused(Pause::Itself), &[Command::Write, Command::ReplaceMachine]);
    check(again, Event::MachinePaused(Pause::Itself), &fails(Failure::HostStopped));
    check(runs.clone(), Event::MachinePaused(Pause::Disk), &fails(Failure::HostDisk));
    check(runs.clone(), Event::MachinePaused(Pause::Itself), &fails(Failure::HostStopped));
    for state in [boots, runs] {
        assert_eq!(check(state.clone(), Event::MachinePaused(Pause::Operator), &[]), state);
    }
}

#[test]
fn a_cancel_is_heard_once_and_gives_after_script_its_time() {
    let canceling = State::Running { canceling: true };
    let state = check(
        State::Running { canceling: false },
        Event::Gitlab(JobStatus::Canceling),
        &[Command::Write, Command::Arm(Grace::Canceling)],
    );
    assert_eq!(state, canceling);
    assert_eq!(check(state, Event::Gitlab(JobStatus::Canceling), &[]), canceling);
}

#[test]
fn a_boot_that_times_out_is_not_repeated() {
    check(State::Booting { replaced: false }, Event::BootDeadline, &fails(Failure::BootDeadline));
}

#[test]
fn a_deadline_after_the_hand_out_changes_nothing() {
    check(State::Running { canceling: false }, Event::BootDeadline, &[]);
}

#[test]
fn a_verdict_outlives_the_machine() {
    let (state, _) = State::Running { canceling: false }.on(Event::GuestVerdict(success()));
    let (state, _) = state.on(Event::MachineStopped(Ending::Died));
    assert!(matches!(state, State::Releasing { verdict: Some(Verdict { success: true, .. }), .. }));
}

fn any_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        Just(Event::Started),
        prop_oneof![Just(Ask::Idle), Just(Ask::Busy), Just(Ask::Untaken), Just(Ask::TooLate)]
            .prop_map(Event::GuestAsked),
        Just(Event::GuestIdle),
        Just(Event::GuestVerdict(success())),
        Just(Event::GuestVerdict(Verdict {
            success: false,
            failure_reason: Some("script_failure".into()),
            exit_code: Some(3),
            runtime_environment_key: None,
        })),
        Just(Event::MachineFailed),
        Just(Event::MachineStopped(Ending::Died)),
        Just(Event::MachinePaused(Pause::Disk)),
        Just(Event::MachinePaused(Pause::Itself)),
        Just(Event::MachinePaused(Pause::Operator)),
        Just(Event::Gitlab(JobStatus::Running)),
        Just(Event::Gitlab(JobStatus::Canceling)),
        Just(Event::Gitlab(JobStatus::Over)),
        Just(Event::BootDeadline),
        Just(Event::SilenceDeadline),
        Just(Event::TimeoutDeadline),
        Just(Event::GraceOver),
        Just(Event::Killed),
        Just(Event::CannotGoOn),
        Just(Event::HostDiskFailed),
        Just(Event::ImageUnusable),
        Just(Event::Panicked),
        Just(Event::Refused(Failure::NotKept)),
    ]
}

/// A job's task as the commands have it, with a disk that takes a record or not.
struct Model {
    state: State,
    /// The record's, on disk.
    kept: State,
    /// What GitLab is told.
    told: Option<Verdict>,
    verdicts: u32,
    hand_outs: u32,
    released: bool,
    finished: bool,
}

impl Model {
    /// One event; `takes`: whether the disk takes what is written.
    fn feed(&mut self, event: Event, takes: bool) -> Result<(), TestCaseError> {
        let before = self.state.clone();
        let asks = matches!(event, Event::GuestAsked(_) | Event::GuestVerdict(_));
        let restart = matches!(event, Event::Started | Event::Panicked | Event::Refused(_))
            && matches!(before, State::Releasing { .. });
        let (next, commands) = before.clone().on(event.clone());
        self.state = next;
        let mut answers = 0;
        let mut written = self.state == before;
        for command in commands {
            match command {
                Command::Explain(_) => prop_assert!(!written, "the record holds the lines"),
                Command::Write => {
                    prop_assert!(!written, "once per change");
                    written = true;
                    if takes {
                        self.kept = self.state.clone();
                    }
                }
                Command::Commit => {
                    prop_assert!(!written, "once per change");
                    prop_assert!(asks, "there is somebody to be asked to come again");
                    if !takes {
                        self.state = before.clone();
                        answers += 1;
                        break;
                    }
                    (written, self.kept) = (true, self.state.clone());
                }
                // Nothing is known yet that the next daemon would not know.
                Command::BeginGuest => {
                    let first = matches!(before, State::Booting { .. });
                    prop_assert!(first);
                }
                Command::Answer(answer) => {
                    answers += 1;
                    match answer {
                        Answer::Job => {
                            let runs = matches!(self.state, State::Running { canceling: false });
                            prop_assert!(runs);
                            if matches!(before, State::Booting { .. }) {
                                self.hand_outs += 1;
                                prop_assert_eq!(&self.kept, &self.state, "no job before its record");
                            }
                        }
                        Answer::Taken => {
                            let State::Releasing { verdict, .. } = &self.state else {
                                return Err(TestCaseError::fail("a verdict is taken that is none"));
                            };
                            let said = matches!(&event, Event::GuestVerdict(said) if verdict.as_ref() == Some(said));
                            prop_assert!(said, "what is taken is the job's verdict");
                            if matches!(before, State::Running { .. }) {
                                prop_assert_eq!(&self.kept, &self.state, "no verdict is taken before its record");
                            }
                        }
                        Answer::NoJob => prop_assert!(matches!(event, Event::GuestAsked(_))),
                        Answer::Over => prop_assert!(matches!(event, Event::GuestVerdict(_))),
                    }
                }
                command => {
                    prop_assert!(written, "{command:?} before the record");
                    self.act(command, &before, restart)?;
                }
            }
        }
        prop_assert_eq!(answers, u32::from(asks), "each question has one answer");
        prop_assert!(written || self.state == before, "a change that nobody writes down");
        if let (State::Releasing { verdict: Some(old), .. }, State::Releasing { verdict, .. }) = (&before, &self.state)
        {
            prop_assert_eq!(Some(old), verdict.as_ref(), "the first verdict stands");
        }
        prop_assert!(self.verdicts <= 1 && self.hand_outs <= 1);
        Ok(())
    }

    fn act(&mut self, command: Command, before: &State, restart: bool) -> Result<(), TestCaseError> {
        match command {
            Command::Deliver | Command::Abandon => {
                let State::Releasing { verdict, .. } = &self.state else {
                    return Err(TestCaseError::fail("told before it is known"));
                };
                prop_assert_eq!(verdict.is_some(), command == Command::Deliver);
                // After a restart the same is given to a new uploader.
                prop_assert!(!restart || self.told == *verdict);
                self.verdicts += u32::from(!restart);
                self.told.clone_from(verdict);
            }
            Command::ReleaseMachine => self.released = true,
            Command::TakeMachine => {
                let early = matches!(before, State::Accepted | State::Booting { .. });
                prop_assert!(early);
            }
            Command::Finish => {
                prop_assert_eq!(&self.state, &State::Ended);
                self.finished = true;
            }
            _ => {}
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    /// Any sequence of events, on a disk that takes some of it, then the machine's and the uploader's ends: one
    /// verdict, one hand-out, everything released, nothing after the end; each question answered once, and nothing
    /// said to the guest that is not on disk.
    #[test]
    fn any_sequence_of_events_ends_in_one_verdict_and_releases_everything(
        first in prop_oneof![Just(Event::Started), Just(Event::Refused(Failure::Unreadable))],
        events in prop::collection::vec((any_event(), prop::bool::weighted(0.8)), 0..40)
    ) {
        let mut model = Model {
            state: State::Accepted,
            kept: State::Accepted,
            told: None,
            verdicts: 0,
            hand_outs: 0,
            released: false,
            finished: false,
        };
        model.feed(first, true)?;
        for (event, takes) in events {
            model.feed(event, takes)?;
        }
        // What always happens at last: the hard cap, then a grace, the machine's end, delivery.
        for event in [Event::TimeoutDeadline, Event::GraceOver, Event::MachineStopped(Ending::Died)] {
            model.feed(event, false)?;
        }
        prop_assert_eq!(model.verdicts, 1);
        prop_assert!(model.released);
        model.feed(Event::MachineReleased, true)?;
        model.feed(Event::Delivered, true)?;
        prop_assert_eq!(&model.state, &State::Ended);
        prop_assert_eq!(&model.kept, &State::Ended);
        prop_assert!(model.finished);
    }
}
