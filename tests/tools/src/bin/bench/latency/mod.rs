//! What GitLab sees of a job, and when: first line, later lines, verdict, by dayfly and by a runner without it.
//!
//! ```text
//!     dayfly   guest: gitlab-runner ─► relay ─► door, spool, uploader ─► │
//!     direct   guest: gitlab-runner ───────────────────────────────────► │ GitLab, on one socket
//!     both     guest: the job's script ── a stamp for each line ───────► │ this process
//! ```
//!
//! Two machines alike, of one image, hold the same runner; on one side it is given its job by dayfly, on the other it
//! asks GitLab itself. By turns, the side that goes first changing from pair to pair; both sides of a pair run the
//! same script to the byte, with pauses at random, so that lines fall everywhere between two of a runner's ticks.
//! The log is one that somebody watches: GitLab asks for it every 3 s, as it does then. Ratios of medians.
//!
//! A verdict takes a tenth of a second or a few, nearly all of it the guest's: on a busy machine the ratio of ten says
//! little (direct over direct has been 1.28). What dayfly itself holds it up for stands beside it, `verdict_held`: from
//! the report's first line at the door to its arrival at GitLab.
//!
//! And a cancel: jobs that say nothing are canceled at a random moment, so that GitLab refuses whatever is said of
//! them (403), until the process of their machine is gone. Only dayfly has a machine to end, so there is no other side.

pub(crate) mod abuse;
mod direct;
mod script;
mod times;

use crate::byhand::Told;
use crate::figures::{Spread, figure, say};
use crate::process::of_machine;
use crate::start::Wanted;
use crate::watched::{StopWatch, WatchedDoors, watched};
use dayfly::clock::Clock;
use dayfly::files::RealFiles;
use dayfly::gitlab::{JobId, RealOpenTransport};
use dayfly::image::store::{ImageStore, Images as _};
use dayfly::machine_spec::DockerSettings;
use dayfly::network::PortRange;
use dayfly::rng::Rng;
use dayfly::telemetry::chain;
use dayfly::vm;
use dayfly::vm::Config;
use dayfly::vm::libvirt::Libvirt;
use dayfly_exec::standin::{JobState, ProjectId, Served, Standin, serve};
use dayfly_test_tools::host::{Choice, Host};
use script::{END, HOST, Pauses, Stamps};
use std::sync::Arc;
use std::time::Duration;
use times::{Got, Times};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

/// Longest wait for one job, or for its end: under TCG on a busy machine a boot takes a minute.
const LIMIT: Duration = Duration::from_secs(240);

/// How often GitLab wants a log that somebody watches.
const TRACE_INTERVAL: Duration = Duration::from_secs(3);

/// Between two looks for a machine's process: what a cancel's time is exact to.
const GLANCE: Duration = Duration::from_millis(20);

/// Before each job, so that nothing of the one before still runs.
const REST: Duration = Duration::from_secs(1);

/// A cancel comes at any moment of this: a silent runner's own signs of life are 30 s apart, and no uploader's further.
const PHASE: Duration = Duration::from_secs(30);

/// Cancels in all, and at once: their machines do nothing meanwhile.
const CANCELS: usize = 10;
const CANCELS_AT_ONCE: usize = 5;

/// Who carries a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Dayfly,
    Direct,
}

/// A daemon with machines of this image, and its GitLab.
struct Begun {
    standin: Standin,
    ours: ProjectId,
    direct: ProjectId,
    registered: Told,
    host: Host,
    watch: StopWatch,
    vms: vm::Host,
    /// Serves for as long as it is there.
    _served: Served,
}

impl Begun {
    fn bench(&self) -> Bench<'_> {
        Bench {
            standin: self.standin.clone(),
            ours: self.ours,
            direct: self.direct,
            registered: &self.registered,
            host: &self.host,
            watch: self.watch.clone(),
            vms: self.vms.clone(),
        }
    }
}

async fn begin(wanted: &Wanted) -> Result<Begun, String> {
    let images = ImageStore::new(&wanted.images);
    let image = images.load(&wanted.image).await.map_err(|error| chain(&error))?;
    let vms = Libvirt::new(&Config { uri: "qemu:///session".into(), accel: wanted.accel, ..Config::default() }).host();
    let watch = StopWatch::default();

    let standin = Standin::new(Clock::system(), Rng::system());
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.map_err(|error| format!("listen: {error}"))?;
    let served = serve(standin.clone(), listener, None).map_err(|error| format!("serve: {error}"))?;
    let port = served.address().port();
    let url = |host: &str| url::Url::parse(&format!("http://{host}:{port}")).map_err(|error| error.to_string());
    let for_guests = url(HOST)?;
    standin.configure(|settings| {
        settings.external_url = for_guests.as_str().trim_end_matches('/').to_owned();
        settings.trace_update_interval = Some(TRACE_INTERVAL);
    });
    let runner_of = |project| {
        let runner = standin.add_runner(project);
        standin.runner_token(runner).ok_or("the runner has no token")
    };
    // A project with a runner of its own for each side, so that each job goes where it is meant for.
    let (ours, direct) = (standin.add_project("group/dayfly"), standin.add_project("group/direct"));
    let registered = Told {
        clone_url: for_guests,
        token: runner_of(direct)?,
        executor: image.manifest.executor_of(&DockerSettings::default()),
    };
    let choice = Choice {
        host: watched(&vms, &watch),
        listen: Arc::new(WatchedDoors(watch.clone())),
        accel: wanted.accel,
        images: (Arc::new(images), wanted.image.clone()),
        transport: Arc::new(RealOpenTransport::default()),
        url: url("127.0.0.1")?,
        token: runner_of(ours)?,
        concurrent: u32::try_from(CANCELS_AT_ONCE).unwrap_or(1),
        ports: PortRange { first: 25_100, last: 25_199 },
        files: Arc::new(RealFiles),
        state_below: None,
    };
    let host = Host::start(choice).await.map_err(|error| chain(&error))?;
    Ok(Begun { standin, ours, direct, registered, host, watch, vms, _served: served })
}

/// Measures and prints.
pub(crate) async fn measure(wanted: &Wanted) -> Result<(), String> {
    let begun = begin(wanted).await?;
    let measured = begun.bench().all(wanted.runs).await;
    let ended = begun.host.end().await;
    let (pairs, cancels) = measured?;
    if !ended {
        return Err("the daemon did not end".into());
    }
    report(&pairs, &cancels)
}

struct Bench<'a> {
    standin: Standin,
    ours: ProjectId,
    direct: ProjectId,
    registered: &'a Told,
    host: &'a Host,
    watch: StopWatch,
    vms: vm::Host,
}

/// One pair: by dayfly, and directly.
struct Pair {
    dayfly: Times,
    direct: Times,
}

impl Bench<'_> {
    async fn all(&self, runs: u16) -> Result<(Vec<Pair>, Vec<f64>), String> {
        let rng = Rng::system();
        let mut pairs = Vec::new();
        for run in 1..=runs {
            // Both sides get the same bytes.
            let stamps = Stamps::listen().await.map_err(|error| format!("listen: {error}"))?;
            let (stamps, pauses) = (&stamps, &Pauses::random(&rng));
            // Dayfly first in the first pair: the other side's machine is made like its.
            let pair = if run % 2 == 1 {
                let dayfly = self.run(Side::Dayfly, stamps, pauses).await?;
                Pair { dayfly, direct: self.run(Side::Direct, stamps, pauses).await? }
            } else {
                let direct = self.run(Side::Direct, stamps, pauses).await?;
                Pair { dayfly: self.run(Side::Dayfly, stamps, pauses).await?, direct }
            };
            for (side, times) in [("dayfly", &pair.dayfly), ("direct", &pair.direct)] {
                let later = Spread::of(times.later.clone()).ok_or("no lines")?;
                say(&format!(
                    "pair {run}: {side}: first line {:.0} ms, later lines {:.0} ms ({:.0} to {:.0}), verdict {:.0} ms",
                    times.first, later.median, later.least, later.most, times.verdict
                ))?;
            }
            pairs.push(pair);
        }
        let mut cancels = Vec::new();
        while cancels.len() < CANCELS {
            cancels.extend(self.cancel_some(&rng).await?);
        }
        Ok((pairs, cancels))
    }

    /// One job that writes lines.
    async fn run(&self, side: Side, stamps: &Stamps, pauses: &Pauses) -> Result<Times, String> {
        sleep(REST).await;
        let spec = stamps.job(pauses);
        let told = || async {
            let came = stamps.until(END, &self.standin).await.map_err(|error| format!("the job's stamps: {error}"))?;
            Ok::<_, String>(came)
        };
        let (job, came) = match side {
            Side::Dayfly => {
                let job = self.standin.enqueue(self.ours, spec);
                let came = self.over(job, told()).await;
                let _ = self.host.jobs().kill(job, None, None);
                self.no_machine_of(Some(job)).await?;
                (job, came)
            }
            Side::Direct => {
                let job = self.standin.enqueue(self.direct, spec);
                let like = self.watch.spec().ok_or("dayfly has started no VM")?;
                let machine = direct::start(&self.vms, &like, self.registered).await?;
                let came = self.over(job, told()).await;
                machine.end().await?;
                (job, came)
            }
        };
        let came = came.map_err(|error| format!("{side:?}: {error}"))?;
        let got = self.standin.read(|model| Got::of(model, job));
        let mut times = got.times(&came).map_err(|error| format!("{side:?}: {error}"))?;
        if side == Side::Dayfly {
            let reported = self.watch.updated().ok_or("no report came to the door")?;
            // One that is no part of the whole is of another report.
            times.held = got.verdict_after(reported).filter(|held| (0.0..=times.verdict).contains(held));
        }
        say(&format!("{side:?}: the stamps' jitter is {:.1} ms", times::jitter(&came).unwrap_or(f64::NAN)))?;
        Ok(times)
    }

    /// Waits for a job's success; what `meanwhile` brought.
    async fn over<T>(&self, job: JobId, meanwhile: impl Future<Output = Result<T, String>>) -> Result<T, String> {
        let done = async {
            let came = meanwhile.await?;
            let over = self.standin.wait_for(|m| m.jobs.get(&job).is_some_and(|job| job.state.is_over()), LIMIT).await;
            over.map_err(|_| "the job did not end in time")?;
            Ok::<_, String>(came)
        };
        let came = timeout(LIMIT, done).await.unwrap_or_else(|_| Err("the job did not come to its end".into()));
        let found = self.standin.job(job).ok_or("the job is gone")?;
        match came {
            Ok(came) if found.state == JobState::Success => Ok(came),
            Ok(_) => {
                Err(format!("the job is {:?}; its log:\n{}", found.state, String::from_utf8_lossy(&found.trace.bytes)))
            }
            Err(error) => Err(format!("{error}; the job's log:\n{}", String::from_utf8_lossy(&found.trace.bytes))),
        }
    }

    async fn no_machines(&self) -> Result<(), String> {
        self.no_machine_of(None).await
    }

    /// Waits until a job, or each, has no machine any more.
    async fn no_machine_of(&self, job: Option<JobId>) -> Result<(), String> {
        let gone = async {
            while self.host.jobs().views().iter().any(|view| job.is_none_or(|job| view.key.id == job)) {
                sleep(GLANCE).await;
            }
        };
        timeout(LIMIT, gone).await.map_err(|_| "the job's VM did not end".to_owned())
    }

    /// Seconds from GitLab's cancel to the machine's end, of some silent jobs side by side.
    async fn cancel_some(&self, rng: &Rng) -> Result<Vec<f64>, String> {
        let mut jobs = Vec::new();
        for _ in 0..CANCELS_AT_ONCE {
            let stamps = Stamps::listen().await.map_err(|error| format!("listen: {error}"))?;
            jobs.push((self.standin.enqueue(self.ours, stamps.silent_job()), stamps));
        }
        let silent = async {
            for (_, stamps) in &jobs {
                stamps.until("0", &self.standin).await.map_err(|error| format!("a silent job: {error}"))?;
            }
            Ok::<_, String>(())
        };
        timeout(LIMIT, silent).await.map_err(|_| "the silent jobs did not start")??;
        // Their lines are at GitLab by then, and nothing is on its way.
        sleep(TRACE_INTERVAL * 2).await;
        let bound = u64::try_from(PHASE.as_millis()).unwrap_or(u64::MAX);
        let phase = || Duration::from_millis(rng.below(bound));
        let mut cancels = JoinSet::new();
        for (job, _) in &jobs {
            let view = self.host.jobs().views().into_iter().find(|view| view.key.id == *job);
            let vm = view.and_then(|view| view.vm).ok_or("a silent job has no VM")?;
            cancels.spawn(cancel(self.standin.clone(), *job, vm, phase()));
        }
        let seconds = cancels.join_all().await.into_iter().collect::<Result<Vec<f64>, String>>()?;
        self.no_machines().await?;
        let words: Vec<String> = seconds.iter().map(|seconds| format!("{seconds:.1}")).collect();
        say(&format!("from cancel to the machine's end: {} s", words.join(", ")))?;
        Ok(seconds)
    }
}

/// Cancels after a while; seconds from then to the end of the machine's process.
async fn cancel(standin: Standin, job: JobId, vm: String, phase: Duration) -> Result<f64, String> {
    sleep(phase).await;
    if of_machine(&vm)?.is_none() {
        return Err("a silent job's machine has ended by itself".into());
    }
    let canceled = Instant::now();
    standin.cancel(job, false);
    while of_machine(&vm)?.is_some() {
        if canceled.elapsed() > LIMIT {
            return Err("a canceled job's machine did not end".into());
        }
        sleep(GLANCE).await;
    }
    Ok(canceled.elapsed().as_secs_f64())
}

/// One measure on both sides.
struct Compared {
    dayfly: Spread,
    direct: Spread,
}

impl Compared {
    /// `None`: a side has no numbers.
    fn of(pairs: &[Pair], numbers: impl Fn(&Times) -> Vec<f64>) -> Option<Self> {
        Some(Self {
            dayfly: Spread::of(pairs.iter().flat_map(|pair| numbers(&pair.dayfly)).collect())?,
            direct: Spread::of(pairs.iter().flat_map(|pair| numbers(&pair.direct)).collect())?,
        })
    }

    fn ratio(&self) -> f64 {
        self.dayfly.median / self.direct.median
    }
}

fn report(pairs: &[Pair], cancels: &[f64]) -> Result<(), String> {
    type Numbers = fn(&Times) -> Vec<f64>;
    let measures: [(&str, Numbers); 3] = [
        ("first_line", |times| vec![times.first]),
        ("line", |times| times.later.clone()),
        ("verdict", |times| vec![times.verdict]),
    ];
    let mut ratios = Vec::new();
    for (name, numbers) in measures {
        let compared = Compared::of(pairs, numbers).ok_or("nothing was measured")?;
        for (side, spread) in [("dayfly", compared.dayfly), ("direct", compared.direct)] {
            let Spread { median, least, most } = spread;
            say(&format!("{name}: {side}: median {median:.0} ms, {least:.0} to {most:.0} ms"))?;
            figure(&format!("latency.{name}_{side}"), median, "ms")?;
        }
        ratios.push((name, compared.ratio()));
    }
    let held = Spread::of(pairs.iter().filter_map(|pair| pair.dayfly.held).collect()).ok_or("no verdict came by")?;
    say(&format!("verdict: from door to GitLab: {:.0} to {:.0} ms", held.least, held.most))?;
    figure("latency.verdict_held", held.median, "ms")?;
    let cancel = Spread::of(cancels.to_vec()).ok_or("nothing was canceled")?;
    say(&format!("cancel: median {:.1} s, {:.1} to {:.1} s", cancel.median, cancel.least, cancel.most))?;
    // A small figure means little without what it was counted from.
    figure("latency.pairs", count(pairs.len()), "")?;
    figure("latency.lines", count(pairs.iter().map(|pair| pair.dayfly.later.len()).sum()), "")?;
    figure("latency.cancels", count(cancels.len()), "")?;
    for (name, ratio) in ratios {
        figure(&format!("latency.{name}_ratio"), ratio, "")?;
    }
    figure("latency.cancel_s", cancel.most, "s")
}

fn count(number: usize) -> f64 {
    u32::try_from(number).map_or(f64::INFINITY, f64::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_of_the_medians_of_all_pairs() {
        let times = |first: f64, later: &[f64]| Times { first, later: later.to_vec(), verdict: 1.0, held: None };
        let pairs = [
            Pair { dayfly: times(30.0, &[1.0, 9.0]), direct: times(10.0, &[2.0, 2.0]) },
            Pair { dayfly: times(20.0, &[3.0]), direct: times(50.0, &[8.0]) },
            Pair { dayfly: times(90.0, &[]), direct: times(40.0, &[]) },
        ];
        let first = Compared::of(&pairs, |times| vec![times.first]).unwrap();
        assert_eq!((first.dayfly.median, first.direct.median, first.ratio()), (30.0, 40.0, 0.75));
        let later = Compared::of(&pairs, |times| times.later.clone()).unwrap();
        assert_eq!((later.dayfly.median, later.direct.median, later.direct.most), (3.0, 2.0, 8.0));
        assert!(Compared::of(&[], |times| vec![times.first]).is_none());
    }
}
