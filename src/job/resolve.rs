//! What machine does this job get, if any? Asked once, between GitLab's 201 and the journal (decision D23).
//!
//! Rules first, then the job's own wishes within the bounds of the class that they say, then the image. What comes of it
//! stands in the record, with the lines that tell its author.

use super::journal::Record;
use super::lines;
use super::networks::network_of;
use super::state::{Failure, State};
use super::wishes::{Wishes, images, quoted};
use super::{Parts, Runner};
use crate::capacity::Resources;
use crate::config::{self, Class, UnknownImage};
use crate::gitlab::{Containers, JobPayload};
use crate::hex::hex;
use crate::image::manifest::{Ability, ExecutorKind};
use crate::image::store::{Image, ImageError};
use crate::machine_spec::{GuestRunnerSpec, ImageRef, KeepFailed, MachineSpec, Size};
use crate::network::{self, Forward, ForwardConfig, Mode};
use crate::rules::{self, Action, Facts, Rule};
use crate::secret::Secret;
use crate::telemetry::chain;
use dayfly_egress::policy::{HostPort, Policy};
use dayfly_guest_config::{RELAY_URL, WIRE_CONTRACT};
use sha2::{Digest as _, Sha256};

/// Why a job gets no machine.
#[derive(Debug)]
pub(super) enum Unresolved {
    /// Its image cannot be used: it ends, with a line that says so.
    Image {
        /// The image.
        name: String,
        /// Cause.
        error: ImageError,
    },
    /// It is not run, for its author or a rule has it so.
    Refused(Refusal),
}

/// Why a job is not run, for its author.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// [`Failure::Denied`] or [`Failure::Unmet`].
    pub(super) failure: Failure,
    /// What is allowed, in one line.
    pub(super) why: String,
}

/// The machine of a job of this runner entry, by rules, class and payload; room for it is no more than what the runner's
/// class has reserved.
///
/// # Errors
/// [`Unresolved`]: the job cannot have a machine.
pub(super) async fn resolve(parts: &Parts, runner: &Runner, payload: &JobPayload) -> Result<MachineSpec, Unresolved> {
    let load = async |name: &str| {
        parts.images.load(name).await.map_err(|error| Unresolved::Image { name: name.to_owned(), error })
    };
    // All images that its jobs may get have the same executor.
    let first = load(&runner.class.image).await?;
    // Its jobs run in the machine itself: `image:` may name that.
    let shell = first.manifest.executor == ExecutorKind::Shell;
    let wishes = Wishes::read(&payload.asked);
    let rule = judge(parts, runner, payload, &wishes, shell)?;
    let unmet = |why| Unresolved::Refused(Refusal { failure: Failure::Unmet, why });
    let wishes = wishes.map_err(unmet)?;
    let class = match rule.map(Rule::action) {
        // One that is not there any more would not have been loaded.
        Some(Action::Class(name)) => runner.classes.iter().find(|class| class.name == name).unwrap_or(&runner.class),
        _ => &runner.class,
    };
    let size = wishes.size_within(class, runner.class.ceiling()).map_err(unmet)?;
    let by_variable = wishes.image_of(class).map_err(unmet)?;
    let by_key = key_image(class, payload, shell);
    let named = by_variable.or(by_key).unwrap_or(&class.image);
    let image = if named == first.name { first } else { load(named).await? };
    let image_gib = image.disk_bytes.div_ceil(1 << 30);
    if wishes.disk_gib.is_some_and(|gib| gib < image_gib) {
        let why = format!("`DAYFLY_DISK` asks for {} GiB; the image `{named}` takes {image_gib} GiB", size.disk_gib);
        return Err(unmet(why));
    }
    let mut notes: Vec<String> = wishes.words().map(|words| format!("asked for: {words}")).into_iter().collect();
    let mut containers = payload.containers.clone();
    if by_variable.is_none() && by_key.is_some() {
        notes.push(format!("asked for by `image:`: image {named}"));
        containers.image = None;
    }
    if shell {
        notes.extend(no_container(class, &containers, by_variable.is_some()).map_err(unmet)?);
    }
    notes.extend(
        rule.filter(|rule| rule.class.is_some())
            .map(|_| format!("machine class {}, by a rule of this runner", class.name)),
    );
    let (forwards, told_of) = forwards_of(runner, class, &image);
    notes.extend(told_of);
    let network = network_of(class, &image).map_err(|error| Unresolved::Image { name: image.name.clone(), error })?;
    let needed = || needed(&runner.config, &payload.registries);
    let egress = (network == Mode::Relay).then(|| {
        let change = rule.and_then(|rule| rule.egress.as_ref());
        change.map_or_else(|| class.egress.clone(), |change| class.egress.changed(change)).policy(needed())
    });
    let kept = keep_failed(class, &image, payload.source.project_at(&runner.config.url));
    let told = told(runner, &parts.machine_id);
    Ok(MachineSpec { keep_failed: kept, forwards, ..spec(class, &image, size, (network, egress), told, notes) })
}

/// The rule that decides, logged and counted like those that are tried out.
fn judge<'a>(
    parts: &Parts,
    runner: &'a Runner,
    payload: &JobPayload,
    wishes: &Result<Wishes, String>,
    shell: bool,
) -> Result<Option<&'a Rule>, Unresolved> {
    if runner.rules.is_empty() {
        return Ok(None);
    }
    let class = &runner.class;
    let asked = wishes.clone().unwrap_or_default();
    let size = asked.size(class);
    let image = asked.image.as_deref().or_else(|| key_image(class, payload, shell)).unwrap_or(&class.image);
    let facts = Facts {
        runner: &runner.config.name,
        project: payload.source.project_at(&runner.config.url),
        protected: payload.source.protected,
        git_ref: payload.source.git_ref.as_deref(),
        user_id: payload.source.user_id,
        image,
        container: payload.asked.container.as_deref(),
        cpus: size.cpus,
        memory_mib: size.memory_mib,
        disk_gib: size.disk_gib,
    };
    let outcome = rules::decide(&runner.rules, &facts);
    let metrics = parts.metrics.job();
    for rule in &outcome.dry_runs {
        let would = rule.action().word();
        tracing::info!(rule = rule.name, would, project = payload.project, "a rule in its dry run fits a job");
        metrics.rule(&rule.name, "dry_run");
    }
    let Some(rule) = outcome.decided else { return Ok(None) };
    let action = rule.action();
    tracing::info!(rule = rule.name, action = action.word(), project = payload.project, "a rule fits a job");
    metrics.rule(&rule.name, action.word());
    match action {
        Action::Deny(why) => Err(Unresolved::Refused(Refusal { failure: Failure::Denied, why: why.to_owned() })),
        Action::Allow | Action::Class(_) => Ok(Some(rule)),
    }
}

/// The image of the class that the job's `image:` names, where no container is made of that.
fn key_image<'a>(class: &'a Class, payload: &JobPayload, shell: bool) -> Option<&'a str> {
    let wanted = payload.asked.container.as_deref().filter(|_| shell)?;
    class.all_images().find(|image| *image == wanted)
}

/// What the author of a job reads that asks for containers where there are none.
///
/// # Errors
/// The class has it so that such a job fails, and this says what is allowed.
fn no_container(class: &Class, asked: &Containers, chosen: bool) -> Result<Option<String>, String> {
    if let (UnknownImage::Fail, false, Some(image)) = (class.unknown_image, chosen, &asked.image) {
        return Err(format!(
            "`image: {}` names no image of this runner; here jobs may have {}",
            quoted(image),
            images(class)
        ));
    }
    let further = (!class.images.is_empty() && asked.image.is_some()).then(|| images(class));
    Ok(lines::no_containers(asked, further.as_deref()))
}

/// A record of a job that may still need its machine made, and has none resolved: the daemon that accepted it knew no
/// such thing, or could not use the image then. `runner` has the class by which the job was accepted. With it, why the
/// job is not run at all.
pub(super) async fn resolve_late(
    parts: &Parts,
    runner: &Runner,
    record: Record,
    payload: Option<&JobPayload>,
) -> (Record, Option<Refusal>) {
    let (None, Some(payload)) = (&record.machine_spec, payload) else { return (record, None) };
    match resolve(parts, runner, payload).await {
        Ok(spec) => (Record { machine_spec: Some(spec), ..record }, None),
        Err(Unresolved::Image { name, error }) => {
            tracing::error!(key = %record.key, image = name, error = chain(&error), "the job's image cannot be used");
            (record, None)
        }
        Err(Unresolved::Refused(refusal)) => {
            // A guest that has its job goes on with it.
            let begins = matches!(record.state, State::Accepted | State::Booting { .. });
            (record, Some(refusal).filter(|_| begins))
        }
    }
}

/// What a job of this machine takes of the room that was reserved for the largest of its runner's class.
pub(super) fn room(reserved: Resources, class: &Class, spec: &MachineSpec) -> Resources {
    // What the hypervisor takes besides the guest's memory.
    let overhead = reserved.memory_mib.saturating_sub(class.ceiling().memory_mib);
    Resources { cpus: spec.cpus, memory_mib: spec.memory_mib.saturating_add(overhead), disk_gib: spec.disk_gib }
}

fn spec(
    class: &Class,
    image: &Image,
    size: Size,
    (network, egress): (Mode, Option<Policy>),
    runner: GuestRunnerSpec,
    notes: Vec<String>,
) -> MachineSpec {
    MachineSpec {
        image: ImageRef { name: image.name.clone(), digest: image.digest() },
        contract: image.manifest.contract,
        executor: image.manifest.executor_of(&class.docker()),
        cpus: size.cpus,
        memory_mib: size.memory_mib,
        disk_gib: size.disk_gib,
        run_as_root: class.run_as_root,
        nested: class.nested,
        limits: Some(class.limits.clone()),
        start: class.start,
        network,
        egress,
        forwards: Vec::new(),
        runner,
        keep_failed: None,
        notes,
    }
}

/// Whether the machine of a job of this project is kept when that has failed.
fn keep_failed(class: &Class, image: &Image, project: Option<&str>) -> Option<KeepFailed> {
    let keep = class.keep_failed.filter(|_| rules::is_among(&class.keep_failed_projects, project))?;
    if !image.manifest.can(Ability::Stay) {
        tracing::warn!(
            image = image.name,
            "this image was built before the machines of failed jobs could be kept; rebuild it for `keep_failed`"
        );
        return None;
    }
    Some(KeepFailed { for_s: keep.get().as_secs(), at_once: class.keep_failed_max })
}

/// What machines of this class reach beside their door, and what their authors are told of that. A guest of the contract
/// before has no wire that it could go over.
fn forwards_of(runner: &Runner, class: &Class, image: &Image) -> (Vec<Forward>, Option<String>) {
    let of_class = |forward: &&ForwardConfig| forward.classes.contains(&class.name);
    let forwards: Vec<Forward> = runner.forwards.iter().filter(of_class).map(ForwardConfig::forward).collect();
    if forwards.is_empty() {
        return (forwards, None);
    }
    if image.manifest.contract < WIRE_CONTRACT {
        return (Vec::new(), Some("no forwards: this machine's image is too old for them".into()));
    }
    let relay = RELAY_URL.trim_start_matches("http://");
    let told: Vec<String> =
        forwards.iter().map(|forward| format!("{relay}:{} ({})", forward.port, forward.name)).collect();
    (forwards, Some(format!("within reach: {}", told.join(", "))))
}

/// What no job of a runner entry can do without.
fn needed(entry: &config::Runner, registries: &[String]) -> Vec<HostPort> {
    network::always([&entry.url].into_iter().chain(&entry.clone_url), registries)
}

/// What the guest's runner is told is the same for all jobs of an entry, so that a runner may have been told before its job
/// is known: its token, too, which only looks right, and opens nothing (decision D9). `machine_id`: the installation's.
fn told(runner: &Runner, machine_id: &str) -> GuestRunnerSpec {
    let own = Sha256::new().chain_update(b"dayfly guest token\0").chain_update(machine_id);
    let own = own.chain_update(b"\0").chain_update(&runner.config.name).finalize();
    let random = hex(&own[..12]);
    GuestRunnerSpec {
        name: runner.config.name.clone(),
        token: Secret::new(runner.api.token().guest_token(&random)),
        clone_url: runner.config.clone_url.as_ref().unwrap_or(&runner.config.url).clone(),
        ca_pem: runner.ca_pem.clone(),
        direct_download: runner.config.direct_download,
        settings: runner.config.guest_settings(),
    }
}
