//! What of the job is kept when it has ended, and what a hand-over takes along of that.

use super::Machinery;
use crate::gitlab::{JobStatus, Verdict};
use crate::history::{self, AtGitlab, End, Outcome};
use crate::job::past::{Past, end_of, machine_was};
use crate::job::state::State;
use crate::telemetry::chain;

impl Machinery {
    /// Notes that the job has come this far.
    pub(in crate::job) fn note(&mut self, what: &str) {
        let elapsed = self.elapsed();
        history::note(&mut self.past.steps, what, elapsed);
    }

    /// The end of its machine's console: of the one that is there, with what a former daemon has seen, or of the last.
    pub(super) fn console_kept(&self) -> Option<(String, u64)> {
        self.past.with(self.machine.as_ref().and_then(|_| self.looks.kept()))
    }

    /// Keeps how the job ended, for whoever asks.
    pub(in crate::job) async fn keep_end(&self, verdict: Option<&Verdict>, word: JobStatus, waits: &str) {
        let console = self.console_kept();
        let outcome = match verdict {
            None => Outcome::Over,
            Some(verdict) if verdict.success => Outcome::Success,
            Some(_) => Outcome::Failed,
        };
        let end = End {
            verdict: outcome,
            failure_reason: verdict.and_then(|verdict| verdict.failure_reason.clone()),
            exit_code: verdict.and_then(|verdict| verdict.exit_code),
            why: self.past.why.clone(),
            at_gitlab: if verdict.is_none() { AtGitlab::OverBefore } else { AtGitlab::of(word, waits) },
            log_bytes: self.trace.spool.view().length,
            machine: machine_was(&self.record).map(|was| history::MachineWas { vm: self.past.vm.clone(), ..was }),
            steps: self.past.steps.clone(),
            cache: self.cache_notes(),
            reached: self.reached_kept(),
            console_rows: console.as_ref().map_or(0, |(_, rows)| *rows),
            console: console.map(|(text, _)| text),
            ..end_of(&self.record, self.parts.clock.now())
        };
        self.parts.history.keep(end, &self.record.key.directory()).await;
    }

    /// Before a hand-over: the next daemon keeps the whole of it.
    pub(super) async fn take_past_along(&self) {
        if self.record.state == State::Ended || !self.journalled.is_there() {
            return;
        }
        let past = Past { console: self.console_kept(), cache: self.cache_notes(), ..self.past.clone() };
        let written = match serde_json::to_vec(&past) {
            Ok(past) => self.parts.journal.put_past(&self.record.key, past).await,
            Err(error) => Err(error.into()),
        };
        if let Err(error) = written {
            tracing::debug!(error = chain(&error), "take along what is known of the job for its end");
        }
    }
}
