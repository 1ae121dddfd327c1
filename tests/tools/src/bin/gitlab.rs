//! A stand-in GitLab over TLS for a script: `gitlab DIRECTORY`.
//!
//! Into DIRECTORY it writes `ca.pem` (a CA of its own), `token` (a runner's) and `port`; then it does what it is told by
//! lines of its standard input, and answers each by one line. It ends with its input. Guests reach this host's loopback
//! as 10.0.2.2, which is the address that it gives itself.
//!
//! | Line | Answer |
//! | --- | --- |
//! | `job SCRIPT` | `ID` of a job that clones the project and runs this line |
//! | `until ID STATE SECONDS` | `ok`, or in which state it is instead |
//! | `says ID SECONDS TEXT` | `ok` once its trace has the text, or `no` |
//! | `trace ID` | `ok`; the trace is in `trace.ID` |
//! | `managers` | how many machines GitLab knows of that use the token |
#![allow(
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a tool: its output is its result, and git is waited for before it serves"
)]

#[path = "../../../support/canary.rs"]
#[allow(dead_code, unreachable_pub, missing_docs, reason = "shared with the test rigs, which use other parts")]
mod canary;

use dayfly::clock::Clock;
use dayfly::gitlab::JobId;
use dayfly::rng::Rng;
use dayfly::secret::Secret;
use dayfly_exec::standin::{JobSpec, Model, ProjectId, Standin, serve};
use std::error::Error;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::TcpListener;

/// Longest wait that a line may ask for.
const WAIT_MAX: Duration = Duration::from_secs(600);

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [directory] = arguments.as_slice() else {
        eprintln!("usage: gitlab DIRECTORY");
        return ExitCode::from(64);
    };
    match run(Path::new(directory)).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gitlab: {error}");
            ExitCode::FAILURE
        }
    }
}

/// One GitLab with one project, and what is asked of it.
struct Gitlab {
    standin: Standin,
    project: ProjectId,
    sha: String,
    directory: PathBuf,
}

async fn run(directory: &Path) -> Result<(), Box<dyn Error>> {
    let (repository, sha) = repository(directory)?;
    let tls = tls(directory)?;
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    let port = listener.local_addr()?.port();
    let standin = Standin::new(Clock::system(), Rng::system());
    standin.configure(|settings| {
        settings.external_url = format!("https://10.0.2.2:{port}");
        settings.trace_update_interval = Some(Duration::from_secs(1));
    });
    let project = standin.add_project("group/project");
    let runner = standin.add_runner(project);
    let token = canary::runner_token(runner.0);
    standin.edit(|model| {
        if let Some(project) = model.projects.get_mut(&project) {
            project.repository = Some(repository);
        }
        if let Some(runner) = model.runners.get_mut(&runner) {
            runner.token = Secret::new(token.clone());
        }
    });
    let file = directory.join("token");
    fs::write(&file, token)?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600))?;
    let _served = serve(standin.clone(), listener, Some(tls))?;
    // Last: who sees it may ask.
    fs::write(directory.join("port.new"), port.to_string())?;
    fs::rename(directory.join("port.new"), directory.join("port"))?;
    let gitlab = Gitlab { standin, project, sha, directory: directory.to_owned() };
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = lines.next_line().await? {
        println!("{}", gitlab.told(&line).await.unwrap_or_else(|| format!("not understood: {line}")));
    }
    Ok(())
}

impl Gitlab {
    async fn told(&self, line: &str) -> Option<String> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        let mut words = rest.splitn(3, ' ');
        Some(match word {
            "job" => {
                let spec = JobSpec {
                    sha: self.sha.clone(),
                    depth: Some(0),
                    refspecs: Some(vec!["+refs/heads/main:refs/remotes/origin/main".into()]),
                    ..JobSpec::script([rest])
                };
                self.standin.enqueue(self.project, spec).to_string()
            }
            "until" => {
                let (job, state, limit) = (id(words.next()?)?, words.next()?, seconds(words.next()?)?);
                let is = |model: &Model| model.jobs.get(&job).is_some_and(|job| job.state.as_str() == state);
                match self.standin.wait_for(is, limit).await {
                    Ok(()) => "ok".into(),
                    Err(_) => self.standin.job(job)?.state.as_str().into(),
                }
            }
            "says" => {
                let (job, limit, text) = (id(words.next()?)?, seconds(words.next()?)?, words.next()?);
                let holds = |trace: &[u8]| trace.windows(text.len()).any(|window| window == text.as_bytes());
                let says = |model: &Model| model.jobs.get(&job).is_some_and(|job| holds(&job.trace.bytes));
                if self.standin.wait_for(says, limit).await.is_ok() { "ok" } else { "no" }.into()
            }
            "trace" => {
                let job = id(rest)?;
                fs::write(self.directory.join(format!("trace.{rest}")), &self.standin.job(job)?.trace.bytes).ok()?;
                "ok".into()
            }
            "managers" => {
                let of = |model: &Model| model.runners.values().map(|runner| runner.managers.len()).sum::<usize>();
                self.standin.read(of).to_string()
            }
            _ => return None,
        })
    }
}

fn id(word: &str) -> Option<JobId> {
    word.parse().ok().map(JobId)
}

fn seconds(word: &str) -> Option<Duration> {
    word.parse().ok().map(Duration::from_secs).map(|limit| limit.min(WAIT_MAX))
}

/// A bare repository with one commit, ready for dumb HTTP, and the commit.
fn repository(directory: &Path) -> Result<(PathBuf, String), Box<dyn Error>> {
    let script = "set -e; cd \"$1\"; git init -q -b main work; cd work; echo content > file.txt; git add .; \
        git -c user.name=t -c user.email=t@t.invalid commit -q -m first; cd ..; git clone -q --bare work repository.git; \
        git -C repository.git update-server-info; git -C repository.git rev-parse HEAD";
    let output = Command::new("sh").args(["-c", script, "sh"]).arg(directory).output()?;
    if !output.status.success() {
        return Err(format!("git: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok((directory.join("repository.git"), String::from_utf8(output.stdout)?.trim().to_owned()))
}

/// A CA of our own in `ca.pem`, and a server certificate for both addresses of this GitLab.
fn tls(directory: &Path) -> Result<Arc<rustls::ServerConfig>, Box<dyn Error>> {
    let mut params = rcgen::CertificateParams::new(Vec::new())?;
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.distinguished_name.push(rcgen::DnType::CommonName, "dayfly test CA");
    let ca_key = rcgen::KeyPair::generate()?;
    fs::write(directory.join("ca.pem"), params.self_signed(&ca_key)?.pem())?;
    let issuer = rcgen::Issuer::from_params(&params, &ca_key);
    let key = rcgen::KeyPair::generate()?;
    let server =
        rcgen::CertificateParams::new(vec!["127.0.0.1".into(), "10.0.2.2".into()])?.signed_by(&key, &issuer)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let key = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der())?;
    Ok(Arc::new(config.with_no_client_auth().with_single_cert(vec![server.der().clone()], key)?))
}
