//! `dayfly register`: makes a runner of GitLab's one of ours.
//!
//! Everything is checked before GitLab is asked, and GitLab is asked before anything is written;
//! what cannot be finished leaves nothing behind. The token never comes by argv, where every user
//! of the host could read it.

mod entry;
mod real;

use super::{Usage, prompt};
use crate::config::{self, Config, Runner};
use crate::gitlab::{GitlabError, RunnerToken, Verified};
use crate::secret::Secret;
use crate::telemetry::chain;
use anyhow::{Context as _, anyhow, bail};
use entry::Entry;
use std::ffi::OsString;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use url::Url;

/// Environment variable with the token, for installations without a terminal.
const TOKEN_VARIABLE: &str = "DAYFLY_REGISTER_TOKEN";

/// Characters of a token at most; GitLab's have some thirty.
const TOKEN_MAX: usize = 512;

/// Arguments of `register`. What is missing is asked for on a terminal.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// GitLab's address, like `https://gitlab.example.com`
    #[arg(long)]
    url: Option<Url>,
    /// Name of the runner here; job logs show it [default: the host's name]
    #[arg(long)]
    name: Option<String>,
    /// Machine class of its jobs [default: the first of the configuration]
    #[arg(long)]
    class: Option<String>,
    /// File to read the runner authentication token (glrt-…) from, `-` for standard input
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Jobs at once of this runner
    #[arg(long)]
    limit: Option<u32>,
    /// GitLab's CA certificates, PEM
    #[arg(long, value_name = "FILE")]
    tls_ca_file: Option<PathBuf>,
    /// Client certificate for GitLab, PEM
    #[arg(long, value_name = "FILE")]
    tls_cert_file: Option<PathBuf>,
    /// Key of the client certificate, PEM
    #[arg(long, value_name = "FILE")]
    tls_key_file: Option<PathBuf>,
    /// GitLab's address as guests reach it for git [default: the url]
    #[arg(long)]
    clone_url: Option<Url>,
    /// Allow an http:// address: tokens go in the clear
    #[arg(long)]
    allow_insecure_http: bool,
    /// Let guests fetch artifacts straight from object storage
    #[arg(long)]
    direct_download: bool,
    /// Refused: arguments are visible to all users of the host.
    #[arg(long, hide = true, num_args = 0..=1)]
    token: Option<Option<OsString>>,
}

/// Runs the command against the real GitLab.
pub(super) async fn with_gitlab(file: &Path, args: Args) -> anyhow::Result<()> {
    register(file, args, real::verify).await
}

/// Runs the command. `verify` asks GitLab whether it knows the token.
async fn register<V>(file: &Path, args: Args, verify: V) -> anyhow::Result<()>
where
    V: AsyncFnOnce(&Config, &Runner, RunnerToken) -> anyhow::Result<Verified>,
{
    if args.token.is_some() {
        return Err(Usage(format!(
            "--token would show the token to every user of this host, and keep it in the shell's history: \
             use the prompt, --token-file FILE or {TOKEN_VARIABLE}; a token that was typed as an argument should be reset in GitLab"
        ))
        .into());
    }
    let entry = Entry::open(file)?;
    let runner = wish(&args, &entry)?;
    entry.refuse_duplicates(&runner)?;
    let token = token(args.token_file.as_deref())?;
    let prepared = entry.append(runner)?;
    let verified = verify(prepared.config(), prepared.runner(), RunnerToken::new(token.clone()))
        .await
        .with_context(|| format!("verify the token at {}", prepared.runner().url))?;
    let name = prepared.runner().name.clone();
    let written = prepared.write(&token)?;
    let id = verified.id.map_or(String::new(), |id| format!(" (GitLab's runner {id})"));
    writeln!(
        io::stdout(),
        "registered runner `{name}`{id} in {}, its token in {}",
        written.config.display(),
        written.token.display()
    )?;
    writeln!(io::stdout(), "a daemon that runs takes it up with: systemctl restart dayfly (running jobs live on)")?;
    Ok(())
}

/// A refusal, with its remedy.
fn explain(error: GitlabError) -> anyhow::Error {
    match error {
        GitlabError::Forbidden { status } => anyhow!(
            "GitLab refuses the token (status {status}): use the runner authentication token (glrt-…) that GitLab showed when the runner was \
             created; a registration token (GR1348941…) is another thing, and no longer of use"
        ),
        error => match error.explain() {
            Some(remedy) => anyhow!("{}; {remedy}", chain(&error)),
            None => anyhow::Error::new(error),
        },
    }
}

/// The entry as asked for by flags, else by prompts.
fn wish(args: &Args, entry: &Entry) -> anyhow::Result<Runner> {
    let interactive = prompt::possible();
    let missing = |flag: &str| Usage(format!("--{flag} is missing, and there is no terminal to ask on"));
    let url = match &args.url {
        Some(url) => url.clone(),
        None if interactive => {
            prompt::line("GitLab's address", Some("https://gitlab.com"))?.parse().context("read the address")?
        }
        None => return Err(missing("url").into()),
    };
    let name = match &args.name {
        Some(name) => name.clone(),
        None if interactive => prompt::line("name of this runner", Some(&host_name()))?,
        None => host_name(),
    };
    let classes: Vec<&str> = entry.config().class.iter().map(|class| class.name.as_str()).collect();
    let class = match (&args.class, classes.as_slice()) {
        (Some(class), _) => class.clone(),
        (None, []) => {
            bail!("choose a machine class: {} has no [[class]]; config.example.toml shows one", entry.file().display())
        }
        (None, [only]) => (*only).to_owned(),
        (None, [first, ..]) if interactive => {
            prompt::line(&format!("machine class, one of {}", classes.join(", ")), Some(first))?
        }
        (None, [first, ..]) => (*first).to_owned(),
    };
    // Flags are relative to where the operator stands, the file's paths to the file.
    let absolute = |path: &Option<PathBuf>| {
        path.as_ref().map(std::path::absolute).transpose().context("find the current directory")
    };
    Ok(Runner {
        token_file: entry::token_file(&name),
        name,
        url,
        class,
        limit: args.limit,
        tls_ca_file: absolute(&args.tls_ca_file)?,
        tls_cert_file: absolute(&args.tls_cert_file)?,
        tls_key_file: absolute(&args.tls_key_file)?,
        clone_url: args.clone_url.clone(),
        allow_insecure_http: args.allow_insecure_http,
        direct_download: args.direct_download,
        poll_interval: config::POLL_INTERVAL,
    })
}

fn host_name() -> String {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    if name.is_empty() { "dayfly".into() } else { name }
}

/// The token, from the file, the environment or the prompt, in this order.
fn token(file: Option<&Path>) -> anyhow::Result<Secret> {
    let text = match (file, std::env::var(TOKEN_VARIABLE)) {
        (Some(file), _) => {
            Secret::new(read_token(file).with_context(|| format!("read the token from `{}`", file.display()))?)
        }
        (None, Ok(text)) => Secret::new(text),
        (None, Err(_)) if prompt::possible() => prompt::secret("runner authentication token")?,
        (None, Err(_)) => {
            return Err(Usage(format!(
                "there is no terminal to ask for the token: use --token-file FILE or {TOKEN_VARIABLE}"
            ))
            .into());
        }
    };
    let token = text.expose().trim();
    if token.is_empty() || token.len() > TOKEN_MAX || !token.bytes().all(|b| b.is_ascii_graphic()) {
        bail!("use this token: it is empty or has characters that no token has");
    }
    Ok(Secret::new(token))
}

fn read_token(file: &Path) -> io::Result<String> {
    let mut text = String::new();
    let bytes_max = TOKEN_MAX as u64 * 2;
    if file == Path::new("-") {
        io::stdin().lock().take(bytes_max).read_to_string(&mut text)?;
    } else {
        std::fs::File::open(file)?.take(bytes_max).read_to_string(&mut text)?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests;
