//! Which machines are frozen, for others to be restored from, and which would be of use?
//!
//! A *golden* stands for one [`Key`]: all that a machine and its runner were told before they knew a job, and the host that
//! froze it. If anything of that is another, so is the key, and nothing is restored. Who makes them is the module `golden`;
//! here is what is known, for the machines that are about to be made. Plain data behind a mutex, held for some lines.

use crate::hex::hex;
use crate::machine_spec::{ImageRef, MachineSpec, Start};
use crate::vm::{Accel, Frozen, VmError};
use dayfly_guest_config::{GuestConfig, GuestRunner};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// Failures in a row after which a golden is thrown away.
const FAILURES_MAX: u32 = 2;

/// Goldens that are wished for at once; what comes later is wished for again by the next job.
const WANTED_MAX: usize = 16;

/// Before a golden is made again for a key for which that failed, doubled with each failure.
const AGAIN_AFTER: Duration = Duration::from_secs(600);

/// The longest of those pauses.
const AGAIN_AFTER_MAX: Duration = Duration::from_secs(24 * 3600);

/// One that nothing was restored from for so long goes: most likely there is no such class or runner entry any more.
const UNUSED_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

/// What a machine that is restored must have in common with the one that was frozen, as a digest in hex.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Key(String);

impl Key {
    /// Its 32 characters; a plain file name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What of the host a frozen machine has in it: never the same on two hosts, nor after an upgrade.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HostTraits {
    /// The hypervisor's name and version, its libvirt's too.
    pub hypervisor: String,
    /// How machines run.
    pub accel: Accel,
    /// Kernel and processor of the host.
    pub kernel: String,
    /// See there.
    pub cpu: String,
    /// The installation's machine-id, by which the runner is known to GitLab.
    pub machine_id: String,
}

impl HostTraits {
    /// Those of this host.
    #[must_use]
    pub fn here(hypervisor: String, accel: Accel, machine_id: String) -> Self {
        let system = rustix::system::uname();
        let kernel = format!("{} {}", system.release().to_string_lossy(), system.version().to_string_lossy());
        let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        Self { hypervisor, accel, kernel, cpu: cpu_of(&cpus), machine_id }
    }
}

/// What the first processor of `/proc/cpuinfo` is and can do.
fn cpu_of(text: &str) -> String {
    let telling = ["vendor_id", "cpu family", "model", "model name", "stepping", "microcode", "flags"];
    let first = text.lines().take_while(|line| !line.is_empty());
    let lines = first.filter(|line| telling.contains(&line.split(':').next().unwrap_or_default().trim()));
    lines.collect::<Vec<_>>().join("\n")
}

/// The key of a machine of this spec whose runner is told this.
fn key(host: &HostTraits, spec: &MachineSpec, runner: &GuestRunner) -> Key {
    let text = serde_json::json!({
        // Its machines may have other devices.
        "dayfly": env!("CARGO_PKG_VERSION"),
        "host": host,
        "image": spec.image.digest,
        "contract": spec.contract,
        "executor": spec.executor.name(),
        "cpus": spec.cpus,
        "memory_mib": spec.memory_mib,
        "disk_gib": spec.disk_gib,
        "nested": spec.nested,
        "network": spec.network,
        "runner": runner,
    })
    .to_string();
    let digest = Sha256::new().chain_update(b"dayfly golden 1\0").chain_update(text).finalize();
    Key(hex(&digest[..16]))
}

/// A golden that may be restored from.
#[derive(Clone, Debug)]
pub struct Golden {
    /// Its files.
    pub frozen: Frozen,
    /// Of which image.
    pub image: ImageRef,
    /// Whose jobs it is for: the runner's name.
    pub runner: String,
    /// Bytes of its files.
    pub bytes: u64,
    /// Seconds since 1970 when it was made.
    pub made_s: i64,
}

/// A golden that would be of use.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Its key.
    pub key: Key,
    /// The machine.
    pub spec: MachineSpec,
    /// What its runner is told; all else of it is somebody's, and of no use.
    pub config: GuestConfig,
}

/// The goldens of one daemon. Clones share them.
#[derive(Clone, Default)]
pub struct Goldens(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Default)]
struct State {
    /// None: nothing is restored here.
    host: Option<HostTraits>,
    known: BTreeMap<Key, Known>,
    wanted: BTreeMap<Key, Wanted>,
    /// Of keys for which none could be made: how often, and when it is tried again.
    failed: BTreeMap<Key, (u32, Instant)>,
    problem: Option<String>,
}

struct Known {
    golden: Golden,
    /// In a row.
    failures: u32,
    /// It is not restored from any more; its files go.
    discarded: bool,
    used: Instant,
}

impl Goldens {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on machines may be restored, on this host.
    pub fn begin(&self, host: HostTraits) {
        self.state().host = Some(host);
    }

    /// Whether that is so.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        self.state().host.is_some()
    }

    /// What a machine of this spec is restored from. If there is none yet, one is wished for. `able`: the image's guest can
    /// be frozen.
    #[must_use]
    pub(super) fn find(&self, spec: &MachineSpec, config: &GuestConfig, able: bool) -> Option<(Key, Frozen)> {
        // A machine with disks of its job's repository has more devices than one that was frozen before.
        if spec.start == Start::Cold || !able || config.clone.is_some() {
            return None;
        }
        let mut state = self.state();
        let key = key(state.host.as_ref()?, spec, &config.runner);
        if let Some(known) = state.known.get_mut(&key).filter(|known| !known.discarded) {
            known.used = Instant::now();
            return Some((key, known.golden.frozen.clone()));
        }
        let now = Instant::now();
        let later = state.failed.get(&key).is_some_and(|(_, again)| *again > now);
        if !later && state.wanted.len() < WANTED_MAX && !state.known.contains_key(&key) {
            // Of a job, of which no more is to be known there than what all have in common.
            let config = GuestConfig { pass: String::new(), seed: String::new(), ..config.clone() };
            let wanted = Wanted { key: key.clone(), spec: spec.clone(), config };
            state.wanted.entry(key).or_insert(wanted);
            drop(state);
            self.0.changed.notify_one();
        }
        None
    }

    /// Nothing came of a restore.
    pub(super) fn failed(&self, key: &Key, error: &VmError) {
        let mut state = self.state();
        let Some(known) = state.known.get_mut(key) else { return };
        known.failures += 1;
        let damaged = matches!(error, VmError::Damaged { .. });
        if !known.discarded && (damaged || known.failures >= FAILURES_MAX) {
            known.discarded = true;
            let (image, why) = (
                known.golden.image.name.clone(),
                if damaged {
                    "is not what was frozen any more: its file was changed, or its disk is failing"
                } else {
                    "could not be restored twice in a row"
                },
            );
            tracing::error!(%key, image, "a golden {why}; it is thrown away, and another is made when it is of use");
            state.problem =
                Some(format!("a frozen machine of image `{image}` {why}; jobs boot until there is another one"));
            drop(state);
            self.0.changed.notify_one();
        }
    }

    /// A guest that was restored has shown its pass.
    pub(super) fn did_well(&self, key: &Key) {
        if let Some(known) = self.state().known.get_mut(key) {
            known.failures = 0;
        }
    }

    /// There is one more.
    pub fn add(&self, key: Key, golden: Golden) {
        let mut state = self.state();
        state.wanted.remove(&key);
        state.failed.remove(&key);
        state.problem = None;
        state.known.insert(key, Known { golden, failures: 0, discarded: false, used: Instant::now() });
    }

    /// None could be made for this key.
    pub fn not_made(&self, key: &Key, why: &str) {
        let mut state = self.state();
        let image = state.wanted.remove(key).map(|wanted| wanted.spec.image.name).unwrap_or_default();
        let (times, again) = state.failed.entry(key.clone()).or_insert((0, Instant::now()));
        *times += 1;
        *again = Instant::now() + AGAIN_AFTER.saturating_mul(1 << (*times - 1).min(10)).min(AGAIN_AFTER_MAX);
        state.problem = Some(format!("no machine of image `{image}` could be frozen, so its jobs boot: {why}"));
    }

    /// What is wished for, the first of it; it stays so until it was made, or was not.
    #[must_use]
    pub fn wanted(&self) -> Option<Wanted> {
        self.state().wanted.values().next().cloned()
    }

    /// What is not restored from any more: its files may go, for no machine that is made from now on needs them.
    #[must_use]
    pub fn discarded(&self) -> Vec<Key> {
        self.state().known.iter().filter(|(_, known)| known.discarded).map(|(key, _)| key.clone()).collect()
    }

    /// Its files have gone.
    pub fn forget(&self, key: &Key) {
        self.state().known.remove(key);
    }

    /// Throws away what has not been used for longest, until all of it has no more than these bytes; and what is not
    /// of an image in use any more, or was not used for a week.
    pub fn keep_within(&self, bytes_max: u64, in_use: impl Fn(&Golden) -> bool) {
        let mut state = self.state();
        for known in state.known.values_mut() {
            known.discarded |= !in_use(&known.golden) || known.used.elapsed() > UNUSED_MAX;
        }
        let mut kept: Vec<&mut Known> = state.known.values_mut().filter(|known| !known.discarded).collect();
        kept.sort_by_key(|known| std::cmp::Reverse(known.used));
        let mut bytes = 0_u64;
        for known in kept {
            bytes = bytes.saturating_add(known.golden.bytes);
            known.discarded = bytes > bytes_max;
        }
    }

    /// Waits until something is wished for, or thrown away. Cancel safe.
    pub async fn changed(&self) {
        self.0.changed.notified().await;
    }

    /// All that may be restored from.
    #[must_use]
    pub fn list(&self) -> Vec<Golden> {
        let known = |known: &Known| (!known.discarded).then(|| known.golden.clone());
        self.state().known.values().filter_map(known).collect()
    }

    /// What an operator should look at.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        self.state().problem.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine_spec::{DockerSettings, Executor};

    fn host() -> HostTraits {
        HostTraits {
            hypervisor: "QEMU 7.2".into(),
            accel: Accel::Kvm,
            kernel: "6.1".into(),
            cpu: "a".into(),
            machine_id: "1".repeat(32),
        }
    }

    fn config() -> GuestConfig {
        let line = include_bytes!("../../vm-images/guest-config/golden/contract-3.json");
        GuestConfig::from_line(line).unwrap()
    }

    fn golden(bytes: u64) -> Golden {
        let frozen = Frozen { state: "/g/state".into(), sha256: [1; 32], disk: "/g/disk".into() };
        Golden {
            frozen,
            image: ImageRef { name: "test".into(), digest: "d".into() },
            runner: "r".into(),
            bytes,
            made_s: 0,
        }
    }

    fn damaged() -> VmError {
        VmError::Damaged { name: "df-x".into() }
    }

    fn begun() -> Goldens {
        let goldens = Goldens::default();
        goldens.begin(host());
        goldens
    }

    /// Anything that a frozen machine has in it makes another key.
    #[test]
    fn each_part_of_a_key_makes_another_one() {
        let (spec, runner) = (MachineSpec::example(), config().runner);
        let mut keys = vec![key(&host(), &spec, &runner)];
        let specs: [fn(&mut MachineSpec); 7] = [
            |spec| spec.image.digest = "cd".repeat(32),
            |spec| spec.cpus = 2,
            |spec| spec.memory_mib = 1024,
            |spec| spec.disk_gib = 11,
            |spec| spec.nested = true,
            |spec| spec.network = crate::network::Mode::Relay,
            |spec| spec.executor = Executor::Docker(DockerSettings::default()),
        ];
        keys.extend(specs.map(|change| {
            let mut spec = spec.clone();
            change(&mut spec);
            key(&host(), &spec, &runner)
        }));
        let hosts: [fn(&mut HostTraits); 5] = [
            |host| host.hypervisor = "QEMU 7.3".into(),
            |host| host.accel = Accel::Tcg,
            |host| host.kernel = "6.2".into(),
            |host| host.cpu = "b".into(),
            |host| host.machine_id = "2".repeat(32),
        ];
        keys.extend(hosts.map(|change| {
            let mut host = host();
            change(&mut host);
            key(&host, &spec, &runner)
        }));
        let runners: [fn(&mut GuestRunner); 3] = [
            |runner| runner.config_toml.push('x'),
            |runner| runner.user = "root".into(),
            |runner| {
                runner.ca_pem = Some("PEM".into());
            },
        ];
        keys.extend(runners.map(|change| {
            let mut runner = runner.clone();
            change(&mut runner);
            key(&host(), &spec, &runner)
        }));
        let count = keys.len();
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), count);
        // What is another for each job is not in it.
        let mut other = config();
        (other.pass, other.vm) = ("B".repeat(43), "b".repeat(16));
        assert_eq!(key(&host(), &spec, &other.runner), keys_of(&spec));
    }

    fn keys_of(spec: &MachineSpec) -> Key {
        key(&host(), spec, &config().runner)
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_there_is_wished_for_once_and_then_found() {
        let goldens = begun();
        let spec = MachineSpec::example();
        assert!(goldens.find(&spec, &config(), false).is_none() && goldens.wanted().is_none(), "its guest cannot");
        let disks = dayfly_guest_config::GuestClone { disks: 1, slot: false };
        let with_disks = GuestConfig { clone: Some(disks), ..config() };
        assert!(goldens.find(&spec, &with_disks, true).is_none() && goldens.wanted().is_none(), "it has more disks");
        let cold = MachineSpec { start: Start::Cold, ..spec.clone() };
        assert!(
            goldens.find(&cold, &config(), true).is_none() && goldens.wanted().is_none(),
            "its class does not want"
        );
        for _ in 0..2 {
            assert!(goldens.find(&spec, &config(), true).is_none());
        }
        let key = goldens.wanted().unwrap().key;
        goldens.add(key.clone(), golden(5));
        assert!(goldens.wanted().is_none());
        assert_eq!(goldens.find(&spec, &config(), true).unwrap().0, key);
        let never = Goldens::default();
        assert!(never.find(&spec, &config(), true).is_none() && never.wanted().is_none(), "nothing is restored here");
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_fails_twice_in_a_row_or_is_damaged_goes_and_is_told() {
        let refused = || VmError::refused("restore VM", "df-x", "no");
        let spec = MachineSpec::example();
        for (errors, gone) in [(vec![refused()], false), (vec![refused(), refused()], true), (vec![damaged()], true)] {
            let goldens = begun();
            let key = keys_of(&spec);
            goldens.add(key.clone(), golden(5));
            for error in &errors {
                goldens.failed(&key, error);
            }
            assert_eq!(goldens.find(&spec, &config(), true).is_none(), gone, "{errors:?}");
            assert_eq!(goldens.discarded(), if gone { vec![key.clone()] } else { vec![] });
            assert_eq!(goldens.problem().is_some(), gone);
            goldens.forget(&key);
            assert!(goldens.find(&spec, &config(), true).is_none() && goldens.wanted().is_some(), "another is made");
        }
        let goldens = begun();
        let key = keys_of(&spec);
        goldens.add(key.clone(), golden(5));
        for _ in 0..5 {
            goldens.failed(&key, &refused());
            goldens.did_well(&key);
        }
        assert!(goldens.find(&spec, &config(), true).is_some(), "never twice in a row");
    }

    #[tokio::test(start_paused = true)]
    async fn none_is_made_again_at_once_where_none_could_be() {
        let goldens = begun();
        let spec = MachineSpec::example();
        assert!(goldens.find(&spec, &config(), true).is_none());
        let key = goldens.wanted().unwrap().key;
        goldens.not_made(&key, "it did not boot");
        assert!(goldens.problem().unwrap().contains("it did not boot"));
        assert!(goldens.find(&spec, &config(), true).is_none() && goldens.wanted().is_none());
        tokio::time::advance(AGAIN_AFTER + Duration::from_secs(1)).await;
        assert!(goldens.find(&spec, &config(), true).is_none() && goldens.wanted().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_used_last_is_kept_within_the_budget_and_no_promoted_image() {
        let goldens = begun();
        let specs = [1, 2, 3].map(|cpus| MachineSpec { cpus, ..MachineSpec::example() });
        for spec in &specs {
            goldens.add(keys_of(spec), golden(10));
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        assert!(goldens.find(&specs[0], &config(), true).is_some(), "used just now");
        goldens.keep_within(20, |_| true);
        assert_eq!(goldens.discarded(), [keys_of(&specs[1])]);
        goldens.keep_within(20, |golden| golden.image.digest != "d");
        assert!(goldens.list().is_empty(), "of an image that was replaced");
        let goldens = begun();
        goldens.add(keys_of(&specs[0]), golden(10));
        tokio::time::advance(UNUSED_MAX).await;
        goldens.keep_within(20, |_| true);
        assert_eq!(goldens.list().len(), 1);
        tokio::time::advance(Duration::from_secs(1)).await;
        goldens.keep_within(20, |_| true);
        assert!(goldens.list().is_empty(), "unused for a week");
    }

    #[test]
    fn a_processor_is_told_by_what_it_is_and_not_by_its_clock() {
        let of =
            |mhz: &str| cpu_of(&format!("processor\t: 0\nmodel name\t: X\ncpu MHz\t\t: {mhz}\nflags\t\t: a b\n\nrest"));
        assert_eq!(of("1"), of("2"));
        assert_eq!(of("1"), "model name\t: X\nflags\t\t: a b");
    }
}
