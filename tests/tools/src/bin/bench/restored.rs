//! What a restored start costs over a bare boot and over a cold start: from GitLab's 201 to the hand-out, by the lines that
//! its author reads; from there to the job's first own line, by the clocks of host and guest; and from the start of a QEMU
//! by hand to its guest's request. By turns.
//!
//! Two daemons, the product's with plain QEMU: the machines of one boot, those of the other are restored once its first job
//! has booted and a machine was frozen. One of each goes before and does not count.

use crate::bare;
use crate::figures::{Spread, figure, ms, say};
use crate::start::Wanted;
use crate::watched::{StopWatch, watched};
use dayfly::clock::Clock;
use dayfly::files::RealFiles;
use dayfly::gitlab::JobId;
use dayfly::image::store::{Image, ImageStore, Images as _};
use dayfly::machine_spec::{DockerSettings, Start};
use dayfly::network::{PortRange, Tcp};
use dayfly::rng::Rng;
use dayfly::telemetry::chain;
use dayfly::vm::{Backend, Config};
use dayfly_exec::standin::{JobSpec, ProjectId, Standin};
use dayfly_test_tools::host::{Choice, Host};
use jiff::Timestamp;
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

/// What a job prints first, and its machine's clock in nanoseconds since 1970.
const FIRST: &str = "first own line at ";

/// The line of a boot section that is the hand-out.
const ASKS: &str = "gitlab-runner asks for the job";

/// The lines of a boot section whose times are told, and what they are called here.
const LINES: [(&str, &str); 4] =
    [("disk ready", "disk"), ("machine restored", "restore"), ("guest has its identity", "identity"), (ASKS, "ask")];

/// Measures and prints.
pub(crate) async fn measure(wanted: &Wanted) -> Result<(), String> {
    let images = ImageStore::new(&wanted.images);
    let image = images.load(&wanted.image).await.map_err(|error| chain(&error))?;
    if !image.manifest.can_hold() {
        return Err(format!("machines of image `{}` cannot be frozen: build it again", wanted.image));
    }
    // Short paths: unix sockets end at 107 bytes.
    let own = tempfile::Builder::new().prefix("df-q").tempdir_in("/tmp").map_err(|error| error.to_string())?;
    let standin = Standin::new(Clock::system(), Rng::system());
    let cold = Bench::start(wanted, own.path(), &standin, Start::Cold).await?;
    let restored = Bench::start(wanted, own.path(), &standin, Start::Restored).await;
    let measured = match &restored {
        Ok(restored) => rounds(wanted, &image, &cold, restored).await,
        Err(error) => Err(error.clone()),
    };
    let mut ended = cold.host.end().await;
    if let Ok(restored) = restored {
        ended &= restored.host.end().await;
    }
    let measured = measured?;
    if !ended {
        return Err("a daemon did not end".into());
    }
    measured.report()
}

/// Seconds of each round.
#[derive(Default)]
struct Measured {
    cold: Vec<f64>,
    cold_script: Vec<f64>,
    restored: Vec<f64>,
    restored_script: Vec<f64>,
    bare: Vec<f64>,
    /// Of the lines of a restored start.
    phases: [Vec<f64>; LINES.len()],
    /// From the first job's end to a golden.
    made: f64,
}

impl Measured {
    fn report(self) -> Result<(), String> {
        for ((_, name), numbers) in LINES.into_iter().zip(self.phases) {
            if let Some(spread) = Spread::of(numbers) {
                figure(&format!("start.restored.{name}"), spread.median, "s")?;
            }
        }
        figure("start.golden", self.made, "s")?;
        let spread = |name: &str, numbers| {
            let spread = Spread::of(numbers).ok_or("nothing was measured")?;
            say(&format!("{name}: median {:.2} s, {:.2} to {:.2} s", spread.median, spread.least, spread.most))?;
            Ok::<_, String>(spread.median)
        };
        let bare = spread("a bare boot to its request", self.bare)?;
        let cold = spread("a cold start to the hand-out", self.cold)?;
        let restored = spread("a restored start to the hand-out", self.restored)?;
        let cold_script = spread("a cold start to the first own line", self.cold_script)?;
        let restored_script = spread("a restored start to the first own line", self.restored_script)?;
        figure("start.qemu_cold_ratio", cold / bare, "")?;
        figure("start.restored_copy_ratio", restored / bare, "")?;
        figure("start.restored_script_ratio", restored_script / cold_script, "")
    }
}

async fn rounds(wanted: &Wanted, image: &Image, cold: &Bench, restored: &Bench) -> Result<Measured, String> {
    let mut measured = Measured::default();
    restored.job().await?;
    let since = Instant::now();
    restored.frozen().await?;
    measured.made = since.elapsed().as_secs_f64();
    let executor = image.manifest.executor_of(&DockerSettings::default());
    for run in 0..=wanted.runs {
        sleep(REST).await;
        let of_restored = restored.job().await?;
        let spec = restored.watch.spec().ok_or("no VM was started")?;
        if spec.frozen.is_none() || of_restored.trace.contains("it boots") {
            return Err(format!("a job was not restored:\n{}", of_restored.trace));
        }
        sleep(REST).await;
        let bare = ms(bare::boot(&restored.disks, &spec, &executor, LIMIT).await?) / 1000.0;
        sleep(REST).await;
        let of_cold = cold.job().await?;
        say(&format!(
            "run {run}: restored {:.2} s, {:.2} s to the first own line; cold {:.2} s, {:.2} s; bare {bare:.2} s",
            of_restored.ask, of_restored.script, of_cold.ask, of_cold.script
        ))?;
        if run == 0 {
            continue;
        }
        measured.bare.push(bare);
        measured.cold.push(of_cold.ask);
        measured.cold_script.push(of_cold.script);
        measured.restored.push(of_restored.ask);
        measured.restored_script.push(of_restored.script);
        for (at, (line, _)) in measured.phases.iter_mut().zip(LINES) {
            at.extend(seconds(&of_restored.trace, line));
        }
    }
    Ok(measured)
}

/// A daemon, and who gives it jobs.
struct Bench {
    standin: Standin,
    project: ProjectId,
    host: Host,
    watch: StopWatch,
    disks: dayfly::vm::disks::Disks,
    goldens: std::path::PathBuf,
}

/// What a job has shown.
struct Shown {
    trace: String,
    /// Seconds to the hand-out.
    ask: f64,
    /// And to its first own line.
    script: f64,
}

impl Bench {
    async fn start(wanted: &Wanted, below: &Path, standin: &Standin, start: Start) -> Result<Self, String> {
        let own = below.join(if start == Start::Cold { "c" } else { "r" });
        std::fs::create_dir_all(own.join("vm")).map_err(|error| error.to_string())?;
        let hypervisor = Config { backend: Backend::Qemu, accel: wanted.accel, ..Config::default() };
        let vms = hypervisor.host(&own.join("vm"));
        let watch = StopWatch::default();
        let project = standin.add_project(if start == Start::Cold { "group/cold" } else { "group/restored" });
        let runner = standin.add_runner(project);
        let choice = Choice {
            host: watched(&vms, &watch),
            hypervisor,
            start,
            listen: Arc::new(Tcp),
            accel: wanted.accel,
            images: (Arc::new(ImageStore::new(&wanted.images)), wanted.image.clone()),
            transport: standin.opener(),
            url: url::Url::parse("http://gitlab.example").map_err(|error| error.to_string())?,
            token: standin.runner_token(runner).ok_or("the runner has no token")?,
            // One for a job, one for a machine that is frozen.
            concurrent: 2,
            ports: PortRange { first: 25_000, last: 25_099 },
            files: Arc::new(RealFiles),
            state_below: Some(own.clone()),
        };
        let host = Host::start(choice).await.map_err(|error| chain(&error))?;
        let goldens = own.join("state/goldens");
        Ok(Self { standin: standin.clone(), project, host, watch, disks: vms.disks, goldens })
    }

    /// One job up to its first own line.
    async fn job(&self) -> Result<Shown, String> {
        let script = format!("echo '{FIRST}'$(date +%s%N)");
        let job = self.standin.enqueue(self.project, JobSpec::script([script.as_str()]));
        let told = async {
            loop {
                let trace = self.trace(job);
                if let Some((ask, script)) = seconds(&trace, ASKS).zip(first_line(&trace)) {
                    return Shown { trace, ask, script };
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
        told.map_err(|_| format!("no first line in the job's log:\n{}", self.trace(job)))
    }

    fn trace(&self, job: JobId) -> String {
        self.standin
            .read(|model| model.jobs.get(&job).map(|job| String::from_utf8_lossy(&job.trace.bytes).into_owned()))
            .unwrap_or_default()
    }

    /// Waits until a golden is in its place.
    async fn frozen(&self) -> Result<(), String> {
        let there = || {
            let entries = std::fs::read_dir(&self.goldens).into_iter().flatten();
            entries.filter_map(Result::ok).any(|entry| entry.path().join("golden.json").exists())
        };
        let made = async {
            while !there() {
                sleep(GLANCE).await;
            }
        };
        timeout(LIMIT, made).await.map_err(|_| "no machine was frozen".to_owned())?;
        // The keeper takes what it was made of down before it tells of it.
        sleep(3 * REST).await;
        Ok(())
    }
}

/// The time that stands before these words in a boot section, in seconds.
fn seconds(trace: &str, line: &str) -> Option<f64> {
    let before = trace.lines().find_map(|text| text.split_once(&format!(" s  {line}")))?.0;
    before.split_whitespace().next_back()?.parse().ok()
}

/// Seconds from the log's first line, which its host has written, to what the job has printed first.
fn first_line(trace: &str) -> Option<f64> {
    let began: Timestamp = trace.split_whitespace().next()?.parse().ok()?;
    // Not where the runner says what it is about to run.
    let mut told = trace.lines().filter_map(|text| text.split_once(FIRST)?.1.trim().parse::<i128>().ok());
    let printed = Timestamp::from_nanosecond(told.next()?).ok()?;
    (printed - began).total(jiff::Unit::Second).ok()
}
