//! What a restored start costs over a bare boot: from GitLab's 201 to the hand-out, by the lines that its author reads,
//! and from the start of a QEMU by hand to its guest's request, by turns.
//!
//! The daemon is the product's with plain QEMU. Its first job boots; once it has frozen a machine, and restored one from
//! that, each job after it is restored. One of each goes before and does not count.

use crate::bare;
use crate::figures::{Spread, figure, ms, say};
use crate::start::Wanted;
use crate::watched::{StopWatch, watched};
use dayfly::clock::Clock;
use dayfly::files::RealFiles;
use dayfly::gitlab::JobId;
use dayfly::image::store::{ImageStore, Images as _};
use dayfly::machine_spec::DockerSettings;
use dayfly::network::{PortRange, Tcp};
use dayfly::rng::Rng;
use dayfly::telemetry::chain;
use dayfly::vm::{Backend, Config};
use dayfly_exec::standin::{JobSpec, ProjectId, Standin};
use dayfly_test_tools::host::{Choice, Host};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// Longest wait for one boot, one golden, or an end: under TCG on a busy machine minutes.
const LIMIT: Duration = Duration::from_secs(400);

/// After this it is looked again.
const GLANCE: Duration = Duration::from_millis(20);

/// Before each start, so that nothing of the one before still runs.
const REST: Duration = Duration::from_secs(1);

/// The lines of a boot section whose times are told, and what they are called here.
const LINES: [(&str, &str); 4] = [
    ("disk ready", "disk"),
    ("machine restored", "restore"),
    ("guest has its identity", "identity"),
    ("gitlab-runner asks for the job", "ask"),
];

/// Measures and prints.
pub(crate) async fn measure(wanted: &Wanted) -> Result<(), String> {
    let images = ImageStore::new(&wanted.images);
    let image = images.load(&wanted.image).await.map_err(|error| chain(&error))?;
    if !image.manifest.can_hold() {
        return Err(format!("machines of image `{}` cannot be frozen: build it again", wanted.image));
    }
    // Short paths: unix sockets end at 107 bytes.
    let own = tempfile::Builder::new().prefix("df-q").tempdir_in("/tmp").map_err(|error| error.to_string())?;
    let hypervisor = Config { backend: Backend::Qemu, accel: wanted.accel, ..Config::default() };
    let vms = hypervisor.host(&own.path().join("vm"));
    let watch = StopWatch::default();
    let standin = Standin::new(Clock::system(), Rng::system());
    let project = standin.add_project("group/project");
    let runner = standin.add_runner(project);
    let choice = Choice {
        host: watched(&vms, &watch),
        hypervisor,
        listen: Arc::new(Tcp),
        accel: wanted.accel,
        images: (Arc::new(images), wanted.image.clone()),
        transport: standin.opener(),
        url: url::Url::parse("http://gitlab.example").map_err(|error| error.to_string())?,
        token: standin.runner_token(runner).ok_or("the runner has no token")?,
        concurrent: 2,
        ports: PortRange { first: 25_000, last: 25_099 },
        files: Arc::new(RealFiles),
        state_below: Some(own.path().to_owned()),
    };
    std::fs::create_dir(own.path().join("vm")).map_err(|error| error.to_string())?;
    let host = Host::start(choice).await.map_err(|error| chain(&error))?;
    let bench = Bench { standin, project, host: &host };
    let measured = async {
        let cold = bench.job("gitlab-runner asks for the job").await?;
        let since = Instant::now();
        frozen(&own.path().join("state/goldens")).await?;
        say(&format!(
            "the first job booted in {:.2} s; frozen, restored and told {:.1} s later",
            cold.1,
            since.elapsed().as_secs_f64()
        ))?;
        let (mut restored, mut by_hand) = (Vec::new(), Vec::new());
        let mut phases: Vec<Vec<f64>> = vec![Vec::new(); LINES.len()];
        for run in 0..=wanted.runs {
            sleep(REST).await;
            let (trace, took) = bench.job("gitlab-runner asks for the job").await?;
            let spec = watch.spec().ok_or("no VM was started")?;
            if spec.frozen.is_none() {
                return Err(format!("a job was not restored:\n{trace}"));
            }
            sleep(REST).await;
            let executor = image.manifest.executor_of(&DockerSettings::default());
            let bare = ms(bare::boot(&vms.disks, &spec, &executor, LIMIT).await?) / 1000.0;
            say(&format!("run {run}: restored {took:.2} s, bare {bare:.2} s"))?;
            if run == 0 {
                continue;
            }
            restored.push(took);
            by_hand.push(bare);
            for (at, (line, _)) in phases.iter_mut().zip(LINES) {
                at.extend(seconds(&trace, line));
            }
        }
        Ok::<_, String>((cold.1, restored, by_hand, phases))
    };
    let measured = measured.await;
    let ended = host.end().await;
    let (cold, restored, by_hand, phases) = measured?;
    if !ended {
        return Err("the daemon did not end".into());
    }
    for ((_, name), numbers) in LINES.into_iter().zip(phases) {
        if let Some(spread) = Spread::of(numbers) {
            figure(&format!("start.restored.{name}"), spread.median, "s")?;
        }
    }
    let spread = |numbers| Spread::of(numbers).ok_or("nothing was measured");
    let (restored, by_hand) = (spread(restored)?, spread(by_hand)?);
    for (name, spread) in [("restored", restored), ("bare", by_hand)] {
        say(&format!("{name}: median {:.2} s, {:.2} to {:.2} s", spread.median, spread.least, spread.most))?;
    }
    figure("start.first_cold", cold, "s")?;
    figure("start.restored_copy_ratio", restored.median / by_hand.median, "")
}

struct Bench<'a> {
    standin: Standin,
    project: ProjectId,
    host: &'a Host,
}

impl Bench<'_> {
    /// One job up to this line of its log; the log, and the time of the line.
    async fn job(&self, line: &str) -> Result<(String, f64), String> {
        let job = self.standin.enqueue(self.project, JobSpec::script(["true"]));
        let told = async {
            loop {
                let trace = self.trace(job);
                if let Some(seconds) = seconds(&trace, line) {
                    return (trace, seconds);
                }
                sleep(GLANCE).await;
            }
        };
        let told = timeout(LIMIT, told).await;
        self.standin.cancel(job, false);
        let _ = self.host.jobs().kill(job, None, None);
        let gone = async {
            while !self.host.jobs().views().is_empty() {
                sleep(GLANCE).await;
            }
        };
        timeout(LIMIT, gone).await.map_err(|_| "the job's VM did not end")?;
        told.map_err(|_| format!("no {line:?} in the job's log:\n{}", self.trace(job)))
    }

    fn trace(&self, job: JobId) -> String {
        self.standin
            .read(|model| model.jobs.get(&job).map(|job| String::from_utf8_lossy(&job.trace.bytes).into_owned()))
            .unwrap_or_default()
    }
}

/// Waits until a golden is in its place.
async fn frozen(goldens: &Path) -> Result<(), String> {
    let there = || {
        let entries = std::fs::read_dir(goldens).into_iter().flatten();
        entries.filter_map(Result::ok).any(|entry| entry.path().join("golden.json").exists())
    };
    let made = async {
        while !there() {
            sleep(GLANCE).await;
        }
    };
    timeout(LIMIT, made).await.map_err(|_| "no machine was frozen".to_owned())?;
    // The keeper takes what it was made of down before it tells of it.
    sleep(Duration::from_secs(3)).await;
    Ok(())
}

/// The time that stands before these words in a boot section, in seconds.
fn seconds(trace: &str, line: &str) -> Option<f64> {
    let before = trace.lines().find_map(|text| text.split_once(&format!(" s  {line}")))?.0;
    before.split_whitespace().next_back()?.parse().ok()
}
