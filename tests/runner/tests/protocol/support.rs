//! A small scripted GitLab on a socket, and a runner under test in front of it.
//!
//! The server keeps each job's log as GitLab does (a PATCH must start where the log ends), answers politely
//! by default, and lets a test's own rule answer first. It records every request.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// No run here takes longer; past it something hangs.
const LIMIT: Duration = Duration::from_secs(60);
/// What the tests' job is called by.
pub(crate) const JOB_TOKEN: &str = "glcbt-64_FAKEjobtoken0123456789";
const RUNNER_TOKEN: &str = "glrt-t1_FAKErunner0123456789";

/// One request as it came.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    /// `poll`, `put`, `patch`, `upload`, `download` or `other`.
    pub(crate) class: &'static str,
    pub(crate) method: String,
    pub(crate) target: String,
    /// In the order and case of the wire.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// Same number: same TCP connection.
    pub(crate) connection: usize,
    /// Seconds since the server's start.
    pub(crate) at: f64,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.iter().find(|(known, _)| known == name).map_or("", |(_, value)| value)
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).expect("a JSON body")
    }
}

/// An answer.
#[derive(Clone)]
pub(crate) struct Reply {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// Answer as soon as the head of the request is read, and close.
    early: bool,
}

pub(crate) fn reply(status: u16) -> Reply {
    Reply { status, headers: Vec::new(), body: Vec::new(), early: false }
}

impl Reply {
    pub(crate) fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub(crate) fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    pub(crate) fn early(mut self) -> Self {
        self.early = true;
        self
    }
}

/// What a rule may look at and change.
#[derive(Default)]
pub(crate) struct Stored {
    /// The job's log.
    pub(crate) trace: Vec<u8>,
    /// Jobs not yet handed out.
    jobs: Vec<Vec<u8>>,
    requests: Vec<Request>,
}

/// Answers a request in its own way, or `None` for the default; the number counts requests of the class, from 1.
pub(crate) type Rule = Box<dyn Fn(&Request, usize, &mut Stored) -> Option<Reply> + Send + Sync>;

struct Shared {
    stored: Mutex<Stored>,
    changed: Condvar,
    rule: Rule,
    began: Instant,
}

impl Shared {
    fn stored(&self) -> MutexGuard<'_, Stored> {
        self.stored.lock().expect("no rule panics")
    }

    fn answer(&self, request: Request) -> Reply {
        let mut stored = self.stored();
        let count = 1 + stored.requests.iter().filter(|known| known.class == request.class).count();
        let reply = (self.rule)(&request, count, &mut stored).unwrap_or_else(|| default(&request, &mut stored));
        stored.requests.push(request);
        drop(stored);
        self.changed.notify_all();
        reply
    }
}

fn default(request: &Request, stored: &mut Stored) -> Reply {
    let running = |status| reply(status).with("Job-Status", "running").with("X-GitLab-Trace-Update-Interval", "3");
    match request.class {
        "poll" => match stored.jobs.pop() {
            Some(job) => reply(201).with("Content-Type", "application/json").with("X-Request-Id", "01FAKE").body(job),
            None => reply(204).with("X-GitLab-Last-Update", "v1"),
        },
        "put" => running(200).body("200"),
        "patch" => {
            let start: usize =
                request.header("Content-Range").split('-').next().expect("a start").parse().expect("a number");
            let status = if start == stored.trace.len() {
                stored.trace.extend_from_slice(&request.body);
                202
            } else {
                416
            };
            running(status).with("Range", format!("0-{}", stored.trace.len()))
        }
        "upload" => reply(201).with("Content-Type", "application/json").body("201"),
        _ => reply(404).with("Content-Type", "application/json").body("{\"message\":\"404\"}"),
    }
}

/// A job's payload: `members` are JSON members that win over the defaults.
pub(crate) fn job(script: &[&str], members: &serde_json::Value) -> serde_json::Value {
    let step = serde_json::json!({"name": "script", "script": script, "timeout": 3600, "when": "on_success"});
    let mut job = serde_json::json!({
        "id": 4242, "token": JOB_TOKEN, "allow_git_fetch": true,
        "job_info": {"id": 4242, "name": "build", "stage": "test", "project_id": 33, "project_name": "proj"},
        "git_info": {"repo_url": "http://gitlab.invalid/grp/proj.git", "ref": "main",
            "sha": "0000000000000000000000000000000000000000", "refspecs": ["+refs/heads/main:refs/remotes/origin/main"],
            "depth": 20},
        "runner_info": {"timeout": 3600},
        "variables": [], "steps": [step], "artifacts": null, "cache": [], "dependencies": [], "services": null,
        "features": {"trace_sections": true, "token_mask_prefixes": ["glpat-"], "failure_reasons":
            ["unknown_failure", "script_failure", "runner_system_failure", "job_execution_timeout", "runner_interrupted"]}
    });
    for (key, value) in members.as_object().expect("an object") {
        match (job[key].as_array_mut(), value.as_array()) {
            (Some(list), Some(more)) => list.extend(more.iter().cloned()),
            _ => job[key] = value.clone(),
        }
    }
    let variables = job["variables"].as_array_mut().expect("a list");
    for (key, value, masked) in
        [("CI_PROJECT_PATH", "grp/proj", false), ("CI_JOB_ID", "4242", false), ("CI_JOB_TOKEN", JOB_TOKEN, true)]
    {
        variables.push(serde_json::json!({"key": key, "value": value, "masked": masked}));
    }
    if !variables.iter().any(|variable| variable["key"] == "GIT_STRATEGY") {
        variables.push(serde_json::json!({"key": "GIT_STRATEGY", "value": "none"}));
    }
    job
}

/// A directory, a server and a runner.
pub(crate) struct World {
    shared: Arc<Shared>,
    directory: tempfile::TempDir,
    url: String,
    runner: Option<Child>,
}

impl World {
    /// Starts the server with these jobs (the first is handed out first) and this rule.
    pub(crate) fn new(jobs: &[serde_json::Value], rule: Rule) -> Self {
        let jobs = jobs.iter().rev().map(|job| serde_json::to_vec(job).expect("JSON")).collect();
        let stored = Stored { jobs, ..Stored::default() };
        let shared =
            Arc::new(Shared { stored: Mutex::new(stored), changed: Condvar::new(), rule, began: Instant::now() });
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let server = Arc::clone(&shared);
        std::thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                let shared = Arc::clone(&server);
                std::thread::spawn(move || {
                    // The runner may hang up at any time; what it sent by then is recorded.
                    let _ = serve(&shared, &stream.expect("a connection"), number);
                });
            }
        });
        Self { shared, directory: tempfile::tempdir().expect("a directory"), url, runner: None }
    }

    /// Where the test may leave files for the job, and the job for the test.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The server's base URL.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Starts `run-single` for at most one job; `config` is added to the runner's entry of config.toml.
    pub(crate) fn start(&mut self, config: &str, wait_timeout_s: u32) {
        let builds = self.path("builds");
        let config = format!(
            "concurrent = 1\ncheck_interval = 3\n[[runners]]\nname = \"vmrunner\"\nurl = \"{}\"\ntoken = \"{RUNNER_TOKEN}\"\n\
             executor = \"shell\"\nbuilds_dir = \"{}\"\n{config}\n",
            self.url,
            builds.display()
        );
        let file = self.path("config.toml");
        std::fs::write(&file, config).expect("written");
        let log = std::fs::File::create(self.path("runner.log")).expect("created");
        let runner = Command::new(program())
            .args(["run-single", "-c"])
            .arg(file)
            .args(["-r", "vmrunner", "--max-builds", "1", "--wait-timeout", &wait_timeout_s.to_string()])
            .env("HOME", self.directory.path())
            .current_dir(self.directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("the runner starts");
        self.runner = Some(runner);
    }

    /// Sends a signal to the runner.
    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(self.runner.as_ref().expect("started"));
        rustix::process::kill_process(pid, signal).expect("it lives");
    }

    /// Waits until a request of this class was answered for the `count`-th time.
    pub(crate) fn wait_for(&self, class: &str, count: usize) {
        let stored = self.shared.stored();
        let missing = |stored: &mut Stored| stored.requests.iter().filter(|known| known.class == class).count() < count;
        let (stored, timeout) = self.shared.changed.wait_timeout_while(stored, LIMIT, missing).expect("no rule panics");
        drop(stored);
        assert!(!timeout.timed_out(), "no {count}. {class}\n{}", self.history());
    }

    /// Waits for the runner's end and tells its exit code.
    pub(crate) fn wait(&mut self) -> i32 {
        let mut runner = self.runner.take().expect("started");
        let (done, ended) = std::sync::mpsc::channel();
        let pid = rustix::process::Pid::from_child(&runner);
        std::thread::spawn(move || {
            let status: ExitStatus = runner.wait().expect("it is our child");
            // The test may have given up.
            let _ = done.send(status);
        });
        match ended.recv_timeout(LIMIT) {
            Ok(status) => status.code().unwrap_or(-1),
            Err(_) => {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                panic!("the runner did not end\n{}", self.history());
            }
        }
    }

    /// All requests of a class so far.
    pub(crate) fn requests(&self, class: &str) -> Vec<Request> {
        self.shared.stored().requests.iter().filter(|known| known.class == class).cloned().collect()
    }

    /// Classes of all requests, in order.
    pub(crate) fn classes(&self) -> Vec<&'static str> {
        self.shared.stored().requests.iter().map(|request| request.class).collect()
    }

    /// The log as the server has it.
    pub(crate) fn trace(&self) -> String {
        String::from_utf8(self.shared.stored().trace.clone()).expect("UTF-8")
    }

    /// The last PUT's body, checked against the log that the server has.
    pub(crate) fn verdict(&self) -> serde_json::Value {
        let put = self.requests("put").pop().unwrap_or_else(|| panic!("no PUT\n{}", self.history())).json();
        let trace = self.shared.stored().trace.clone();
        let crc = format!("crc32:{:08x}", crc32fast::hash(&trace));
        assert_eq!(put["output"]["checksum"], crc, "checksum of the log\n{}", self.history());
        assert_eq!(put["output"]["bytesize"], trace.len(), "size of the log");
        put
    }

    /// Everything that happened, for a failing test.
    pub(crate) fn history(&self) -> String {
        let stored = self.shared.stored();
        let mut text = String::new();
        for request in &stored.requests {
            let body = String::from_utf8_lossy(&request.body[..request.body.len().min(4096)]).into_owned();
            text.push_str(&format!(
                "{:.2} #{} {} {} {:?}\n{body}\n",
                request.at, request.connection, request.method, request.target, request.headers
            ));
        }
        let log = std::fs::read_to_string(self.path("runner.log")).unwrap_or_default();
        format!("{text}--- runner's own log\n{log}")
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(mut runner) = self.runner.take() {
            let _ = runner.kill();
            let _ = runner.wait();
        }
    }
}

/// The stand-in, or another runner whose recorded behaviour it has to share.
fn program() -> PathBuf {
    std::env::var_os("DAYFLY_GITLAB_RUNNER")
        .map_or_else(|| Path::new(env!("CARGO_BIN_EXE_dayfly-standin-runner")).to_owned(), PathBuf::from)
}

/// Whether the runner under test is the stand-in.
pub(crate) fn is_stand_in() -> bool {
    std::env::var_os("DAYFLY_GITLAB_RUNNER").is_none()
}

fn serve(shared: &Shared, stream: &TcpStream, connection: usize) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    while let Some(mut request) = read_head(shared, &mut reader, connection)? {
        // A rule that answers early does so without the body.
        if request.class == "upload" {
            let preview = (shared.rule)(&request, 0, &mut shared.stored());
            if let Some(reply) = preview.filter(|reply| reply.early) {
                shared.answer(request);
                write_reply(&mut writer, &reply.with("Connection", "close"))?;
                stream.shutdown(std::net::Shutdown::Write)?;
                // What the runner still sends is thrown away: a reset could overtake the answer.
                return std::io::copy(&mut reader, &mut std::io::sink()).map(|_| ());
            }
        }
        request.body = read_body(&request, &mut reader)?;
        let reply = shared.answer(request);
        write_reply(&mut writer, &reply)?;
    }
    Ok(())
}

fn read_head(shared: &Shared, reader: &mut impl BufRead, connection: usize) -> std::io::Result<Option<Request>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace();
    let (method, target) = (words.next().unwrap_or("").to_owned(), words.next().unwrap_or("").to_owned());
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        match line.trim_end().split_once(": ") {
            Some((name, value)) => headers.push((name.to_owned(), value.to_owned())),
            None => break,
        }
    }
    let class = match method.as_str() {
        "POST" if target.ends_with("/jobs/request") => "poll",
        "PUT" => "put",
        "PATCH" => "patch",
        "POST" if target.contains("/artifacts") => "upload",
        "GET" if target.contains("/artifacts") => "download",
        _ => "other",
    };
    // Go's and ureq's clients write names differently; HTTP does not care.
    let headers = headers.into_iter().map(|(name, value)| (canonical(&name), value)).collect();
    let at = shared.began.elapsed().as_secs_f64();
    Ok(Some(Request { class, method, target, headers, body: Vec::new(), connection, at }))
}

fn canonical(name: &str) -> String {
    let word = |word: &str| word[..1].to_uppercase() + &word[1..].to_lowercase();
    name.split('-').map(word).collect::<Vec<_>>().join("-")
}

fn read_body(request: &Request, reader: &mut impl BufRead) -> std::io::Result<Vec<u8>> {
    let mut body = Vec::new();
    if request.header("Transfer-Encoding") == "chunked" {
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            let size = u64::from_str_radix(line.trim(), 16).map_err(std::io::Error::other)?;
            let mut chunk = Vec::new();
            reader.take(size).read_to_end(&mut chunk)?;
            body.append(&mut chunk);
            reader.read_line(&mut String::new())?;
            if size == 0 {
                return Ok(body);
            }
        }
    }
    let length = request.header("Content-Length").parse().unwrap_or(0);
    reader.take(length).read_to_end(&mut body)?;
    Ok(body)
}

fn write_reply(writer: &mut impl Write, reply: &Reply) -> std::io::Result<()> {
    let mut head = format!("HTTP/1.1 {} Status\r\n", reply.status);
    for (name, value) in &reply.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    if reply.status != 204 {
        head.push_str(&format!("Content-Length: {}\r\n", reply.body.len()));
    }
    head.push_str("\r\n");
    writer.write_all(head.as_bytes())?;
    writer.write_all(&reply.body)
}

/// The one part of an upload's body: its headers' text and its bytes.
pub(crate) fn multipart(request: &Request) -> (String, Vec<u8>) {
    let boundary = request.header("Content-Type").split("boundary=").nth(1).expect("a boundary");
    let body = &request.body;
    let head_end = body.windows(4).position(|bytes| bytes == b"\r\n\r\n").expect("a head");
    let tail = format!("\r\n--{boundary}--\r\n");
    assert!(body.starts_with(format!("--{boundary}\r\n").as_bytes()), "begins with the boundary");
    assert!(body.ends_with(tail.as_bytes()), "ends with the last boundary");
    let head = String::from_utf8(body[..head_end].to_vec()).expect("text");
    (head, body[head_end + 4..body.len() - tail.len()].to_vec())
}

/// Names and contents of a zip's entries.
pub(crate) fn unzip(bytes: &[u8]) -> BTreeMap<String, String> {
    let mut archive = zip::ZipArchive::new(std::io::Cursor::new(bytes)).expect("a zip");
    let count = archive.len();
    let mut entries = BTreeMap::new();
    for index in 0..count {
        let mut entry = archive.by_index(index).expect("an entry");
        let mut text = String::new();
        entry.read_to_string(&mut text).expect("text");
        let name = entry.name().expect("a name").into_owned();
        entries.insert(name, text);
    }
    entries
}

/// A zip with these entries.
pub(crate) fn zip(entries: &[(&str, &str)]) -> Vec<u8> {
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, text) in entries {
        archive.start_file(*name, zip::write::SimpleFileOptions::default()).expect("an entry");
        archive.write_all(text.as_bytes()).expect("in memory");
    }
    archive.finish().expect("in memory").into_inner()
}

/// A script that goes on only when a file is there.
fn until(file: &Path) -> String {
    format!("until [ -e {} ]; do sleep 0.05; done", file.display())
}

/// Members of a job with this `after_script`.
pub(crate) fn after_script(script: &[&str]) -> serde_json::Value {
    serde_json::json!({"steps": [{"name": "after_script", "script": script, "timeout": 3600, "when": "always"}]})
}

/// A GitLab without surprises.
pub(crate) fn polite() -> Rule {
    Box::new(|_, _, _| None)
}

/// A world whose rule may leave a file behind, for the job to see.
pub(crate) fn world_with_file(
    make_job: impl Fn(&str) -> serde_json::Value,
    rule: impl Fn(&Request, usize, &mut Stored, &Path) -> Option<Reply> + Send + Sync + 'static,
) -> (World, tempfile::TempDir) {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("go-on");
    let job = make_job(&until(&file));
    let world = World::new(&[job], Box::new(move |request, count, stored| rule(request, count, stored, &file)));
    (world, directory)
}
