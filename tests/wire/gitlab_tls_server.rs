//! Certificates of all kinds, and TLS servers that show them and keep what they were sent.

use crate::gitlab_server::{soon, until};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

/// A CA, and what it signs.
pub(crate) struct Ca {
    pub(crate) pem: String,
    pub(crate) der: CertificateDer<'static>,
    pub(crate) issuer: Issuer<'static, KeyPair>,
}

/// A certificate for a server or client, its key, and what is sent along.
pub(crate) struct Identity {
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) pem: String,
    pub(crate) key: KeyPair,
}

pub(crate) fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

impl Ca {
    pub(crate) fn new(name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let cert = ca_params(name).self_signed(&key).unwrap();
        Self { pem: cert.pem(), der: cert.der().clone(), issuer: Issuer::new(ca_params(name), key) }
    }

    /// An intermediate CA.
    pub(crate) fn below(&self, name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let cert = ca_params(name).signed_by(&key, &self.issuer).unwrap();
        Self { pem: cert.pem(), der: cert.der().clone(), issuer: Issuer::new(ca_params(name), key) }
    }

    pub(crate) fn sign(&self, change: impl FnOnce(&mut CertificateParams)) -> Identity {
        let mut params = server_params();
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        Identity { chain: vec![cert.der().clone()], pem: cert.pem(), key }
    }

    pub(crate) fn good(&self) -> Identity {
        self.sign(|_| {})
    }
}

pub(crate) fn server_params() -> CertificateParams {
    let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params
}

/// A certificate that nobody signed but itself.
pub(crate) fn self_signed(change: impl FnOnce(&mut CertificateParams)) -> Identity {
    let mut params = server_params();
    change(&mut params);
    let key = KeyPair::generate().unwrap();
    let cert = params.self_signed(&key).unwrap();
    Identity { chain: vec![cert.der().clone()], pem: cert.pem(), key }
}

/// The same, marked as a CA.
pub(crate) fn self_signed_ca(change: impl FnOnce(&mut CertificateParams)) -> Identity {
    self_signed(|params| {
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        change(params);
    })
}

pub(crate) fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

pub(crate) fn server_config(identity: &Identity, clients: Option<&Ca>) -> ServerConfig {
    let key = PrivateKeyDer::try_from(identity.key.serialize_der()).unwrap();
    let builder = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions().unwrap();
    let builder = match clients {
        None => builder.with_no_client_auth(),
        Some(ca) => {
            let mut roots = RootCertStore::empty();
            roots.add(ca.der.clone()).unwrap();
            builder.with_client_cert_verifier(
                WebPkiClientVerifier::builder_with_provider(roots.into(), provider()).build().unwrap(),
            )
        }
    };
    let mut config = builder.with_single_cert(identity.chain.clone(), key).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config
}

/// What a TLS server has seen.
#[derive(Default)]
pub(crate) struct Seen {
    /// Bytes inside TLS (or, without TLS, at all).
    pub(crate) application: Vec<u8>,
    /// Connections that have ended, or been answered.
    pub(crate) over: usize,
    pub(crate) handshakes: usize,
    pub(crate) server_name: Option<String>,
    pub(crate) protocol: Option<Vec<u8>>,
    pub(crate) client_certificate: bool,
}

pub(crate) struct TlsServer {
    pub(crate) address: SocketAddr,
    pub(crate) seen: Arc<Mutex<Seen>>,
    pub(crate) config: Arc<Mutex<Arc<ServerConfig>>>,
    pub(crate) _tasks: JoinSet<()>,
}

pub(crate) const ANSWER: &[u8] = b"HTTP/1.1 204 No Content\r\n\r\n";

impl TlsServer {
    /// Answers 204 to whatever comes.
    pub(crate) async fn new(config: ServerConfig) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Seen::default()));
        let config = Arc::new(Mutex::new(Arc::new(config)));
        let (counted, current) = (Arc::clone(&seen), Arc::clone(&config));
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let seen = Arc::clone(&counted);
                let acceptor = TlsAcceptor::from(Arc::clone(&current.lock().unwrap()));
                connections.spawn(async move {
                    if let Ok(mut tls) = acceptor.accept(stream).await {
                        {
                            let (_, connection) = tls.get_ref();
                            let mut seen = seen.lock().unwrap();
                            seen.handshakes += 1;
                            seen.server_name = connection.server_name().map(str::to_owned);
                            seen.protocol = connection.alpn_protocol().map(<[u8]>::to_vec);
                            seen.client_certificate = connection.peer_certificates().is_some();
                        }
                        let mut buffer = vec![0; 0x10000];
                        while let Ok(n @ 1..) = tls.read(&mut buffer).await {
                            seen.lock().unwrap().application.extend_from_slice(&buffer[..n]);
                            // A small request comes in one or two records; its body ends with `}`.
                            if buffer[..n].ends_with(b"}") || buffer[..n].ends_with(b"\r\n\r\n") {
                                seen.lock().unwrap().over += 1;
                                let _ = tls.write_all(ANSWER).await;
                            }
                        }
                    }
                    seen.lock().unwrap().over += 1;
                });
            }
        });
        Self { address, seen, config, _tasks: tasks }
    }

    pub(crate) fn application_bytes(&self) -> usize {
        self.seen.lock().unwrap().application.len()
    }
}

/// Answers each connection with these bytes once something has come.
pub(crate) async fn bytes_server(bytes: &'static [u8]) -> TlsServer {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let seen = Arc::new(Mutex::new(Seen::default()));
    let kept = Arc::clone(&seen);
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut buffer = vec![0; 0x10000];
            let mut all = Vec::new();
            let mut first = true;
            while let Ok(n @ 1..) = stream.read(&mut buffer).await {
                all.extend_from_slice(&buffer[..n]);
                if std::mem::take(&mut first) {
                    let _ = stream.write_all(bytes).await;
                }
            }
            let mut seen = kept.lock().unwrap();
            // A TLS handshake or alert is none of ours; what is ours has the word POST in it.
            if all.windows(4).any(|w| w == b"POST") {
                seen.application.extend_from_slice(&all);
            }
            seen.over += 1;
        }
    });
    let config = Arc::new(Mutex::new(Arc::new(server_config(&Ca::new("unused").good(), None))));
    TlsServer { address, seen, config, _tasks: tasks }
}

/// `openssl s_server` with this certificate; its output, and its port once it listens.
pub(crate) struct OpenSsl {
    pub(crate) _child: tokio::process::Child,
    pub(crate) output: Arc<Mutex<String>>,
    pub(crate) port: u16,
    pub(crate) _tasks: JoinSet<()>,
}

/// Runs openssl, which is everywhere that ca-certificates is; rustls can make neither a short RSA
/// key nor a server of one.
#[expect(clippy::disallowed_methods, reason = "a test's own tool, with its deadline in the test")]
pub(crate) async fn openssl(directory: &Path, arguments: &[&str]) {
    let run =
        tokio::process::Command::new("openssl").args(arguments).current_dir(directory).kill_on_drop(true).output();
    let output = soon(run).await.expect("openssl must be installed");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

impl OpenSsl {
    #[expect(clippy::disallowed_methods, reason = "a test's own tool, killed with its handle")]
    pub(crate) async fn serve(directory: &Path) -> Self {
        let arguments = [
            "s_server",
            "-accept",
            "127.0.0.1:0",
            "-cert",
            "leaf.pem",
            "-key",
            "leaf.key",
            "-cipher",
            "DEFAULT@SECLEVEL=0",
        ];
        let mut child = tokio::process::Command::new("openssl")
            .args(arguments)
            .current_dir(directory)
            .kill_on_drop(true)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let output = Arc::new(Mutex::new(String::new()));
        let (mut stdout, kept) = (child.stdout.take().unwrap(), Arc::clone(&output));
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut buffer = vec![0; 0x1000];
            while let Ok(n @ 1..) = stdout.read(&mut buffer).await {
                kept.lock().unwrap().push_str(&String::from_utf8_lossy(&buffer[..n]));
            }
        });
        let port =
            || output.lock().unwrap().lines().find_map(|line| line.strip_prefix("ACCEPT 127.0.0.1:")?.parse().ok());
        until(|| port().is_some()).await;
        let port = port().unwrap();
        Self { _child: child, output, port, _tasks: tasks }
    }
}
