//! `dayfly run`: the daemon, once configuration and logging stand.

use crate::config::Config;
use crate::daemon::{self, Connect};
use crate::telemetry::{self, chain};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use std::path::Path;

/// How long blocking calls may take to end after the daemon has: part of the 5 s of a hand-over.
const RUNTIME_PATIENCE: std::time::Duration = std::time::Duration::from_millis(200);

/// Runs until a signal ends it.
pub(super) fn run(config: &Path, connect: Connect) -> anyhow::Result<()> {
    let loaded = Config::load(config)?;
    loaded.check_for_running()?;
    // Its last lines are written out when this is dropped, after all else.
    let _log = telemetry::init(&loaded.config.log)?;
    keep_memory_private();
    for warning in &loaded.warnings {
        tracing::warn!("configuration: {warning}");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let ended = runtime.block_on(daemon::main(loaded, connect));
    // A blocking call that hangs (a disk, libvirt) must not hold a hand-over up.
    runtime.shutdown_timeout(RUNTIME_PATIENCE);
    ended
}

/// Tokens and payloads are in our memory: no core dump, no debugger of the same user (threats.md T36).
fn keep_memory_private() {
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    let results = [setrlimit(Resource::Core, none), set_dumpable_behavior(DumpableBehavior::NotDumpable)];
    for error in results.into_iter().filter_map(Result::err) {
        tracing::warn!(error = %chain(&error), "memory may show in core dumps");
    }
}
