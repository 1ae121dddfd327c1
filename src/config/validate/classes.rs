//! Classes, and the rules that may give one: is what they say possible, and does it fit together?

use super::{BRIDGE, BRIDGE_REMEDY, Report, name_of, unique};
use crate::config::origin::nearest_name;
use crate::config::{Class, Config, Runner};
use crate::machine_spec::{Size, Start};
use crate::network::{Choice, EgressConfig, always};
use crate::rules::{Rule, are_patterns};
use crate::vm::Backend;
use dayfly_egress::policy::PolicyError;
use std::time::Duration;

/// Images of a class at most: each is looked at before each poll.
const IMAGES_MAX: usize = 32;

/// A machine is kept for so long at most.
const KEEP_FAILED_MAX: Duration = Duration::from_secs(24 * 3600);

/// Rules at most: each may be looked at for each job, and is a line of the metrics.
const RULES_MAX: usize = 256;

pub(super) fn classes(config: &Config, report: &mut Report<'_>) {
    for (i, class) in config.class.iter().enumerate() {
        one_class(i, class, config, report);
        egress(i, class, config, report);
        unfenced(i, class, config, report);
        for (name, what, remedy) in class.limits.flaws() {
            report.error(&format!("class.{i}.limits.{name}"), what, remedy);
        }
    }
    unique("class", config.class.iter().map(|class| class.name.as_str()), report);
}

fn one_class(i: usize, class: &Class, config: &Config, report: &mut Report<'_>) {
    let key = |name: &str| format!("class.{i}.{name}");
    name_of(&key("name"), &class.name, report);
    // It names a directory below `image_directory`.
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let mut is_image = |key: String, name: &str| {
        if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
            let what = format!("is `{}`", name.escape_debug());
            report.error(&key, what, "name an image as `dayfly image list` shows it");
        }
    };
    is_image(key("image"), &class.image);
    for (n, image) in class.images.iter().enumerate() {
        is_image(key(&format!("images.{n}")), image);
    }
    if class.images.len() > IMAGES_MAX {
        report.error(&key("images"), format!("has more than {IMAGES_MAX} images"), "make several classes of them");
    }
    let is_reference =
        |name: &str| !name.is_empty() && name.chars().all(|c| c.is_ascii_graphic()) && !name.starts_with('-');
    if let Some(name) = class.container_image.as_deref().filter(|name| !is_reference(name)) {
        report.error(
            &key("container_image"),
            format!("is `{}`", name.escape_debug()),
            "name a container image as in a job's `image:`, like debian:12",
        );
    }
    report.not_zero(&key("cpus"), class.cpus == 0);
    report.not_zero(&key("disk_gib"), class.disk_gib == 0);
    report.not_zero(&key("memory_mib"), class.memory_mib == 0);
    for (most, own, name) in [
        (class.max_cpus.map(u64::from), class.cpus.into(), "cpus"),
        (class.max_memory_mib, class.memory_mib, "memory_mib"),
        (class.max_disk_gib, class.disk_gib, "disk_gib"),
    ] {
        if let Some(most) = most.filter(|most| *most < own) {
            let what = format!("is {most}, less than what every job gets (`{name}`, {own})");
            report.error(&key(&format!("max_{name}")), what, format!("raise it, or lower `{name}`"));
        }
    }
    keep_failed(i, class, report);
    if class.start == Start::Restored && config.hypervisor.backend == Backend::Libvirt {
        report.error(
            &key("start"),
            "is `restored`, and libvirt's machines always boot: only those of `hypervisor.backend = \"qemu\"` can be restored yet",
            "leave it away, or set it to \"cold\"",
        );
    } else if class.start == Start::Restored && config.goldens.disk_gib == 0 {
        let what = "is `restored`, but `goldens.disk_gib` is 0: nothing to restore from is ever made";
        report.error(&key("start"), what, "leave it away, or raise that");
    }
    if class.network == Some(Choice::Bridge) {
        report.error(&key("network"), BRIDGE, BRIDGE_REMEDY);
    }
}

/// Whether it is said whose machines are kept, and for a time that ends.
fn keep_failed(i: usize, class: &Class, report: &mut Report<'_>) {
    let key = |name: &str| format!("class.{i}.{name}");
    let projects = &class.keep_failed_projects;
    match class.keep_failed {
        Some(keep) if keep.get() > KEEP_FAILED_MAX => {
            report.error(&key("keep_failed"), "is more than a day", "keep machines for minutes or hours");
        }
        Some(keep) if keep.get().is_zero() => {
            report.error(&key("keep_failed"), "is nothing", "leave it away, and no machine is kept");
        }
        Some(_) if projects.is_empty() => {
            let remedy = "name projects like [\"group/**\"], or all of them by [\"**\"]";
            report.error(&key("keep_failed"), "is for no project: `keep_failed_projects` is not set", remedy);
        }
        Some(_) => {}
        None if !projects.is_empty() => {
            let what = "has no effect without `keep_failed`";
            report.warning(&key("keep_failed_projects"), what, "set that to a time like \"30m\"");
        }
        None => {}
    }
    if let Err((what, remedy)) = are_patterns(projects) {
        report.error(&key("keep_failed_projects"), what, remedy);
    }
    report.not_zero(&key("keep_failed_max"), class.keep_failed_max == 0);
}

/// What `error` says, as what is wrong and the remedy.
fn split(error: &PolicyError) -> (String, String) {
    let text = error.to_string();
    let (what, remedy) = text.rsplit_once(": ").unwrap_or((&text, "config.example.toml shows its form"));
    (format!("makes no sense: {what}"), remedy.to_owned())
}

/// Whether what a rule changes makes sense with each class whose jobs it may fit, and has an effect with one of them.
fn rule_egress(i: usize, rule: &Rule, config: &Config, report: &mut Report<'_>) {
    let Some(change) = rule.egress.as_ref().filter(|_| rule.deny.is_none()) else { return };
    let key = format!("rule.{i}.egress");
    let (mut met, mut effect) = (false, false);
    for runner in config.runner.iter().filter(|runner| rule.is_of(&runner.name)) {
        let name = rule.class.as_ref().unwrap_or(&runner.class);
        let Some(class) = config.class.iter().find(|class| class.name == *name) else { continue };
        met = true;
        if class.network == Some(Choice::User) {
            continue;
        }
        effect = true;
        let urls = [&runner.url].into_iter().chain(&runner.clone_url);
        if let Err(error) = class.egress.changed(change).validate(always(urls, &[])) {
            let (what, remedy) = split(&error);
            return report.error(&key, format!("{what} (with class `{}`)", class.name), remedy);
        }
    }
    if met && !effect {
        let what = "has no effect in the network `user`, where a job reaches what this host reaches";
        report.error(&key, what, "leave it away, or set `network = \"relay\"` in the class");
    }
}

/// Where QEMU has the daemon's own user there is no fence around the network `user`.
fn unfenced(i: usize, class: &Class, config: &Config, report: &mut Report<'_>) {
    if class.network == Some(Choice::User) && !config.hypervisor.is_system() {
        let what =
            "is `user` without `qemu:///system`: a job reaches every loopback port of this host and its whole network";
        report.warning(&format!("class.{i}.network"), what, "use it for trials only, or set `network = \"relay\"`");
    }
}

/// Whether the policy of a class makes sense, and leaves the GitLabs of its jobs to be reached.
fn egress(i: usize, class: &Class, config: &Config, report: &mut Report<'_>) {
    let has_it = |runner: &&Runner| {
        runner.class == class.name || config.classes_by_rule(&runner.name).iter().any(|by| by.name == class.name)
    };
    let urls =
        config.runner.iter().filter(has_it).flat_map(|runner| [&runner.url].into_iter().chain(&runner.clone_url));
    let key = format!("class.{i}.egress");
    if let Err(error) = class.egress.validate(always(urls, &[])) {
        let (what, remedy) = split(&error);
        report.error(&key, what, remedy);
    }
    if class.network == Some(Choice::User) && class.egress != EgressConfig::default() {
        let what = "has no effect in the network `user`, where a job reaches what this host reaches";
        report.error(&key, what, "leave it away, or set `network = \"relay\"`");
    }
}

pub(super) fn rules(config: &Config, report: &mut Report<'_>) {
    for (i, rule) in config.rule.iter().enumerate() {
        one_rule(i, rule, config, report);
    }
    unique("rule", config.rule.iter().map(|rule| rule.name.as_str()), report);
    if config.rule.len() > RULES_MAX {
        report.error("rule", format!("has more than {RULES_MAX} rules"), "put patterns together");
    }
    // What stands behind a rule that fits every job is never looked at.
    let last = config.rule.iter().position(fits_all);
    if let Some(i) = last.filter(|i| i + 1 < config.rule.len()) {
        let what = "has no condition, so no rule behind it is ever looked at";
        report.warning(&format!("rule.{i}"), what, "move it to the end, or give it a condition");
    }
}

/// Whether it decides on every job that it meets.
fn fits_all(rule: &Rule) -> bool {
    let Rule { name, allow, deny, class, dry_run: false, .. } = rule else { return false };
    let open = Rule {
        name: name.clone(),
        allow: *allow,
        deny: deny.clone(),
        class: class.clone(),
        egress: rule.egress.clone(),
        ..Rule::default()
    };
    *rule == open
}

fn one_rule(i: usize, rule: &Rule, config: &Config, report: &mut Report<'_>) {
    let key = |name: &str| if name.is_empty() { format!("rule.{i}") } else { format!("rule.{i}.{name}") };
    name_of(&key("name"), &rule.name, report);
    for (name, what, remedy) in rule.flaws() {
        report.error(&key(name), what, remedy);
    }
    for (n, name) in rule.runner.iter().enumerate() {
        if !config.runner.iter().any(|runner| runner.name == *name) {
            let known = config.runner.iter().map(|runner| runner.name.as_str());
            let remedy = nearest_name(name, known).map_or_else(|| "add it, or take it out".into(), did_you_mean);
            report.error(&key(&format!("runner.{n}")), format!("is no runner: `{}`", name.escape_debug()), remedy);
        }
    }
    rule_egress(i, rule, config, report);
    let Some(wanted) = &rule.class else { return };
    let Some(class) = config.class.iter().find(|class| class.name == *wanted) else {
        let known = config.class.iter().map(|class| class.name.as_str());
        let remedy = nearest_name(wanted, known).map_or_else(|| "add a [[class]] of this name".into(), did_you_mean);
        report.error(&key("class"), format!("names the unknown class `{}`", wanted.escape_debug()), remedy);
        return;
    };
    for runner in config.runner.iter().filter(|runner| rule.is_of(&runner.name)) {
        let Some(own) = config.class.iter().find(|class| class.name == runner.class) else { continue };
        if let Some((what, name)) = beyond(class.ceiling(), own.ceiling()) {
            let what = format!(
                "names `{wanted}`, whose machines may have {what}: more than is reserved for a job of runner `{}` (class `{}`)",
                runner.name, own.name
            );
            let remedy =
                format!("raise `max_{name}` of class `{}`, or name other runners in the rule's `runner`", own.name);
            report.error(&key("class"), what, remedy);
        }
    }
}

fn did_you_mean(meant: &str) -> String {
    format!("did you mean `{meant}`?")
}

/// In what a size does not fit into a room, and the key of that.
fn beyond(size: Size, room: Size) -> Option<(String, &'static str)> {
    if size.cpus > room.cpus {
        Some((format!("{} CPUs, not {}", size.cpus, room.cpus), "cpus"))
    } else if size.memory_mib > room.memory_mib {
        Some((format!("{} MiB memory, not {}", size.memory_mib, room.memory_mib), "memory_mib"))
    } else if size.disk_gib > room.disk_gib {
        Some((format!("{} GiB disk, not {}", size.disk_gib, room.disk_gib), "disk_gib"))
    } else {
        None
    }
}
