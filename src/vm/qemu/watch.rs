//! One task per machine listens to its QEMU for as long as we live, for QEMU tells how a machine ends only to whom
//! listens then.
//!
//! However a guest ends its machine, its QEMU stays (`-action shutdown=pause`), so that the next daemon still finds it:
//! the state says that it was shut down, and the log how. Once the end is noted in the record, QEMU is told to go.
//!
//! | what happens | event | state |
//! | --- | --- | --- |
//! | power-off in the guest | `SHUTDOWN guest-shutdown` | `shutdown` |
//! | reset in the guest | `SHUTDOWN guest-reset` | `shutdown` |
//! | panic, with the guest's `pvpanic` driver | `GUEST_PANICKED` | `guest-panicked` |
//! | the guest sleeps | `SUSPEND` | `suspended` |
//! | QMP `quit`, or a SIGTERM | `SHUTDOWN host-…` | gone |
//! | the host's disk fails | `BLOCK_IO_ERROR`, `STOP` | `io-error` |
//! | QMP `stop` | `STOP` | `paused` |
//! | QEMU is killed, or crashes | none | gone |

use super::log::{self, Log};
use super::qmp::{Message, Qmp};
use super::record::Records;
use crate::telemetry::chain;
use crate::vm::{Ending, Pause, VmName, VmState};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio::time::timeout;

/// Questions that may wait for one QEMU. Who asks has a deadline.
const QUESTIONS_MAX: usize = 16;

/// How long QEMU may take to begin a conversation, or to take a command.
const TALK_DEADLINE: Duration = Duration::from_secs(5);

/// What is asked of a machine.
pub(super) enum Question {
    /// Its state.
    State(oneshot::Sender<VmState>),
    /// That it go. Answered before it has gone.
    Quit(oneshot::Sender<()>),
    /// What went through its disks.
    Disks(oneshot::Sender<Value>),
    /// Whatever QEMU answers to this command, or its refusal.
    Command(Value, oneshot::Sender<Result<Value, String>>),
}

/// A machine that is listened to. Dropping it ends that.
pub(super) struct Watch {
    questions: mpsc::Sender<Question>,
    known: Arc<Mutex<VmState>>,
    task: AbortHandle,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Watch {
    /// Connects to a machine's QEMU, and asks it how it does.
    pub(super) async fn begin(records: &Records, name: &VmName) -> io::Result<Self> {
        let socket = records.path(name, "qmp");
        let (questions, asked) = mpsc::channel(QUESTIONS_MAX);
        let known = Arc::new(Mutex::new(VmState::Running));
        let mut listener = Listener {
            records: records.clone(),
            name: name.clone(),
            known: known.clone(),
            ended: None,
            due: VecDeque::new(),
        };
        let begin = async {
            let mut qmp = Qmp::connect(&socket, &name.to_string()).await?;
            let status = qmp.ask("query-status").await?.map_err(io::Error::other)?;
            listener.take(&mut qmp, &status).await?;
            Ok::<_, io::Error>(qmp)
        };
        let qmp = timeout(TALK_DEADLINE, begin).await.map_err(|_| io::ErrorKind::TimedOut)??;
        #[expect(clippy::disallowed_methods, reason = "ended by this type's drop; nobody waits for it")]
        let task = tokio::spawn(listener.listen(qmp, asked));
        Ok(Self { questions, known, task: task.abort_handle() })
    }

    /// Whether it still listens.
    pub(super) fn is_at_work(&self) -> bool {
        !self.task.is_finished()
    }

    /// The state that QEMU told last.
    pub(super) fn known(&self) -> VmState {
        *self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where to ask.
    pub(super) fn questions(&self) -> mpsc::Sender<Question> {
        self.questions.clone()
    }
}

/// Whose answer is due.
enum Due {
    Theirs(Question),
    /// Our own, for the state.
    Ours,
    /// Nobody cares for it.
    Nobodys,
}

struct Listener {
    records: Records,
    name: VmName,
    known: Arc<Mutex<VmState>>,
    ended: Option<Ending>,
    /// Answers that are due, oldest first.
    due: VecDeque<Due>,
}

impl Listener {
    async fn listen(mut self, mut qmp: Qmp, mut asked: mpsc::Receiver<Question>) {
        loop {
            match self.once(&mut qmp, &mut asked).await {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return,
                // Whoever asks next hears of it; a QEMU that a guest has broken into could do this for ever.
                Err(error) => return tracing::debug!(vm = %self.name, error = chain(&error), "listen to a QEMU"),
            }
        }
    }

    /// The next thing that happens.
    async fn once(&mut self, qmp: &mut Qmp, asked: &mut mpsc::Receiver<Question>) -> io::Result<()> {
        let message = tokio::select! {
            biased;
            // Both are cancel safe. What QEMU says goes first.
            message = qmp.next() => message?,
            Some(question) = asked.recv(), if self.due.len() < QUESTIONS_MAX => {
                let command = match &question {
                    Question::State(_) => json!({ "execute": "query-status" }),
                    Question::Quit(_) => json!({ "execute": "quit" }),
                    Question::Disks(_) => json!({ "execute": "query-blockstats" }),
                    Question::Command(command, _) => command.clone(),
                };
                return self.send(qmp, &command, Due::Theirs(question)).await;
            }
        };
        match message {
            Message::Event { name, reason } if name == "SHUTDOWN" => {
                let (ending, by_guest) = match reason.as_str() {
                    "guest-shutdown" => (Ending::PoweredOff, true),
                    "guest-reset" => (Ending::Restarted, true),
                    "guest-panic" => (Ending::Panicked, true),
                    reason if reason.starts_with("host-") => (Ending::Destroyed, false),
                    _ => return Ok(()),
                };
                self.end(qmp, ending, by_guest).await
            }
            Message::Event { name, .. } => {
                let changes = ["STOP", "RESUME", "SUSPEND", "SUSPEND_DISK", "WAKEUP", "GUEST_PANICKED", "WATCHDOG"];
                // One that is asked already may be answered with what was before.
                let asked = self.due.iter().filter(|due| matches!(due, Due::Ours)).count();
                if changes.contains(&name.as_str()) && asked < 2 {
                    self.send(qmp, &json!({ "execute": "query-status" }), Due::Ours).await?;
                }
                Ok(())
            }
            Message::Answer(answer) => match (self.due.pop_front(), answer) {
                (Some(Due::Theirs(Question::Command(_, reply))), answer) => {
                    let _ = reply.send(answer);
                    Ok(())
                }
                (Some(Due::Theirs(Question::State(reply))), Ok(status)) => {
                    let state = self.take(qmp, &status).await?;
                    // Who does not wait any more has had its deadline.
                    let _ = reply.send(state);
                    Ok(())
                }
                (Some(Due::Ours), Ok(status)) => self.take(qmp, &status).await.map(drop),
                (Some(Due::Theirs(Question::Quit(reply))), Ok(_)) => {
                    let _ = reply.send(());
                    Ok(())
                }
                (Some(Due::Theirs(Question::Disks(reply))), Ok(disks)) => {
                    let _ = reply.send(disks);
                    Ok(())
                }
                (Some(Due::Nobodys), _) => Ok(()),
                (Some(_), Err(error)) => Err(io::Error::other(error)),
                (None, _) => Err(io::Error::new(io::ErrorKind::InvalidData, "QEMU answers what nobody asked")),
            },
        }
    }

    async fn send(&mut self, qmp: &mut Qmp, command: &Value, due: Due) -> io::Result<()> {
        self.due.push_back(due);
        timeout(TALK_DEADLINE, qmp.tell(command)).await.map_err(|_| io::ErrorKind::TimedOut)?
    }

    /// The state that an answer tells; from now on it is known.
    async fn take(&mut self, qmp: &mut Qmp, status: &Value) -> io::Result<VmState> {
        let word = status.get("status").and_then(Value::as_str).unwrap_or_default();
        if word == "shutdown" && self.ended.is_none() {
            let path = self.records.path(&self.name, "log");
            let read = tokio::task::spawn_blocking(move || Log::open(&path).read()).await.map_err(io::Error::other)?;
            self.end(qmp, log::of_shutdown(&read), true).await?;
        }
        let state = self.ended.map_or_else(|| translate(word), VmState::Ended);
        *self.known.lock().unwrap_or_else(PoisonError::into_inner) = state;
        Ok(state)
    }

    /// It has ended: noted, and then, if QEMU stays for our sake, it is let go.
    async fn end(&mut self, qmp: &mut Qmp, ending: Ending, stays: bool) -> io::Result<()> {
        if self.ended.is_some() {
            return Ok(());
        }
        let (records, name) = (self.records.clone(), self.name.clone());
        let noted = tokio::task::spawn_blocking(move || records.note_ended(&name, ending)).await;
        self.ended = Some(ending);
        *self.known.lock().unwrap_or_else(PoisonError::into_inner) = VmState::Ended(ending);
        match noted.map_err(io::Error::other).and_then(|noted| noted) {
            Ok(()) if stays => self.send(qmp, &json!({ "execute": "quit" }), Due::Nobodys).await,
            Ok(()) => Ok(()),
            // Its record has gone with it: it was destroyed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => {
                // It stays, and is destroyed like one that panicked.
                tracing::warn!(vm = %self.name, error = chain(&error), "note how a machine ended");
                Ok(())
            }
        }
    }
}

/// QEMU's run state in our words.
fn translate(word: &str) -> VmState {
    match word {
        // It is being started.
        "running" | "prelaunch" | "inmigrate" | "restore-vm" => VmState::Running,
        "io-error" => VmState::Paused(Pause::Disk),
        "paused" | "save-vm" | "finish-migrate" | "postmigrate" | "colo" => VmState::Paused(Pause::Operator),
        "guest-panicked" => VmState::Ended(Ending::Panicked),
        "suspended" => VmState::Ended(Ending::Slept),
        "watchdog" => VmState::Ended(Ending::Hung),
        // `internal-error`, and what no QEMU says yet.
        _ => VmState::Paused(Pause::Itself),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_state_of_qemus_is_somebodys_doing() {
        assert_eq!(translate("running"), VmState::Running);
        assert_eq!(translate("io-error"), VmState::Paused(Pause::Disk));
        assert_eq!(translate("paused"), VmState::Paused(Pause::Operator));
        assert_eq!(translate("internal-error"), VmState::Paused(Pause::Itself));
        assert_eq!(translate("suspended"), VmState::Ended(Ending::Slept));
        assert_eq!(translate("guest-panicked"), VmState::Ended(Ending::Panicked));
    }
}
