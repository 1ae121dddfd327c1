//! What a cold start costs over a bare boot: from GitLab's 201 to the guest's first request, and from the
//! start of a QEMU by hand to the same request, by turns.
//!
//! The daemon is the product's with real files, libvirt and image; only GitLab is the stand-in, in this
//! process, so that its answer takes no time. Both sides are stopped at the door, when the line of the
//! request has come. Boots by turns, so that a machine that slows down slows both; medians, so that one
//! slow boot decides nothing. One boot of each goes before and does not count: it fills the page cache.

use crate::bare;
use crate::figures::{Spread, figure, ms, say};
use crate::watched::{Mark, StopWatch, WatchedDoors, WatchedGitlab, watched};
use crate::{number, text};
use dayfly::clock::Clock;
use dayfly::files::RealFiles;
use dayfly::image::store::{ImageStore, Images as _};
use dayfly::machine_spec::{DockerSettings, Executor};
use dayfly::network::PortRange;
use dayfly::rng::Rng;
use dayfly::telemetry::chain;
use dayfly::vm::disks::Disks;
use dayfly::vm::libvirt::Libvirt;
use dayfly::vm::{AccelChoice, Config};
use dayfly_exec::standin::{JobSpec, ProjectId, Standin};
use dayfly_test_tools::host::{Choice, Host};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{sleep, timeout};

/// Longest wait for one boot, or for its end: under TCG on a busy machine a minute.
const LIMIT: Duration = Duration::from_secs(240);

/// After this the daemon is looked at again.
const GLANCE: Duration = Duration::from_millis(50);

/// Before each boot, so that nothing of the one before still runs.
const REST: Duration = Duration::from_secs(1);

/// The phases: what ends each, and what it is called. The first begins with GitLab's 201.
const PHASES: [(Mark, &str); 7] = [
    (Mark::DiskAsked, "accept"),
    (Mark::DiskReady, "disk"),
    (Mark::Started, "machine"),
    (Mark::Ready, "boot"),
    (Mark::Applied, "apply"),
    (Mark::RunnerStarted, "runner"),
    (Mark::Asked, "ask"),
];

/// What is to be measured.
pub(crate) struct Wanted {
    /// How often.
    pub(crate) runs: u16,
    pub(crate) images: PathBuf,
    pub(crate) image: String,
    pub(crate) accel: AccelChoice,
}

impl Wanted {
    /// `runs`: the option that says how often, and what counts without it. `None`: usage.
    pub(crate) fn read(options: &[(&str, &str)], runs: (&str, u16)) -> Option<Self> {
        Some(Self {
            runs: number(options, runs.0, runs.1)?,
            images: text(options, "--images")?.into(),
            image: text(options, "--image").unwrap_or("debian-12-shell").into(),
            accel: match text(options, "--accel").unwrap_or("auto") {
                "auto" => AccelChoice::Auto,
                "kvm" => AccelChoice::Kvm,
                "tcg" => AccelChoice::Tcg,
                _ => return None,
            },
        })
    }
}

/// Measures and prints.
pub(crate) async fn measure(wanted: &Wanted) -> Result<(), String> {
    let images = ImageStore::new(&wanted.images);
    let image = images.load(&wanted.image).await.map_err(|error| chain(&error))?;
    let watch = StopWatch::default();
    let vms = Libvirt::new(&Config { uri: "qemu:///session".into(), accel: wanted.accel, ..Config::default() }).host();
    let standin = Standin::new(Clock::system(), Rng::system());
    let project = standin.add_project("group/project");
    let runner = standin.add_runner(project);
    let choice = Choice {
        host: watched(&vms, &watch),
        listen: Arc::new(WatchedDoors(watch.clone())),
        accel: wanted.accel,
        images: (Arc::new(images), wanted.image.clone()),
        transport: Arc::new(WatchedGitlab(standin.opener(), watch.clone())),
        url: url::Url::parse("http://gitlab.example").map_err(|error| error.to_string())?,
        token: standin.runner_token(runner).ok_or("the runner has no token")?,
        concurrent: 1,
        ports: PortRange { first: 25_000, last: 25_099 },
        files: Arc::new(RealFiles),
        state_below: None,
    };
    let host = Host::start(choice).await.map_err(|error| chain(&error))?;
    let measured = rounds(
        wanted,
        &Bench {
            standin,
            project,
            host: &host,
            watch,
            disks: vms.disks,
            executor: image.manifest.executor_of(&DockerSettings::default()),
        },
    )
    .await;
    let ended = host.end().await;
    let (dayfly, bare, phases) = measured?;
    if !ended {
        return Err("the daemon did not end".into());
    }
    report(dayfly, bare, phases)
}

struct Bench<'a> {
    standin: Standin,
    project: ProjectId,
    host: &'a Host,
    watch: StopWatch,
    disks: Disks,
    executor: Executor,
}

/// Milliseconds of each boot by dayfly, of each bare one, and of each phase.
type Measured = (Vec<f64>, Vec<f64>, BTreeMap<&'static str, Vec<f64>>);

async fn rounds(wanted: &Wanted, bench: &Bench<'_>) -> Result<Measured, String> {
    let (mut dayfly, mut bare, mut phases) = (Vec::new(), Vec::new(), BTreeMap::<_, Vec<f64>>::new());
    for run in 0..=wanted.runs {
        let by_dayfly = bench.dayfly().await?;
        let spec = bench.watch.spec().ok_or("no VM was started")?;
        sleep(REST).await;
        let by_hand = ms(bare::boot(&bench.disks, &spec, &bench.executor, LIMIT).await?);
        sleep(REST).await;
        let whole: f64 = by_dayfly.iter().map(|(_, ms)| ms).sum();
        let what = if run == 0 { "warm-up".to_owned() } else { format!("run {run}") };
        say(&format!("{what}: dayfly {whole:.0} ms, bare {by_hand:.0} ms"))?;
        if run == 0 {
            continue;
        }
        dayfly.push(whole);
        bare.push(by_hand);
        for (name, ms) in by_dayfly {
            phases.entry(name).or_default().push(ms);
        }
    }
    Ok((dayfly, bare, phases))
}

impl Bench<'_> {
    /// One job by dayfly up to the guest's first request; its phases, which add up to the whole.
    async fn dayfly(&self) -> Result<Vec<(&'static str, f64)>, String> {
        self.watch.reset();
        let job = self.standin.enqueue(self.project, JobSpec::script(["true"]));
        let asked = timeout(LIMIT, self.watch.asked()).await;
        let marks = self.watch.marks();
        // The job has told all that it can; its VM goes before the next one starts.
        self.standin.cancel(job, false);
        let _ = self.host.jobs().kill(job, None, None);
        let gone = async {
            while !self.host.jobs().views().is_empty() {
                sleep(GLANCE).await;
            }
        };
        timeout(LIMIT, gone).await.map_err(|_| "the job's VM did not end")?;
        asked.map_err(|_| format!("the guest did not ask in time; so far: {marks:?}"))?;
        phases(&marks)
    }
}

fn phases(marks: &[(Mark, tokio::time::Instant)]) -> Result<Vec<(&'static str, f64)>, String> {
    let at = |mark: Mark| marks.iter().find(|(known, _)| *known == mark).map(|(_, at)| *at);
    let mut before = at(Mark::PickedUp).ok_or("nobody saw GitLab's 201")?;
    let mut phases = Vec::new();
    for (mark, name) in PHASES {
        // What a guest reports may be lost, or overtaken by what it does: such a phase is empty, and its
        // time is the next one's.
        let now = at(mark).unwrap_or(before).max(before);
        phases.push((name, ms(now - before)));
        before = now;
    }
    Ok(phases)
}

fn report(dayfly: Vec<f64>, bare: Vec<f64>, phases: BTreeMap<&'static str, Vec<f64>>) -> Result<(), String> {
    let spread = |numbers| Spread::of(numbers).ok_or("nothing was measured");
    let (dayfly, bare) = (spread(dayfly)?, spread(bare)?);
    for (name, spread) in [("dayfly", dayfly), ("bare", bare)] {
        say(&format!("{name}: median {:.0} ms, {:.0} to {:.0} ms", spread.median, spread.least, spread.most))?;
    }
    for (_, name) in PHASES {
        let numbers = phases.get(name).cloned().unwrap_or_default();
        figure(&format!("start.phase.{name}"), spread(numbers)?.median, "ms")?;
    }
    figure("start.dayfly", dayfly.median, "ms")?;
    figure("start.bare", bare.median, "ms")?;
    figure("start.cold_ratio", dayfly.median / bare.median, "")
}
