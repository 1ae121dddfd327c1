//! What has the machine of a cloud image said of its taking-in? Lines on its first serial port (`vm-images/cloud/take-in.sh`).

use super::CloudError;
use crate::image::build::Progress;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// Beginning of the lines that are for us.
const SAYS: &str = "dayfly-take-in: ";

/// Lines of its console that are kept for an error.
const LINES_MAX: usize = 8;

/// Packages of a system that are kept: a desktop has three thousand.
const PACKAGES_MAX: usize = 10_000;

/// What is kept of the words for the record.
const WORDS_MAX: usize = 200;

/// What an image is made of, as it says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Facts {
    /// `debian trixie`.
    pub(super) suite: String,
    /// `6.12.48`.
    pub(super) kernel: String,
    pub(super) packages: BTreeMap<String, String>,
}

/// What was heard so far.
#[derive(Debug, Default)]
pub(super) struct Said {
    facts: Facts,
    failed: Option<String>,
    begun: bool,
    done: bool,
    /// The last of its steps.
    step: String,
    /// The last lines that were not for us.
    last: VecDeque<String>,
}

impl Said {
    pub(super) fn hear(&mut self, line: &str, progress: &mut Progress<'_>) {
        let Some(at) = line.find(SAYS) else {
            if self.last.len() == LINES_MAX {
                self.last.pop_front();
            }
            self.last.push_back(line.trim().to_owned());
            return;
        };
        let text: String = line[at + SAYS.len()..].trim().chars().take(WORDS_MAX).collect();
        match text.split_once(' ') {
            Some(("failed:", why)) => self.failed = Some(why.to_owned()),
            Some(("suite", suite)) => self.facts.suite = suite.to_owned(),
            Some(("kernel", kernel)) => self.facts.kernel = kernel.to_owned(),
            Some(("package", package)) => {
                let named = package.split_once(' ').filter(|_| self.facts.packages.len() < PACKAGES_MAX);
                self.facts.packages.extend(named.map(|(name, version)| (name.to_owned(), version.to_owned())));
            }
            _ => {
                (self.begun, self.done) = (self.begun || text == "begun", self.done || text == "done");
                progress(&format!("in its machine: {text}"));
                self.step = text;
            }
        }
    }

    /// The machine has ended.
    pub(super) fn end(self) -> Result<Facts, CloudError> {
        match self {
            Self { failed: Some(why), .. } => Err(CloudError::Machine(why)),
            Self { done: true, facts, .. } => Ok(facts),
            Self { begun: true, step, last, .. } => {
                let why = format!("its machine ended in the middle, at `{step}`; its last lines: {}", lines(last));
                Err(CloudError::Machine(why))
            }
            Self { last, .. } => Err(CloudError::Machine(format!(
                "its machine ended before cloud-init began; its last lines: {}",
                lines(last)
            ))),
        }
    }

    /// It has not, within so long.
    pub(super) fn late(self, within: Duration) -> CloudError {
        let why = match self {
            Self { failed: Some(why), .. } => format!("its machine did not power off, and had failed: {why}"),
            Self { done: true, .. } => {
                "its machine has done all and does not power off; it needs ACPI, as every PC's kernel has".into()
            }
            Self { begun: true, step, last, .. } => format!(
                "its machine came to `{step}` and did not power off; give it longer by --within; its last lines: {}",
                lines(last)
            ),
            Self { last, .. } if last.is_empty() => {
                "its machine did not say a word on its first serial port: does it start on a PC's BIOS, and has it \
                 cloud-init? Images called `genericcloud`, `cloudimg` or `Cloud-Base` have"
                    .into()
            }
            Self { last, .. } => format!(
                "its machine came up, and no cloud-init of it has read the disk CIDATA: it needs cloud-init with the data \
                 source NoCloud; its last lines: {}",
                lines(last)
            ),
        };
        CloudError::Deadline { within, why }
    }
}

fn lines(last: VecDeque<String>) -> String {
    Vec::from(last).join(" / ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(lines: &[&str]) -> Said {
        let mut said = Said::default();
        lines.iter().for_each(|line| said.hear(line, &mut |_| {}));
        said
    }

    #[test]
    fn what_an_image_says_of_itself_is_its_record() {
        let facts = heard(&[
            "[    1.0] Linux version",
            "[   9.1] cloud-init[400]: dayfly-take-in: begun",
            "dayfly-take-in: suite debian trixie",
            "dayfly-take-in: kernel 6.12.48+deb13-cloud-amd64",
            "dayfly-take-in: package git 1:2.47",
            "dayfly-take-in: package broken",
            "dayfly-take-in: done",
        ])
        .end()
        .unwrap();
        let packages = BTreeMap::from([("git".to_owned(), "1:2.47".to_owned())]);
        let kernel = "6.12.48+deb13-cloud-amd64".to_owned();
        assert_eq!(facts, Facts { suite: "debian trixie".into(), kernel, packages });
    }

    #[test]
    fn how_far_it_came_says_what_to_do() {
        let late = |lines: &[&str]| heard(lines).late(Duration::from_secs(9)).to_string();
        assert!(late(&[]).contains("within 9 s its machine did not say a word on its first serial port"));
        let no_cloud_init = late(&["[ 1.0] Linux", "debian login:"]);
        assert!(no_cloud_init.contains("it needs cloud-init") && no_cloud_init.ends_with("Linux / debian login:"));
        let stuck = late(&["dayfly-take-in: begun", "dayfly-take-in: packages git"]);
        assert!(stuck.contains("came to `packages git`") && stuck.contains("--within"), "{stuck}");
        assert!(late(&["dayfly-take-in: begun", "dayfly-take-in: done"]).contains("does not power off"));
        let end = |lines: &[&str]| heard(lines).end().unwrap_err().to_string();
        assert_eq!(
            end(&["dayfly-take-in: begun", "dayfly-take-in: failed: it has no git"]),
            "take it in: it has no git"
        );
        assert!(end(&["x"]).contains("ended before cloud-init began; its last lines: x"));
        assert!(end(&["dayfly-take-in: begun", "panic"]).contains("in the middle, at `begun`"));
    }

    #[test]
    fn what_it_says_is_bounded() {
        let mut said = Said::default();
        for number in 0..20_000 {
            said.hear(&format!("dayfly-take-in: package p{number} {}", "9".repeat(4000)), &mut |_| {});
            said.hear(&format!("line {number}"), &mut |_| {});
        }
        assert_eq!((said.facts.packages.len(), said.last.len()), (PACKAGES_MAX, LINES_MAX));
        assert!(said.facts.packages.values().all(|version| version.len() <= WORDS_MAX));
    }
}
