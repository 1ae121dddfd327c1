//! 5: GitLab's bytes are a prefix of the spool at every instant, and equal at the end; the spool is our first lines,
//! the guest's bytes, our last lines; the verdict's checksum and size are those of the spool.

use super::{Checker, Findings};
use crate::event::{Event, FileOp};
use crate::ledger::{JobNote, Ledger, job_of};
use dayfly::gitlab::JobId;
use dayfly_exec::standin::Route;
use std::collections::BTreeMap;

/// Keeps each spool as the file layer was told to write it.
#[derive(Default)]
pub(crate) struct Trace {
    spools: BTreeMap<JobId, Vec<u8>>,
    /// Last lines that the disk did not take, as they were sent from memory. GitLab may lose the end of them again.
    from_memory: BTreeMap<JobId, Vec<u8>>,
}

impl Checker for Trace {
    fn on(&mut self, event: &Event<'_>, ledger: &Ledger, findings: &mut Findings) {
        match event {
            Event::File { op: FileOp::WriteAt, path, bytes, ok: true } => {
                if let Some((job, "trace")) = job_of(path) {
                    self.spools.entry(job).or_default().extend_from_slice(bytes);
                }
            }
            Event::Held { job, last } => {
                let (Some(note), Some(spool)) = (ledger.jobs.get(&job.id), self.spools.get(&job.id)) else { return };
                if note.trace_spoilt.is_some()
                    || job.erased
                    || note.refused
                    || note.panicked.is_some()
                    || note.begun_anew
                {
                    return;
                }
                let held = &job.trace.bytes;
                // Only a disk that failed leaves lines in memory alone.
                let from_memory = note.spool_failed
                    && held.strip_prefix(spool.as_slice()).is_some_and(|rest| {
                        let kept = self.from_memory.entry(job.id).or_default();
                        let lines = ours(rest).is_ok();
                        if lines && rest.len() > kept.len() {
                            *kept = rest.to_vec();
                        }
                        lines || kept.starts_with(rest)
                    });
                // A disk that failed, and a job that was over before the next daemon began to end it once more.
                let too_late = note.spool_failed && note.verdicts > 0;
                if !spool.starts_with(held) && !from_memory && !too_late {
                    let (at, spool, held) = (common(spool, held), spool.len(), held.len());
                    let what = format!("job {}: GitLab's {held} bytes leave the spool's {spool} at {at}", job.id);
                    findings.add(5, what);
                } else if *last && job.verdicts == 1 && held.len() != spool.len() && !note.spool_failed {
                    let (spool, held) = (spool.len(), held.len());
                    findings.add(5, format!("job {}: GitLab holds {held} of {spool} bytes at the end", job.id));
                }
            }
            Event::Request(request) if request.route == Route::UpdateJob => {
                let (Some(job), Some(update)) = (request.job, request.update) else { return };
                let (Some(spool), Some((sum, size))) = (self.spools.get(&job), &update.trace) else { return };
                let Some(note) = ledger
                    .jobs
                    .get(&job)
                    .filter(|note| !note.spool_failed && !note.refused && note.panicked.is_none() && !note.begun_anew)
                else {
                    return;
                };
                let right = format!("crc32:{:08x}", crc32fast::hash(spool));
                let empty_is_left_out = *size == 0 && spool.is_empty();
                if note.trace_spoilt.is_none()
                    && update.state != "running"
                    && (*sum != right || *size != spool.len() as u64)
                    && !empty_is_left_out
                {
                    let length = spool.len();
                    findings
                        .add(5, format!("job {job}: {sum} of {size} bytes is sent, the spool is {right} of {length}"));
                }
            }
            _ => {}
        }
    }

    fn end(&mut self, ledger: &Ledger, findings: &mut Findings) {
        for (job, spool) in &self.spools {
            let Some(note) = ledger.jobs.get(job) else { continue };
            if let Err(why) = exact(spool, note) {
                findings.add(5, format!("job {job}: {why}"));
            }
        }
    }
}

fn common(a: &[u8], b: &[u8]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// Our lines, the guest's bytes, our lines.
fn exact(spool: &[u8], note: &JobNote) -> Result<(), String> {
    let Some(base) = note.guest_base.and_then(|base| usize::try_from(base).ok()) else {
        return if note.taken > 0 {
            Err(format!("{} bytes of its guest are nowhere", note.taken))
        } else {
            ours(spool)
        };
    };
    let (first, rest) = spool.split_at_checked(base).ok_or("the spool is shorter than its first lines")?;
    ours(first)?;
    if note.full {
        return Ok(());
    }
    let common = common(rest, &note.printed);
    if common < note.taken {
        return Err(format!("only {common} of {} bytes of its guest are in the spool", note.taken));
    }
    ours(&rest[common..])
}

fn ours(bytes: &[u8]) -> Result<(), String> {
    let text = String::from_utf8_lossy(bytes);
    let is_ours = |line: &str| line.as_bytes().get(26) == Some(&b'Z') && line.get(27..31) == Some(" 00O");
    match text.lines().find(|line| !line.is_empty() && !is_ours(line)) {
        Some(line) => Err(format!("a line that is neither its guest's nor ours: {line:?}")),
        None => Ok(()),
    }
}
