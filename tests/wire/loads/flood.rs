//! A guest that floods its trace, and the whole daemon around it: real files, virtual time.

use super::scales::{Growth, alone, sized};
use crate::door::support::LIMIT;
use crate::support::guest::Guest;
use crate::support::world::{World, paused};
use dayfly::BoxFuture;
use dayfly::daemon::{self, Backends, Shutdown};
use dayfly::files::RealFiles;
use dayfly::gitlab::transport::{Body, Call, OpenError, full};
use dayfly::gitlab::{Endpoint, JobId, OpenTransport, Transport, TransportError};
use dayfly::guest::Limits;
use dayfly::vm::Stream;
use dayfly_exec::standin::{JobSpec, JobState};
use dayfly_test_guest::job::patch;
use dayfly_test_guest::{Connection, Job};
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

const MIB: u64 = 1 << 20;
/// How often GitLab wants each trace.
const INTERVAL: Duration = Duration::from_secs(3);

/// What GitLab was sent of one job's trace. It keeps nothing but what is not an `x`.
#[derive(Default)]
struct Trace {
    begun: Option<Instant>,
    requests: u32,
    bytes: u64,
    crc: crc32fast::Hasher,
    others: Vec<u8>,
    /// The most by which it was ahead of the burst and the rate.
    ahead: u64,
    /// The final PUT's checksum was that of these bytes.
    verdict_fits: bool,
}

/// The stand-in, but for the bytes of traces, which are counted.
#[derive(Clone)]
struct Gitlab {
    opener: Arc<dyn OpenTransport>,
    traces: Arc<Mutex<BTreeMap<String, Trace>>>,
    limits: Limits,
}

struct ToGitlab(Arc<dyn Transport>, Gitlab);

impl OpenTransport for Gitlab {
    fn open(&self, endpoint: &Endpoint) -> Result<Arc<dyn Transport>, OpenError> {
        Ok(Arc::new(ToGitlab(self.opener.open(endpoint)?, self.clone())))
    }
}

impl Transport for ToGitlab {
    fn call(&self, call: Call) -> BoxFuture<'static, Result<http::Response<Body>, TransportError>> {
        let (standin, gitlab) = (Arc::clone(&self.0), self.1.clone());
        Box::pin(async move {
            let (parts, body) = call.request.into_parts();
            let body = body.collect().await.unwrap().to_bytes();
            let job = parts.uri.path().trim_end_matches("/trace").to_owned();
            if parts.method == http::Method::PATCH {
                return Ok(gitlab.append(&job, &body));
            }
            if parts.method == http::Method::PUT {
                gitlab.verdict(&job, &body);
            }
            standin.call(Call { request: http::Request::from_parts(parts, full(body)), ..call }).await
        })
    }
}

impl Gitlab {
    fn append(&self, job: &str, body: &[u8]) -> http::Response<Body> {
        let mut traces = self.traces.lock().unwrap();
        let trace = traces.entry(job.to_owned()).or_default();
        let seconds = trace.begun.get_or_insert_with(Instant::now).elapsed().as_secs();
        trace.requests += 1;
        trace.bytes += body.len() as u64;
        trace.crc.update(body);
        trace.others.extend(body.iter().filter(|byte| **byte != b'x'));
        // A second more: what was let through since the last whole one.
        let allowed = self.limits.trace_bytes_burst + self.limits.trace_bytes_per_second * (seconds + 1);
        trace.ahead = trace.ahead.max(trace.bytes.saturating_sub(allowed));
        http::Response::builder()
            .status(202)
            .header("job-status", "running")
            .header("range", format!("0-{}", trace.bytes))
            .header("x-gitlab-trace-update-interval", INTERVAL.as_secs())
            .body(full("202"))
            .unwrap()
    }

    fn verdict(&self, job: &str, body: &[u8]) {
        let update: Value = serde_json::from_slice(body).unwrap();
        if update["state"] != "running" {
            let mut traces = self.traces.lock().unwrap();
            let trace = traces.entry(job.to_owned()).or_default();
            let expected = format!("crc32:{:08x}", trace.crc.clone().finalize());
            trace.verdict_fits = update["output"] == json!({"checksum": expected, "bytesize": trace.bytes});
        }
    }
}

/// PATCHes of one connection, many at a time.
struct Patches {
    connection: Connection<Box<dyn Stream>>,
    job: Job,
}

impl Patches {
    /// Says that the job runs, and begins to send its trace.
    async fn begin(guest: &Guest, payload: &Value) -> Self {
        guest.begin(payload).await;
        let connection = guest.connect().await.expect("a place at the door");
        Self { connection, job: Job::new(payload).expect("a job") }
    }

    async fn send(&mut self, number: usize, bytes: usize) {
        let body = vec![b'x'; bytes];
        for _ in 0..number {
            self.connection.send(&patch(self.job.id, &self.job.token, self.job.sent, &body)).await.unwrap();
            self.job.sent += bytes;
        }
        for _ in 0..number {
            let answer = timeout(LIMIT, self.connection.answer()).await.expect("an answer in time").unwrap();
            assert_eq!(answer.expect("an answer").status, 202);
        }
    }
}

/// Sends single bytes, then megabytes, as fast as it is let; then ends like any other job.
async fn flood(guest: &Guest, payload: &Value, ones: usize, pieces: usize) {
    let mut patches = Patches::begin(guest, payload).await;
    for _ in 0..ones / 50 {
        patches.send(50, 1).await;
    }
    for _ in 0..pieces {
        patches.send(1, usize::try_from(MIB).unwrap()).await;
    }
    let verdict = patches.job.update(json!({"state": "success", "output": {}}));
    assert_eq!(guest.exchange(&verdict).await.expect("an answer").status, 200);
}

/// Sends a byte a second until the flood is over; the longest time that one took.
async fn go_on(guest: &Guest, payload: &Value, over: &AtomicBool) -> Duration {
    let mut patches = Patches::begin(guest, payload).await;
    let mut longest = Duration::ZERO;
    while !over.load(Ordering::SeqCst) {
        let begun = Instant::now();
        patches.send(1, 1).await;
        longest = longest.max(begun.elapsed());
        sleep(Duration::from_secs(1)).await;
    }
    longest
}

/// T10: 100,000 single bytes, then 1 GiB back to back: memory stays flat, the spool keeps to its
/// bound with one notice, GitLab sees no more than the rate lets through and few requests, the other
/// VM's calls are answered at once, and the job ends as its guest says.
#[test]
fn a_flood_of_trace_ends_at_its_bounds_and_so_does_its_job() {
    if !alone("loads::flood::a_flood_of_trace_ends_at_its_bounds_and_so_does_its_job") {
        return;
    }
    paused(async {
        let (ones, pieces, spool_mib) = sized((5_000, 48, 16), (100_000, 1024, 256));
        let usual = Limits::default();
        let small = Limits { trace_bytes_per_second: 4 * MIB, trace_bytes_burst: 8 * MIB, ..usual.clone() };
        let limits = sized(small, usual);
        let dir = tempfile::tempdir().unwrap();
        let world = World::new(10);
        let mut config = world.config.clone();
        config.state_directory = dir.path().join("state");
        config.runtime_directory = dir.path().join("run");
        config.limits.spool_mib = spool_mib;
        (config.capacity.disk_gib, config.capacity.disk_reserve_gib) = (Some(1000), 0);
        std::fs::create_dir_all(config.state_directory.join("overlays")).unwrap();
        std::fs::create_dir_all(&config.runtime_directory).unwrap();
        let gitlab = Gitlab { opener: world.standin.opener(), traces: Arc::default(), limits: limits.clone() };
        let backends = Backends {
            transport: Arc::new(gitlab.clone()),
            files: Arc::new(RealFiles),
            door_limits: limits.clone(),
            ..world.backends()
        };
        let over = Arc::new(AtomicBool::new(false));
        let longest = Arc::new(Mutex::new(None));
        let growth = Arc::new(Mutex::new(None));
        let took = Arc::new(Mutex::new(Duration::ZERO));
        {
            let (over, longest, growth, took) = (over.clone(), longest.clone(), growth.clone(), took.clone());
            world.set_guest(move |guest| {
                let (over, longest, growth, took) = (over.clone(), longest.clone(), growth.clone(), took.clone());
                async move {
                    let payload = guest.ask().await.expect("a job");
                    if payload["steps"][0]["script"][0] == "flood" {
                        *growth.lock().unwrap() = Some(Growth::begin());
                        let begun = Instant::now();
                        flood(&guest, &payload, ones, pieces).await;
                        *took.lock().unwrap() = begun.elapsed();
                        over.store(true, Ordering::SeqCst);
                    } else {
                        let found = go_on(&guest, &payload, &over).await;
                        *longest.lock().unwrap() = Some(found);
                    }
                    guest.power_off().await;
                }
            });
        }
        let shutdown = Shutdown::new();
        let daemon = daemon::start(config, backends, shutdown.clone()).await.unwrap();
        let mut running = tokio::task::JoinSet::new();
        running.spawn(daemon.run());
        let _ = world.standin.enqueue(world.project, JobSpec::script(["go on"]));
        let job: JobId = world.standin.enqueue(world.project, JobSpec::script(["flood"]));
        world.until(job, JobState::Success).await;
        let grown = growth.lock().unwrap().as_ref().expect("it has begun").mib();
        let found = {
            let mut traces = gitlab.traces.lock().unwrap();
            traces.remove(&format!("/api/v4/jobs/{job}")).expect("GitLab saw its trace")
        };

        println!("figure load.flood_mib {grown:.2} MiB");
        let seconds = took.lock().unwrap().as_secs();
        println!("{} bytes in {} requests, {seconds} s", found.bytes, found.requests);
        // The requests' rate for the single bytes, the bytes' rate for the others.
        let bytes = ones as u64 + pieces as u64 * MIB;
        assert!(
            seconds
                >= (ones as u64 - 100) / 50 + (bytes - limits.trace_bytes_burst) / limits.trace_bytes_per_second / 2
        );
        let others = String::from_utf8_lossy(&found.others).into_owned();
        assert_eq!(others.matches("this log reached the limit").count(), 1, "{others}");
        assert!((spool_mib * MIB..spool_mib * MIB + 64 * 1024).contains(&found.bytes), "{}", found.bytes);
        assert_eq!((found.ahead, found.verdict_fits), (0, true));
        let whole_pieces = found.bytes / MIB;
        let in_time = seconds / INTERVAL.as_secs();
        assert!(u64::from(found.requests) <= whole_pieces + in_time + 10, "{} requests", found.requests);
        assert!(grown <= 32.0, "{grown} MiB");
        let wait = async {
            while longest.lock().unwrap().is_none() {
                sleep(Duration::from_millis(100)).await;
            }
        };
        timeout(LIMIT, wait).await.expect("the other guest ends");
        let longest = longest.lock().unwrap().take().unwrap();
        assert!(longest <= Duration::from_millis(100), "another VM's call took {longest:?}");
        shutdown.end();
        assert!(running.join_next().await.unwrap().unwrap(), "the daemon ends");
    });
}
