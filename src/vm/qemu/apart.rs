//! Where a QEMU is put so that it does not go with us: a scope of systemd's, or a process group.
//!
//! A service's processes are one cgroup to systemd, and a session's go with it. So where systemd runs and lets us,
//! each QEMU gets a scope of its own (`systemd-run --scope`, which becomes the program that it starts: its input and
//! its number stay). Elsewhere it has a process group of its own, which no signal to ours or to our terminal reaches;
//! a service must then say `KillMode=process`, as ours does.

use crate::process::Program;
use crate::vm::{Limits, VmName, VmSpec};
use rustix::process::geteuid;
use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::time::Duration;

/// There while systemd is the system's first process (sd_booted(3)).
const BOOTED: &str = "/run/systemd/system";

/// How long systemd may take to make a scope. Takes 20 ms.
const DEADLINE: Duration = Duration::from_secs(5);

/// Where a user's own systemd is found.
const OF_THE_SESSION: [&str; 2] = ["XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS"];

/// One of the ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Apart {
    /// A scope of the system's, or of the user's own systemd.
    Scope { user: bool },
    /// A process group.
    Group,
}

/// Variables of ours that a program needs to find the user's systemd.
fn session() -> Vec<(&'static str, OsString)> {
    OF_THE_SESSION.into_iter().filter_map(|name| Some((name, std::env::var_os(name)?))).collect()
}

/// What a scope holds its VM to. A user's own systemd takes those of controllers that it was not given, to no effect.
pub(super) fn properties(spec: &VmSpec) -> Vec<String> {
    let Some(limits) = &spec.confine.limits else { return Vec::new() };
    vec![
        format!("MemoryMax={}M", Limits::memory_mib(spec.memory_mib)),
        "MemorySwapMax=0".into(),
        format!("CPUWeight={}", limits.cpu_weight),
        format!("CPUQuota={}%", Limits::cpu_percent(spec.cpus)),
        format!("TasksMax={}", limits.processes),
    ]
}

impl Apart {
    /// The best way that works here: systemd is asked for a scope, once.
    pub(super) async fn find() -> Self {
        if !Path::new(BOOTED).exists() {
            return Self::Group;
        }
        let scope = Self::Scope { user: !geteuid().is_root() };
        let (program, arguments, environment) = scope.command(OsStr::new("true"), None, &[], &[]);
        let mut tried = Program::new(program, DEADLINE).args(arguments);
        for (name, value) in environment {
            tried = tried.env(name, value);
        }
        match tried.run().await {
            Ok(_) => scope,
            Err(error) => {
                tracing::debug!(error = crate::telemetry::chain(&error), "systemd gives us no scopes for machines");
                Self::Group
            }
        }
    }

    /// What to start for this program to run so: program, arguments, variables.
    pub(super) fn command(
        self,
        program: &OsStr,
        name: Option<&VmName>,
        properties: &[String],
        arguments: &[String],
    ) -> (OsString, Vec<OsString>, Vec<(&'static str, OsString)>) {
        let rest = arguments.iter().map(OsString::from);
        match self {
            Self::Group => (program.to_owned(), rest.collect(), Vec::new()),
            Self::Scope { user } => {
                let mut all: Vec<OsString> =
                    [if user { "--user" } else { "--system" }, "--scope", "--quiet", "--collect"]
                        .map(OsString::from)
                        .into();
                if let Some(name) = name {
                    all.push(format!("--unit=dayfly-{name}.scope").into());
                }
                all.extend(properties.iter().map(|property| format!("--property={property}").into()));
                all.extend(["--".into(), program.to_owned()]);
                all.extend(rest);
                ("systemd-run".into(), all, if user { session() } else { Vec::new() })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scope_has_the_machines_name_and_a_group_needs_no_help() {
        let name = VmName::parse("df-abcdefghijklmnop").unwrap();
        let command = |apart: Apart| {
            let (program, arguments, _) =
                apart.command(OsStr::new("qemu"), Some(&name), &["TasksMax=9".into()], &["-name".into(), "a b".into()]);
            [vec![program], arguments].concat().join(OsStr::new(" ")).into_string().unwrap()
        };
        assert_eq!(command(Apart::Group), "qemu -name a b");
        assert_eq!(
            command(Apart::Scope { user: true }),
            "systemd-run --user --scope --quiet --collect --unit=dayfly-df-abcdefghijklmnop.scope --property=TasksMax=9 -- qemu -name a b"
        );
        assert!(command(Apart::Scope { user: false }).starts_with("systemd-run --system --scope"));
    }
}
