//! The page, who sees consoles, TLS, and the fleet.

use super::*;
use base64::Engine as _;
use std::path::PathBuf;

const TOKEN: &str = "0123456789abcdef0123456789abcdef";

fn private(path: PathBuf, text: &str) -> PathBuf {
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    path
}

fn with_token(dir: &Path) -> Config {
    Config { token_file: Some(private(dir.join("token"), TOKEN)), ..Config::default() }
}

fn showing(path: &str, authorization: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {authorization}\r\n\r\n")
}

/// What is shown of a job, a runner, a project is text, whoever chose it; and a browser gets nothing from elsewhere.
#[tokio::test]
async fn the_page_shows_texts_as_texts_and_allows_nothing_from_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let (socket, fake) =
        (dir.path().join("s"), Fake::with(RunnerState::WaitingForRoom { missing: "2 <b>CPUs".into() }));
    fake.0.lock().unwrap().daemon.problems.push("<i>look</i>".into());
    beside(Address::Unix(socket.clone()), EXCHANGE_DEADLINE, fake, |_| async move {
        let page = ask(&socket, &get("/")).await;
        assert!(
            page.starts_with("HTTP/1.1 200 OK\r\n") && page.contains("content-type: text/html; charset=utf-8"),
            "{page}"
        );
        for shown in [
            "&lt;script&gt;alert(1)",
            "te&quot;st' onload=x",
            "waiting for room: 2 &lt;b&gt;CPUs",
            "&lt;i&gt;look",
            "1 problem",
        ] {
            assert!(page.contains(shown), "no {shown:?}: {page}");
        }
        assert!(!page.contains("<script>alert") && !page.contains("<b>CPUs") && !page.contains("<i>look"), "{page}");
        assert!(page.contains("content-security-policy: default-src 'none';"), "{page}");
        let link = page.split("href=\"/jobs/").nth(1).unwrap().split('"').next().unwrap();
        assert_eq!(link, "42?runner=ci+%26+co");
        let job = ask(&socket, &get(&format!("/jobs/{link}"))).await;
        assert!(job.contains("disk ready") && job.contains("script_failure, exit code 3"), "{job}");
        for path in ["/page.css", "/page.js", "/icon.svg", "/status.json", "/jobs.json"] {
            let file = ask(&socket, &get(path)).await;
            assert!(file.starts_with("HTTP/1.1 200 OK\r\n"), "{path}: {file}");
            let elsewhere = file.replace("http://www.w3.org/2000/svg", "").replace("https://gitlab.example/", "");
            assert!(!elsewhere.contains("://"), "{path}: {file}");
        }
        for path in ["/jobs/43", "/jobs/42?runner=other", "/jobs/x", "/jobs/"] {
            assert!(ask(&socket, &get(path)).await.starts_with("HTTP/1.1 404 "), "{path}");
        }
    })
    .await;
}

/// T35: a console is shown to who has the token, as a program or as a browser sends it, and to nobody else.
#[tokio::test]
async fn a_console_is_shown_to_who_has_the_token() {
    let dir = tempfile::tempdir().unwrap();
    let (socket, config) = (dir.path().join("s"), with_token(dir.path()));
    let fake = Fake::with(RunnerState::Polling);
    beside_with(&config, Address::Unix(socket.clone()), EXCHANGE_DEADLINE, fake.clone(), |_| async {
        let hidden = ask(&socket, &get("/jobs/42")).await;
        assert!(hidden.contains("disk ready") && !hidden.contains("first row"), "{hidden}");
        assert!(hidden.contains("href=\"/jobs/42?runner=ci+%26+co&amp;token\""), "{hidden}");
        let asked = ask(&socket, &get("/jobs/42?token")).await;
        assert!(asked.starts_with("HTTP/1.1 401 ") && asked.contains("www-authenticate: Basic realm="), "{asked}");
        let basic = format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("me:{TOKEN}")));
        for authorization in [format!("Bearer {TOKEN}"), basic] {
            let shown = ask(&socket, &showing("/jobs/42?token", &authorization)).await;
            assert!(shown.contains("first row\n&lt;img src=x&gt;"), "{shown}");
        }
        for path in ["/", "/jobs/42", "/metrics", "/healthz"] {
            assert!(ask(&socket, &showing(path, "Bearer x")).await.starts_with("HTTP/1.1 401 "), "{path}");
        }
        assert!(!ask(&socket, &get("/jobs.json")).await.contains("first row"));
    })
    .await;
    beside(Address::Unix(socket.clone()), EXCHANGE_DEADLINE, fake, |_| async {
        let none = ask(&socket, &get("/jobs/42?token")).await;
        assert!(none.contains("status.token_file") && !none.contains("first row"), "{none}");
    })
    .await;
}

/// T35: a page of somebody else's that leads its own name here reads nothing.
#[tokio::test]
async fn on_loopback_only_its_address_is_answered() {
    beside(
        Address::Tcp(([127, 0, 0, 1], 0).into()),
        EXCHANGE_DEADLINE,
        Fake::with(RunnerState::Polling),
        |port| async move {
            let port = port.unwrap();
            for (host, status) in [(format!("127.0.0.1:{port}"), "200"), ("evil.example".to_owned(), "421")] {
                let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n");
                stream.write_all(request.as_bytes()).await.unwrap();
                let mut answer = String::new();
                stream.read_to_string(&mut answer).await.unwrap();
                assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{host}: {answer}");
            }
        },
    )
    .await;
}

/// Two daemons of a fleet, over TLS: one names the other, by the token that they share.
#[tokio::test]
async fn the_fleets_others_are_asked_over_tls_with_the_token() {
    let dir = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(vec!["localhost".into(), "127.0.0.1".into()]).unwrap();
    let (cert, key) =
        (dir.path().join("cert.pem"), private(dir.path().join("key.pem"), &made.signing_key.serialize_pem()));
    std::fs::write(&cert, made.cert.pem()).unwrap();
    let tls = Config { tls_cert_file: Some(cert.clone()), tls_key_file: Some(key), ..with_token(dir.path()) };
    let other = Fake::with(RunnerState::Polling);
    other.0.lock().unwrap().daemon.problems.push("the other one's problem".into());
    let socket = dir.path().join("s");
    beside_with(&tls, Address::Tcp(([127, 0, 0, 1], 0).into()), EXCHANGE_DEADLINE, other, |port| async move {
        let url = format!("https://127.0.0.1:{}", port.unwrap()).parse().unwrap();
        let nobody = "https://127.0.0.1:9".parse().unwrap();
        let ours = Config { fleet: vec![url, nobody], fleet_ca_file: Some(cert), ..with_token(dir.path()) };
        beside_with(
            &ours,
            Address::Unix(socket.clone()),
            EXCHANGE_DEADLINE,
            Fake::with(RunnerState::Polling),
            |_| async {
                let first = ask(&socket, &get("/")).await;
                assert!(first.contains("is being asked"), "the page waits for nobody: {first}");
                let since = Instant::now();
                let page = loop {
                    let page = ask(&socket, &get("/")).await;
                    if page.contains("problem") && !page.contains("is being asked") {
                        break page;
                    }
                    assert!(since.elapsed() < Duration::from_secs(20), "{page}");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                };
                assert!(
                    page.contains("the other one&#39;s problem") || page.contains("the other one's problem"),
                    "{page}"
                );
                assert!(page.contains("does not answer"), "{page}");
            },
        )
        .await;
    })
    .await;
}
