//! A record and a machine as they should be.

#![expect(clippy::unwrap_used, reason = "addresses and ids are constants")]

use dayfly::capacity::Resources;
use dayfly::gitlab::JobId;
use dayfly::job::journal::{JobKey, RECORD_VERSION, Record};
use dayfly::job::state::State;
use dayfly::machine_spec::{Executor, GuestRunnerSpec, GuestSettings, ImageRef, MachineSpec, Start};
use dayfly::network::Mode;
use dayfly::secret::Secret;

/// The record of a job that nothing has happened to yet.
#[must_use]
pub fn record(id: u64) -> Record {
    Record {
        version: RECORD_VERSION,
        installation: None,
        key: JobKey { runner: "linux \"vm\"/1".into(), id: JobId(id) },
        gitlab: "https://gitlab.example".parse().unwrap(),
        job_token: Secret::new("glcbt-1"),
        received: "1970-01-01T00:00:00Z".parse().unwrap(),
        received_uptime_ms: None,
        timeout_s: Some(3600),
        name: "test".into(),
        project: "g/p".into(),
        debug_trace: false,
        trace_sections: true,
        knows_interrupted: true,
        class: "small".into(),
        machine_spec: Some(machine_spec()),
        resources: Resources { cpus: 1, memory_mib: 512, disk_gib: 10 },
        machine: None,
        guest_base: None,
        newer_token: None,
        last_lines: None,
        reached: Vec::new(),
        state: State::Accepted,
    }
}

/// The machine of a small class on the image `test`.
#[must_use]
pub fn machine_spec() -> MachineSpec {
    MachineSpec {
        image: ImageRef { name: "test".into(), digest: "ab".repeat(32) },
        contract: dayfly_guest_config::CONTRACT,
        executor: Executor::Shell,
        cpus: 1,
        memory_mib: 512,
        disk_gib: 10,
        run_as_root: false,
        nested: false,
        limits: None,
        start: Start::Auto,
        network: Mode::User,
        egress: None,
        forwards: Vec::new(),
        runner: GuestRunnerSpec {
            name: "linux \"vm\"/1".into(),
            token: Secret::new("glrt-123456789abcdef"),
            clone_url: "https://gitlab.example".parse().unwrap(),
            ca_pem: None,
            direct_download: false,
            settings: GuestSettings::default(),
        },
        keep_failed: None,
        notes: Vec::new(),
    }
}
