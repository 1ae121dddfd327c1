//! The stand-in on a socket, and its repositories.

use super::*;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::rustls;

async fn listen(lab: &Lab, tls: Option<Arc<rustls::ServerConfig>>) -> Served {
    serve(lab.gitlab.clone(), TcpListener::bind("127.0.0.1:0").await.unwrap(), tls).unwrap()
}

/// Sends raw bytes and reads until the connection ends.
async fn raw(stream: &mut (impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin), request: &str) -> String {
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    // A cut connection may read as an error: what came before it counts.
    let read = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut answer)).await;
    let _ = read.expect("the stand-in ends the connection");
    String::from_utf8_lossy(&answer).into_owned()
}

const DISCOVERY: &str = "GET /api/v4/runners/router/discovery HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";

#[tokio::test]
async fn it_answers_on_a_socket_and_a_planned_cut_is_a_cut() {
    let lab = Lab::new();
    let served = listen(&lab, None).await;
    let mut stream = TcpStream::connect(served.address()).await.unwrap();
    assert!(raw(&mut stream, DISCOVERY).await.starts_with("HTTP/1.1 403 "));
    lab.gitlab.script(Matcher::any(), Fault::DropBeforeApply);
    let mut stream = TcpStream::connect(served.address()).await.unwrap();
    assert_eq!(raw(&mut stream, DISCOVERY).await, "");
    let connections: Vec<u64> = lab.gitlab.requests().iter().map(|request| request.connection).collect();
    assert_eq!(connections, [1, 2]);
    let mut idle = TcpStream::connect(served.address()).await.unwrap();
    // One answer proves that the connection is being served; then it is cut.
    idle.write_all(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut first = [0; 12];
    idle.read_exact(&mut first).await.unwrap();
    served.cut_connections();
    let mut rest = Vec::new();
    let _ = tokio::time::timeout(Duration::from_secs(20), idle.read_to_end(&mut rest)).await.expect("cut");
    let address = served.address();
    served.stop().await;
    assert!(TcpStream::connect(address).await.is_err());
}

#[tokio::test]
async fn it_speaks_tls() {
    let lab = Lab::new();
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()).into();
    let server = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    let served = listen(&lab, Some(Arc::new(server))).await;
    let mut roots = rustls::RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = TcpStream::connect(served.address()).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(client));
    let mut stream = connector.connect("localhost".try_into().unwrap(), stream).await.unwrap();
    assert!(raw(&mut stream, DISCOVERY).await.starts_with("HTTP/1.1 403 "));
}

/// T38: a clone needs the token of a job that runs, of this project.
#[tokio::test(start_paused = true)]
async fn a_repository_costs_the_token_of_an_executing_job_of_its_project() {
    let lab = Lab::new();
    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir(directory.path().join("info")).unwrap();
    std::fs::write(directory.path().join("info/refs"), "5f1c\trefs/heads/main\n").unwrap();
    std::fs::write(directory.path().join("config"), "secret").unwrap();
    std::os::unix::fs::symlink("/etc/passwd", directory.path().join("HEAD")).unwrap();
    lab.gitlab
        .edit(|model| model.projects.get_mut(&lab.project).unwrap().repository = Some(directory.path().to_owned()));
    let (id, token) = lab.running_job(JobSpec::default()).await;
    let other = lab.gitlab.add_project("tools/other");
    let basic = |password: &str| format!("Basic {}", BASE64_STANDARD.encode(format!("gitlab-ci-token:{password}")));
    let get = async |project: &str, file: &str, authorization: Option<String>| {
        let headers: Vec<(&str, &str)> = authorization.iter().map(|value| ("authorization", value.as_str())).collect();
        lab.send("GET", &format!("/{project}.git/{file}"), &headers, "").await
    };
    let refs = "info/refs?service=git-upload-pack";
    let reply = get("tools/lint", refs, Some(basic(&token))).await;
    assert_eq!((reply.status, &reply.body[..]), (200, b"5f1c\trefs/heads/main\n".as_slice()));
    let refused = get("tools/lint", refs, None).await;
    assert_eq!((refused.status, refused.header("www-authenticate")), (401, Some("Basic realm=\"GitLab\"")));
    assert_eq!(get("tools/lint", refs, Some(basic("glcbt-other"))).await.status, 401);
    assert_eq!(get("tools/other", refs, Some(basic(&token))).await.status, 401);
    for file in ["config", "HEAD", "objects/../config", "info/../config", "objects/info/packs"] {
        assert_eq!(get("tools/lint", file, Some(basic(&token))).await.status, 404, "{file}");
    }
    assert_eq!(lab.put(id, json!({ "token": token, "state": "success" })).await.status, 200);
    assert_eq!(get("tools/lint", refs, Some(basic(&token))).await.status, 401);
    assert_ne!(other, lab.project);
}
