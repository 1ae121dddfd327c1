//! What rustls is told: roots, CA file, client certificate; and messages that name what to fix.
//!
//! TLS 1.2 and 1.3 by ring; the host's roots plus the site's CA file; name, dates and purpose of
//! GitLab's certificate always checked. There is no way to skip that. ALPN offers http/1.1 only
//! (decision D18). The client key never leaves this process (decision D19).

use super::transport::{Endpoint, OpenError};
use super::verifier::{Verifier, ca_serves};
use crate::files::{plain, private};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier as _;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{AlertDescription, CertificateError, ClientConfig, RootCertStore};
use std::error::Error;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// A PEM file of an operator's; the largest bundles of public CAs are below 1 MiB.
const FILE_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// The TLS files of one endpoint, and the host's roots.
pub(super) struct Material {
    ca_file: Option<PathBuf>,
    client: Option<(PathBuf, PathBuf)>,
    /// The host's own, read once: packages renew them, and a restart is no loss (decision D11).
    system: Vec<CertificateDer<'static>>,
}

/// What tells one state of the files from another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fingerprint(Vec<Option<(u64, u64, i64, i64)>>);

impl Material {
    pub(super) fn of(endpoint: &Endpoint) -> Self {
        // Single certificates that cannot be read are left out, as every TLS library does.
        let system = rustls_native_certs::load_native_certs().certs;
        Self { ca_file: endpoint.tls_ca_file.clone(), client: endpoint.tls_client.clone(), system }
    }

    fn files(&self) -> impl Iterator<Item = &Path> {
        let client = self.client.iter().flat_map(|(cert, key)| [cert, key]);
        self.ca_file.iter().chain(client).map(PathBuf::as_path)
    }

    /// Whether there is any file that may change.
    pub(super) fn may_change(&self) -> bool {
        self.files().next().is_some()
    }

    /// Blocking, a few microseconds a file.
    pub(super) fn fingerprint(&self) -> Fingerprint {
        let one = |path: &Path| {
            let metadata = std::fs::metadata(path).ok()?;
            Some((metadata.ino(), metadata.len(), metadata.mtime(), metadata.mtime_nsec()))
        };
        Fingerprint(self.files().map(one).collect())
    }

    /// Reads the files. Blocking.
    pub(super) fn read(&self) -> Result<ClientConfig, OpenError> {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(self.system.iter().cloned());
        let mut listed = Vec::new();
        if let Some(path) = &self.ca_file {
            listed = certificates(path)?;
            for cert in &listed {
                roots.add(cert.clone()).map_err(|source| file_error(path, source))?;
            }
        }
        let tls = |source: super::transport::BodyError| OpenError::Tls(source);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|source| tls(source.into()))?;
        let builder = if roots.is_empty() {
            // Only for `http://`: nobody's certificate can be good.
            builder.with_root_certificates(roots)
        } else {
            let webpki = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider);
            let webpki = webpki.build().map_err(|source| tls(source.into()))?;
            // rustls calls every verifier of one's own dangerous. Ours only adds to webpki's: see there.
            builder.dangerous().with_custom_certificate_verifier(Arc::new(Verifier { webpki, listed }))
        };
        let mut config = match &self.client {
            None => builder.with_no_client_auth(),
            Some((cert, key)) => builder
                .with_client_auth_cert(certificates(cert)?, private_key(key)?)
                .map_err(|source| file_error(key, source))?,
        };
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }

    /// Whether no certificate at all could be accepted.
    pub(super) fn trusts_nobody(&self) -> bool {
        self.system.is_empty() && self.ca_file.is_none()
    }
}

fn file_error(path: &Path, source: impl Into<super::transport::BodyError>) -> OpenError {
    OpenError::File { path: path.to_owned(), source: source.into() }
}

fn read(path: &Path, is_key: bool) -> Result<Vec<u8>, OpenError> {
    use std::io::Read as _;
    let failed = |source: io::Error| file_error(path, source);
    let file = plain::open_chosen(path).map_err(failed)?;
    if is_key && let Some(mode) = private::too_open(path, &file.metadata().map_err(failed)?) {
        return Err(file_error(path, format!("mode {mode:o} lets others read the key; make it 0600")));
    }
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, OpenError> {
    let bytes = read(path, false)?;
    let certs = CertificateDer::pem_slice_iter(&bytes).collect::<Result<Vec<_>, _>>();
    let certs = certs.map_err(|source| file_error(path, source))?;
    if certs.is_empty() { Err(file_error(path, what_else(&bytes))) } else { Ok(certs) }
}

/// What a server of our own shows: certificate and key, PEM files.
///
/// # Errors
/// [`OpenError::File`], [`OpenError::Tls`]. Blocking.
pub fn server(cert: &Path, key: &Path) -> Result<rustls::ServerConfig, OpenError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| OpenError::Tls(error.into()))?
        .with_no_client_auth()
        .with_single_cert(certificates(cert)?, private_key(key)?);
    config.map_err(|error| OpenError::Tls(error.into()))
}

/// What a file is that should hold certificates and does not.
fn what_else(bytes: &[u8]) -> &'static str {
    let text = String::from_utf8_lossy(bytes);
    if bytes.starts_with(&[0x30, 0x82]) {
        "it holds no certificate in PEM form, but perhaps one in DER: openssl x509 -inform der -in FILE -out FILE.pem"
    } else if text.contains("PRIVATE KEY-----") {
        "it holds no certificate in PEM form, but a private key"
    } else if text.contains("CERTIFICATE REQUEST-----") {
        "it holds no certificate in PEM form, but the request for one"
    } else {
        "it holds no certificate in PEM form"
    }
}

/// When those certificates of a CA file ended whose time is over at `now`. rustls takes such a CA for what it is named,
/// and git and OpenSSL do not: GitLab answers the daemon, and every clone in a guest fails.
///
/// # Errors
/// [`OpenError::File`]. Blocking.
pub fn expired_cas(path: &Path, now: jiff::Timestamp) -> Result<Vec<jiff::Timestamp>, OpenError> {
    let now = UnixTime::since_unix_epoch(Duration::from_secs(now.as_second().try_into().unwrap_or_default()));
    Ok(certificates(path)?.iter().filter_map(|cert| end_of(cert, now)).collect())
}

/// webpki says it of a server's certificate, and looks at the dates before all else: so each is shown to it as one.
fn end_of(cert: &CertificateDer<'_>, now: UnixTime) -> Option<jiff::Timestamp> {
    let mut roots = RootCertStore::empty();
    roots.add(cert.clone().into_owned()).ok()?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let webpki = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build().ok()?;
    let name = ServerName::try_from("ca.invalid").ok()?;
    match webpki.verify_server_cert(cert, &[], &name, &[], now) {
        Err(rustls::Error::InvalidCertificate(CertificateError::ExpiredContext { not_after, .. })) => {
            jiff::Timestamp::from_second(not_after.as_secs().try_into().ok()?).ok()
        }
        _ => None,
    }
}

/// Whether a connection failed because nobody that is trusted here has signed GitLab's certificate.
pub(super) fn is_of_unknown_issuer(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<rustls::Error>() {
            return *error == rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer);
        }
        next = match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    false
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, OpenError> {
    let bytes = read(path, true)?;
    // The cause would say no more than this, and what it read is a key.
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|_| file_error(path, "it holds no private key in PEM form"))
}

/// What an operator can do about a failed connection, as a sentence that names it.
pub(super) fn explain(error: &(dyn Error + 'static)) -> Option<String> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<rustls::Error>() {
            return explain_tls(error);
        }
        if let Some(error) = error.downcast_ref::<io::Error>() {
            // What rustls says comes wrapped in an io::Error, whose source is the wrapped one's.
            if let Some(inner) = error.get_ref() {
                next = Some(inner);
                continue;
            }
            return explain_io(error);
        }
        // The only sign of a name that does not resolve is the text of a private type.
        if error.to_string() == "dns error" {
            return Some("GitLab's name does not resolve: check `url` and this host's DNS".to_owned());
        }
        next = error.source();
    }
    None
}

fn explain_io(error: &io::Error) -> Option<String> {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => {
            Some("nothing listens there: check `url`, its port, and that GitLab is up".to_owned())
        }
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => Some(
            "there is no way to that address: check this host's network, and whether a proxy (HTTPS_PROXY) is needed"
                .to_owned(),
        ),
        _ => None,
    }
}

fn explain_tls(error: &rustls::Error) -> Option<String> {
    use rustls::Error as E;
    let text = match error {
        E::InvalidCertificate(certificate) => return Some(explain_certificate(certificate)),
        E::AlertReceived(
            AlertDescription::CertificateRequired | AlertDescription::HandshakeFailure | AlertDescription::AccessDenied,
        ) => "GitLab refused the handshake; if it demands a client certificate, set `tls_cert_file` and `tls_key_file`",
        E::AlertReceived(
            AlertDescription::BadCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateRevoked
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::UnknownCA
            | AlertDescription::DecryptError,
        ) => "GitLab does not accept our client certificate: renew `tls_cert_file` and `tls_key_file`",
        E::AlertReceived(AlertDescription::UnrecognisedName) => {
            "no site of that name at GitLab's address: check the host name in `url`"
        }
        E::AlertReceived(AlertDescription::ProtocolVersion | AlertDescription::InsufficientSecurity)
        | E::PeerIncompatible(_) => {
            "GitLab's server speaks no TLS 1.2 or newer that is safe: enable TLS 1.2 or 1.3 and a modern cipher there"
        }
        E::InvalidMessage(_) => "what answered speaks no TLS: check the port in `url` (plain HTTP on it?)",
        E::PeerMisbehaved(_) => {
            "the TLS handshake broke a rule: something between this host and GitLab interferes, or its key is too weak"
        }
        _ => return None,
    };
    Some(text.to_owned())
}

fn explain_certificate(error: &CertificateError) -> String {
    use CertificateError as C;
    match error {
        C::UnknownIssuer => "GitLab's certificate is signed by nobody that this host trusts: put its CA into `tls_ca_file`; \
             if the CA is there, the server does not send its intermediate certificates"
            .to_owned(),
        C::NotValidForName => "GitLab's certificate is for another name: check the host name in `url`".to_owned(),
        C::NotValidForNameContext { expected, presented } => {
            // Written as `DnsName("gitlab.example")`, `IpAddress(...)`.
            let plain = |name: &String| name.trim_start_matches("DnsName(\"").trim_end_matches("\")").to_owned();
            let names = presented.iter().map(plain).collect::<Vec<_>>().join(", ");
            let names = if names.is_empty() { "none".to_owned() } else { super::answers::clean(&names, 200) };
            format!("GitLab's certificate is not for `{}` but for {names}: check the host name in `url`", expected.to_str())
        }
        C::Expired | C::ExpiredContext { .. } => "GitLab's certificate has expired: renew it there (or this host's clock is wrong)".to_owned(),
        C::NotValidYet | C::NotValidYetContext { .. } => {
            "GitLab's certificate is not valid yet: check the clocks of this host and of the one that issued it".to_owned()
        }
        C::InvalidPurpose | C::InvalidPurposeContext { .. } => {
            "GitLab's certificate is not meant for a server: issue one with the extended key usage `serverAuth`".to_owned()
        }
        C::BadSignature | C::UnsupportedSignatureAlgorithmContext { .. } | C::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => {
            "a signature in GitLab's certificate chain is wrong or too weak (RSA below 2048 bits, SHA-1): issue a new one".to_owned()
        }
        C::Revoked => "GitLab's certificate was revoked: renew it there".to_owned(),
        error if ca_serves(error) => "GitLab's server shows a CA's certificate as its own: put that very certificate into `tls_ca_file`, \
             or issue a server certificate from it"
            .to_owned(),
        _ => "GitLab's certificate cannot be used: issue a new one".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn endpoint(ca: Option<&Path>, client: Option<(&Path, &Path)>) -> Endpoint {
        Endpoint {
            url: url::Url::parse("https://gitlab.example").unwrap(),
            tls_ca_file: ca.map(Path::to_owned),
            tls_client: client.map(|(cert, key)| (cert.to_owned(), key.to_owned())),
            allow_insecure_http: false,
        }
    }

    fn refused(endpoint: &Endpoint) -> String {
        let error = Material::of(endpoint).read().map(|_| ()).unwrap_err();
        let source = error.source().unwrap().to_string();
        format!("{error}: {source}")
    }

    #[test]
    fn files_that_cannot_be_used_are_named_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let (cert, key, other) = (dir.path().join("c.pem"), dir.path().join("k.pem"), dir.path().join("o.pem"));
        let made = rcgen::generate_simple_self_signed(vec!["client".to_owned()]).unwrap();
        std::fs::write(&cert, made.cert.pem()).unwrap();
        std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        std::fs::write(&other, "no pem").unwrap();
        let set_mode = |mode| std::fs::set_permissions(&key, std::fs::Permissions::from_mode(mode)).unwrap();

        assert!(refused(&endpoint(Some(&dir.path().join("none")), None)).contains("No such file"));
        assert!(refused(&endpoint(Some(&other), None)).ends_with("o.pem`: it holds no certificate in PEM form"));
        set_mode(0o640);
        let text = refused(&endpoint(None, Some((&cert, &key))));
        assert!(text.ends_with("k.pem`: mode 640 lets others read the key; make it 0600"), "{text}");
        set_mode(0o600);
        assert!(Material::of(&endpoint(Some(&cert), Some((&cert, &key)))).read().is_ok());
        set_mode(0o600);
        std::fs::write(&key, "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n").unwrap();
        let text = refused(&endpoint(None, Some((&cert, &key))));
        assert!(text.contains("k.pem") && !text.contains("c2VjcmV0") && !text.contains("secret"), "{text}");
    }

    /// U18: a CA file that is none is told by what it is instead.
    #[test]
    fn what_is_no_ca_file_is_told_by_what_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca");
        let made = rcgen::generate_simple_self_signed(vec!["ca".to_owned()]).unwrap();
        for (content, part) in [
            (made.cert.der().to_vec(), "openssl x509 -inform der"),
            (made.signing_key.serialize_pem().into_bytes(), "but a private key"),
            (b"<html>".to_vec(), "no certificate in PEM form"),
        ] {
            std::fs::write(&path, content).unwrap();
            let text = refused(&endpoint(Some(&path), None));
            assert!(text.contains(part), "{text}");
        }
    }

    /// U18: the CA whose time is over is seen in a bundle, with its day; one that stands or is yet to come is not.
    #[test]
    fn a_ca_that_has_expired_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bundle.pem");
        let ca = |until: i32| {
            let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
            params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            params.not_before = rcgen::date_time_ymd(2020, 1, 1);
            params.not_after = rcgen::date_time_ymd(until, 1, 1);
            params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().pem()
        };
        std::fs::write(&path, [ca(2040), ca(2025), ca(2023)].concat()).unwrap();
        let at = |text: &str| expired_cas(&path, text.parse().unwrap()).unwrap();
        assert_eq!(at("2022-01-01T00:00:00Z"), []);
        let found: Vec<String> = at("2024-01-01T00:00:00Z").iter().map(ToString::to_string).collect();
        assert_eq!(found, ["2023-01-01T00:00:00Z"]);
        assert_eq!(at("2026-01-01T00:00:00Z").len(), 2);
        assert!(expired_cas(&dir.path().join("none"), jiff::Timestamp::UNIX_EPOCH).is_err());
    }

    /// G9: a file that was replaced has another fingerprint; one that was not, has not.
    #[test]
    fn a_replaced_file_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let ca = dir.path().join("ca.pem");
        let material = Material::of(&endpoint(Some(&ca), None));
        let missing = material.fingerprint();
        std::fs::write(&ca, "a").unwrap();
        let written = material.fingerprint();
        assert_eq!(written, material.fingerprint());
        std::fs::write(dir.path().join("new"), "a").unwrap();
        std::fs::rename(dir.path().join("new"), &ca).unwrap();
        let replaced = material.fingerprint();
        assert!(missing != written && written != replaced);
    }
}
