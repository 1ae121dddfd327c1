//! What a daemon is set up from: how guests run here, and the runners with their tokens and GitLabs.

use super::{Backends, DaemonError, Installation};
use crate::config::{self, Config};
use crate::files::Files;
use crate::gitlab::transport::OpenError;
use crate::gitlab::{Endpoint, Reach, RunnerApi, RunnerToken};
use crate::image::store::Image;
use crate::job::Runner;
use crate::job::journal::Record;
use crate::metrics::Metrics;
use crate::network::ForwardConfig;
use crate::rules::Rule;
use crate::supply::Users;
use crate::telemetry::chain;
use crate::vm::proof::{Places, Subject, memory, prove_kvm};
use crate::vm::{Accel, HostInfo, InstallationId, PASSWD, PASSWD_BYTES_MAX, VmUsers};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// Bytes of what a proof of before rests on, at most.
const GROUND_BYTES_MAX: u64 = 4096;

/// Which virtualisation runs guests: what was asked for, KVM proven by a boot where nothing was. A proof of before holds
/// while nothing that it rests on has changed; if it does not and there are jobs, they go on: their guests run already.
/// `host`: as the hypervisor has told it, if it answers; while it does not, a proof of before is all there is to go by.
pub(super) async fn accel(
    config: &Config,
    backends: &Backends,
    places: Places<'_>,
    installation: &InstallationId,
    restart: bool,
    host: Option<&HostInfo>,
) -> Result<Accel, DaemonError> {
    use crate::vm::AccelChoice;
    match config.hypervisor.accel {
        AccelChoice::Kvm => return Ok(Accel::Kvm),
        AccelChoice::Tcg => {
            tracing::warn!(
                "guests run under TCG (`hypervisor.accel = \"tcg\"`): slow, and NO ISOLATION between a job and this host"
            );
            return Ok(Accel::Tcg);
        }
        AccelChoice::Auto => {}
    }
    // The kernel of an image that jobs will run in, if there is one.
    let mut image = None;
    for class in &config.class {
        image = backends.images.load(&class.image).await.ok();
        if image.is_some() {
            break;
        }
    }
    let subject = image.as_ref().map_or(Subject::Sector, Image::proof);
    let proven = config.state_directory.join("kvm-proven");
    let before = backends.files.read(&proven, GROUND_BYTES_MAX).await.ok();
    let ground = host.map(|host| memory::ground(&subject, host));
    let holds = match &ground {
        Some(ground) => before.as_deref() == Some(ground.as_bytes()),
        None => before.is_some(),
    };
    if holds {
        tracing::info!("KVM runs guests here, as was proven before");
        return Ok(Accel::Kvm);
    }
    match prove_kvm(&backends.host, &subject, places, installation, &backends.rng).await {
        Ok(proof) => {
            let took_ms = u64::try_from(proof.took.as_millis()).unwrap_or(u64::MAX);
            tracing::info!(took_ms, proven_by = proof.what, "KVM runs guests here");
            // Without the mark the next start proves it again.
            if let Err(error) = backends.files.replace(&proven, ground.unwrap_or_default().into_bytes()).await {
                tracing::warn!(error = chain(&error), "note that KVM is proven");
            }
            Ok(Accel::Kvm)
        }
        Err(error) if restart && before.is_some() => {
            tracing::error!(
                error = chain(&error),
                "KVM was proven before, and is not now; the jobs of before go on, and new machines may be lost"
            );
            Ok(Accel::Kvm)
        }
        Err(error) => Err(DaemonError::NoKvm(chain(&error))),
    }
}

/// As whom VMs of jobs run, by the host's list of users.
pub(super) async fn users(config: &Config, files: &dyn Files) -> Result<Users, DaemonError> {
    if !config.hypervisor.is_system() {
        return Ok(Users::default());
    }
    // Without the list there are none.
    let passwd = files.read(Path::new(PASSWD), PASSWD_BYTES_MAX).await.unwrap_or_default();
    let found = config.hypervisor.users(&String::from_utf8_lossy(&passwd), config.concurrent)?;
    if config.hypervisor.vm_users == Some(VmUsers::None) {
        tracing::info!("all machines run as one user, as it is configured");
    } else if found.of_jobs.is_empty() {
        tracing::warn!(
            "all machines run as one user: a QEMU that was taken over is all of them; see `hypervisor.vm_users`"
        );
    } else {
        tracing::info!(users = found.of_jobs.len(), "each machine runs as a user of its own");
    }
    Ok(Users::each(found.of_jobs))
}

/// Reads tokens and certificates, and opens each runner's GitLab. What is known of the GitLab of an entry of `before`
/// stays known.
pub(super) async fn runners(
    config: &Config,
    backends: &Backends,
    installation: &Installation,
    metrics: &Metrics,
    before: &BTreeMap<String, Arc<Runner>>,
) -> Result<BTreeMap<String, Arc<Runner>>, DaemonError> {
    let mut runners = BTreeMap::new();
    for entry in &config.runner {
        let Some(class) = config.class.iter().find(|class| class.name == entry.class) else { continue };
        let name = || entry.name.clone();
        let token = RunnerToken::from_file(&entry.token_file)
            .map_err(|source| DaemonError::Token { runner: name(), source })?;
        let endpoint = endpoint(entry);
        let transport = backends.transport.open(&endpoint).map_err(|source| {
            let key = match &source {
                OpenError::File { path, .. } => key_of(entry, path),
                OpenError::InsecureHttp(_) => Some("url"),
                OpenError::Tls(_) => None,
            };
            DaemonError::Endpoint { runner: name(), key, source: source.into() }
        })?;
        let ca_pem = match &entry.tls_ca_file {
            None => None,
            Some(path) => {
                let bytes = backends.files.read(path, dayfly_guest_config::CONFIG_BYTES_MAX as u64 / 2).await;
                let bytes = bytes.map_err(|source| DaemonError::Endpoint {
                    runner: name(),
                    key: Some("tls_ca_file"),
                    source: OpenError::File { path: path.clone(), source: source.into() }.into(),
                })?;
                Some(String::from_utf8_lossy(&bytes).into_owned())
            }
        };
        let known = before.get(&entry.name).filter(|runner| runner.config.url == entry.url);
        let reach = match known {
            Some(runner) => runner.reach.clone(),
            None => Reach::new(&entry.name, entry.url.as_str(), metrics.gitlab().clone()),
        };
        metrics.job().begin_runner(&entry.name);
        let transport = reach.watch(transport);
        let api = RunnerApi::new(transport.clone(), token, installation.system_id(), backends.rng.clone());
        let rules: Arc<[Rule]> = config.rule.iter().filter(|rule| rule.is_of(&entry.name)).cloned().collect();
        for rule in rules.iter() {
            let does = if rule.dry_run { "dry_run" } else { rule.action().word() };
            metrics.job().begin_rule(&rule.name, does);
        }
        let forwards: Arc<[ForwardConfig]> = config.forward.clone().into();
        for forward in forwards.iter() {
            metrics.guest().begin_forward(&forward.name);
        }
        let (config, class, classes) = (entry.clone(), class.clone(), config.classes_by_rule(&entry.name));
        let runner = Runner { config, class, rules, forwards, classes, transport, reach, api, ca_pem };
        runners.insert(entry.name.clone(), Arc::new(runner));
    }
    Ok(runners)
}

/// The configuration's key of a file.
fn key_of(runner: &config::Runner, path: &Path) -> Option<&'static str> {
    let files = [
        ("tls_ca_file", &runner.tls_ca_file),
        ("tls_cert_file", &runner.tls_cert_file),
        ("tls_key_file", &runner.tls_key_file),
    ];
    files.into_iter().find(|(_, file)| file.as_deref() == Some(path)).map(|(key, _)| key)
}

/// How a runner's GitLab is reached.
#[must_use]
pub fn endpoint(runner: &config::Runner) -> Endpoint {
    Endpoint {
        url: runner.url.clone(),
        tls_ca_file: runner.tls_ca_file.clone(),
        tls_client: runner.tls_cert_file.clone().zip(runner.tls_key_file.clone()),
        allow_insecure_http: runner.allow_insecure_http,
    }
}

/// The runner that speaks for a record: its own, if that is still of the same GitLab, else any that
/// is. The connection serves, for job calls need the job's token only; the machine is the record's. A record of before
/// records had one gets the class that it names.
pub(super) fn runner_of(
    record: &Record,
    runners: &BTreeMap<String, Arc<Runner>>,
    classes: &[config::Class],
) -> Option<Arc<Runner>> {
    let own = runners.get(&record.key.runner).filter(|runner| runner.config.url == record.gitlab);
    let runner = own.or_else(|| runners.values().find(|runner| runner.config.url == record.gitlab))?;
    let named = classes.iter().find(|class| class.name == record.class);
    match named.filter(|class| record.machine_spec.is_none() && **class != runner.class) {
        Some(class) => Some(Arc::new(Runner { class: class.clone(), ..(**runner).clone() })),
        None => Some(runner.clone()),
    }
}
