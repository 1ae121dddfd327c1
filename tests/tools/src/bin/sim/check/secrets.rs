//! 7 and 8: the runner token reaches no guest, file or log; a job's secrets its own VM, its files and GitLab alone; a
//! pass its guest config and the runtime directory alone.

use super::{Checker, Findings};
use crate::event::{Event, FileOp, GuestDoes};
use crate::ledger::{Ledger, job_of};
use memchr::memmem::find;
use std::collections::BTreeSet;
use std::fmt;

/// What all runner tokens of a run hold behind their public part.
pub(crate) const RUNNER_CANARY: &str = "RuNnErCaNaRy";

/// What the secret variable of each job begins with; its id follows.
pub(crate) const JOB_CANARY: &str = "JoBcAnArY-";

/// Length of a pass as text.
const PASS: usize = 43;

#[derive(Default)]
pub(crate) struct Secrets {
    passes: BTreeSet<String>,
}

impl Secrets {
    fn look(&self, what: &dyn fmt::Display, bytes: &[u8], own: Option<u64>, findings: &mut Findings) {
        if find(bytes, RUNNER_CANARY.as_bytes()).is_some() {
            findings.add(7, format!("the runner token is in {what}"));
        }
        let mut rest = bytes;
        while let Some(at) = find(rest, JOB_CANARY.as_bytes()) {
            rest = &rest[at + JOB_CANARY.len()..];
            let digits: Vec<u8> = rest.iter().copied().take_while(u8::is_ascii_digit).collect();
            let job = String::from_utf8_lossy(&digits).parse::<u64>().ok();
            if job != own {
                findings.add(8, format!("a secret of job {} is in {what}", job.unwrap_or(0)));
            }
        }
    }

    /// All passes in a text of words.
    fn passes_in(&self, bytes: &[u8]) -> bool {
        let is_letter = |b: &u8| b.is_ascii_alphanumeric() || *b == b'-' || *b == b'_';
        let words = bytes.split(|b| !is_letter(b));
        words
            .filter(|word| word.len() == PASS)
            .any(|word| std::str::from_utf8(word).is_ok_and(|word| self.passes.contains(word)))
    }

    /// The daemon's log of the run.
    pub(crate) fn log(bytes: &[u8], passes: BTreeSet<String>, tokens: &BTreeSet<String>, findings: &mut Findings) {
        let this = Self { passes };
        this.look(&"the log", bytes, None, findings);
        if this.passes_in(bytes) {
            findings.add(8, "a pass is in the log");
        }
        let text = String::from_utf8_lossy(bytes);
        let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-' || c == '_'));
        if words.filter(|word| word.starts_with("glcbt-")).any(|word| tokens.contains(word)) {
            findings.add(8, "a job token is in the log");
        }
    }
}

impl Checker for Secrets {
    fn on(&mut self, event: &Event<'_>, ledger: &Ledger, findings: &mut Findings) {
        match event {
            Event::Guest { does: GuestDoes::Configured { pass }, .. } => drop(self.passes.insert((*pass).to_owned())),
            Event::Guest { job, does: GuestDoes::Reads(bytes), .. } => {
                self.look(&"what a guest got", bytes, Some(job.0), findings);
                let foreign = ledger.jobs.get(job).is_some_and(|note| has_other_token(bytes, &note.token));
                if foreign {
                    findings.add(8, format!("the guest of job {job} got a job token that is not its own"));
                }
            }
            Event::File { op: FileOp::Replace | FileOp::WriteAt, path, bytes, .. } => {
                let of = job_of(path);
                let runtime = path.starts_with("/run");
                let own = of.filter(|_| runtime).map(|(job, _)| job.0);
                self.look(&format_args!("file {}", path.display()), bytes, own, findings);
                if !runtime && self.passes_in(bytes) {
                    findings.add(8, format!("a pass is in {}", path.display()));
                }
            }
            Event::Request(request) => {
                let body = request.body;
                if request.job.is_some() {
                    self.look(&"a request of a job to GitLab", body, request.job.map(|job| job.0), findings);
                }
                if self.passes_in(body) {
                    findings.add(8, "a pass is in a request to GitLab");
                }
            }
            Event::Calls { spec: Some(spec), .. } => {
                self.look(&"what a VM is started from", format!("{spec:?}").as_bytes(), None, findings);
            }
            _ => {}
        }
    }
}

/// Whether a job token is in there that is not this one.
fn has_other_token(bytes: &[u8], own: &str) -> bool {
    let mut rest = bytes;
    while let Some(at) = find(rest, b"glcbt-64_") {
        if !rest[at..].starts_with(own.as_bytes()) {
            return true;
        }
        rest = &rest[at + 1..];
    }
    false
}
