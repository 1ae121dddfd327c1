//! A configuration that is misread: the checkers know what was meant.

use super::Bug;
use dayfly::cache::CacheTenant;
use dayfly::config::{Config, Span};

/// As good as never.
const NEVER: Span = Span::from_secs(30 * 24 * 3600);

/// Makes of the configuration what a daemon with this bug goes by, in its `lives`-th life.
pub(super) fn misread(bug: Bug, config: &mut Config, lives: u32) {
    let limits = &mut config.limits;
    match bug {
        Bug::CacheTenantTooWide => {
            config.cache.tenant = vec![CacheTenant { name: "all".into(), projects: vec!["**/*".into()] }];
        }
        Bug::OneJobTooMany => config.concurrent += 1,
        Bug::BootDeadlineEarly => limits.boot_deadline = Span::from_secs(limits.boot_deadline.get().as_secs() / 10),
        Bug::BootDeadlineNever => limits.boot_deadline = NEVER,
        Bug::SilenceNever => limits.silence_deadline = NEVER,
        Bug::SilenceWhileAway if lives > 1 => limits.silence_deadline = Span::from_secs(1),
        Bug::CapIgnored => limits.timeout_grace = NEVER,
        Bug::GraceNeverOver => {
            (limits.canceling_grace, limits.cancel_grace, limits.power_off_grace) = (NEVER, NEVER, NEVER);
        }
        Bug::KeptForEver => {
            for class in &mut config.class {
                class.keep_failed = class.keep_failed.map(|_| NEVER);
            }
        }
        _ => {}
    }
}
