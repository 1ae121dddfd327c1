//! `dayfly run`: the daemon, once configuration and logging stand.

use crate::config::Config;
use crate::daemon;
use crate::telemetry::{self, chain};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use std::path::Path;

/// Runs until a signal ends it.
pub(super) fn run(config: &Path) -> anyhow::Result<()> {
    let loaded = Config::load(config)?;
    loaded.check_for_running()?;
    // Its last lines are written out when this is dropped, after all else.
    let _log = telemetry::init(&loaded.config.log)?;
    keep_memory_private();
    for warning in &loaded.warnings {
        tracing::warn!("configuration: {warning}");
    }
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(daemon::main(loaded))
}

/// Tokens and payloads are in our memory: no core dump, no debugger of the same user (safety.md T36).
fn keep_memory_private() {
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    let results = [setrlimit(Resource::Core, none), set_dumpable_behavior(DumpableBehavior::NotDumpable)];
    for error in results.into_iter().filter_map(Result::err) {
        tracing::warn!(error = %chain(&error), "memory may show in core dumps");
    }
}
