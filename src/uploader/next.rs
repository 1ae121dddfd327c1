//! What does GitLab get next, and when?

use super::trace::PATCH_BYTES_MAX;
use super::{Outbox, Uploader, pace};
use crate::gitlab::Verdict;
use crate::spool::SpoolView;
use tokio::time::Instant;

/// What to do next.
pub(super) enum Next {
    Patch(u64),
    Keepalive,
    MarkDebug,
    Verdict(Verdict),
    Wait(Option<Instant>),
    Stop,
}

impl Uploader {
    pub(super) fn next(&self) -> Next {
        let outbox = self.upload.outbox.borrow().clone();
        if outbox == Outbox::Abandoned {
            return Next::Stop;
        }
        let now = Instant::now();
        if now < self.not_before {
            return Next::Wait(Some(self.not_before));
        }
        let waiting = self.end().saturating_sub(self.sent);
        if let (Outbox::Verdict(verdict), true) = (&outbox, self.given_up) {
            return Next::Verdict(verdict.clone());
        }
        // A keepalive that is due goes before a PATCH: while PATCHes fail it is the only sign of life, and it tells
        // whether GitLab is away or takes no trace.
        let state_due = self.last_state.map_or(now, |last| last + self.upload.keepalive);
        if self.owed.is_failing() && now >= state_due {
            return Next::Keepalive;
        }
        // The mark goes before everything else: a trace with secrets in it must not stand unmarked.
        if *self.upload.debug_trace.borrow() && !self.marked_debug && self.sent > 0 {
            return Next::MarkDebug;
        }
        if let Outbox::Verdict(verdict) = outbox {
            if waiting > 0 {
                return Next::Patch(self.sent);
            }
            // The last byte again: GitLab takes it without effect if it holds what it should, and
            // names its size if not.
            let last = self.end().checked_sub(1).filter(|_| self.doubt);
            return last.map_or(Next::Verdict(verdict), Next::Patch);
        }
        // GitLab hears `running` first: a server that waits for it takes no trace before (threats.md
        // G20), and a job that is over by now ends here (G18).
        if !self.opened {
            return Next::Keepalive;
        }
        let keepalive_due = self.last_answer.map_or(now, |last| last + self.upload.keepalive);
        if now >= keepalive_due {
            return Next::Keepalive;
        }
        let view = self.upload.spool.view();
        let guest_interval = self.upload.guest_interval;
        let patch_due =
            pace::patch_due(&view, self.sent, self.last_patch, self.interval, guest_interval).unwrap_or(now);
        if waiting > 0 && (now >= patch_due || waiting >= PATCH_BYTES_MAX as u64) {
            return Next::Patch(self.sent);
        }
        Next::Wait(Some(if waiting > 0 { keepalive_due.min(patch_due) } else { keepalive_due }))
    }

    pub(super) fn end(&self) -> u64 {
        self.truncated_at.unwrap_or_else(|| self.upload.spool.view().length)
    }

    /// A guest's next piece may be the one that is waited for, and its last one waits for nothing.
    pub(super) async fn wait(&mut self, until: Option<Instant>, seen: SpoolView) {
        let until = until.unwrap_or_else(Instant::now);
        let backing_off = Instant::now() < self.not_before;
        tokio::select! {
            biased;
            // All branches are cancel safe. The outbox first: an abandoned job sends nothing more.
            changed = self.upload.outbox.changed() => if changed.is_err() {
                // The job task is gone without a word: a crash of it, or the daemon ends.
                std::future::pending::<()>().await;
            },
            changed = self.upload.debug_trace.changed() => if changed.is_err() {
                std::future::pending::<()>().await;
            },
            () = self.upload.spool.news_since(seen), if !backing_off && self.truncated_at.is_none() => {}
            () = tokio::time::sleep_until(until) => {}
        }
    }
}
