//! `dayfly doctor`: can this host run jobs, and how well does it keep them apart?
//!
//! Each finding is one line, with a remedy where there is one. Nothing is taken on trust: libvirt is
//! asked, and the acceleration has to boot a guest that says something (decision D16).

mod boot;
mod confinement;
mod host;
mod service;

use super::fit::Size;
use super::scratch;
use crate::config::{Class, Config, Loaded, Runner};
use crate::daemon::{self, Backends, Installation};
use crate::files::plain;
use crate::gitlab::{RunnerApi, RunnerToken};
use crate::image::alike;
use crate::image::manifest::RunnerOrigin;
use crate::image::store::{Image, ImageStore};
use crate::job;
use crate::machine_spec::Start;
use crate::network::{Choice, EGRESS_PROGRAM, Mode};
use crate::process;
use crate::rng::Rng;
use crate::telemetry::{chain, printable};
use crate::vm::AccelChoice;
use crate::vm::proof::{Places, Subject, prove_confined};
use crate::vm::{self, Accel, Backend, PASSWD, VmId};
use host::Host;
use service::User;
use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

/// How long one GitLab is waited for; people wait too.
const GITLAB_PATIENCE: Duration = Duration::from_secs(15);

/// Bytes of `installation.json` that are read; it has a hundred.
const INSTALLATION_BYTES_MAX: u64 = 16 * 1024;

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Jobs run; something is slower or weaker than it could be.
    Warn,
    /// No job will run.
    Bad,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    /// How much it matters.
    pub level: Level,
    /// What was found.
    pub what: String,
    /// What to do about it; empty: nothing.
    pub remedy: String,
}

impl Finding {
    fn ok(what: impl Into<String>) -> Self {
        Self { level: Level::Ok, what: what.into(), remedy: String::new() }
    }

    fn warn(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { level: Level::Warn, what: what.into(), remedy: remedy.into() }
    }

    fn bad(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { level: Level::Bad, what: what.into(), remedy: remedy.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let level = match self.level {
            Level::Ok => "ok   ",
            Level::Warn => "warn ",
            Level::Bad => "BAD  ",
        };
        write!(f, "{level} {}", printable(&self.what))?;
        if self.remedy.is_empty() { Ok(()) } else { write!(f, "\n      -> {}", printable(&self.remedy)) }
    }
}

/// Arguments of `doctor`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Also run a whole job in a machine of each class; takes as long as that
    #[arg(long)]
    boot: bool,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Looks at everything and prints it; exit code 1 if no job would run.
pub(super) async fn doctor(config: &Path, args: Args) -> anyhow::Result<ExitCode> {
    let loaded = Config::load_or_default(config)?;
    let backends = Backends::real(&loaded.config)?;
    let host = Host::new(Path::new("/"), rustix::process::geteuid().as_raw());
    let mut findings = configuration(&loaded);
    if rustix::process::geteuid().is_root()
        && let Some(user) = User::of(&loaded.config, &host.users())
    {
        findings.extend(user.judge(&loaded).await);
    }
    findings.extend(files(&loaded.config, &host));
    let fenced = confinement::is_fenced(&loaded.config, &host.users()).await;
    findings.extend(images(&loaded.config, &ImageStore::new(&loaded.config.image_directory), fenced));
    for runner in &loaded.config.runner {
        findings.extend(gitlab(&loaded.config, runner, &backends).await);
    }
    // Where the service has its overlays, or else where everybody may have files.
    let overlays = loaded.config.state_directory.join("overlays");
    let dir = scratch::passable(&[&overlays, &std::env::temp_dir(), Path::new("/var/tmp")])?;
    // Beside a daemon that runs, and perhaps as another user.
    let vms = loaded.config.hypervisor.host(dir.path());
    findings.extend(machines(&loaded.config, &vms, dir.path(), &backends.rng).await);
    if args.boot {
        findings.extend(boot::jobs(&loaded.config, dir.path()).await);
    }
    let bad = findings.iter().filter(|finding| finding.level == Level::Bad).count();
    if args.json {
        super::print(&format!("{}\n", serde_json::to_string_pretty(&findings)?))?;
        return Ok(if bad == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    for finding in &findings {
        writeln!(io::stdout(), "{finding}")?;
    }
    if bad == 0 {
        writeln!(io::stdout(), "this host can run jobs")?;
        return Ok(ExitCode::SUCCESS);
    }
    writeln!(io::stdout(), "this host cannot run jobs: {bad} to mend")?;
    Ok(ExitCode::FAILURE)
}

/// The configuration's own warnings.
fn configuration(loaded: &Loaded) -> Vec<Finding> {
    let mut findings: Vec<Finding> =
        loaded.warnings.iter().map(|warning| Finding::warn(format!("configuration: {warning}"), "")).collect();
    findings.push(match (&loaded.file, loaded.check_for_running()) {
        (None, _) => Finding::warn("there is no configuration file: these are the defaults", "dayfly register"),
        (Some(_), _) if loaded.config.runner.is_empty() => Finding::warn("no runner is configured", "dayfly register"),
        (_, Err(error)) => Finding::bad(chain(&error), "dayfly check"),
        (Some(file), Ok(())) => Finding::ok(format!("configuration {} is good", file.display())),
    });
    findings
}

/// What a class's jobs reach of this host and its network. `fenced`: whether there is a fence around the network `user`.
fn network(class: &Class, image: &Image, fenced: bool) -> Finding {
    let name = &class.name;
    match job::network_of(class, image) {
        Err(error) => Finding::bad(format!("class `{name}`: {}", chain(&error)), format!("dayfly image build {}", image.name)),
        Ok(Mode::Relay) => {
            Finding::ok(format!("class `{name}`: network `relay`: its machines have no network card, and reach no port of this host"))
        }
        Ok(Mode::User) if fenced => Finding::ok(format!(
            "class `{name}`: network `user`, inside a fence: a job reaches no port of this host and no private network, but for this host's resolvers and what /etc/dayfly/fence.d lists"
        )),
        Ok(Mode::User) => Finding::warn(
            format!("class `{name}`: network `user`: a job reaches every loopback port of this host and whatever this host reaches"),
            match class.network {
                None => format!("dayfly image build {}, for the network `relay`", image.name),
                Some(_) => "leave `network` away, or run nothing on loopback that trusts everyone who connects, and no jobs of people whom you would not let on this network".into(),
            },
        ),
    }
}

/// Where a class's machines come from, and why; `None`: it was asked for that they boot.
fn start(config: &Config, class: &Class, image: &Image) -> Option<Finding> {
    let name = &class.name;
    let boots = |why: &str| format!("class `{name}`: its machines boot: {why}");
    if class.start == Start::Cold {
        return None;
    }
    Some(if config.hypervisor.backend == Backend::Libvirt {
        Finding::ok(boots("only those of `hypervisor.backend = \"qemu\"` can be restored yet"))
    } else if config.goldens.disk_gib == 0 {
        Finding::ok(boots("`goldens.disk_gib` is 0"))
    } else if !image.manifest.can_hold() {
        let what = boots(&format!("image `{}` is of a time before machines could be frozen", image.name));
        Finding::warn(what, format!("dayfly image build {}", image.name))
    } else {
        Finding::ok(format!(
            "class `{name}`: its machines are restored once one of its kind has been frozen, which `dayfly status` lists; each is sent a copy of its own of that one's memory"
        ))
    })
}

/// Whether a runner's GitLab answers and knows the token. `None`: this host has never run as a runner
/// manager, and asking would make GitLab list one.
async fn gitlab(config: &Config, runner: &Runner, backends: &Backends) -> Option<Finding> {
    // The daemon's user may write there, and doctor may be root.
    let file = plain::open(&config.state_directory.join("installation.json")).ok()?;
    let installation: Installation = serde_json::from_reader(file.take(INSTALLATION_BYTES_MAX)).ok()?;
    let name = &runner.name;
    let of = |error: &dyn std::error::Error| format!("runner `{name}`: {}", chain(error));
    let token = match RunnerToken::from_file(&runner.token_file) {
        Ok(token) => token,
        Err(error) => return Some(Finding::bad(of(&error), "dayfly register")),
    };
    let transport = match backends.transport.open(&daemon::endpoint(runner)) {
        Ok(transport) => transport,
        Err(error) => return Some(Finding::bad(of(&error), "mend the runner's entry in the configuration")),
    };
    let api = RunnerApi::new(transport, token, installation.system_id(), backends.rng.clone());
    Some(match tokio::time::timeout(GITLAB_PATIENCE, api.verify(None)).await {
        Ok(Ok(_)) => Finding::ok(format!("runner `{name}`: {} knows its token", runner.url)),
        Ok(Err(error)) => {
            let remedy = error.explain().unwrap_or_else(|| "if it is not down, look at what is in between".into());
            let what = format!("{}, asking {}", of(&error), runner.url);
            if error.is_transient() { Finding::warn(what, remedy) } else { Finding::bad(what, remedy) }
        }
        Err(_) => Finding::warn(
            format!("runner `{name}`: {} gave no answer within {} s", runner.url, GITLAB_PATIENCE.as_secs()),
            "if it is not down, look at what is in between",
        ),
    })
}

fn files(config: &Config, host: &Host) -> Vec<Finding> {
    let mut findings = host.programs();
    findings.push(host.sub_ids());
    if config.hypervisor.backend == Backend::Libvirt {
        findings.push(host.log_daemon(&config.hypervisor.uri));
    }
    findings.extend(host.kvm_device(config.hypervisor.accel));
    if config.hypervisor.backend == Backend::Libvirt {
        findings.extend(host.confinement(&config.hypervisor.uri));
    }
    findings.extend(egress(config, process::find_program(EGRESS_PROGRAM).is_some()));
    findings.extend(clones(config, |program| process::find_program(program).is_some()));
    findings.push(host.runtime_directory(&config.runtime_directory));
    findings.extend(host.shared_hardware());
    findings.extend(room(config));
    findings
}

/// Whether there is a program that carries the egress of machines without a network card; `None`: no class has such.
fn egress(config: &Config, found: bool) -> Option<Finding> {
    config.class.iter().any(|class| class.network != Some(Choice::User)).then(|| {
        if found {
            return Finding::ok(format!("`{EGRESS_PROGRAM}` is here, for machines without a network card"));
        }
        Finding::bad(
            format!("`{EGRESS_PROGRAM}` is not here: no machine without a network card can be made"),
            "install it beside dayfly, from the package or build that has this dayfly, or set `network = \"user\"`",
        )
    })
}

/// Whether there is what mirrors of repositories are made with; `None`: none are to be made.
fn clones(config: &Config, is_here: impl Fn(&str) -> bool) -> Option<Finding> {
    config.clones.enabled.then(|| {
        let missing: Vec<_> = crate::clones::PROGRAMS.into_iter().filter(|(program, _)| !is_here(program)).collect();
        let [programs, packages] = [0, 1].map(|which| {
            let words = missing.iter().map(|(program, package)| if which == 0 { *program } else { *package });
            words.collect::<Vec<_>>().join(" ")
        });
        if missing.is_empty() {
            return Finding::ok("git and mke2fs are here, for mirrors of repositories");
        }
        Finding::bad(
            format!("not here, and jobs' repositories cannot be kept without: {programs}"),
            format!("apt install {packages}"),
        )
    })
}

/// Whether each class can run at all.
fn room(config: &Config) -> Vec<Finding> {
    let size = match Size::of_host(config) {
        Ok(size) => size,
        Err(error) => {
            return vec![Finding::bad(format!("free disk cannot be told: {error}"), "check `state_directory`")];
        }
    };
    let mut findings: Vec<Finding> = size
        .too_large(config)
        .into_iter()
        .map(|found| Finding::bad(format!("{}: it can never run here", found.what), found.remedy))
        .collect();
    if findings.is_empty() {
        findings.push(Finding::ok(format!(
            "every class fits: {} MiB memory, {} GiB disk for jobs at {}",
            size.memory_mib,
            size.disk_gib,
            size.place.display()
        )));
    }
    let cpus = std::thread::available_parallelism().map_or(u32::MAX, |cpus| cpus.get().try_into().unwrap_or(u32::MAX));
    findings.extend(config.class.iter().filter(|class| class.ceiling().cpus > cpus).map(|class| {
        let what = format!(
            "class `{}` has up to {} CPUs, this host {cpus}: its jobs run, and wait for each other's turn",
            class.name,
            class.ceiling().cpus
        );
        Finding::warn(what, "lower the class's `cpus` or `max_cpus`")
    }));
    findings
}

/// Each image, whose runner is in it, and whether every class has one that will do.
fn images(config: &Config, store: &ImageStore, fenced: bool) -> Vec<Finding> {
    let mut findings = Vec::new();
    match store.list() {
        Err(error) => findings.push(Finding::bad(chain(&error), "check `image_directory`")),
        Ok(images) => findings.extend(images.into_iter().map(|(name, image)| match image {
            Ok(image) => {
                let runner = &image.manifest.runner;
                match runner.origin {
                    RunnerOrigin::Standin => Finding::warn(
                        format!(
                            "image `{name}` holds dayfly's stand-in ({}), not the official gitlab-runner",
                            runner.version
                        ),
                        format!("dayfly image build {name} --runner PATH-TO-gitlab-runner"),
                    ),
                    origin => {
                        Finding::ok(format!("image `{name}` holds gitlab-runner {} (from: {origin})", runner.version))
                    }
                }
            }
            Err(error) => Finding::warn(chain(&error), format!("dayfly image build {name}")),
        })),
    }
    for class in &config.class {
        for name in class.all_images() {
            findings.extend(class_image(class, name, store, fenced));
            findings.extend(store.get(name).ok().and_then(|image| start(config, class, &image)));
        }
    }
    for runner in &config.runner {
        let images: Vec<Image> = config.images_of(runner).filter_map(|(_, name)| store.get(&name).ok()).collect();
        let tested: Vec<Image> = images.into_iter().filter(|image| image.manifest.info.is_some()).collect();
        if let (false, Err(reason)) = (tested.is_empty(), alike::told(&tested)) {
            let remedy = "dayfly image list shows their versions";
            findings.push(Finding::bad(format!("runner `{}` takes no jobs: {reason}", runner.name), remedy));
        }
    }
    findings
}

/// What keeps an image of a class from being used, if anything does.
fn class_image(class: &Class, name: &str, store: &ImageStore, fenced: bool) -> Option<Finding> {
    match store.get(name) {
        Err(error) => {
            let what = format!("class `{}`: {}", class.name, chain(&error));
            Some(Finding::bad(what, format!("dayfly image build {name}")))
        }
        Ok(image) if image.manifest.info.is_none() => {
            let what = format!("class `{}`: image `{name}` has not passed its boot test", class.name);
            Some(Finding::bad(what, format!("dayfly image test {name}")))
        }
        Ok(image) if image.manifest.runner.origin == RunnerOrigin::Standin && !class.allow_standin_runner => {
            let what = format!("class `{}` takes no jobs: its image `{name}` holds the stand-in", class.name);
            Some(Finding::bad(
                what,
                "build the image with the official gitlab-runner, or set `allow_standin_runner = true` for a trial",
            ))
        }
        Ok(image) => Some(network(class, &image, fenced)),
    }
}

/// The back end, and a guest that has to say something. `dir`: for the guest's files.
pub async fn machines(config: &Config, host: &vm::Host, dir: &Path, rng: &Rng) -> Vec<Finding> {
    let Config { hypervisor, .. } = config;
    let (who, absent) = match hypervisor.backend {
        Backend::Libvirt => (
            hypervisor.uri.as_str(),
            "is libvirtd installed and running, and may this user connect (group libvirt)? Try: virsh -c URI list"
                .replace("URI", &hypervisor.uri),
        ),
        Backend::Qemu => ("QEMU, without libvirt,", "apt install qemu-system-x86".to_owned()),
    };
    let info = match host.hypervisor.probe().await {
        Ok(info) => info,
        Err(error) => {
            return vec![Finding::bad(chain(&error), absent)];
        }
    };
    let mut findings = vec![Finding::ok(format!(
        "{who} answers: {}, {} CPUs, {} MiB memory",
        info.version, info.cpus, info.memory_mib
    ))];
    let accel = if config.hypervisor.accel == AccelChoice::Tcg { Accel::Tcg } else { Accel::Kvm };
    let name = if accel == Accel::Tcg { "TCG" } else { "KVM" };
    if accel == Accel::Kvm && !info.kvm_offered {
        findings.push(Finding::bad(
            if hypervisor.backend == Backend::Libvirt {
                "libvirt offers no KVM here"
            } else {
                "QEMU has no KVM here: /dev/kvm is not for this user"
            },
            "see /dev/kvm; `hypervisor.accel = \"tcg\"` runs jobs for a trial, slowly and unisolated",
        ));
        return findings;
    }
    let places = Places { disks: dir, sockets: dir };
    // An installation id of its own: a daemon that runs must not take this VM for a leftover of its own.
    // What jobs will run in, where there is one already.
    let store = ImageStore::new(&config.image_directory);
    let image = config.class.iter().find_map(|class| store.get(&class.image).ok());
    let subject = image.as_ref().map_or(Subject::Sector, Image::proof);
    let passwd = std::fs::read_to_string(PASSWD).unwrap_or_default();
    let users = hypervisor.users(&passwd, config.concurrent);
    if let Err(missing) = &users {
        findings.push(Finding::bad(chain(missing), "systemd-sysusers dayfly.conf, or name others"));
    }
    let user = users.unwrap_or_default().of_others;
    match prove_confined(host, accel, &subject, places, &VmId::random(rng), user, rng).await {
        Ok((proof, measured)) => {
            let took = proof.took.as_millis();
            findings.push(Finding::ok(format!("{name} runs guests: {} spoke after {took} ms", proof.what)));
            let own_uid = rustix::process::geteuid().as_raw();
            findings.extend(measured.iter().flat_map(|it| confinement::judge(it, config, own_uid, &passwd, dir)));
        }
        Err(error) => {
            let remedy = "KVM must be the hardware's own (kvm_intel or kvm_amd; nested, if the cloud offers it); libvirt keeps QEMU's log of the VM below /var/log/libvirt/qemu. For a trial: hypervisor.accel = \"tcg\", slow and without isolation";
            findings.push(Finding::bad(format!("{name} is not proven: {}", chain(&error)), remedy));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::EXAMPLE;

    fn example() -> Config {
        Config::assemble(Some(("/etc/dayfly/config.toml".into(), EXAMPLE.into())), []).unwrap().config
    }

    fn levels(findings: &[Finding]) -> Vec<Level> {
        findings.iter().map(|finding| finding.level).collect()
    }

    #[test]
    fn a_finding_is_a_line_and_its_remedy_another() {
        assert_eq!(Finding::ok("fine").to_string(), "ok    fine");
        assert_eq!(Finding::bad("broken\u{1b}[m", "mend it").to_string(), "BAD   broken\\u{1b}[m\n      -> mend it");
    }

    #[test]
    fn the_weakness_of_the_network_user_is_said() {
        let findings = configuration(&Config::assemble(None, []).unwrap());
        assert!(findings.iter().any(|f| f.what.contains("no configuration file") && f.remedy == "dayfly register"));
        let with = |choice: Option<Choice>, relays: bool, fenced: bool| {
            let mut manifest = crate::image::manifest::tests::example();
            if !relays {
                manifest.networks.clear();
            }
            network(&Class { network: choice, ..Class::new("c", "i") }, &Image::example(manifest), fenced)
        };
        let of = |choice: Option<Choice>, relays: bool| with(choice, relays, false);
        assert_eq!(with(Some(Choice::User), true, true).level, Level::Ok);
        assert!(of(None, true).what.contains("reach no port of this host"));
        let weak = of(None, false);
        assert!(weak.level == Level::Warn && weak.what.contains("every loopback port"), "{weak}");
        assert!(weak.remedy.starts_with("dayfly image build debian-12-shell"), "{weak}");
        assert_eq!(of(Some(Choice::User), true).level, Level::Warn);
        assert_eq!(of(Some(Choice::Relay), false).level, Level::Bad);
    }

    #[test]
    fn where_machines_come_from_is_said_with_the_reason() {
        let of = |backend, disk_gib, can: bool, start| {
            let mut config = example();
            (config.hypervisor.backend, config.goldens.disk_gib) = (backend, disk_gib);
            let mut manifest = crate::image::manifest::tests::example();
            manifest.abilities = can.then(|| "hold".to_owned()).into_iter().collect();
            super::start(&config, &Class { start, ..Class::new("c", "i") }, &Image::example(manifest))
        };
        let what = |finding: Option<Finding>| finding.unwrap().what;
        assert!(
            what(of(Backend::Qemu, 8, true, Start::Auto)).contains("restored once one of its kind has been frozen")
        );
        assert!(what(of(Backend::Libvirt, 8, true, Start::Auto)).contains("boot: only those of"));
        assert!(what(of(Backend::Qemu, 0, true, Start::Auto)).contains("boot: `goldens.disk_gib` is 0"));
        let old = of(Backend::Qemu, 8, false, Start::Restored).unwrap();
        assert_eq!((old.level, old.remedy.as_str()), (Level::Warn, "dayfly image build debian-12-shell"));
        assert_eq!(of(Backend::Qemu, 8, true, Start::Cold), None);
    }

    #[test]
    fn a_host_without_a_program_is_red_for_who_needs_it() {
        let mut config = example();
        assert_eq!(egress(&config, true).map(|finding| finding.level), Some(Level::Ok));
        assert_eq!(egress(&config, false).map(|finding| finding.level), Some(Level::Bad));
        config.class[0].network = Some(Choice::User);
        assert_eq!(egress(&config, false), None);
        assert_eq!(clones(&config, |_| false), None);
        config.clones.enabled = true;
        assert_eq!(clones(&config, |_| true).map(|finding| finding.level), Some(Level::Ok));
        let finding = clones(&config, |program| program != "mke2fs").unwrap();
        assert_eq!((finding.level, finding.remedy.as_str()), (Level::Bad, "apt install e2fsprogs"));
    }

    /// U22: `doctor` is red for a class that is larger than its host.
    #[test]
    fn a_class_that_never_fits_is_bad() {
        let mut config = example();
        config.state_directory = "/".into();
        (config.capacity.memory_mib, config.capacity.disk_gib) = (Some(10_000), Some(100));
        assert!(levels(&room(&config)).iter().all(|level| *level != Level::Bad));
        config.class[0].memory_mib = 1 << 40;
        let findings = room(&config);
        assert_eq!(findings[0].level, Level::Bad);
        assert!(findings[0].what.contains("class `default` takes") && findings[0].what.ends_with("can never run here"));
    }

    #[test]
    fn a_class_without_its_image_is_bad() {
        let dir = tempfile::tempdir().unwrap();
        let findings = images(&example(), &ImageStore::new(dir.path()), false);
        assert_eq!(levels(&findings), [Level::Bad]);
        assert!(
            findings[0].what.contains("class `default`") && findings[0].remedy == "dayfly image build debian-12-shell",
            "{findings:?}"
        );
    }
}
