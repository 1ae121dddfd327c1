//! What of the host a job reaches because its operator says so: a proxy for packages, here Debian's apt-cacher-ng, from
//! machines that reach nothing else of this host.

use crate::lab::{LIMIT, Lab, Options, run};
use dayfly_exec::standin::{JobSpec, JobState, Variable};
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};

/// Two jobs, each in a fresh machine without a network card, install one package from a mirror by way of the proxy; the
/// mirror is asked for it once. Of the host they reach the proxy, and no port beside it.
#[tokio::test(flavor = "multi_thread")]
async fn a_package_proxy_is_reached_and_nothing_beside_it() {
    let files = tempfile::Builder::new().prefix("df-apt-").tempdir_in("/tmp").unwrap();
    let (mirror, asked) = mirror(repository(files.path())).await;
    let proxy = free_port();
    let _proxy = apt_cacher(files.path(), proxy).await;
    let forward =
        format!("[[forward]]\nname = \"apt\"\naddress = \"127.0.0.1:{proxy}\"\nport = 3142\nclasses = [\"small\"]\n");
    let options = Options { network: "relay", sections: forward, ..Options::default() };
    let mut lab = Lab::start(options).await;
    let closed = format!("if (: </dev/tcp/192.0.2.1/{mirror}) 2>/dev/null; then exit 3; fi");
    let beside = format!("if (: </dev/tcp/127.0.0.1/{mirror}) 2>/dev/null; then exit 4; fi");
    let source = format!(
        "mkdir -p apt/lists/partial apt/cache/archives/partial; echo 'deb [trusted=yes] http://127.0.0.1:{mirror} ./' >apt/list"
    );
    let apt = "apt() { apt-get -qq -o Dir::Etc::SourceList=$PWD/apt/list -o Dir::Etc::SourceParts=/dev/null \
        -o Dir::State::Lists=$PWD/apt/lists -o Dir::Cache=$PWD/apt/cache -o Debug::NoLocking=1 \
        -o Acquire::http::Proxy=http://192.0.2.1:3142 \"$@\"; }";
    let script = [
        source.as_str(),
        apt,
        "apt update",
        "apt download dayfly-test-package",
        "dpkg-deb --contents dayfly-test-package_1_all.deb",
        closed.as_str(),
        beside.as_str(),
        "echo nothing beside it",
    ];
    for round in ["first", "second"] {
        // GitLab's repository is at an address of the other network.
        let spec = JobSpec::script(script).with_variable(Variable::new("GIT_STRATEGY", "none"));
        let job = lab.enqueue(spec);
        lab.until(job, JobState::Success).await;
        let trace = lab.trace(job);
        for text in ["within reach: 192.0.2.1:3142 (apt)", "./a-file-of-the-package", "nothing beside it"] {
            assert!(trace.contains(text), "{round}: no {text:?}\n{}", lab.story(job));
        }
    }
    let asked = asked.lock().unwrap().clone();
    let packages = asked.iter().filter(|path| path.ends_with(".deb")).count();
    assert_eq!(packages, 1, "the mirror was asked for {asked:?}");
    lab.assert_clean().await;
}

/// A repository of one package.
fn repository(dir: &Path) -> std::path::PathBuf {
    let (root, tree) = (dir.join("mirror"), dir.join("package"));
    fs::create_dir_all(tree.join("DEBIAN")).unwrap();
    fs::create_dir_all(&root).unwrap();
    let control = "Package: dayfly-test-package\nVersion: 1\nArchitecture: all\nMaintainer: nobody <n@example.com>\nDescription: one file\n";
    fs::write(tree.join("DEBIAN/control"), control).unwrap();
    fs::write(tree.join("a-file-of-the-package"), vec![b'x'; 100_000]).unwrap();
    let name = "dayfly-test-package_1_all.deb";
    let deb = root.join(name);
    run("dpkg-deb", &["--root-owner-group", "--build", tree.to_str().unwrap(), deb.to_str().unwrap()]);
    let digest = |path: &Path| {
        let summed = run("sha256sum", &[path.to_str().unwrap()]);
        String::from_utf8_lossy(&summed.stdout)[..64].to_owned()
    };
    let size = fs::metadata(&deb).unwrap().len();
    let packages = format!("{control}Filename: ./{name}\nSize: {size}\nSHA256: {}\n", digest(&deb));
    fs::write(root.join("Packages"), &packages).unwrap();
    let listed = format!(" {} {} Packages\n", digest(&root.join("Packages")), packages.len());
    let release = format!("Suite: test\nDate: Thu, 01 Jan 2026 00:00:00 UTC\nSHA256:\n{listed}");
    fs::write(root.join("Release"), release).unwrap();
    root
}

/// Serves these files; says its port, and what it is asked for.
async fn mirror(root: std::path::PathBuf) -> (u16, Arc<Mutex<Vec<String>>>) {
    let port = free_port();
    let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&asked);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(answer(stream, root.clone(), Arc::clone(&noted)));
        }
    });
    (port, asked)
}

/// One request a connection.
async fn answer(stream: TcpStream, root: std::path::PathBuf, noted: Arc<Mutex<Vec<String>>>) {
    let mut stream = BufReader::new(stream);
    let mut first = String::new();
    if stream.read_line(&mut first).await.is_err() {
        return;
    }
    let mut line = String::new();
    while stream.read_line(&mut line).await.is_ok_and(|count| count > 2) {
        line.clear();
    }
    let path = first.split(' ').nth(1).unwrap_or_default();
    let path = path.rsplit_once("/./").map_or(path, |(_, name)| name).trim_start_matches('/').to_owned();
    noted.lock().unwrap().push(path.clone());
    let found = fs::read(root.join(&path)).ok().filter(|_| !path.contains('/'));
    let (status, body) = found.map_or(("404 Not Found", Vec::new()), |body| ("200 OK", body));
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\nConnection: close\r\n\r\n",
        body.len()
    );
    let _ = stream.write_all(head.as_bytes()).await;
    if !first.starts_with("HEAD") {
        let _ = stream.write_all(&body).await;
    }
    let _ = stream.shutdown().await;
}

/// A port that nobody had a moment ago; apt-cacher-ng knows none above 32767, here and at mirrors.
fn free_port() -> u16 {
    let is_free = |port: &u16| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok();
    (12_000..20_000).find(is_free).expect("one of thousands is free")
}

/// Debian's package proxy, with nothing but its defaults and places of its own; ends with this.
struct Proxy(Child);

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn apt_cacher(dir: &Path, port: u16) -> Proxy {
    let places = ["cache", "log", "sockets", "configuration"].map(|name| dir.join(name));
    for place in &places {
        fs::create_dir_all(place).unwrap();
    }
    let mut command = Command::new("/usr/sbin/apt-cacher-ng");
    // The package's own configuration has a part that its user alone reads. And mirrors are at port 80, by default.
    fs::write(places[3].join("acng.conf"), "AllowUserPorts: 0\n").unwrap();
    command.arg("-c").arg(&places[3]);
    command.args(["ForeGround=1", "BindAddress=127.0.0.1", &format!("Port={port}")]);
    command.args(["CacheDir", "LogDir"].iter().zip(&places).map(|(key, place)| format!("{key}={}", place.display())));
    command.arg(format!("SocketPath={}/s", places[2].display()));
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let mut proxy = Proxy(child.expect("apt-cacher-ng is installed: run `scripts/test e2e`"));
    let up = async {
        while TcpStream::connect(("127.0.0.1", port)).await.is_err() {
            assert!(proxy.0.try_wait().unwrap().is_none(), "apt-cacher-ng has ended");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(LIMIT, up).await.expect("apt-cacher-ng listens");
    proxy
}
