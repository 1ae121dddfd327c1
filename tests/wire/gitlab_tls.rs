//! TLS to GitLab: what is trusted, what is refused and how that is said, client certificates, reload.

use crate::gitlab_server::{PATIENCE, every_text, job, open, plain, runner, soon, until};
use crate::gitlab_tls_server::{
    Ca, OpenSsl, TlsServer, bytes_server, openssl, provider, self_signed, self_signed_ca, server_config,
};
use dayfly::gitlab::transport::{OpenError, full};
use dayfly::gitlab::{
    Call, Connection, Endpoint, GitlabError, JobUpdate, OpenTransport as _, ProxyEnvironment, RealLimits,
    RealOpenTransport, RunnerInfo, Transport, TransportError,
};
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, date_time_ymd};
use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use url::Url;

/// A folder with the files that an endpoint names.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        // Replaced as operators' tools do it, so that it is another file.
        let new = self.0.path().join("new");
        std::fs::write(&new, text).unwrap();
        std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::rename(new, &path).unwrap();
        path
    }
}

fn endpoint(port: u16, ca: Option<&Path>, client: Option<(PathBuf, PathBuf)>) -> Endpoint {
    Endpoint {
        url: Url::parse(&format!("https://localhost:{port}")).unwrap(),
        tls_ca_file: ca.map(Path::to_owned),
        tls_client: client,
        allow_insecure_http: false,
    }
}

fn transport(endpoint: &Endpoint) -> Arc<dyn Transport> {
    open(RealLimits::default(), endpoint)
}

async fn poll(transport: Arc<dyn Transport>) -> Result<(), GitlabError> {
    let info = RunnerInfo(serde_json::value::RawValue::from_string("{}".to_owned()).unwrap());
    soon(runner(transport).request_job(&info, None)).await.map(|_| ())
}

/// The poll must fail, with an explanation that says `hint`, and a server that got no byte of it.
async fn refused(case: &str, server: &TlsServer, transport: Arc<dyn Transport>, hint: &str) {
    let error = poll(transport).await.map(|()| panic!("{case}: it was accepted")).unwrap_err();
    let (text, explained) = (every_text(&error), error.explain().unwrap_or_default());
    assert!(error.is_transient(), "{case}: {text}");
    assert!(explained.contains(hint), "{case}: {explained} ({text})");
    assert!(!text.contains("secrettail"), "{case}: {text}");
    until(|| server.seen.lock().unwrap().over > 0).await;
    assert_eq!(server.application_bytes(), 0, "{case}");
}

#[tokio::test]
async fn a_gitlab_of_the_configured_ca_is_trusted() {
    let (files, ca) = (Files::new(), Ca::new("site CA"));
    let bundle = files.write("ca.pem", &format!("# other\n{}{}", Ca::new("another").pem, ca.pem));
    let server = TlsServer::new(server_config(&ca.good(), None)).await;
    let transport = transport(&endpoint(server.address.port(), Some(&bundle), None));
    poll(Arc::clone(&transport)).await.unwrap();
    poll(transport).await.unwrap();
    let seen = server.seen.lock().unwrap();
    // HTTP/1.1 though the server prefers h2; SNI; one connection.
    assert_eq!(
        (seen.protocol.as_deref(), seen.server_name.as_deref(), seen.handshakes),
        (Some(&b"http/1.1"[..]), Some("localhost"), 1)
    );
    assert!(!seen.client_certificate);
}

#[tokio::test]
async fn an_intermediate_that_is_sent_is_used() {
    let (files, ca) = (Files::new(), Ca::new("site CA"));
    let intermediate = ca.below("intermediate");
    let mut identity = intermediate.good();
    identity.chain.push(intermediate.der.clone());
    let server = TlsServer::new(server_config(&identity, None)).await;
    poll(transport(&endpoint(server.address.port(), Some(&files.write("ca.pem", &ca.pem)), None))).await.unwrap();
}

/// T23: self-signed, unknown CA, wrong name, expired, not yet valid, wrong EKU, missing
/// intermediate, SNI mismatch: each is refused before a byte of ours is sent, and named.
#[tokio::test]
async fn bad_certificates_are_refused_and_named() {
    let (files, ca) = (Files::new(), Ca::new("site CA"));
    let ca_file = files.write("ca.pem", &ca.pem);
    let dates = |from: i32, to: i32| {
        ca.sign(move |params| {
            params.not_before = date_time_ymd(from, 1, 1);
            params.not_after = date_time_ymd(to, 1, 1);
        })
    };
    let with_names = |names: &[&str]| {
        let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        ca.sign(move |params| params.subject_alt_names = CertificateParams::new(names).unwrap().subject_alt_names)
    };
    for (case, identity, hint) in [
        ("self-signed", self_signed(|_| {}), "`tls_ca_file`"),
        ("self-signed, marked as a CA", self_signed_ca(|_| {}), "put that very certificate into `tls_ca_file`"),
        ("unknown CA", Ca::new("nobody's CA").good(), "`tls_ca_file`"),
        ("unknown CA of the same name", Ca::new("site CA").good(), "certificate"),
        ("wrong name", with_names(&["gitlab.example"]), "not for `localhost` but for gitlab.example"),
        ("no name", with_names(&[]), "check the host name in `url`"),
        ("expired", dates(2001, 2002), "has expired"),
        ("not yet valid", dates(2900, 2901), "not valid yet"),
        ("wrong EKU", ca.sign(|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth]), "`serverAuth`"),
        ("missing intermediate", ca.below("intermediate").good(), "intermediate certificates"),
    ] {
        let server = TlsServer::new(server_config(&identity, None)).await;
        refused(case, &server, transport(&endpoint(server.address.port(), Some(&ca_file), None)), hint).await;
    }

    // A server with several sites, and none of the name that we ask for.
    let mut sites = rustls::server::ResolvesServerCertUsingSni::new();
    let other = with_names(&["other.example"]);
    let key =
        rustls::crypto::ring::sign::any_supported_type(&PrivateKeyDer::try_from(other.key.serialize_der()).unwrap())
            .unwrap();
    sites.add("other.example", rustls::sign::CertifiedKey::new(other.chain.clone(), key)).unwrap();
    let config = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions().unwrap();
    let server = TlsServer::new(config.with_no_client_auth().with_cert_resolver(Arc::new(sites))).await;
    refused("SNI mismatch", &server, transport(&endpoint(server.address.port(), Some(&ca_file), None)), "GitLab").await;
}

/// A server whose certificate is its own CA, as `openssl req -x509` makes it, is GitLab if that
/// very certificate is listed.
#[tokio::test]
async fn a_listed_self_signed_server_is_trusted() {
    for identity in [self_signed(|_| {}), self_signed_ca(|_| {})] {
        let files = Files::new();
        let listed = files.write("ca.pem", &format!("{}{}", Ca::new("another").pem, identity.pem));
        let server = TlsServer::new(server_config(&identity, None)).await;
        poll(transport(&endpoint(server.address.port(), Some(&listed), None))).await.unwrap();
    }
}

/// T23: a listed self-signed certificate is held to its dates and names, and to its every byte.
#[tokio::test]
async fn a_listed_self_signed_server_must_be_valid_and_of_that_name() {
    let dated = |from: i32, to: i32| {
        move |params: &mut CertificateParams| {
            params.not_before = date_time_ymd(from, 1, 1);
            params.not_after = date_time_ymd(to, 1, 1);
        }
    };
    let other_name = |p: &mut CertificateParams| {
        p.subject_alt_names = CertificateParams::new(vec!["gitlab.example".to_owned()]).unwrap().subject_alt_names;
    };
    for (case, identity, hint) in [
        ("expired", self_signed_ca(dated(2001, 2002)), "has expired"),
        ("not yet valid", self_signed_ca(dated(2900, 2901)), "not valid yet"),
        ("wrong name", self_signed_ca(other_name), "not for `localhost` but for gitlab.example"),
        ("expired, no CA", self_signed(dated(2001, 2002)), "has expired"),
    ] {
        let files = Files::new();
        let server = TlsServer::new(server_config(&identity, None)).await;
        let listed = files.write("ca.pem", &identity.pem);
        refused(case, &server, transport(&endpoint(server.address.port(), Some(&listed), None)), hint).await;
    }
    // The same names and dates, and another key: nobody's but an attacker's.
    let (files, listed, shown) = (Files::new(), self_signed_ca(|_| {}), self_signed_ca(|_| {}));
    let server = TlsServer::new(server_config(&shown, None)).await;
    let listed = files.write("ca.pem", &listed.pem);
    refused("a double", &server, transport(&endpoint(server.address.port(), Some(&listed), None)), "certificate").await;
}

/// T23: the listed certificate shown by somebody without its key proves nothing.
#[tokio::test]
async fn a_listed_certificate_without_its_key_is_refused() {
    let (files, listed, thief) = (Files::new(), self_signed_ca(|_| {}), self_signed_ca(|_| {}));
    let key = PrivateKeyDer::try_from(thief.key.serialize_der()).unwrap();
    let key = rustls::crypto::ring::sign::any_supported_type(&key).unwrap();
    // `new` checks nothing: as a thief would put them together.
    let shown = rustls::sign::CertifiedKey::new(listed.chain.clone(), key);
    let config = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions().unwrap();
    let resolver = rustls::sign::SingleCertAndKey::from(shown);
    let server = TlsServer::new(config.with_no_client_auth().with_cert_resolver(Arc::new(resolver))).await;
    let listed = files.write("ca.pem", &listed.pem);
    refused("stolen", &server, transport(&endpoint(server.address.port(), Some(&listed), None)), "signature").await;
}

/// T23: without a CA file the host's roots decide, and they know nothing of ours.
#[tokio::test]
async fn the_hosts_roots_do_not_trust_a_private_ca() {
    let server = TlsServer::new(server_config(&Ca::new("site CA").good(), None)).await;
    let opened = RealOpenTransport::new(RealLimits::default(), ProxyEnvironment::default()).open(&endpoint(
        server.address.port(),
        None,
        None,
    ));
    match opened {
        Ok(transport) => refused("no CA file", &server, transport, "`tls_ca_file`").await,
        Err(error) => {
            assert!(every_text(&error).contains("ca-certificates"), "a host without roots: {}", every_text(&error))
        }
    }
}

/// T23: a GitLab that demands a client certificate gets one, or nothing. The key stays here.
#[tokio::test]
async fn client_certificates_are_shown_where_configured() {
    let (files, ca, clients) = (Files::new(), Ca::new("site CA"), Ca::new("client CA"));
    let ca_file = files.write("ca.pem", &ca.pem);
    let client = |ca: &Ca, name: &str| {
        let identity = ca.sign(|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth]);
        (
            files.write(&format!("{name}.pem"), &identity.pem),
            files.write(&format!("{name}.key"), &identity.key.serialize_pem()),
        )
    };
    let server = TlsServer::new(server_config(&ca.good(), Some(&clients))).await;
    let port = server.address.port();
    refused("none", &server, transport(&endpoint(port, Some(&ca_file), None)), "`tls_cert_file` and `tls_key_file`")
        .await;
    let foreign = client(&Ca::new("other clients"), "foreign");
    refused(
        "foreign",
        &server,
        transport(&endpoint(port, Some(&ca_file), Some(foreign))),
        "does not accept our client certificate",
    )
    .await;

    poll(transport(&endpoint(port, Some(&ca_file), Some(client(&clients, "good"))))).await.unwrap();
    assert!(server.seen.lock().unwrap().client_certificate);
    // A server that doesn't ask is shown none.
    let indifferent = TlsServer::new(server_config(&ca.good(), None)).await;
    poll(transport(&endpoint(indifferent.address.port(), Some(&ca_file), Some(client(&clients, "good")))))
        .await
        .unwrap();
    assert!(!indifferent.seen.lock().unwrap().client_certificate);

    let (cert, key) = client(&clients, "good");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let opened = RealOpenTransport::default().open(&endpoint(port, Some(&ca_file), Some((cert, key))));
    let text = every_text(&opened.map(|_| ()).unwrap_err());
    assert!(text.contains("good.key") && text.contains("make it 0600") && !text.contains("PRIVATE"), "{text}");
}

/// T23: TLS 1.1, and plain HTTP on the TLS port: refused, and the server gets no byte of ours.
#[tokio::test]
async fn what_is_no_modern_tls_is_refused_and_named() {
    // A ServerHello of TLS 1.1: record and version 3.2, random, no session, a CBC suite of its time.
    const TLS_1_1: &[u8] = b"\x16\x03\x02\x00\x2a\x02\x00\x00\x26\x03\x02\
        0123456789abcdef0123456789abcdef\x00\x00\x2f\x00";
    let (files, ca) = (Files::new(), Ca::new("site CA"));
    let ca_file = files.write("ca.pem", &ca.pem);
    for (case, bytes, hint) in [
        ("TLS 1.1", TLS_1_1, "TLS 1.2"),
        ("alert protocol_version", &b"\x15\x03\x02\x00\x02\x02\x46"[..], "TLS 1.2"),
        ("plain HTTP", b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", "check the port in `url`"),
    ] {
        let server = bytes_server(bytes).await;
        refused(case, &server, transport(&endpoint(server.address.port(), Some(&ca_file), None)), hint).await;
    }
}

/// T23: a key of RSA-1024, of the server or of its CA, is refused; the same with 2048 is not.
#[tokio::test]
async fn short_rsa_keys_are_refused_and_named() {
    for (ca_bits, leaf_bits, good) in [("2048", "2048", true), ("2048", "1024", false), ("1024", "2048", false)] {
        let files = Files::new();
        let directory = files.0.path();
        let (ca_key, leaf_key) = (format!("rsa:{ca_bits}"), format!("rsa:{leaf_bits}"));
        let ca = [
            "req",
            "-x509",
            "-newkey",
            &ca_key,
            "-nodes",
            "-subj",
            "/CN=site CA",
            "-days",
            "2",
            "-keyout",
            "ca.key",
            "-out",
            "ca.pem",
        ];
        openssl(directory, &ca).await;
        let request = [
            "req",
            "-newkey",
            &leaf_key,
            "-nodes",
            "-subj",
            "/CN=localhost",
            "-keyout",
            "leaf.key",
            "-out",
            "leaf.csr",
        ];
        openssl(directory, &request).await;
        files.write(
            "extensions",
            "subjectAltName=DNS:localhost\nextendedKeyUsage=serverAuth\nbasicConstraints=CA:FALSE\n",
        );
        let sign = [
            "x509",
            "-req",
            "-in",
            "leaf.csr",
            "-CA",
            "ca.pem",
            "-CAkey",
            "ca.key",
            "-CAcreateserial",
            "-days",
            "2",
            "-out",
            "leaf.pem",
            "-extfile",
            "extensions",
        ];
        openssl(directory, &sign).await;
        let server = OpenSsl::serve(directory).await;
        let transport = transport(&endpoint(server.port, Some(&directory.join("ca.pem")), None));
        let case = format!("CA {ca_bits}, server {leaf_bits}");
        if good {
            // It prints what it gets and answers nothing, so the call is dropped once that has come.
            let mut polling = std::pin::pin!(poll(transport));
            let arrived = until(|| server.output.lock().unwrap().contains("POST /api/v4/jobs/request"));
            tokio::select! { biased; polled = &mut polling => panic!("{case}: {polled:?}"), () = arrived => {} }
        } else {
            let error = poll(transport).await.unwrap_err();
            let explained = error.explain().unwrap_or_default();
            assert!(explained.contains("too weak"), "{case}: {explained} ({})", every_text(&error));
            assert!(!server.output.lock().unwrap().contains("POST"), "{case}");
        }
    }
}

/// T24: `http://` is refused unless somebody said so.
#[tokio::test]
async fn clear_text_is_refused_unless_allowed() {
    for url in ["http://gitlab.example", "http://127.0.0.1:1", "ftp://gitlab.example"] {
        let endpoint =
            Endpoint { url: Url::parse(url).unwrap(), tls_ca_file: None, tls_client: None, allow_insecure_http: false };
        let opened = RealOpenTransport::default().open(&endpoint).map(|_| ());
        assert!(matches!(&opened, Err(OpenError::InsecureHttp(_))), "{url}");
        assert!(opened.unwrap_err().to_string().contains("allow_insecure_http = true"));
    }
    plain(&Url::parse("http://127.0.0.1:1").unwrap());
}

/// T26: from https to http, too, a redirect is an answer like any other.
#[tokio::test]
async fn a_redirect_to_clear_text_is_not_followed() {
    let (files, ca) = (Files::new(), Ca::new("site CA"));
    let target = bytes_server(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let acceptor = TlsAcceptor::from(Arc::new(server_config(&ca.good(), None)));
    let location = format!("http://{}/x", target.address);
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let mut tls = acceptor.accept(stream).await.unwrap();
            let mut buffer = vec![0; 0x10000];
            let _ = tls.read(&mut buffer).await;
            let text =
                format!("HTTP/1.1 307 X\r\nLocation: {location}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
            tls.write_all(text.as_bytes()).await.unwrap();
            tls.shutdown().await.unwrap();
        }
    });
    let transport = transport(&endpoint(port, Some(&files.write("ca.pem", &ca.pem)), None));
    assert!(matches!(poll(Arc::clone(&transport)).await, Err(GitlabError::Unexpected { status: 307, .. })));
    let updated = soon(job(transport).update_job(&JobUpdate { verdict: None, trace: None })).await;
    assert!(matches!(updated, Err(GitlabError::Unexpected { status: 307, .. })));
    let seen = target.seen.lock().unwrap();
    assert_eq!((seen.over, seen.application.len()), (0, 0));
}

/// G9: a replaced CA file counts for the next call, without a restart; one that cannot be used
/// does not take the old one's place.
#[tokio::test]
async fn a_replaced_ca_file_is_read_again() {
    let (files, old, new) = (Files::new(), Ca::new("old CA"), Ca::new("new CA"));
    let path = files.write("ca.pem", &old.pem);
    let server = TlsServer::new(server_config(&old.good(), None)).await;
    let transport = transport(&endpoint(server.address.port(), Some(&path), None));
    poll(Arc::clone(&transport)).await.unwrap();

    // The server's certificate is renewed by a new CA: kept connections go on, new ones fail closed.
    *server.config.lock().unwrap() = Arc::new(server_config(&new.good(), None));
    poll(Arc::clone(&transport)).await.unwrap();
    let own = |transport: &Arc<dyn Transport>| {
        let request = http::Request::get("/x").body(full("")).unwrap();
        transport.call(Call { request, connection: Connection::Own, head_timeout: PATIENCE, total_timeout: PATIENCE })
    };
    let error = soon(own(&transport)).await.map(|_| ()).unwrap_err();
    assert!(matches!(error, TransportError::Connect(_)) && error.explain().unwrap().contains("`tls_ca_file`"));

    files.write("ca.pem", "half a file");
    assert!(soon(own(&transport)).await.is_err());
    poll(Arc::clone(&transport)).await.unwrap();

    files.write("ca.pem", &new.pem);
    soon(own(&transport)).await.unwrap();
    poll(Arc::clone(&transport)).await.unwrap();
    // And what trusted the old CA is gone: no connection is left of before.
    *server.config.lock().unwrap() = Arc::new(server_config(&old.good(), None));
    files.write("ca.pem", &format!("{}\n", new.pem));
    assert!(poll(Arc::clone(&transport)).await.is_err());
}

/// A GitLab behind a proxy that only tunnels: the certificate checked is GitLab's.
#[tokio::test]
async fn https_goes_through_a_proxys_tunnel() {
    let (files, ca) = (Files::new(), Ca::new("site CA"));
    let server = TlsServer::new(server_config(&ca.good(), None)).await;
    let target = server.address;
    let proxy = crate::gitlab_server::Server::raw(move |stream, _, seen| {
        Box::pin(async move {
            let mut wire = crate::gitlab_server::Wire::new(stream);
            let request = wire.head().await.unwrap();
            seen.lock().unwrap().requests.push(request);
            wire.stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
            let mut upstream = tokio::net::TcpStream::connect(target).await.unwrap();
            let _ = tokio::io::copy_bidirectional(&mut wire.stream, &mut upstream).await;
        })
    })
    .await;
    let environment = ProxyEnvironment {
        https: Some(format!("http://user:secret@{}", proxy.address)),
        ..ProxyEnvironment::default()
    };
    let open = |environment: &ProxyEnvironment, ca: &str| {
        RealOpenTransport::new(RealLimits::default(), environment.clone())
            .open(&endpoint(target.port(), Some(&files.write("ca.pem", ca)), None))
            .unwrap()
    };
    poll(open(&environment, &ca.pem)).await.unwrap();
    let request = proxy.request();
    assert_eq!(request.line, format!("CONNECT localhost:{} HTTP/1.1", target.port()));
    assert_eq!(request.all("proxy-authorization"), ["Basic dXNlcjpzZWNyZXQ="]);
    assert!(request.all("runner-token").is_empty(), "no token is the proxy's to see");
    assert_eq!(server.seen.lock().unwrap().server_name.as_deref(), Some("localhost"));
    assert!(poll(open(&environment, &Ca::new("site CA").pem)).await.is_err());
    let excepted = ProxyEnvironment { none: Some("localhost".to_owned()), ..environment };
    let before = proxy.connections();
    poll(open(&excepted, &ca.pem)).await.unwrap();
    assert_eq!(proxy.connections(), before);
}
