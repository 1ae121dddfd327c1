//! The listener over real sockets.

mod page;

use super::*;
use crate::BoxFuture;
use crate::gitlab::JobId;
use crate::gitlab::{OpenTransport, RealOpenTransport};
use crate::history::{AtGitlab, End, Outcome, Step};
use crate::metrics::{Form, Metrics, Snapshot};
use crate::status::{ConsoleFound, JobFound, RunnerState, RunnerStatus, StatusReport};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Mutex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::Instant;

/// A daemon with one runner in a state that tests choose.
struct Fake(Mutex<StatusReport>);

impl Fake {
    fn with(state: RunnerState) -> Arc<Self> {
        let runner = RunnerStatus {
            name: "ci".into(),
            url: "https://gitlab.example/".into(),
            class: "small".into(),
            state,
            answered_s: None,
            outage: None,
            jobs: 0,
        };
        Arc::new(Self(Mutex::new(StatusReport { runners: vec![runner], ..StatusReport::default() })))
    }
}

impl Reports for Fake {
    fn status(&self) -> StatusReport {
        self.0.lock().unwrap().clone()
    }
    fn metrics(&self, form: Form) -> String {
        Metrics::new().text(&Snapshot::default(), form)
    }
    fn ended(&self, jobs_max: usize) -> Vec<End> {
        assert!(jobs_max <= 1000);
        vec![End { console: None, ..end() }]
    }
    fn job<'a>(&'a self, id: JobId, runner: Option<&'a str>) -> BoxFuture<'a, JobFound> {
        let known = id == end().id && runner.is_none_or(|runner| runner == end().runner);
        Box::pin(async move { if known { JobFound::Ended { end: Box::new(end()) } } else { JobFound::Unknown } })
    }
    fn console_log<'a>(&'a self, _id: JobId, _runner: Option<&'a str>) -> BoxFuture<'a, ConsoleFound> {
        Box::pin(async { ConsoleFound::Unknown })
    }
    fn console<'a>(&'a self, id: JobId, _: Option<&'a str>, _: Option<u64>) -> BoxFuture<'a, ConsoleFound> {
        let known = id == end().id;
        Box::pin(async move {
            if known { ConsoleFound::Ended { text: end().console, rows: 2 } } else { ConsoleFound::Unknown }
        })
    }
}

/// A job that has ended, with texts in it that somebody would like a browser to obey.
fn end() -> End {
    End {
        version: 1,
        runner: "ci & co".into(),
        id: JobId(42),
        gitlab: "https://gitlab.example/".into(),
        project: "group/<script>alert(1)</script>".into(),
        name: "te\"st' onload=x".into(),
        class: "small".into(),
        received: "2026-01-02T03:04:05Z".parse().unwrap(),
        ended: "2026-01-02T03:05:05Z".parse().unwrap(),
        verdict: Outcome::Failed,
        failure_reason: Some("script_failure".into()),
        exit_code: Some(3),
        why: None,
        at_gitlab: AtGitlab::All,
        log_bytes: 2000,
        machine: None,
        steps: vec![Step { what: "disk ready".into(), at_ms: 120 }],
        cache: Vec::new(),
        reached: Vec::new(),
        console_rows: 2,
        console: Some("first row\n<img src=x>\n".into()),
    }
}

/// Runs `test` beside a listener at this address, served with this deadline.
async fn beside<F: Future<Output = ()>>(
    address: Address,
    deadline: Duration,
    fake: Arc<Fake>,
    test: impl FnOnce(Option<u16>) -> F,
) {
    beside_with(&Config::default(), address, deadline, fake, test).await;
}

/// The same, by a section of the configuration.
async fn beside_with<F: Future<Output = ()>>(
    config: &Config,
    address: Address,
    deadline: Duration,
    fake: Arc<Fake>,
    test: impl FnOnce(Option<u16>) -> F,
) {
    let transport: Arc<dyn OpenTransport> = Arc::new(RealOpenTransport::default());
    let settings = Settings::read(config, &address, &transport).await.unwrap();
    let (_in_force, settings) = watch::channel(Arc::new(settings));
    let listening = listen(&address).await.unwrap().unwrap();
    let port = matches!(address, Address::Tcp(_)).then(|| listening.port());
    let stop = CancellationToken::new();
    let served = serve_within(deadline, listening, fake, settings, stop.clone());
    let tested = async {
        test(port).await;
        stop.cancel();
    };
    tokio::join!(served, tested);
}

async fn ask(path: &Path, request: &str) -> String {
    let mut stream = UnixStream::connect(path).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n")
}

/// T35: what is read, in either form; nothing here takes a command.
#[tokio::test]
async fn metrics_come_in_the_form_that_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    beside(Address::Unix(socket.clone()), EXCHANGE_DEADLINE, Fake::with(RunnerState::Polling), |_| async move {
        let classic = ask(&socket, &get("/metrics")).await;
        assert!(classic.starts_with("HTTP/1.1 200 OK\r\n") && classic.contains("text/plain; version=0.0.4"), "{classic}");
        assert!(classic.contains("# TYPE dayfly_jobs_assigned_total counter\n"), "{classic}");
        let open = "GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5\r\n\r\n";
        let open = ask(&socket, open).await;
        assert!(open.contains("application/openmetrics-text") && open.ends_with("# EOF\n"), "{open}");
        assert!(ask(&socket, &get("/")).await.contains("/metrics"));
        assert!(ask(&socket, &get("/etc/passwd")).await.starts_with("HTTP/1.1 404 "));
        let head = ask(&socket, "HEAD /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(head.starts_with("HTTP/1.1 200 ") && head.ends_with("\r\n\r\n"), "{head}");
        assert!(ask(&socket, "POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").await.starts_with("HTTP/1.1 405 "));
    })
    .await;
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "its socket goes with it");
}

/// T35: only the daemon's own user and root.
#[tokio::test]
async fn only_the_owner_may_use_the_socket() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    beside(Address::Unix(socket.clone()), EXCHANGE_DEADLINE, Fake::with(RunnerState::Polling), |_| async move {
        assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    })
    .await;
}

#[tokio::test]
async fn ready_is_who_can_take_a_job() {
    let states = [
        (RunnerState::Polling, 200),
        (RunnerState::WaitingForRoom { missing: "2 CPUs".into() }, 200),
        (RunnerState::Blocked { reason: "no image".into() }, 503),
        (RunnerState::Refused { error: "no".into() }, 503),
        (RunnerState::Retrying { error: "502".into(), in_s: 3 }, 503),
        (RunnerState::Stopped, 503),
    ];
    for (state, code) in states {
        let dir = tempfile::tempdir().unwrap();
        let (socket, fake) = (dir.path().join("s"), Fake::with(state.clone()));
        fake.0.lock().unwrap().daemon.problems.push("look\nhere".into());
        let of_test = fake.clone();
        beside(Address::Unix(socket.clone()), EXCHANGE_DEADLINE, fake, |_| async move {
            let answer = ask(&socket, &get("/readyz")).await;
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {code} ")) && answer.ends_with("\nlook\\nhere\n"),
                "{answer}"
            );
            assert!(ask(&socket, &get("/healthz")).await.starts_with("HTTP/1.1 200 "), "{state}");
            of_test.0.lock().unwrap().daemon.draining = true;
            assert!(ask(&socket, &get("/readyz")).await.starts_with("HTTP/1.1 503 "));
        })
        .await;
    }
}

/// A port on loopback: nobody who connects and says nothing, or too much, keeps others out for longer than a deadline.
#[tokio::test]
async fn silent_and_endless_clients_are_closed_and_others_served() {
    let deadline = Duration::from_millis(300);
    let address = Address::Tcp(([127, 0, 0, 1], 0).into());
    beside(address, deadline, Fake::with(RunnerState::Polling), |port| async move {
        let port = port.unwrap();
        let connect = || TcpStream::connect(("127.0.0.1", port));
        let mut silent = Vec::new();
        for _ in 0..2 * CONNECTIONS_MAX {
            silent.push(connect().await.unwrap());
        }
        let since = Instant::now();
        let mut stream = connect().await.unwrap();
        stream.write_all(get("/healthz").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.ends_with("\r\n\r\nok\n"), "{answer}");
        assert!(since.elapsed() < 10 * deadline, "{:?}", since.elapsed());
        drop(silent);
        // A head without end.
        let mut stream = connect().await.unwrap();
        let endless = format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(64 * 1024));
        let _ = stream.write_all(endless.as_bytes()).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    })
    .await;
}

#[tokio::test]
async fn a_place_that_is_taken_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = Address::Tcp(taken.local_addr().unwrap());
    let error = listen(&address).await.unwrap_err();
    assert!(error.to_string().contains(&format!("{address} (`status.listen`)")), "{error}");
    let nowhere = Address::Unix("/nonexistent/s".into());
    assert!(listen(&nowhere).await.unwrap_err().to_string().contains("`/nonexistent/s`"));
    assert!(listen(&Address::Off).await.unwrap().is_none());
}

#[test]
fn an_address_is_a_path_or_a_port_or_off() {
    for text in ["/run/dayfly/status.sock", "127.0.0.1:9480", "[::1]:9480", "off"] {
        assert_eq!(String::from(text.parse::<Address>().unwrap()), text);
    }
    assert_eq!("unix:/run/x".parse::<Address>().unwrap(), Address::Unix("/run/x".into()));
    for text in ["", "9480", "localhost:9480", "status.sock", "127.0.0.1"] {
        assert!(text.parse::<Address>().unwrap_err().to_string().contains("`127.0.0.1:9480`"), "{text}");
    }
}
