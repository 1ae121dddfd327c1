//! `dayfly register`: makes a runner of GitLab's one of ours.
//!
//! Everything is checked before GitLab is asked, and GitLab is asked before anything is written;
//! what cannot be finished leaves nothing behind. The token never comes by argv, where every user
//! of the host could read it.

pub(super) mod entry;
pub(super) mod foreign;
pub(super) mod real;

use super::{Usage, prompt};
use crate::config::{Config, Runner};
use crate::control;
use crate::files::plain;
use crate::gitlab::{self, GitlabError, RunnerToken, Verified};
use crate::image::store::ImageStore;
use crate::secret::Secret;
use crate::telemetry::{chain, printable};
use anyhow::{Context as _, anyhow, bail};
use entry::{Change, Copied, Entry};
use jiff::Timestamp;
use std::ffi::OsString;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use toml_edit::Value;
use url::Url;

/// Environment variable with the token, for installations without a terminal.
const TOKEN_VARIABLE: &str = "DAYFLY_REGISTER_TOKEN";

/// The same, as gitlab-runner calls it.
const OFFICIAL_TOKEN_VARIABLE: &str = "CI_SERVER_TOKEN";

/// What gitlab-runner takes a registration token from, and an authentication token too.
const REGISTRATION_TOKEN_VARIABLE: &str = "REGISTRATION_TOKEN";

/// Characters of a token at most; GitLab's have some thirty.
const TOKEN_MAX: usize = 512;

/// Expired CAs that are told one by one; a bundle may hold many.
const EXPIRED_TOLD_MAX: usize = 3;

/// Arguments of `register`. What is missing is asked for on a terminal. Variables are gitlab-runner's where it has one.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// GitLab's address, like `https://gitlab.example.com`
    #[arg(short, long, env = "CI_SERVER_URL", value_parser = address)]
    url: Option<Url>,
    /// Name of the runner here; job logs show it [default: the host's name]
    #[arg(long, alias = "description", env = "RUNNER_NAME")]
    name: Option<String>,
    /// Machine class of its jobs [default: the first of the configuration]
    #[arg(long, env = "DAYFLY_REGISTER_CLASS")]
    class: Option<String>,
    /// File to read the runner authentication token (glrt-…) from, `-` for standard input
    #[arg(long, value_name = "FILE", env = "DAYFLY_REGISTER_TOKEN_FILE")]
    token_file: Option<PathBuf>,
    /// Jobs at once of this runner; 0: as many as `concurrent` allows
    #[arg(long, env = "RUNNER_LIMIT")]
    limit: Option<u32>,
    /// GitLab's CA certificates, PEM; a copy is kept beside the configuration
    #[arg(long, value_name = "FILE", env = "CI_SERVER_TLS_CA_FILE")]
    tls_ca_file: Option<PathBuf>,
    /// Client certificate for GitLab, PEM; likewise
    #[arg(long, value_name = "FILE", env = "CI_SERVER_TLS_CERT_FILE")]
    tls_cert_file: Option<PathBuf>,
    /// Key of the client certificate, PEM; likewise
    #[arg(long, value_name = "FILE", env = "CI_SERVER_TLS_KEY_FILE")]
    tls_key_file: Option<PathBuf>,
    /// GitLab's address as guests reach it for git [default: the url]
    #[arg(long, env = "CLONE_URL", value_parser = address)]
    clone_url: Option<Url>,
    /// Allow an http:// address: tokens go in the clear
    #[arg(long, env = "DAYFLY_REGISTER_ALLOW_INSECURE_HTTP", value_parser = clap::builder::FalseyValueParser::new())]
    allow_insecure_http: bool,
    /// Let guests fetch artifacts straight from object storage
    #[arg(long, env = "DAYFLY_REGISTER_DIRECT_DOWNLOAD", value_parser = clap::builder::FalseyValueParser::new())]
    direct_download: bool,
    /// Ask nothing, even on a terminal
    #[arg(short, long, env = "REGISTER_NON_INTERACTIVE", value_parser = clap::builder::FalseyValueParser::new())]
    non_interactive: bool,
    /// Refused: arguments are visible to all users of the host.
    #[arg(short, long, hide = true, num_args = 0..=1)]
    token: Option<Option<OsString>>,
    /// Refused likewise, and of no use.
    #[arg(short, long, hide = true, num_args = 0..=1)]
    registration_token: Option<Option<OsString>>,
    /// What became of flags that only gitlab-runner has a use for.
    #[arg(skip)]
    pub(super) notes: Vec<String>,
}

/// An address as people write it; it needs its scheme.
fn address(text: &str) -> Result<Url, String> {
    let text = text.trim();
    if !text.contains("://") {
        return Err(format!("it has no scheme: write https://{}", text.trim_start_matches('/')));
    }
    text.parse().map_err(|error| format!("{error}: write an address like https://gitlab.example.com"))
}

/// What is to become of the file: the entry's name, its keys, and copies of files beside it.
struct Wish {
    name: String,
    changes: Vec<Change>,
    copies: Vec<Copied>,
    /// Whether there is an entry of this name.
    anew: bool,
}

/// Runs the command against the real GitLab.
pub(super) async fn with_gitlab(file: &Path, args: Args) -> anyhow::Result<()> {
    let notes = foreign::of_environment(variable);
    for note in args.notes.iter().chain(&notes) {
        writeln!(io::stderr(), "note: {}", printable(note))?;
    }
    register(file, args, variable, real::verify).await
}

/// A variable of this process; an empty one is none.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Runs the command. `verify` asks GitLab whether it knows the token.
async fn register<V>(
    file: &Path,
    args: Args,
    variable: impl Fn(&str) -> Option<String>,
    verify: V,
) -> anyhow::Result<()>
where
    V: AsyncFnOnce(&Config, &Runner, RunnerToken) -> anyhow::Result<Verified>,
{
    if args.token.is_some() || args.registration_token.is_some() {
        let flag = if args.token.is_some() { "--token" } else { "--registration-token" };
        return Err(Usage(format!(
            "{flag} would show the token to every user of this host, and keep it in the shell's history: \
             use the prompt, --token-file FILE or {TOKEN_VARIABLE}; a token that was typed as an argument should be reset in GitLab"
        ))
        .into());
    }
    let interactive = prompt::possible() && !args.non_interactive;
    let entry = Entry::open(file)?;
    let wish = wish(&args, &entry, interactive)?;
    let token = token(args.token_file.as_deref(), variable, interactive)?;
    refuse_twice(&entry, &wish.name, &RunnerToken::new(token.clone()))?;
    let Wish { name, changes, copies, anew } = wish;
    let prepared = entry.put(&name, changes)?;
    let stale = !anew && prepared.runner().token_file.exists();
    // By the files that were given: the copies are not there yet.
    let mut asked = prepared.runner().clone();
    for copy in &copies {
        *file_of(&mut asked, copy.key) = Some(copy.source.clone());
    }
    let verified = verify(prepared.config(), &asked, RunnerToken::new(token.clone()))
        .await
        .with_context(|| format!("verify the token at {}", asked.url))?;
    let warnings = asked.tls_ca_file.as_deref().map(|ca| expired(ca, Timestamp::now())).unwrap_or_default();
    let next = next_step(prepared.config(), prepared.runner());
    let written = prepared.write(&token, &copies)?;
    let mut out = io::stdout();
    let id = verified.id.map_or(String::new(), |id| format!(" (GitLab's runner {id})"));
    writeln!(
        out,
        "{} runner `{}`{id} in {}, its token in {}",
        if anew { "registered anew:" } else { "registered" },
        printable(&name),
        written.config.display(),
        written.token.display()
    )?;
    if stale {
        writeln!(out, "a token that lay there, of no entry, was replaced")?;
    }
    for copy in &copies {
        writeln!(out, "copied {} to {}", copy.source.display(), copy.target.display())?;
    }
    for warning in warnings {
        writeln!(out, "warning: {}", printable(&warning))?;
    }
    writeln!(out, "next: {next}")?;
    Ok(())
}

/// CAs by which git in a guest will trust nobody.
fn expired(ca: &Path, now: Timestamp) -> Vec<String> {
    let expired = gitlab::expired_cas(ca, now).unwrap_or_default();
    let told = expired.iter().take(EXPIRED_TOLD_MAX).map(|end| {
        format!(
            "a CA in {} expired on {}: dayfly goes by it all the same, git in the guests does not, and clones fail; \
             renew it, then register anew",
            ca.display(),
            end.strftime("%Y-%m-%d")
        )
    });
    told.collect()
}

/// What the operator does now.
fn next_step(config: &Config, runner: &Runner) -> String {
    let image = config.class.iter().find(|class| class.name == runner.class).map(|class| class.image.as_str());
    match image {
        Some(image) if ImageStore::new(&config.image_directory).get(image).is_err() => {
            format!("dayfly image build {image}, which the runner's class `{}` needs", printable(&runner.class))
        }
        _ if control::socket(&config.runtime_directory).exists() => {
            "systemctl reload dayfly, and the daemon that runs takes it up; running jobs go on".into()
        }
        _ => "dayfly doctor, then: systemctl enable --now dayfly".into(),
    }
}

/// The runner's key of this name that names a file.
fn file_of<'a>(runner: &'a mut Runner, key: &str) -> &'a mut Option<PathBuf> {
    match key {
        "tls_cert_file" => &mut runner.tls_cert_file,
        "tls_key_file" => &mut runner.tls_key_file,
        _ => &mut runner.tls_ca_file,
    }
}

/// Two entries of one token take each other's jobs.
fn refuse_twice(entry: &Entry, name: &str, token: &RunnerToken) -> anyhow::Result<()> {
    for other in entry.config().runner.iter().filter(|other| other.name != name) {
        if RunnerToken::from_file(&other.token_file).is_ok_and(|known| known.same_as(token)) {
            bail!(
                "register `{name}`: runner `{}` has this very token; one entry is enough for it (its `limit` says how many \
                 jobs at once), for another entry create another runner in GitLab",
                other.name
            );
        }
    }
    Ok(())
}

/// A refusal, with its remedy.
pub(super) fn explain(error: GitlabError, runner: &Runner) -> anyhow::Error {
    let url = runner.url.as_str().trim_end_matches('/');
    let remedy = match &error {
        GitlabError::Forbidden { status } => {
            return anyhow!(
                "GitLab refuses the token (status {status}): use the runner authentication token (glrt-…) that GitLab showed when the runner was \
                 created; a registration token (GR1348941…) is another thing, and no longer of use"
            );
        }
        GitlabError::RateLimited { retry_after } => Some(format!(
            "it says so with status 429 of its address, and nothing is wrong with the token: try again in {} s",
            retry_after.as_secs()
        )),
        GitlabError::Unavailable { status: Some(status @ 500..), .. } => Some(format!(
            "GitLab, or a proxy before it, answers {status}: it is down, being upgraded or overloaded; see whether {url} \
             opens in a browser, and try again"
        )),
        error if error.is_of_unknown_issuer() => runner.tls_ca_file.as_ref().map(|ca| {
            format!(
                "{} holds no CA that has signed GitLab's certificate, or GitLab does not send its intermediate \
                 certificates; openssl s_client -showcerts -connect {}:{} shows who has",
                ca.display(),
                runner.url.host_str().unwrap_or_default(),
                runner.url.port_or_known_default().unwrap_or(443)
            )
        }),
        _ => None,
    };
    match remedy.or_else(|| error.explain()) {
        Some(remedy) => anyhow!("{}; {remedy}", chain(&error)),
        None => anyhow::Error::new(error),
    }
}

/// The entry as asked for by flags, else by prompts; of one that is there, what is not asked for stays.
fn wish(args: &Args, entry: &Entry, interactive: bool) -> anyhow::Result<Wish> {
    let missing = |flag: &str| Usage(format!("--{flag} is missing, and there is no terminal to ask on"));
    // By name first: it says whether there is more to ask.
    let name = match &args.name {
        Some(name) => name.clone(),
        None if interactive => prompt::line("name of this runner", Some(&host_name()))?,
        None => host_name(),
    };
    let known = entry.runner(&name);
    let url = match (&args.url, known) {
        (Some(url), _) => url.clone(),
        (None, Some(known)) => known.url.clone(),
        (None, None) if interactive => {
            address(&prompt::line("GitLab's address", Some("https://gitlab.com"))?).map_err(Usage)?
        }
        (None, None) => return Err(missing("url").into()),
    };
    if let Some(known) = known.filter(|known| known.url != url) {
        bail!(
            "register `{name}`: {} has a runner of this name, of {}; choose another --name, or first: dayfly unregister --name '{name}'",
            entry.file().display(),
            known.url
        );
    }
    let mut changes: Vec<Change> = Vec::new();
    if known.is_none() {
        let class = class(args, entry, interactive)?;
        changes.push(("name", name.as_str().into()));
        changes.push(("url", url.as_str().into()));
        changes.push(("token_file", path_value(&entry::token_file(&name))));
        changes.push(("class", class.into()));
    } else if let Some(class) = &args.class {
        changes.push(("class", class.into()));
    }
    if let Some(limit) = args.limit.filter(|limit| *limit > 0) {
        changes.push(("limit", i64::from(limit).into()));
    }
    let files = [
        ("tls_ca_file", &args.tls_ca_file, "ca.pem", false),
        ("tls_cert_file", &args.tls_cert_file, "cert.pem", false),
        ("tls_key_file", &args.tls_key_file, "key.pem", true),
    ];
    let mut copies = Vec::new();
    for (key, source, suffix, private) in files {
        let Some(source) = source else { continue };
        // Flags are relative to where the operator stands, the file's paths to the file.
        let source = std::path::absolute(source).context("find the current directory")?;
        let target = Path::new("tls").join(format!("{}.{suffix}", entry::file_name(&name)));
        changes.push((key, path_value(&target)));
        let bytes = entry::read_bounded(&source)
            .with_context(|| format!("read `{}` (--{})", source.display(), key.replace('_', "-")))?;
        copies.push(Copied { key, source, target: entry.resolve(&target), private, bytes });
    }
    if let Some(clone_url) = &args.clone_url {
        changes.push(("clone_url", clone_url.as_str().into()));
    }
    for (key, on) in [("allow_insecure_http", args.allow_insecure_http), ("direct_download", args.direct_download)] {
        if on {
            changes.push((key, true.into()));
        }
    }
    Ok(Wish { anew: known.is_some(), name, changes, copies })
}

fn class(args: &Args, entry: &Entry, interactive: bool) -> anyhow::Result<String> {
    let classes: Vec<&str> = entry.config().class.iter().map(|class| class.name.as_str()).collect();
    Ok(match (&args.class, classes.as_slice()) {
        (Some(class), _) => class.clone(),
        (None, []) => {
            bail!("choose a machine class: {} has no [[class]]; config.example.toml shows one", entry.file().display())
        }
        (None, [only]) => (*only).to_owned(),
        (None, [first, ..]) if interactive => {
            prompt::line(&format!("machine class, one of {}", classes.join(", ")), Some(first))?
        }
        (None, [first, ..]) => (*first).to_owned(),
    })
}

fn path_value(path: &Path) -> Value {
    path.to_string_lossy().into_owned().into()
}

fn host_name() -> String {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    if name.is_empty() { "dayfly".into() } else { name }
}

/// The token, from the file, the environment or the prompt, in this order.
fn token(file: Option<&Path>, variable: impl Fn(&str) -> Option<String>, interactive: bool) -> anyhow::Result<Secret> {
    let given = || variable(TOKEN_VARIABLE).or_else(|| variable(OFFICIAL_TOKEN_VARIABLE)).map(Secret::new);
    let text = match file {
        Some(file) => {
            Secret::new(read_token(file).with_context(|| format!("read the token from `{}`", file.display()))?)
        }
        None => match given().map_or_else(|| registration(&variable), |token| Ok(Some(token)))? {
            Some(token) => token,
            None if interactive => prompt::secret("runner authentication token")?,
            None => {
                return Err(Usage(format!(
                    "there is no terminal to ask for the token: use --token-file FILE or {TOKEN_VARIABLE}"
                ))
                .into());
            }
        },
    };
    let token = text.expose().trim();
    if token.is_empty() || token.len() > TOKEN_MAX || !token.bytes().all(|b| b.is_ascii_graphic()) {
        bail!("use this token: it is empty or has characters that no token has");
    }
    Ok(Secret::new(token))
}

/// gitlab-runner's variable for registration tokens takes the other kind, too.
fn registration(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Secret>, Usage> {
    match variable(REGISTRATION_TOKEN_VARIABLE) {
        Some(token) if token.trim().starts_with("glrt-") => Ok(Some(Secret::new(token))),
        Some(_) => Err(Usage(format!(
            "{REGISTRATION_TOKEN_VARIABLE} holds a registration token, by which no runner is made here: create the runner in \
             GitLab (its page Runners, or POST /user/runners), and give the token that it shows (glrt-…) by \
             --token-file FILE or {TOKEN_VARIABLE}"
        ))),
        None => Ok(None),
    }
}

fn read_token(file: &Path) -> io::Result<String> {
    let mut text = String::new();
    let bytes_max = TOKEN_MAX as u64 * 2;
    if file == Path::new("-") {
        io::stdin().lock().take(bytes_max).read_to_string(&mut text)?;
    } else {
        plain::open_chosen(file)?.take(bytes_max).read_to_string(&mut text)?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests;
