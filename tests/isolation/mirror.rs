//! A server of packages: what `apt-get`, `pip` and `npm` want is files over HTTP, with TLS and without.

use base64::Engine as _;
use sha2::{Digest as _, Sha256, Sha512};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncWrite, AsyncWriteExt as _, BufReader};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

/// Of the file `/held`, whose second half waits until it is let go.
pub(crate) const HELD_BYTES: usize = 200 << 20;

/// What a package says, once it is installed.
pub(crate) const WORDS: [&str; 3] = ["installed by apt", "installed by pip", "installed by npm"];

type Files = Arc<HashMap<String, Vec<u8>>>;

/// The server, as long as this lives.
pub(crate) struct Mirror {
    let_go: watch::Sender<bool>,
    half_sent: watch::Receiver<bool>,
    _tasks: JoinSet<()>,
}

#[derive(Clone)]
struct Serving {
    files: Files,
    let_go: watch::Receiver<bool>,
    half_sent: watch::Sender<bool>,
}

impl Mirror {
    /// At ports 80 and 443 of an address, with packages that are made in `dir`.
    pub(crate) async fn new(at: IpAddr, tls: Arc<rustls::ServerConfig>, dir: &Path) -> Self {
        let packages =
            debian(dir).into_iter().chain(python()).chain(javascript(dir)).chain([("/node.tar".into(), node(dir))]);
        let files = Arc::new(packages.collect());
        let ((let_go, released), (half, half_sent)) = (watch::channel(false), watch::channel(false));
        let serving = Serving { files, let_go: released, half_sent: half };
        let mut tasks = JoinSet::new();
        for port in [80, 443] {
            let listener = TcpListener::bind(SocketAddr::new(at, port)).await.expect("ports of the ring's namespace");
            let (serving, acceptor) = (serving.clone(), TlsAcceptor::from(Arc::clone(&tls)));
            tasks.spawn(async move {
                let mut connections = JoinSet::new();
                while let Ok((stream, _)) = listener.accept().await {
                    let (serving, acceptor) = (serving.clone(), acceptor.clone());
                    connections.spawn(async move {
                        // A client that has gone is none of ours.
                        let _ = if port == 443 {
                            match acceptor.accept(stream).await {
                                Ok(stream) => serving.serve(stream).await,
                                Err(error) => Err(error),
                            }
                        } else {
                            serving.serve(stream).await
                        };
                    });
                }
            });
        }
        Self { let_go, half_sent, _tasks: tasks }
    }

    /// Waits until half of `/held` was sent.
    pub(crate) async fn half_sent(&mut self) {
        self.half_sent.wait_for(|sent| *sent).await.unwrap();
    }

    pub(crate) fn let_go(&self) {
        self.let_go.send_replace(true);
    }
}

impl Serving {
    async fn serve(mut self, stream: impl AsyncRead + AsyncWrite + Unpin) -> std::io::Result<()> {
        let mut stream = BufReader::new(stream);
        loop {
            let (mut line, mut path) = (String::new(), None);
            loop {
                line.clear();
                if stream.read_line(&mut line).await? == 0 {
                    return Ok(());
                }
                if line.trim().is_empty() {
                    break;
                }
                path.get_or_insert_with(|| line.split(' ').nth(1).unwrap_or_default().to_owned());
            }
            let path = path.unwrap_or_default();
            if path == "/held" {
                self.held(&mut stream).await?;
                continue;
            }
            let (status, body) = match self.files.get(&path) {
                Some(body) => ("200 OK", body.as_slice()),
                None => ("404 Not Found", &[][..]),
            };
            let kind = if path.ends_with('/') { "text/html" } else { "application/octet-stream" };
            let head = format!("HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n", body.len());
            stream.write_all(head.as_bytes()).await?;
            stream.write_all(body).await?;
            stream.flush().await?;
        }
    }

    async fn held(&mut self, stream: &mut (impl AsyncWrite + Unpin)) -> std::io::Result<()> {
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {HELD_BYTES}\r\n\r\n");
        stream.write_all(head.as_bytes()).await?;
        let piece = vec![b'h'; 1 << 20];
        for sent in 0..HELD_BYTES / piece.len() {
            if sent == HELD_BYTES / piece.len() / 2 {
                stream.flush().await?;
                self.half_sent.send_replace(true);
                let _ = self.let_go.wait_for(|go| *go).await;
            }
            stream.write_all(&piece).await?;
        }
        stream.flush().await
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

/// A repository of one Debian package with a program that says a word.
fn debian(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let (root, file) = (dir.join("package"), dir.join("package.deb"));
    let control = "Package: dayfly-probe\nVersion: 1.0\nArchitecture: all\nMaintainer: nobody <nobody@example>\n\
                   Description: says a word\n";
    fs::create_dir_all(root.join("DEBIAN")).unwrap();
    fs::create_dir_all(root.join("usr/share/dayfly-probe")).unwrap();
    fs::write(root.join("DEBIAN/control"), control).unwrap();
    fs::write(root.join("usr/share/dayfly-probe/word"), format!("{}\n", WORDS[0])).unwrap();
    output(Command::new("dpkg-deb").args(["--root-owner-group", "--build"]).args([&root, &file]));
    let package = fs::read(file).unwrap();
    let list = format!(
        "{control}Filename: ./dayfly-probe.deb\nSize: {}\nSHA256: {}\n\n",
        package.len(),
        hex(&Sha256::digest(&package))
    );
    let release = format!(
        "Origin: dayfly\nDate: Thu, 01 Jan 2026 00:00:00 UTC\nSHA256:\n {} {} Packages\n",
        hex(&Sha256::digest(&list)),
        list.len()
    );
    vec![
        ("/apt/./dayfly-probe.deb".into(), package.clone()),
        ("/apt/dayfly-probe.deb".into(), package),
        ("/apt/./Packages".into(), list.clone().into_bytes()),
        ("/apt/Packages".into(), list.into_bytes()),
        ("/apt/./Release".into(), release.clone().into_bytes()),
        ("/apt/Release".into(), release.into_bytes()),
    ]
}

/// An index of one Python package.
fn python() -> Vec<(String, Vec<u8>)> {
    let of = "dayfly_probe-1.0.dist-info";
    let wheel = "dayfly_probe-1.0-py3-none-any.whl";
    let record = format!("dayfly_probe.py,,\n{of}/METADATA,,\n{of}/WHEEL,,\n{of}/RECORD,,\n");
    let bytes = zip(&[
        ("dayfly_probe.py".into(), format!("WORD = {:?}\n", WORDS[1])),
        (format!("{of}/METADATA"), "Metadata-Version: 2.1\nName: dayfly-probe\nVersion: 1.0\n".into()),
        (
            format!("{of}/WHEEL"),
            "Wheel-Version: 1.0\nGenerator: dayfly\nRoot-Is-Purelib: true\nTag: py3-none-any\n".into(),
        ),
        (format!("{of}/RECORD"), record),
    ]);
    let index = format!("<!DOCTYPE html><html><body><a href=\"/files/{wheel}\">{wheel}</a></body></html>");
    vec![("/simple/dayfly-probe/".into(), index.into_bytes()), (format!("/files/{wheel}"), bytes)]
}

/// A registry of one package of JavaScript.
fn javascript(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let (root, file) = (dir.join("javascript"), dir.join("javascript.tgz"));
    fs::create_dir_all(root.join("package")).unwrap();
    fs::write(root.join("package/package.json"), r#"{"name":"dayfly-probe","version":"1.0.0"}"#).unwrap();
    fs::write(root.join("package/word"), format!("{}\n", WORDS[2])).unwrap();
    output(Command::new("tar").arg("-C").arg(&root).arg("-czf").arg(&file).arg("package"));
    let package = fs::read(file).unwrap();
    let digest = base64::engine::general_purpose::STANDARD.encode(Sha512::digest(&package));
    let index = serde_json::json!({
        "name": "dayfly-probe",
        "dist-tags": {"latest": "1.0.0"},
        "versions": {"1.0.0": {
            "name": "dayfly-probe",
            "version": "1.0.0",
            "dist": {
                "tarball": "https://npm.example/files/dayfly-probe-1.0.0.tgz",
                "integrity": format!("sha512-{digest}"),
            },
        }},
    });
    vec![("/dayfly-probe".into(), index.to_string().into_bytes()), ("/files/dayfly-probe-1.0.0.tgz".into(), package)]
}

/// This host's Node.js and npm, for an image that has none: the program and what it is linked with in `opt/node`, npm
/// where it is here, which is where it looks for its parts.
fn node(dir: &Path) -> Vec<u8> {
    let (root, file) = (dir.join("node"), dir.join("node.tar"));
    let opt = root.join("opt/node");
    fs::create_dir_all(&opt).unwrap();
    let copy = |from: &Path, name: &str| fs::copy(from, opt.join(name)).unwrap();
    let node = fs::canonicalize(output(Command::new("sh").args(["-c", "command -v node"])).trim()).unwrap();
    copy(&node, "node");
    // `libname.so => /path/libname.so (0x…)`, and the loader as `/path/ld.so (0x…)`.
    for line in output(Command::new("ldd").arg(&node)).lines() {
        let Some(from) = line.split_whitespace().map(Path::new).find(|word| word.is_absolute()) else { continue };
        let name = from.file_name().unwrap().to_str().unwrap();
        copy(from, if name.starts_with("ld-") { "ld.so" } else { name });
    }
    // A program of its own has its parts beside it; Debian's has them where all of Debian's modules are.
    let npm = fs::canonicalize(output(Command::new("sh").args(["-c", "command -v npm"])).trim()).unwrap();
    let start =
        format!("#!/bin/sh\nexec /opt/node/ld.so --library-path /opt/node /opt/node/node {} \"$@\"\n", npm.display());
    fs::write(opt.join("npm"), start).unwrap();
    let debian = Path::new("/usr/share/nodejs");
    let parts = if npm.starts_with(debian) { debian } else { npm.parent().and_then(Path::parent).unwrap() };
    output(
        Command::new("tar")
            .args(["--mode=a+rx", "-cf"])
            .arg(&file)
            .arg("-C")
            .arg(&root)
            .args(["opt", "-C", "/"])
            .arg(parts.strip_prefix("/").unwrap()),
    );
    fs::read(file).unwrap()
}

/// What a program prints that must do it.
fn output(command: &mut Command) -> String {
    let done = command.output().unwrap();
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap()
}

/// A zip file of these files, as they are.
fn zip(files: &[(String, String)]) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, content) in files {
        let start = u32::try_from(out.len()).unwrap();
        // Version, flags, method (stored), time, date: 1 January 1980.
        let mut middle = Vec::new();
        for half in [10_u16, 0, 0, 0, 0x21] {
            middle.extend(half.to_le_bytes());
        }
        middle.extend(crc32fast::hash(content.as_bytes()).to_le_bytes());
        let length = u32::try_from(content.len()).unwrap();
        middle.extend(length.to_le_bytes());
        middle.extend(length.to_le_bytes());
        middle.extend(u16::try_from(name.len()).unwrap().to_le_bytes());
        middle.extend([0, 0]);
        out.extend(b"PK\x03\x04");
        out.extend(&middle);
        out.extend(name.as_bytes());
        out.extend(content.as_bytes());
        directory.extend(b"PK\x01\x02\x0a\x00");
        directory.extend(&middle);
        // No comment, first disk, no attributes.
        directory.extend([0; 10]);
        directory.extend(start.to_le_bytes());
        directory.extend(name.as_bytes());
    }
    let count = u16::try_from(files.len()).unwrap().to_le_bytes();
    let (start, length) = (u32::try_from(out.len()).unwrap(), u32::try_from(directory.len()).unwrap());
    out.extend(&directory);
    out.extend(b"PK\x05\x06\0\0\0\0");
    out.extend([count, count].concat());
    out.extend(length.to_le_bytes());
    out.extend(start.to_le_bytes());
    out.extend([0, 0]);
    out
}
