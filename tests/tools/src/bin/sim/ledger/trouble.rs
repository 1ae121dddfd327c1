//! What is out of order, and since when: no checker asks for more than can be done meanwhile.

use super::{At, Ledger};
use crate::event::Trouble;
use crate::kinds::Kind;
use dayfly::gitlab::JobId;
use std::time::Duration;

/// The uploader's longest pause, jitter included.
const PAUSE_MAX: Duration = Duration::from_secs(70);

impl Ledger {
    pub(super) fn set_down(&mut self, trouble: Trouble, down: bool) {
        let now = self.now;
        if down {
            self.down.entry(trouble).or_insert(now);
        } else if let Some(since) = self.down.remove(&trouble) {
            self.troubles.push((trouble, since, now));
        }
    }

    /// Something was disturbed now, and may be for this long.
    pub(crate) fn spoil(&mut self, trouble: Trouble, lasts: Duration) {
        let now = self.now;
        // Many small ones in a row are one.
        if let Some((_, _, until)) =
            self.troubles.iter_mut().rev().take(4).find(|(t, _, until)| *t == trouble && *until >= now)
        {
            *until = (*until).max(now + lasts);
            return;
        }
        self.troubles.push((trouble, now, now + lasts));
    }

    pub(super) fn fault(&mut self, kind: Kind) {
        use Kind as K;
        match kind {
            K::ServerError
            | K::HtmlError
            | K::ConnectFails
            | K::LoginPage
            | K::NotFound
            | K::Redirect
            | K::PatchLost
            | K::PatchReplyLost
            | K::FinalLost
            | K::FinalReplyLost
            | K::FinalRefused
            | K::FirstWordLost
            | K::Conflict => self.spoil(Trouble::Gitlab, Duration::from_secs(70)),
            K::RateLimited | K::RateLimitedUntil => self.spoil(Trouble::Gitlab, Duration::from_secs(100)),
            K::BlackHole | K::SlowHead | K::SlowBody => self.spoil(Trouble::Gitlab, Duration::from_secs(250)),
            K::RunnerRefused => {
                self.refused_at = Some(self.now);
                self.spoil(Trouble::Gitlab, Duration::from_secs(310));
            }
            // The call fails after its deadline of 30 s or 60 s, and the next one may come late.
            K::DestroyHangs => self.spoil(Trouble::Libvirt, Duration::from_secs(45)),
            K::CreateHangs | K::OverlayHangs => self.spoil(Trouble::Libvirt, Duration::from_secs(75)),
            K::AssignTruncated | K::AssignNonsense => self.spoil(Trouble::Gitlab, Duration::from_secs(15)),
            _ => {}
        }
    }

    /// A task of this job is made to panic.
    pub(crate) fn panics(&mut self, job: JobId) {
        let now = self.now;
        if let Some(note) = self.jobs.get_mut(&job) {
            (note.panicked, note.spool_failed, note.files_failed) = (Some(now), true, Some(now));
        }
        self.spoil(Trouble::Disk, Duration::from_secs(10));
    }

    /// Whether some runner may still be waiting because its token was refused.
    pub(crate) fn refused_lately(&self) -> bool {
        self.refused_at.is_some_and(|at| at + Duration::from_secs(320) > self.now)
    }

    /// Whether this was down between the two, but for times shorter than the pause before a next try.
    pub(crate) fn down_through(&self, kind: Trouble, from: At, to: At) -> bool {
        let mut times: Vec<_> = self.troubles.iter().filter(|(trouble, ..)| *trouble == kind).collect();
        times.sort_by_key(|(_, since, _)| *since);
        let mut down_until = from;
        for (_, since, until) in times {
            if *since > down_until + PAUSE_MAX {
                break;
            }
            down_until = down_until.max(*until);
        }
        down_until >= to
    }

    /// Whether nothing of these disturbed the time between the two.
    pub(crate) fn calm(&self, kinds: &[Trouble], from: At, to: At) -> bool {
        self.down.iter().all(|(trouble, since)| !kinds.contains(trouble) || *since > to)
            && self
                .troubles
                .iter()
                .all(|(trouble, since, until)| !kinds.contains(trouble) || *since > to || *until < from)
    }
}
