//! Which rule decides, and that nothing but the order and the conditions does.

use super::*;
use proptest::prelude::*;

const JOB: Facts<'_> = Facts {
    runner: "ci",
    project: Some("Group/sub/project"),
    protected: Some(false),
    git_ref: Some("release-1"),
    user_id: Some(7),
    image: "debian-13-shell",
    container: Some("node:22"),
    cpus: 4,
    memory_mib: 4096,
    disk_gib: 40,
};

fn list(of: &[&str]) -> Vec<String> {
    of.iter().map(|text| (*text).to_owned()).collect()
}

/// A rule that holds one condition.
fn rule(set: impl FnOnce(&mut Rule)) -> Rule {
    let mut rule = Rule { name: "r".into(), allow: true, ..Rule::default() };
    set(&mut rule);
    rule
}

#[test]
fn each_condition_is_looked_at() {
    let conditions: [(bool, Rule); 24] = [
        (true, rule(|_| {})),
        (true, rule(|r| r.runner = list(&["other", "ci"]))),
        (false, rule(|r| r.runner = list(&["c*"]))),
        (true, rule(|r| r.project = list(&["group/**"]))),
        (false, rule(|r| r.project = list(&["group/*"]))),
        (true, rule(|r| r.group = list(&["group"]))),
        (true, rule(|r| r.group = list(&["/group/SUB/"]))),
        (false, rule(|r| r.group = list(&["gro", "group/sub/project", "ö"]))),
        (true, rule(|r| r.protected = Some(false))),
        (false, rule(|r| r.protected = Some(true))),
        (true, rule(|r| r.git_ref = list(&["main", "release-*"]))),
        (false, rule(|r| r.git_ref = list(&["Release-*"]))),
        (true, rule(|r| r.user_id = vec![5, 7])),
        (false, rule(|r| r.user_id = vec![5])),
        (true, rule(|r| r.image = list(&["debian-*"]))),
        (false, rule(|r| r.image = list(&["ubuntu-*"]))),
        (true, rule(|r| r.container = list(&["node:*"]))),
        (false, rule(|r| r.container = list(&["python:*"]))),
        (true, rule(|r| r.min_cpus = Some(4))),
        (false, rule(|r| r.min_cpus = Some(5))),
        (true, rule(|r| r.min_memory_mib = Some(4096))),
        (false, rule(|r| r.min_memory_mib = Some(4097))),
        (true, rule(|r| r.min_disk_gib = Some(40))),
        (false, rule(|r| r.min_disk_gib = Some(41))),
    ];
    for (expected, rule) in conditions {
        assert_eq!(rule.fits(&JOB), expected, "{rule:?}");
    }
    let both = rule(|r| (r.min_cpus, r.protected) = (Some(1), Some(true)));
    assert!(!both.fits(&JOB), "all conditions must hold");
}

/// What GitLab did not say is neither of two, and fits no pattern.
#[test]
fn what_is_not_known_fits_no_condition() {
    let unknown = Facts { project: None, protected: None, git_ref: None, user_id: None, container: None, ..JOB };
    for rule in [
        rule(|r| r.project = list(&["**"])),
        rule(|r| r.group = list(&["group"])),
        rule(|r| r.protected = Some(true)),
        rule(|r| r.protected = Some(false)),
        rule(|r| r.git_ref = list(&["**"])),
        rule(|r| r.user_id = vec![7]),
        rule(|r| r.container = list(&["**"])),
    ] {
        assert!(!rule.fits(&unknown), "{rule:?}");
    }
}

#[test]
fn the_first_rule_that_fits_decides_and_dry_runs_do_not() {
    let rules = [
        rule(|r| (r.name, r.min_cpus) = ("large".into(), Some(64))),
        rule(|r| (r.name, r.allow, r.deny, r.dry_run) = ("try".into(), false, Some("no".into()), true)),
        rule(|r| (r.name, r.allow, r.class) = ("class".into(), false, Some("big".into()))),
        rule(|r| (r.name, r.allow, r.deny) = ("rest".into(), false, Some("no".into()))),
    ];
    let outcome = decide(&rules, &JOB);
    assert_eq!(outcome.decided.map(|rule| (rule.name.as_str(), rule.action())), Some(("class", Action::Class("big"))));
    assert_eq!(outcome.dry_runs.iter().map(|rule| rule.name.as_str()).collect::<Vec<_>>(), ["try"]);
    assert_eq!(decide(&rules[3..], &JOB).decided.map(Rule::action), Some(Action::Deny("no")));
    assert_eq!(decide(&rules[..1], &JOB), Outcome::default());
}

#[test]
fn a_rule_that_makes_no_sense_is_told() {
    let flaws = |set: fn(&mut Rule)| {
        rule(set).flaws().into_iter().map(|(key, what, remedy)| format!("{key} {what}; {remedy}")).collect::<Vec<_>>()
    };
    assert_eq!(flaws(|_| {}), [""; 0]);
    assert!(flaws(|r| r.allow = false)[0].contains("says none of `allow`, `deny` and `class`"));
    assert!(flaws(|r| r.class = Some("a".into()))[0].contains("says several of"));
    assert!(flaws(|r| (r.allow, r.deny) = (false, Some(" ".into())))[0].starts_with("deny is empty"));
    assert!(flaws(|r| (r.allow, r.deny) = (false, Some("a\nb".into())))[0].contains("no line of up to"));
    assert!(flaws(|r| r.project = vec![String::new()])[0].starts_with("project has a pattern that is empty"));
    assert!(flaws(|r| r.group = vec!["a/*".into()])[0].contains("patterns are for `project`"));
}

prop_compose! {
    fn any_rule()(
        project in proptest::collection::vec("[ab*/]{1,4}", 0..2),
        protected in proptest::option::of(any::<bool>()),
        min_cpus in proptest::option::of(0u32..6),
        action in 0..3u8,
        dry_run in any::<bool>(),
    ) -> Rule {
        Rule {
            name: "r".into(),
            project, protected, min_cpus, dry_run,
            allow: action == 0,
            deny: (action == 1).then(|| "no".to_owned()),
            class: (action == 2).then(|| "c".to_owned()),
            ..Rule::default()
        }
    }
}

proptest! {
    /// Whatever the rules: the decision is the first that fits and is no dry run, and nothing behind it matters.
    #[test]
    fn what_stands_behind_the_decision_changes_nothing(
        rules in proptest::collection::vec(any_rule(), 0..8),
        more in proptest::collection::vec(any_rule(), 0..4),
        project in proptest::option::of("[ab/]{1,5}"),
        protected in proptest::option::of(any::<bool>()),
        cpus in 0u32..6,
    ) {
        let facts = Facts { project: project.as_deref(), protected, cpus, ..JOB };
        let outcome = decide(&rules, &facts);
        let first = rules.iter().position(|rule| rule.fits(&facts) && !rule.dry_run);
        prop_assert_eq!(outcome.decided, first.map(|at| &rules[at]));
        prop_assert!(outcome.dry_runs.iter().all(|rule| rule.dry_run && rule.fits(&facts)));
        let before = first.unwrap_or(rules.len());
        prop_assert_eq!(outcome.dry_runs.len(), rules[..before].iter().filter(|rule| rule.fits(&facts)).count());
        if let Some(at) = first {
            let changed = [&rules[..=at], &more[..]].concat();
            prop_assert_eq!(decide(&changed, &facts), decide(&rules, &facts));
        }
    }

    /// A rule without conditions fits every job.
    #[test]
    fn a_rule_without_conditions_fits_all(project in proptest::option::of(".*"), cpus in any::<u32>()) {
        let facts = Facts { project: project.as_deref(), cpus, ..Facts::default() };
        let open = rule(|_| {});
        prop_assert!(open.fits(&facts));
    }
}
