//! Every event in every state.

use super::*;
use proptest::prelude::*;

fn success() -> Verdict {
    Verdict { success: true, failure_reason: None, exit_code: None }
}

fn check(state: State, event: Event, commands: &[Command]) -> State {
    let (next, got) = state.on(event.clone());
    assert_eq!(got, commands, "after {event:?}");
    next
}

#[test]
fn a_job_that_goes_well_takes_five_steps() {
    let state = check(State::Accepted, Event::Started, &[Command::TakeMachine]);
    let state = check(state, Event::GuestAsked, &[Command::HandOut]);
    let state = check(
        state,
        Event::GuestVerdict(success()),
        &[Command::CloseGuest, Command::Deliver(success()), Command::Arm(Grace::PowerOff)],
    );
    let state = check(state, Event::MachineStopped(Ending::Died), &[Command::ReleaseMachine]);
    let state = check(state, Event::MachineReleased, &[]);
    assert_eq!(check(state, Event::Delivered, &[Command::Finish]), State::Ended);
}

#[test]
fn a_machine_that_dies_booting_is_replaced_once() {
    let state =
        check(State::Booting { replaced: false }, Event::MachineStopped(Ending::Died), &[Command::ReplaceMachine]);
    check(
        state,
        Event::MachineStopped(Ending::Died),
        &[Command::CloseGuest, Command::Fail(Failure::DiedBooting(Ending::Died)), Command::ReleaseMachine],
    );
}

/// U50: only an I/O error is a disk; what somebody at the host has paused is waited for.
#[test]
fn each_reason_of_a_pause_ends_a_job_in_its_own_way() {
    let fail = |failure| vec![Command::CloseGuest, Command::Fail(failure), Command::ReleaseMachine];
    let (boots, again, runs) =
        (State::Booting { replaced: false }, State::Booting { replaced: true }, State::Running { canceling: false });
    check(boots.clone(), Event::MachinePaused(Pause::Disk), &fail(Failure::HostDisk));
    check(boots.clone(), Event::MachinePaused(Pause::Itself), &[Command::ReplaceMachine]);
    check(again, Event::MachinePaused(Pause::Itself), &fail(Failure::HostStopped));
    check(runs.clone(), Event::MachinePaused(Pause::Disk), &fail(Failure::HostDisk));
    check(runs.clone(), Event::MachinePaused(Pause::Itself), &fail(Failure::HostStopped));
    for state in [boots, runs] {
        assert_eq!(check(state.clone(), Event::MachinePaused(Pause::Operator), &[]), state);
    }
}

#[test]
fn a_boot_that_times_out_is_not_repeated() {
    check(
        State::Booting { replaced: false },
        Event::BootDeadline,
        &[Command::CloseGuest, Command::Fail(Failure::BootDeadline), Command::ReleaseMachine],
    );
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
        Just(Event::GuestAsked),
        Just(Event::GuestVerdict(success())),
        Just(Event::GuestVerdict(Verdict {
            success: false,
            failure_reason: Some("script_failure".into()),
            exit_code: Some(3)
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    /// Any sequence of events, then the machine's and the uploader's ends: one verdict, one
    /// hand-out, everything released, nothing after the end.
    #[test]
    fn any_sequence_of_events_ends_in_one_verdict_and_releases_everything(events in prop::collection::vec(any_event(), 0..40)) {
        let mut state = State::Accepted;
        let mut verdicts = 0;
        let mut hand_outs = 0;
        let mut released = false;
        let mut all = vec![Event::Started];
        all.extend(events);
        for event in all {
            let before = state.clone();
            let restart = matches!(event, Event::Started | Event::Panicked | Event::Refused(_)) && matches!(before, State::Releasing { .. });
            let (next, commands) = state.on(event);
            state = next;
            for command in &commands {
                match command {
                    // After a restart the same verdict is given to a new uploader.
                    Command::Fail(_) | Command::Deliver(_) | Command::Abandon if !restart => verdicts += 1,
                    Command::HandOut => hand_outs += 1,
                    Command::ReleaseMachine => released = true,
                    Command::TakeMachine => {
                        let early = matches!(before, State::Accepted | State::Booting { .. });
                        prop_assert!(early);
                    }
                    Command::Finish => prop_assert_eq!(&state, &State::Ended),
                    _ => {}
                }
            }
            if let State::Releasing { verdict: Some(old), .. } = &before
                && let State::Releasing { verdict, .. } = &state {
                prop_assert_eq!(Some(old), verdict.as_ref(), "the first verdict stands");
            }
            prop_assert!(verdicts <= 1 && hand_outs <= 1);
        }
        // What always happens at last: the hard cap, then a grace, the machine's end, delivery.
        for event in [Event::TimeoutDeadline, Event::GraceOver, Event::MachineStopped(Ending::Died)] {
            let (next, commands) = state.on(event);
            state = next;
            for command in commands {
                verdicts += i32::from(matches!(command, Command::Fail(_) | Command::Deliver(_) | Command::Abandon));
                released |= command == Command::ReleaseMachine;
            }
        }
        prop_assert_eq!(verdicts, 1);
        prop_assert!(released);
        let (state, _) = state.on(Event::MachineReleased);
        let (state, commands) = state.on(Event::Delivered);
        prop_assert_eq!(&state, &State::Ended);
        prop_assert_eq!(commands, vec![Command::Finish]);
    }
}
