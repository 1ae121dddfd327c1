//! What are we told to do, and by which source?
//!
//! Defaults, then the file, then the environment (`DAYFLY_…`), validated, then immutable. Sections
//! are defined next to the code that obeys them; here they are put together. Unknown keys are
//! errors. Secrets come from files only, so a `Config` may be printed.

mod cache;
mod duration;
mod example;
mod foreign;
mod history;
mod limits;
mod load;
mod origin;
mod schema;
mod validate;

pub use cache::{Cache, CacheUpstream};
pub use duration::Span;
pub use example::EXAMPLE;
pub use history::History;
pub use limits::Limits;
pub use load::{ConfigError, Loaded, environment};
pub use origin::{Origin, Origins};
pub use schema::schema;
pub use validate::{Problem, Problems};

use crate::image::store::VERSIONS_KEPT;
use crate::machine_spec::{DockerSettings, EnvironmentLine, GuestSettings, Size, Start};
use crate::rules::Rule;
use crate::{capacity, control, network, telemetry, vm, web};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use url::Url;

/// The whole configuration. `config.example.toml` explains each key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Journal and spools; survives a reboot.
    pub state_directory: PathBuf,
    /// Payloads, passes, sockets; a tmpfs that survives a restart of the service, not a reboot.
    pub runtime_directory: PathBuf,
    /// Base images, one directory each.
    pub image_directory: PathBuf,
    /// Versions of an image that are kept, the one in use among them.
    pub image_versions: usize,
    /// How old an image may be before it is a problem, and `dayfly image refresh` builds it anew.
    pub image_max_age: Option<Span>,
    /// Jobs at once, over all runners.
    pub concurrent: u32,
    /// Section `[log]`.
    pub log: telemetry::Config,
    /// Section `[control]`.
    pub control: control::Config,
    /// Section `[status]`.
    pub status: web::Config,
    /// Section `[hypervisor]`.
    pub hypervisor: vm::Config,
    /// Section `[network]`.
    pub network: network::Config,
    /// Section `[capacity]`.
    pub capacity: capacity::Config,
    /// Section `[cache]`.
    pub cache: Cache,
    /// Section `[clones]`.
    pub clones: Clones,
    /// Section `[goldens]`.
    pub goldens: Goldens,
    /// Section `[limits]`.
    pub limits: Limits,
    /// Section `[history]`.
    pub history: History,
    /// `[[class]]`: machine classes.
    pub class: Vec<Class>,
    /// `[[forward]]`: what of this host's network jobs reach beside their doors.
    pub forward: Vec<network::ForwardConfig>,
    /// `[[rule]]`: which jobs are taken, and in which class; in order.
    pub rule: Vec<Rule>,
    /// `[[runner]]`: registered runners.
    pub runner: Vec<Runner>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_directory: "/var/lib/dayfly".into(),
            runtime_directory: "/run/dayfly".into(),
            image_directory: "/var/lib/dayfly/images".into(),
            image_versions: VERSIONS_KEPT,
            image_max_age: None,
            concurrent: 1,
            log: telemetry::Config::default(),
            control: control::Config::default(),
            status: web::Config::default(),
            hypervisor: vm::Config::default(),
            network: network::Config::default(),
            capacity: capacity::Config::default(),
            cache: Cache::default(),
            clones: Clones::default(),
            goldens: Goldens::default(),
            limits: Limits::default(),
            history: History::default(),
            class: Vec::new(),
            forward: Vec::new(),
            rule: Vec::new(),
            runner: Vec::new(),
        }
    }
}

impl Config {
    /// The classes that rules may give to jobs of this runner entry, in the order of the rules.
    #[must_use]
    pub fn classes_by_rule(&self, runner: &str) -> Vec<Class> {
        let mut classes: Vec<Class> = Vec::new();
        // One in its dry run is to be ready for the day on which it counts.
        for name in self.rule.iter().filter(|rule| rule.is_of(runner)).filter_map(|rule| rule.class.as_ref()) {
            let class = self.class.iter().find(|class| class.name == *name);
            classes.extend(class.filter(|class| classes.iter().all(|known| known.name != class.name)).cloned());
        }
        classes
    }

    /// All images that jobs of this runner entry may get, each with a class that has it.
    pub fn images_of(&self, runner: &Runner) -> impl Iterator<Item = (Class, String)> {
        let own = self.class.iter().find(|class| class.name == runner.class).cloned();
        own.into_iter().chain(self.classes_by_rule(&runner.name)).flat_map(|class| {
            let names: Vec<String> = class.all_images().map(str::to_owned).collect();
            names.into_iter().map(move |name| (class.clone(), name))
        })
    }
}

/// `[[class]]`: a kind of machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Class {
    /// Its name, for `[[runner]]`.
    pub name: String,
    /// Name of the base image.
    pub image: String,
    /// Further images that its jobs may choose.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub images: Vec<String>,
    /// What becomes of a job whose `image:` is none of these, where no container can be made of it.
    #[serde(default)]
    pub unknown_image: UnknownImage,
    /// Virtual CPUs.
    #[serde(default = "defaults::cpus")]
    pub cpus: u32,
    /// Virtual CPUs that a job may ask for at most; none: `cpus`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_cpus: Option<u32>,
    /// Guest memory, MiB.
    #[serde(default = "defaults::memory_mib")]
    pub memory_mib: u64,
    /// Guest memory that a job may ask for at most, MiB; none: `memory_mib`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_memory_mib: Option<u64>,
    /// Virtual disk, GiB.
    #[serde(default = "defaults::disk_gib")]
    pub disk_gib: u64,
    /// Virtual disk that a job may ask for at most, GiB; none: `disk_gib`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_disk_gib: Option<u64>,
    /// Whether jobs run as root in the guest.
    #[serde(default)]
    pub run_as_root: bool,
    /// The container image of a job that names none, where the image's executor is docker; none: the image's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container_image: Option<String>,
    /// Whether a job's containers see the socket of the guest's Docker.
    #[serde(default)]
    pub docker_socket: bool,
    /// Whether a job's containers may do what the guest's root may.
    #[serde(default)]
    pub privileged_containers: bool,
    /// Whether an image that holds the stand-in runner is good enough. For trials only.
    #[serde(default)]
    pub allow_standin_runner: bool,
    /// Whether guests may run VMs of their own, where the host's KVM lets them.
    #[serde(default)]
    pub nested: bool,
    /// For how long the machine of a job that has failed is kept for an operator; none: it goes at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_failed: Option<Span>,
    /// The projects of whose jobs that is so: patterns, as in rules.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keep_failed_projects: Vec<String>,
    /// So many machines of the class are kept at once at most.
    #[serde(default = "defaults::keep_failed_max")]
    pub keep_failed_max: u32,
    /// Where their machines come from.
    #[serde(default, skip_serializing_if = "Start::is_auto")]
    pub start: Start,
    /// What network its jobs have; none: `relay` where the image can, else `user`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<network::Choice>,
    /// What they may reach without a network card.
    #[serde(default)]
    pub egress: network::EgressConfig,
    /// How much of the host each of its machines may use.
    #[serde(default)]
    pub limits: vm::Limits,
}

/// Section `[clones]`: what is kept of projects' repositories, see [`crate::clones`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Clones {
    /// Whether anything is kept, and given to machines.
    pub enabled: bool,
    /// GiB of all projects together, mirrors and disks.
    pub size_gib: u64,
    /// GiB of one project; a mirror that has grown to that is made anew.
    pub project_gib: u64,
    /// MiB that one fetch may bring.
    pub fetch_mib: u64,
    /// How long one fetch may take.
    pub fetch_deadline: Span,
    /// A mirror that is older is made anew: it has what was deleted at GitLab since.
    pub max_age: Span,
}

impl Default for Clones {
    fn default() -> Self {
        Self {
            enabled: false,
            size_gib: 40,
            project_gib: 10,
            fetch_mib: 4096,
            fetch_deadline: Span::from_secs(120),
            max_age: Span::from_secs(14 * 24 * 3600),
        }
    }
}

/// Section `[goldens]`: frozen machines, which others are restored from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Goldens {
    /// GiB of their files; 0: none is made.
    pub disk_gib: u64,
}

impl Default for Goldens {
    fn default() -> Self {
        Self { disk_gib: 8 }
    }
}

/// What becomes of a job whose `image:` names no image of its class, on machines whose runner makes no containers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UnknownImage {
    /// It runs, and its log says that the key has no effect.
    #[default]
    Warn,
    /// It fails at once.
    Fail,
}

impl Class {
    /// A class of what each must have, and the defaults.
    #[must_use]
    pub fn new(name: impl Into<String>, image: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            image: image.into(),
            images: Vec::new(),
            unknown_image: UnknownImage::Warn,
            cpus: defaults::cpus(),
            max_cpus: None,
            memory_mib: defaults::memory_mib(),
            max_memory_mib: None,
            disk_gib: defaults::disk_gib(),
            max_disk_gib: None,
            run_as_root: false,
            container_image: None,
            docker_socket: false,
            privileged_containers: false,
            allow_standin_runner: false,
            nested: false,
            keep_failed: None,
            keep_failed_projects: Vec::new(),
            keep_failed_max: defaults::keep_failed_max(),
            start: Start::Auto,
            network: None,
            egress: network::EgressConfig::default(),
            limits: vm::Limits::default(),
        }
    }

    /// All images that a job of it may get, the one of jobs that choose none first.
    pub fn all_images(&self) -> impl Iterator<Item = &str> {
        let further = self.images.iter().filter(|further| **further != self.image);
        std::iter::once(&self.image).chain(further).map(String::as_str)
    }

    /// The largest machine that a job of it may get: room for it is reserved before GitLab is asked (decision D23).
    #[must_use]
    pub fn ceiling(&self) -> Size {
        Size {
            cpus: self.max_cpus.unwrap_or(self.cpus).max(self.cpus),
            memory_mib: self.max_memory_mib.unwrap_or(self.memory_mib).max(self.memory_mib),
            disk_gib: self.max_disk_gib.unwrap_or(self.disk_gib).max(self.disk_gib),
        }
    }

    /// The machine of a job that asks for nothing.
    #[must_use]
    pub fn size(&self) -> Size {
        Size { cpus: self.cpus, memory_mib: self.memory_mib, disk_gib: self.disk_gib }
    }

    /// What it says of jobs' containers.
    #[must_use]
    pub fn docker(&self) -> DockerSettings {
        DockerSettings {
            image: self.container_image.clone(),
            helper_image: None,
            socket: self.docker_socket,
            privileged: self.privileged_containers,
        }
    }
}

/// `[[runner]]`: one registered runner of one GitLab.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Runner {
    /// Its name: unique here, and the one that job logs show.
    pub name: String,
    /// GitLab's URL.
    pub url: Url,
    /// File with the runner authentication token, mode 0600.
    pub token_file: PathBuf,
    /// Its machine class.
    pub class: String,
    /// Jobs at once of this runner; none: `concurrent` alone limits it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
    /// GitLab's CA chain, PEM; also given to the guest for git.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_ca_file: Option<PathBuf>,
    /// Client certificate, PEM. Stays on the host, like its key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_cert_file: Option<PathBuf>,
    /// Key of the client certificate, PEM, mode 0600.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_key_file: Option<PathBuf>,
    /// GitLab's URL as guests reach it; none: `url`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clone_url: Option<Url>,
    /// Allows `http://`: the tokens go in the clear.
    #[serde(default)]
    pub allow_insecure_http: bool,
    /// Lets guests fetch artifacts straight from object storage.
    #[serde(default)]
    pub direct_download: bool,
    /// Pause between polls that found nothing.
    #[serde(default = "defaults::poll_interval")]
    pub poll_interval: Span,
    /// MiB of a job's log that the guest's runner takes; none: `limits.spool_mib`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_limit_mib: Option<u64>,
    /// Variables of every job, `NAME=value`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub environment: Vec<EnvironmentLine>,
    /// Before a job's sources are fetched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pre_get_sources_script: Option<String>,
    /// After that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub post_get_sources_script: Option<String>,
    /// Before a job's own commands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pre_build_script: Option<String>,
    /// After them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub post_build_script: Option<String>,
    /// Feature flags of the guest's runner.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub feature_flags: BTreeMap<String, bool>,
    /// Whether jobs may choose their build directory.
    #[serde(default)]
    pub custom_build_dir: bool,
}

impl Runner {
    /// An entry of what each must have, and the defaults.
    #[must_use]
    pub fn new(name: impl Into<String>, url: Url, token_file: impl Into<PathBuf>, class: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            url,
            token_file: token_file.into(),
            class: class.into(),
            limit: None,
            tls_ca_file: None,
            tls_cert_file: None,
            tls_key_file: None,
            clone_url: None,
            allow_insecure_http: false,
            direct_download: false,
            poll_interval: POLL_INTERVAL,
            output_limit_mib: None,
            environment: Vec::new(),
            pre_get_sources_script: None,
            post_get_sources_script: None,
            pre_build_script: None,
            post_build_script: None,
            feature_flags: BTreeMap::new(),
            custom_build_dir: false,
        }
    }

    /// What of it goes into guests' config.toml.
    #[must_use]
    pub fn guest_settings(&self) -> GuestSettings {
        GuestSettings {
            output_limit_mib: self.output_limit_mib,
            environment: self.environment.clone(),
            pre_get_sources_script: self.pre_get_sources_script.clone(),
            post_get_sources_script: self.post_get_sources_script.clone(),
            pre_build_script: self.pre_build_script.clone(),
            post_build_script: self.post_build_script.clone(),
            feature_flags: self.feature_flags.clone(),
            custom_build_dir: self.custom_build_dir,
        }
    }
}

/// The default of `poll_interval`: the official runner's `check_interval`.
pub const POLL_INTERVAL: Span = Span::from_secs(3);

mod defaults {
    use super::Span;

    pub(super) fn cpus() -> u32 {
        2
    }

    pub(super) fn memory_mib() -> u64 {
        2048
    }

    pub(super) fn disk_gib() -> u64 {
        20
    }

    pub(super) fn keep_failed_max() -> u32 {
        1
    }

    pub(super) fn poll_interval() -> Span {
        super::POLL_INTERVAL
    }
}
