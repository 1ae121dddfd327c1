//! Door, spool and uploader alone: the real ones, in memory. What the job task decides about them
//! (its verdict, its own lines) is a harness of a few lines here; the rest of the daemon is not there.

use super::client::{Client, Heard, Way};
use super::moods::{Gitlab, LONG};
use super::plan::{Ending, Plan};
use crate::support::mortal::Life;
use crate::support::world::paused;
use dayfly::BoxFuture;
use dayfly::awake::Awake;
use dayfly::clock::Clock;
use dayfly::files::Files as _;
use dayfly::gitlab::{Endpoint, JobClient, JobStatus, Verdict};
use dayfly::guest::{Admission, GuestEvent, GuestView, Limits, VerdictAnswer, admit};
use dayfly::metrics::{Form, Metrics, Snapshot};
use dayfly::network::Entrance;
use dayfly::rng::Rng;
use dayfly::secret::Secret;
use dayfly::spool::Spool;
use dayfly::uploader::{Outbox, Upload, UploaderEvent, upload};
use dayfly::vm::{Stream, VmId};
use dayfly_doubles::fake::FakeHypervisor;
use dayfly_doubles::files::MemoryFiles;
use dayfly_exec::standin::{JobSpec, Standin};
use dayfly_guest_config::Pass;
use dayfly_test_guest::{Connection, enter};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::timeout;

const SPOOL: &str = "/state/trace";
const DOOR: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 10_000);

/// Before a door that did not let the guest in is tried again.
const RETRY: Duration = Duration::from_millis(200);

/// Lines of ours.
const FIRST_LINE: &str = "2026-01-01T00:00:00.000000Z 00O dayfly: a first line\n";
const LAST_LINES: &str = "2026-01-01T00:00:00.000000Z 00O dayfly: one last line\nand another\n";

/// The begin of what stands for the bytes that found no room.
const NOTICE: &[u8] = b"\n\x1b[33;1mdayfly: this log reached the limit";

/// What is on disk besides the spool: the job's record, for the few decisions of the harness.
#[derive(Clone, Default)]
struct Record(Arc<Mutex<Kept>>);

#[derive(Clone, Default)]
struct Kept {
    guest_base: Option<u64>,
    verdict: Option<Verdict>,
    debug: bool,
}

impl Record {
    fn read(&self) -> Kept {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn write(&self, change: impl FnOnce(&mut Kept)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// What outlives the daemon.
struct World {
    gitlab: Gitlab,
    files: MemoryFiles,
    doors: FakeHypervisor,
    pass: Pass,
    token: Secret,
    record: Record,
    clock: Clock,
    rng: Rng,
    /// The plan's [`Ending::Ours`] has come.
    we_end: Arc<Notify>,
    metrics: Metrics,
}

/// One case.
pub(super) fn case(plan: &Plan) -> Result<(), String> {
    counted(plan).map(drop)
}

/// One case, and what was counted in it.
pub(super) fn counted(plan: &Plan) -> Result<String, String> {
    let metrics = Metrics::new();
    let mut result = Ok(());
    paused(async { result = story(plan, metrics.clone()).await });
    result.map(|()| metrics.text(&Snapshot::default(), Form::Open))
}

async fn story(plan: &Plan, metrics: Metrics) -> Result<(), String> {
    let (clock, rng) = (Clock::simulated("2026-01-01T00:00:00Z".parse().unwrap()), Rng::seeded(1));
    let standin = Standin::new(clock.clone(), rng.clone());
    let project = standin.add_project("group/project");
    let runner = standin.add_runner(project);
    let id = standin.enqueue(project, JobSpec::script(["true"]));
    standin.edit(|model| model.jobs.get_mut(&id).unwrap().start(runner, "s_1", LONG, clock.now()));
    let files = MemoryFiles::default();
    files.create_dir(Path::new("/state")).await.unwrap();
    let world = World {
        token: standin.job(id).unwrap().token,
        gitlab: Gitlab::new(standin, id, files.clone(), Path::new(SPOOL), plan),
        files,
        doors: FakeHypervisor::new(),
        pass: Pass::new([5; 32]),
        record: Record::default(),
        clock,
        rng,
        we_end: Arc::default(),
        metrics,
    };
    let daemon = async {
        for end in plan.kills.iter().copied().map(Some).chain([None]) {
            let life = Life::new(end, None);
            let delivered = tokio::select! {
                biased;
                () = life.over() => false,
                () = live(&life, &world, plan) => true,
            };
            if delivered {
                return;
            }
        }
    };
    let mut client = Client::new(&world, id.0, world.token.expose().to_owned(), plan);
    let all = async { tokio::join!(daemon, client.run(plan), world.gitlab.watch()) };
    let Ok(((), said, watched)) = timeout(LONG, all).await else {
        return Err(format!("it does not come to an end\n{}", world.gitlab.history()));
    };
    watched?;
    match (plan.ending, said?) {
        (Ending::Verdict { .. }, Heard::Taken | Heard::Nothing)
        | (Ending::Ours { .. }, Heard::Refused | Heard::Nothing) => {}
        (ending, heard) => return Err(format!("the guest heard {heard:?}, {ending:?}")),
    }
    world.gitlab.judge()?;
    judge_spool(plan, &world.gitlab.spool(), client.taken)
}

/// The spool is our first lines ‖ the guest's bytes ‖ our last lines.
fn judge_spool(plan: &Plan, spool: &[u8], taken: usize) -> Result<(), String> {
    let log = plan.log.bytes();
    let text = |bytes: &[u8]| String::from_utf8_lossy(&bytes[..bytes.len().min(300)]).into_owned();
    let Some(rest) = spool.strip_prefix(FIRST_LINE.repeat(plan.first_lines).as_bytes()) else {
        return Err(format!("our first lines are not where they were: {}", text(spool)));
    };
    let (rest, ours) = match (plan.ending, rest.strip_suffix(LAST_LINES.as_bytes())) {
        (Ending::Ours { .. }, Some(rest)) => (rest, true),
        // A kill between record and lines costs the harness's lines, nothing else.
        (Ending::Ours { .. }, None) if plan.kills.is_empty() => return Err("our last lines are not there".to_owned()),
        _ => (rest, false),
    };
    let room = plan.room.unwrap_or(usize::MAX);
    let held = rest.iter().zip(log).take_while(|(a, b)| a == b).count().min(room);
    let mut rest = &rest[held..];
    if held < taken.min(room) {
        return Err(format!("{taken} bytes of the guest were taken, and {held} are there: {}", text(rest)));
    }
    if matches!(plan.ending, Ending::Verdict { .. }) && held < log.len().min(room) {
        return Err(format!("{held} of {} bytes of the guest are there: {}", log.len(), text(rest)));
    }
    match rest.strip_prefix(NOTICE).filter(|_| held == room && room < log.len()) {
        Some(behind) => {
            let line = behind.iter().position(|byte| *byte == b'\n').map_or(behind.len(), |at| at + 1);
            rest = &behind[line..];
        }
        None if taken > room => return Err(format!("no notice after {room} bytes: {}", text(rest))),
        None => {}
    }
    // A partial last line is ended before ours.
    if ours && rest == b"\n" || rest.is_empty() {
        return Ok(());
    }
    Err(format!("between the guest's {held} bytes and the end: {}", text(rest)))
}

/// One life of the daemon, as far as it is here; ends when the uploader is done.
async fn live(life: &Life, world: &World, plan: &Plan) {
    let record = &world.record;
    let files = life.files(Arc::new(world.files.clone()));
    let first = FIRST_LINE.repeat(plan.first_lines);
    let bytes_max = plan.room.map_or(1 << 30, |room| (first.len() + room) as u64);
    let mut kept = record.read();
    let spool = Spool::open(files, Path::new(SPOOL), bytes_max, kept.guest_base).await.unwrap();
    if kept.guest_base.is_none() {
        // A kill may have come after our lines and before the record of where they end.
        if !first.is_empty() && spool.view().length == 0 {
            spool.append_own(&first).await.unwrap();
        }
        kept.guest_base = Some(spool.begin_guest().await);
        record.write(|record| record.guest_base = kept.guest_base);
    }
    let endpoint = Endpoint {
        url: "https://gitlab.example/".parse().unwrap(),
        tls_ca_file: None,
        tls_client: None,
        allow_insecure_http: false,
    };
    let transport = life.transport(world.gitlab.standin.opener()).open(&endpoint).unwrap();
    let client = JobClient::new(transport, world.gitlab.job, world.token.clone(), world.rng.clone());
    let (outbox, outbox_in) = watch::channel(Outbox::Empty);
    let (debug, debug_in) = watch::channel(kept.debug);
    let (events, mut uploads) = mpsc::channel(64);
    let uploader = upload(Upload {
        client: client.clone(),
        newer_token: watch::channel(None).1,
        spool: spool.reader(),
        outbox: outbox_in,
        events,
        debug_trace: debug_in,
        keepalive: Duration::from_secs(30),
        keep: LONG,
        trace_patience: LONG,
        guest_interval: Duration::from_secs(1),
        awake: Awake::default(),
        metrics: world.metrics.clone(),
        rng: world.rng.clone(),
        clock: world.clock.clone(),
    });
    let view = GuestView { status: JobStatus::Running, verdict: None, update_interval: Duration::from_secs(3) };
    let (view, view_in) = watch::channel(view);
    let (told, mut guest) = mpsc::channel(64);
    let doors = life.listen(Arc::new(world.doors.clone()));
    let door = admit(Admission {
        vm: VmId::random(&world.rng),
        entrance: Entrance::Port(doors.listen(DOOR).await.unwrap()),
        pass: world.pass.clone(),
        guest_token: Secret::new("glrt-guest"),
        job: world.gitlab.job,
        job_token: world.token.clone(),
        dependencies: Vec::new(),
        spool: spool.writer(),
        client,
        cache: None,
        forwards: Vec::new(),
        direct_download: false,
        events: told,
        view: view_in,
        limits: Limits::default(),
        rng: world.rng.clone(),
        clock: world.clock.clone(),
        metrics: world.metrics.clone(),
    });
    let end = |verdict: Verdict| {
        view.send_modify(|view| view.verdict = Some(verdict.clone()));
        world.gitlab.ended();
        outbox.send_replace(Outbox::Verdict(verdict));
    };
    if let Some(verdict) = kept.verdict {
        spool.close_guest().await;
        end(verdict);
    }
    let job = async {
        loop {
            tokio::select! {
                biased;
                // All are receivers, so cancel safe.
                Some(event) = uploads.recv() => if event == UploaderEvent::Done { break },
                Some(event) = guest.recv() => match event {
                    GuestEvent::DebugTrace => {
                        record.write(|record| record.debug = true);
                        debug.send_replace(true);
                    }
                    GuestEvent::Verdict { verdict, reply } => {
                        let known = record.read().verdict;
                        let answer = match &known {
                            Some(known) if *known == verdict => VerdictAnswer::Taken,
                            Some(_) => VerdictAnswer::Over,
                            None => {
                                spool.close_guest().await;
                                spool.sync().await.unwrap();
                                record.write(|record| record.verdict = Some(verdict.clone()));
                                end(verdict);
                                VerdictAnswer::Taken
                            }
                        };
                        let _ = reply.send(answer);
                    }
                    _ => {}
                },
                () = world.we_end.notified() => {
                    let verdict = Verdict { success: false, failure_reason: Some("runner_system_failure".into()), exit_code: None, runtime_environment_key: None };
                    spool.close_guest().await;
                    record.write(|record| record.verdict = Some(verdict.clone()));
                    spool.append_own(LAST_LINES).await.unwrap();
                    spool.sync().await.unwrap();
                    end(verdict);
                }
            }
        }
    };
    tokio::join!(uploader, job);
    door.revoke().await;
}

impl Way for World {
    fn connect(&self) -> BoxFuture<'_, Option<Connection<Box<dyn Stream>>>> {
        // The door is closed for good once the job is over.
        let waits = || !self.gitlab.standin.read(|model| model.jobs[&self.gitlab.job].state.is_over());
        Box::pin(enter(&self.pass, || self.doors.connect(DOOR), || [7; 16], RETRY, waits))
    }

    fn gitlab_loses(&self, permille: usize) {
        self.gitlab.lose(permille);
    }

    fn we_end(&self, _: usize) -> BoxFuture<'_, ()> {
        self.we_end.notify_one();
        Box::pin(std::future::ready(()))
    }
}
