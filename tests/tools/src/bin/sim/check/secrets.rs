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

    /// Whether a pass is among the words of a text.
    fn passes_in(&self, bytes: &[u8]) -> bool {
        let is_letter = |b: &u8| b.is_ascii_alphanumeric() || *b == b'-' || *b == b'_';
        let mut rest = bytes;
        while let Some(word) = rest.get(..PASS) {
            // From its end: what is no letter there spares the look at all before it.
            if let Some(at) = word.iter().rposition(|b| !is_letter(b)) {
                rest = &rest[at + 1..];
                continue;
            }
            let length = rest.iter().take_while(|b| is_letter(b)).count();
            if length == PASS && std::str::from_utf8(word).is_ok_and(|word| self.passes.contains(word)) {
                return true;
            }
            rest = &rest[length..];
        }
        false
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_is_found_wherever_it_stands_as_a_word() {
        let pass = "p".repeat(PASS);
        let secrets = Secrets { passes: BTreeSet::from([pass.clone()]) };
        let long = "q".repeat(2 * PASS);
        for (text, found) in [
            (pass.clone(), true),
            (format!("{{\"pass\":\"{pass}\"}}"), true),
            (format!("a b {long} {pass}\n{long}"), true),
            (format!("{long} {}, {pass}", &long[..PASS]), true),
            (format!("{pass}p"), false),
            (format!("x{pass}"), false),
            (format!("{} {}", &pass[1..], &pass[1..]), false),
            (long, false),
            (String::new(), false),
        ] {
            assert_eq!(secrets.passes_in(text.as_bytes()), found, "{text}");
        }
    }
}
