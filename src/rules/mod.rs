//! May this job run here, and in which class? `[[rule]]`s in order; the first that fits decides.
//!
//! Pure: what is known of a job goes in as [`Facts`], the rule that decides comes out. `job::resolve` asks, between
//! GitLab's 201 and the journal, and what comes of it stands in the job's record. What GitLab did not say of a job fits
//! no condition, whatever the rule does: whoever wants to take only what is known ends with a rule that denies the rest.

mod glob;

use crate::network::EgressChange;
use serde::{Deserialize, Serialize};

/// Characters of a rule's line for authors at most: it stands in one line of the log.
const DENY_CHARS_MAX: usize = 300;

/// `[[rule]]`: conditions that all must hold, and what becomes of the job. A condition that is not there holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rule {
    /// Its name: in logs, metrics and messages.
    pub name: String,
    /// The job came to one of these runner entries.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub runner: Vec<String>,
    /// The project's path fits one of these patterns, whatever the case.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub project: Vec<String>,
    /// The project lies in one of these groups, or in a group of theirs.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub group: Vec<String>,
    /// The ref is protected at GitLab, or is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protected: Option<bool>,
    /// Branch, tag or full name of the ref fits one of these patterns.
    #[serde(rename = "ref", skip_serializing_if = "Vec::is_empty")]
    pub git_ref: Vec<String>,
    /// GitLab's id of the user who started the job is one of these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub user_id: Vec<u64>,
    /// The image of the job's machine fits one of these patterns.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub image: Vec<String>,
    /// What stands in the job's `image:` fits one of these patterns.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub container: Vec<String>,
    /// The job's machine has so many CPUs, or more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_cpus: Option<u32>,
    /// So much memory, MiB, or more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_memory_mib: Option<u64>,
    /// So much disk, GiB, or more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_disk_gib: Option<u64>,
    /// It is taken, in the runner's class.
    pub allow: bool,
    /// It fails at once, and this is the line for its author.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deny: Option<String>,
    /// It is taken, in this class.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub class: Option<String>,
    /// What this changes of what its class lets it reach.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub egress: Option<EgressChange>,
    /// It is only logged and counted that the rule fits; the next ones decide.
    pub dry_run: bool,
}

/// What is known of a job before it has a machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct Facts<'a> {
    /// The runner entry that it came to.
    pub runner: &'a str,
    /// Its project's whole path.
    pub project: Option<&'a str>,
    /// Whether its ref is protected.
    pub protected: Option<bool>,
    /// Its ref.
    pub git_ref: Option<&'a str>,
    /// Who started it.
    pub user_id: Option<u64>,
    /// The image of its machine, as it asks for it or as its class says.
    pub image: &'a str,
    /// What stands in its `image:`.
    pub container: Option<&'a str>,
    /// Virtual CPUs, likewise.
    pub cpus: u32,
    /// Memory, MiB, likewise.
    pub memory_mib: u64,
    /// Disk, GiB, likewise.
    pub disk_gib: u64,
}

/// What a rule does with a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action<'a> {
    /// It is taken, in the runner's class.
    Allow,
    /// It fails at once, with this line.
    Deny(&'a str),
    /// It is taken, in this class.
    Class(&'a str),
}

impl Action<'_> {
    /// Its word in logs and metrics.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny(_) => "deny",
            Self::Class(_) => "class",
        }
    }
}

/// What came of all rules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome<'a> {
    /// The rule that decides; none: the job is taken, in the runner's class.
    pub decided: Option<&'a Rule>,
    /// Those before it that fit and are dry runs.
    pub dry_runs: Vec<&'a Rule>,
}

/// The first rule that fits and is no dry run.
#[must_use]
pub fn decide<'a>(rules: &'a [Rule], facts: &Facts<'_>) -> Outcome<'a> {
    let mut outcome = Outcome::default();
    for rule in rules.iter().filter(|rule| rule.fits(facts)) {
        if !rule.dry_run {
            outcome.decided = Some(rule);
            break;
        }
        outcome.dry_runs.push(rule);
    }
    outcome
}

impl Rule {
    /// Whether all its conditions hold.
    #[must_use]
    pub fn fits(&self, facts: &Facts<'_>) -> bool {
        let any = |patterns: &[String], name: Option<&str>, fold: bool| {
            patterns.is_empty() || name.is_some_and(|name| patterns.iter().any(|p| glob::fits(p, name, fold)))
        };
        self.is_of(facts.runner)
            && any(&self.project, facts.project, true)
            && (self.group.is_empty() || facts.project.is_some_and(|path| self.group.iter().any(|g| lies_in(path, g))))
            && self.protected.is_none_or(|wanted| facts.protected == Some(wanted))
            && any(&self.git_ref, facts.git_ref, false)
            && (self.user_id.is_empty() || facts.user_id.is_some_and(|user| self.user_id.contains(&user)))
            && any(&self.image, Some(facts.image), false)
            && any(&self.container, facts.container, false)
            && self.min_cpus.is_none_or(|min| facts.cpus >= min)
            && self.min_memory_mib.is_none_or(|min| facts.memory_mib >= min)
            && self.min_disk_gib.is_none_or(|min| facts.disk_gib >= min)
    }

    /// Whether it may fit jobs of this runner entry.
    #[must_use]
    pub fn is_of(&self, runner: &str) -> bool {
        self.runner.is_empty() || self.runner.iter().any(|name| name == runner)
    }

    /// What it does.
    #[must_use]
    pub fn action(&self) -> Action<'_> {
        match (&self.deny, &self.class) {
            (Some(line), _) => Action::Deny(line),
            (None, Some(class)) => Action::Class(class),
            (None, None) => Action::Allow,
        }
    }

    /// What is wrong with it by itself: the key, what it is, and the remedy.
    #[must_use]
    pub fn flaws(&self) -> Vec<(&'static str, String, String)> {
        let mut flaws = Vec::new();
        let mut flaw = |key, what: String, remedy: &str| flaws.push((key, what, remedy.to_owned()));
        let actions = usize::from(self.allow) + usize::from(self.deny.is_some()) + usize::from(self.class.is_some());
        if actions != 1 {
            let what = format!("says {} of `allow`, `deny` and `class`", if actions == 0 { "none" } else { "several" });
            flaw("", what, "set `allow = true`, or `deny = \"a line for the author\"`, or `class = \"NAME\"`");
        }
        if let Some(line) = &self.deny {
            if line.trim().is_empty() {
                flaw("deny", "is empty".into(), "write a line that tells a job's author what is allowed");
            } else if line.chars().any(char::is_control) || line.chars().count() > DENY_CHARS_MAX {
                let what = format!("is no line of up to {DENY_CHARS_MAX} printable characters");
                flaw("deny", what, "shorten it, without line breaks");
            }
        }
        if self.egress.is_some() && self.deny.is_some() {
            flaw("egress", "is of a rule that denies, whose jobs reach nothing".into(), "leave it away");
        }
        let lists = [
            ("project", &self.project),
            ("group", &self.group),
            ("ref", &self.git_ref),
            ("image", &self.image),
            ("container", &self.container),
        ];
        for (key, patterns) in lists {
            if let Err((what, remedy)) = are_patterns(patterns) {
                flaw(key, what, remedy);
            }
        }
        if self.group.iter().any(|group| group.contains(['*', '?'])) {
            flaw("group", "has a pattern in it".into(), "name groups as they are; patterns are for `project`");
        }
        flaws
    }
}

/// Whether a project's whole path fits this pattern, whatever the case.
#[must_use]
pub fn path_fits(pattern: &str, path: &str) -> bool {
    glob::fits(pattern, path, true)
}

/// Whether these may be patterns at all.
///
/// # Errors
/// What is wrong with one of them, and the remedy.
pub fn are_patterns(patterns: &[String]) -> Result<(), (String, &'static str)> {
    if patterns.iter().any(|p| p.is_empty() || p.chars().count() > glob::PATTERN_CHARS_MAX) {
        let what = format!("has a pattern that is empty, or longer than {} characters", glob::PATTERN_CHARS_MAX);
        return Err((what, "write patterns like \"group/**\", or leave the key away"));
    }
    Ok(())
}

/// Whether a project's path fits one of these patterns, whatever the case; one that is not known fits none.
#[must_use]
pub fn is_among(patterns: &[String], project: Option<&str>) -> bool {
    project.is_some_and(|path| patterns.iter().any(|pattern| glob::fits(pattern, path, true)))
}

/// Whether a project of this path lies in this group, however deep.
fn lies_in(path: &str, group: &str) -> bool {
    let group = group.trim_matches('/');
    let (Some(start), Some(rest)) = (path.get(..group.len()), path.get(group.len()..)) else { return false };
    start.eq_ignore_ascii_case(group) && rest.starts_with('/')
}

#[cfg(test)]
mod tests;
