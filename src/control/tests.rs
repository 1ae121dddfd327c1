//! Server and client against each other, over a real socket.

use super::*;
use crate::BoxFuture;
use crate::cache::Caches;
use crate::history::{End, Suggestion};
use crate::metrics::Form;
use crate::status::{DaemonStatus, Reports};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

/// Job, runner and reason of a kill.
type Killed = (JobId, Option<String>, Option<String>);

#[derive(Default)]
struct Fake {
    draining: AtomicBool,
    killed: Mutex<Vec<Killed>>,
}

impl Reports for Fake {
    fn status(&self) -> StatusReport {
        StatusReport {
            daemon: DaemonStatus { draining: self.draining.load(Ordering::SeqCst), ..DaemonStatus::default() },
            ..StatusReport::default()
        }
    }
    fn metrics(&self, form: Form) -> String {
        assert_eq!(form, Form::Classic);
        "dayfly_up 1\n".into()
    }
    fn ended(&self, jobs_max: usize) -> Vec<End> {
        assert_eq!(jobs_max, 5);
        Vec::new()
    }
    fn job<'a>(&'a self, _id: JobId, _runner: Option<&'a str>) -> BoxFuture<'a, JobFound> {
        Box::pin(async { JobFound::Ambiguous { runners: vec!["a".into(), "b".into()] } })
    }
    fn console_log<'a>(&'a self, _id: JobId, _runner: Option<&'a str>) -> BoxFuture<'a, ConsoleFound> {
        Box::pin(async { ConsoleFound::Unknown })
    }
    fn console<'a>(&'a self, _id: JobId, runner: Option<&'a str>, from: Option<u64>) -> BoxFuture<'a, ConsoleFound> {
        let text = format!("{runner:?} from {from:?}\n");
        Box::pin(async { ConsoleFound::Ended { text: Some(text), rows: 1 } })
    }
}

impl ControlHandler for Fake {
    fn drain(&self) -> Vec<JobId> {
        self.draining.store(true, Ordering::SeqCst);
        vec![JobId(9)]
    }
    fn shell<'a>(&'a self, wish: ShellWish<'a>) -> BoxFuture<'a, Opened> {
        assert_eq!((wish.size.rows, wish.term, wish.runner), (30, "vt100", None));
        let why = format!("not for user {}", wish.user);
        Box::pin(async { Opened::No(ShellOutcome::Refused { why }) })
    }
    fn kill(&self, job: JobId, runner: Option<&str>, reason: Option<String>) -> KillOutcome {
        self.killed.lock().unwrap().push((job, runner.map(str::to_owned), reason));
        KillOutcome::Told { runner: runner.unwrap_or("ci").to_owned() }
    }
    fn caches(&self) -> Option<Caches> {
        None
    }
    fn suggest<'a>(&'a self, class: &'a str, days: u32) -> BoxFuture<'a, Suggestion> {
        Box::pin(async move { Suggestion { class: class.into(), days, ..Suggestion::default() } })
    }
    fn status_is_not_served(&self, _why: Option<String>) {}
}

/// Runs `test` beside a server on a socket in a fresh directory; both must come to an end.
async fn beside_server<F: Future<Output = ()>>(deadline: Duration, test: impl FnOnce(PathBuf, Arc<Fake>) -> F) {
    let dir = tempfile::tempdir().unwrap();
    let path = socket(dir.path());
    // What killed daemons leave: E15.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    std::fs::create_dir(dir.path().join(".new-socket")).unwrap();
    drop(std::os::unix::net::UnixListener::bind(dir.path().join(".new-socket/s")).unwrap());
    let (fake, stop) = (Arc::new(Fake::default()), CancellationToken::new());
    let served = server::serve_within(deadline, bind(&path, None).unwrap(), fake.clone(), stop.clone());
    let tested = async {
        test(path.clone(), fake.clone()).await;
        stop.cancel();
    };
    tokio::join!(served, tested);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left behind");
}

#[tokio::test]
async fn status_metrics_drain_and_kill_reach_the_handler() {
    beside_server(EXCHANGE_DEADLINE, |path, fake| async move {
        let Answer::Status { status } = call(&path, &Request::Status).await.unwrap() else { panic!("no status") };
        assert!(!status.daemon.draining);
        let metrics = Answer::Metrics { text: "dayfly_up 1\n".into() };
        assert_eq!(call(&path, &Request::Metrics).await.unwrap(), metrics);
        assert_eq!(call(&path, &Request::Drain).await.unwrap(), Answer::Draining { kept: vec![JobId(9)] });
        let Answer::Status { status } = call(&path, &Request::Status).await.unwrap() else { panic!("no status") };
        assert!(status.daemon.draining);
        let kill = Request::Kill { job: JobId(42), runner: Some("b".into()), reason: Some(" a\nb\u{1b}[2J ".into()) };
        assert_eq!(
            call(&path, &kill).await.unwrap(),
            Answer::Kill { outcome: KillOutcome::Told { runner: "b".into() } }
        );
        assert_eq!(*fake.killed.lock().unwrap(), [(JobId(42), Some("b".into()), Some("a\\nb\\u{1b}[2J".into()))]);
    })
    .await;
}

/// Jobs under way and ended, one of them, and a console: what `dayfly jobs`, `job show` and `console` ask.
#[tokio::test]
async fn jobs_and_consoles_reach_the_handler() {
    beside_server(EXCHANGE_DEADLINE, |path, _| async move {
        let jobs = call(&path, &Request::Jobs { ended_max: None }).await.unwrap();
        assert_eq!(jobs, Answer::Jobs { jobs: Box::default() });
        let jobs = call(&path, &Request::Jobs { ended_max: Some(5) }).await.unwrap();
        assert_eq!(jobs, Answer::Jobs { jobs: Box::new(JobList { ended: Some(vec![]), ..JobList::default() }) });
        let job = call(&path, &Request::Job { job: JobId(42), runner: None }).await.unwrap();
        assert_eq!(job, Answer::Job { found: JobFound::Ambiguous { runners: vec!["a".into(), "b".into()] } });
        let console = Request::Console { job: JobId(42), runner: Some("a".into()), from: Some(7) };
        let text = Some("Some(\"a\") from Some(7)\n".to_owned());
        assert_eq!(
            call(&path, &console).await.unwrap(),
            Answer::Console { found: ConsoleFound::Ended { text, rows: 1 } }
        );
        let suggestion = Suggestion { class: "small".into(), days: 7, ..Suggestion::default() };
        let suggest = Request::Suggest { class: "small".into(), days: 7 };
        assert_eq!(call(&path, &suggest).await.unwrap(), Answer::Suggest { suggestion });
    })
    .await;
}

/// A wish for a shell comes with who wishes it, by the kernel's word; what is refused is answered and ends.
#[tokio::test]
async fn a_shell_is_asked_for_by_a_user_that_the_kernel_names() {
    beside_server(EXCHANGE_DEADLINE, |path, _| async move {
        let wish = Request::Shell { job: JobId(42), runner: None, rows: 30, columns: 90, term: "vt100".into() };
        let (answer, mut rest) = open(&path, &wish).await.unwrap();
        let why = format!("not for user {}", rustix::process::geteuid().as_raw());
        assert_eq!(answer, Answer::Shell { outcome: ShellOutcome::Refused { why } });
        let mut more = Vec::new();
        rest.read_to_end(&mut more).await.unwrap();
        assert!(more.is_empty());
    })
    .await;
}

/// T35: commands are for the daemon's own user and root.
#[tokio::test]
async fn only_the_owner_may_use_the_socket() {
    beside_server(EXCHANGE_DEADLINE, |path, _| async move {
        call(&path, &Request::Status).await.unwrap();
        let metadata = std::fs::metadata(&path).unwrap();
        assert!(metadata.file_type().is_socket());
        assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    })
    .await;
}

/// U20: members of the group of operators may use it, and nobody else; a group that cannot be had keeps nobody waiting.
#[tokio::test]
async fn a_group_of_operators_may_use_the_socket() {
    use std::os::unix::fs::MetadataExt as _;
    let dir = tempfile::tempdir().unwrap();
    let path = socket(dir.path());
    let own = rustix::process::getegid().as_raw();
    drop(bind(&path, Some(&own.to_string())).unwrap());
    let found = std::fs::metadata(&path).unwrap();
    assert_eq!((found.mode() & 0o777, found.gid()), (0o660, own));
    drop(bind(&path, Some("no-such-group")).unwrap());
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    drop(bind(&path, None).unwrap());
    assert_eq!(std::fs::metadata(dir.path()).unwrap().mode() & 0o777, 0o700);
}

#[tokio::test]
async fn nonsense_gets_an_error_and_changes_nothing() {
    beside_server(EXCHANGE_DEADLINE, |path, fake| async move {
        let long = format!("{{\"command\":\"{}\"}}\n", "x".repeat(5_000));
        for line in [
            "\n",
            "drain\n",
            "{\"command\":\"reboot\"}\n",
            "{\"command\":\"kill\"}\n",
            "{\"command\":\"kill\",\"job\":-1}\n",
            "{\"command\":\"kill\",\"job\":1,\"all\":true}\n",
            &long,
        ] {
            let mut stream = UnixStream::connect(&path).await.unwrap();
            // The server may have answered, and closed, before it read all of the long line.
            let _ = stream.write_all(line.as_bytes()).await;
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer).await;
            if !answer.is_empty() {
                assert!(matches!(serde_json::from_slice(&answer).unwrap(), Answer::Error { .. }), "{line}");
            }
        }
        let Answer::Status { status } = call(&path, &Request::Status).await.unwrap() else { panic!("no status") };
        assert!(!status.daemon.draining && fake.killed.lock().unwrap().is_empty());
    })
    .await;
}

#[tokio::test]
async fn a_client_that_says_nothing_delays_the_next_by_one_deadline() {
    beside_server(Duration::from_millis(50), |path, _| async move {
        let silent = UnixStream::connect(&path).await.unwrap();
        assert!(matches!(call(&path, &Request::Status).await.unwrap(), Answer::Status { .. }));
        drop(silent);
    })
    .await;
}

#[tokio::test]
async fn a_daemon_that_is_not_there_is_said_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = socket(dir.path());
    assert!(matches!(call(&path, &Request::Status).await, Err(ControlError::NotRunning { .. })));
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(matches!(call(&path, &Request::Status).await, Err(ControlError::NotRunning { .. })));
}
