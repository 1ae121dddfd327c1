//! What machine does this job get? Asked once, between GitLab's 201 and the journal (decision D23).

use super::journal::Record;
use super::{Parts, Runner};
use crate::capacity::Resources;
use crate::config;
use crate::gitlab::JobPayload;
use crate::image::store::{Image, ImageError};
use crate::machine_spec::{GuestRunnerSpec, ImageRef, MachineSpec};
use crate::network;
use crate::rng::Rng;
use crate::secret::Secret;
use crate::telemetry::chain;

/// The machine of a job of this runner entry, by its class and the payload; room for it is no more than what the class
/// has reserved.
///
/// # Errors
/// The image's: the job cannot have a machine, and ends with a line that says so.
pub(super) async fn resolve(parts: &Parts, runner: &Runner, payload: &JobPayload) -> Result<MachineSpec, ImageError> {
    let image = parts.images.load(&runner.class.image).await?;
    Ok(spec(&runner.class, &image, told(runner, &parts.rng), payload))
}

/// A record of a job that may still need its machine made, and has none resolved: the daemon that accepted it knew no
/// such thing, or could not use the image then. `runner` has the class by which the job was accepted.
pub async fn resolve_late(parts: &Parts, runner: &Runner, record: Record, payload: Option<&JobPayload>) -> Record {
    let (None, Some(payload)) = (&record.machine_spec, payload) else { return record };
    match resolve(parts, runner, payload).await {
        Ok(spec) => Record { machine_spec: Some(spec), ..record },
        Err(error) => {
            tracing::error!(key = %record.key, image = runner.class.image, error = chain(&error), "the job's image cannot be used");
            record
        }
    }
}

/// What a job of this machine takes of the room that was reserved for the largest of its class.
pub(super) fn room(ceiling: Resources, class: &config::Class, spec: &MachineSpec) -> Resources {
    // What the hypervisor takes besides the guest's memory.
    let overhead = ceiling.memory_mib.saturating_sub(class.memory_mib);
    Resources { cpus: spec.cpus, memory_mib: spec.memory_mib.saturating_add(overhead), disk_gib: spec.disk_gib }
}

/// The rules themselves. Nothing in a payload chooses yet; where something does, it is bounded here.
fn spec(class: &config::Class, image: &Image, runner: GuestRunnerSpec, _payload: &JobPayload) -> MachineSpec {
    MachineSpec {
        image: ImageRef { name: class.image.clone(), digest: image.digest() },
        contract: image.manifest.contract,
        executor: image.manifest.executor.clone(),
        cpus: class.cpus,
        memory_mib: class.memory_mib,
        disk_gib: class.disk_gib,
        run_as_root: class.run_as_root,
        network: network::Mode::User,
        runner,
    }
}

fn told(runner: &Runner, rng: &Rng) -> GuestRunnerSpec {
    let random: String = rng.bytes::<12>().iter().map(|b| format!("{b:02x}")).collect();
    GuestRunnerSpec {
        name: runner.config.name.clone(),
        token: Secret::new(runner.api.token().guest_token(&random)),
        clone_url: runner.config.clone_url.as_ref().unwrap_or(&runner.config.url).clone(),
        ca_pem: runner.ca_pem.clone(),
        direct_download: runner.config.direct_download,
        settings: runner.config.guest_settings(),
    }
}
