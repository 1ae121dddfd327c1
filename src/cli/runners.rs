//! `dayfly list`, `verify`, `unregister`, `reset-token`: the life of a runner after `register`, by gitlab-runner's verbs.

use super::Usage;
use super::register::entry::{self, Entry};
use super::register::real;
use crate::config::{Config, Runner};
use crate::gitlab::{GitlabError, Replacement, RunnerApi, RunnerToken};
use crate::telemetry::printable;
use anyhow::{Context as _, bail};
use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitCode;

/// Which runners are meant.
#[derive(Debug, clap::Args)]
pub(super) struct Which {
    /// Name of the runner's entry
    #[arg(short, long, env = "RUNNER_NAME")]
    name: Option<String>,
    /// All runners of the configuration
    #[arg(long, conflicts_with = "name")]
    all_runners: bool,
}

impl Which {
    /// The entries that are meant; `else_all`: all of them, if nothing was said.
    fn of<'a>(&self, config: &'a Config, else_all: bool) -> anyhow::Result<Vec<&'a Runner>> {
        let names = || {
            let names: Vec<String> = config.runner.iter().map(|runner| format!("`{}`", runner.name)).collect();
            if names.is_empty() { "there is none; dayfly register makes one".into() } else { names.join(", ") }
        };
        match &self.name {
            Some(name) => match config.runner.iter().find(|runner| runner.name == *name) {
                Some(runner) => Ok(vec![runner]),
                None => bail!("find runner `{name}` in the configuration; its runners: {}", names()),
            },
            None if self.all_runners || else_all => Ok(config.runner.iter().collect()),
            None => Err(Usage(format!("say which by --name or --all-runners; the runners: {}", names())).into()),
        }
    }
}

/// What stands in the configuration, and no token of it.
#[derive(serde::Serialize)]
struct Listed<'a> {
    name: &'a str,
    url: &'a str,
    class: &'a str,
    limit: Option<u32>,
    token_file: &'a Path,
}

/// Shows the runners of the configuration.
pub(super) fn list(config: &Path, json: bool) -> anyhow::Result<()> {
    let config = Config::load_or_default(config)?.config;
    let listed: Vec<Listed<'_>> = config.runner.iter().map(listed).collect();
    let mut out = io::stdout();
    if json {
        writeln!(out, "{}", serde_json::to_string_pretty(&listed)?)?;
    } else if listed.is_empty() {
        writeln!(out, "no runner is configured; dayfly register makes one")?;
    }
    for runner in listed.iter().filter(|_| !json) {
        let limit = runner.limit.map_or(String::new(), |limit| format!(", limit {limit}"));
        let line = format!(
            "{}  {}, class {}{limit}, token in {}",
            runner.name,
            runner.url,
            runner.class,
            runner.token_file.display()
        );
        writeln!(out, "{}", printable(&line))?;
    }
    Ok(())
}

fn listed(runner: &Runner) -> Listed<'_> {
    Listed {
        name: &runner.name,
        url: runner.url.as_str(),
        class: &runner.class,
        limit: runner.limit,
        token_file: &runner.token_file,
    }
}

/// Asks each runner's GitLab whether it knows the token. Exit code 1 if one does not.
pub(super) async fn verify(config: &Path, which: &Which, json: bool) -> anyhow::Result<ExitCode> {
    let config = Config::load(config)?.config;
    let mut code = ExitCode::SUCCESS;
    let mut found = Vec::new();
    for runner in which.of(&config, true)? {
        let (known, line) = match verify_one(&config, runner).await {
            Ok(line) => (true, line),
            Err(error) => {
                code = ExitCode::FAILURE;
                (false, format!("{error:#}"))
            }
        };
        if json {
            found.push(serde_json::json!({ "name": runner.name, "url": runner.url, "known": known, "what": line }));
        } else {
            writeln!(io::stdout(), "{}: {}", printable(&runner.name), printable(&line))?;
        }
    }
    if json {
        super::print(&format!("{}\n", serde_json::to_string_pretty(&found)?))?;
    }
    Ok(code)
}

async fn verify_one(config: &Config, runner: &Runner) -> anyhow::Result<String> {
    let token = RunnerToken::from_file(&runner.token_file)?;
    match real::ask(config, runner, token, async |api: &RunnerApi| api.verify(None).await).await? {
        Ok(verified) => {
            let id = verified.id.map_or(String::new(), |id| format!(", as its runner {id}"));
            let until = verified.expires_at.map_or(String::new(), |end| {
                format!(
                    "; the token expires on {}, and the daemon renews it before",
                    end.strftime("%Y-%m-%d %H:%M UTC")
                )
            });
            Ok(format!("{} knows its token{id}{until}", runner.url))
        }
        Err(error) => Err(refused(error, runner)),
    }
}

/// GitLab's no, for a runner that is configured.
fn refused(error: GitlabError, runner: &Runner) -> anyhow::Error {
    match error {
        GitlabError::Forbidden { status } => anyhow::anyhow!(
            "{} does not know its token (status {status}): the runner was deleted there, or its token reset; with another \
             token: dayfly register --name '{}', or without: dayfly unregister --name '{}'",
            runner.url,
            runner.name,
            runner.name
        ),
        error => super::register::explain(error, runner),
    }
}

/// Arguments of `unregister`.
#[derive(Debug, clap::Args)]
pub(super) struct Unregister {
    #[command(flatten)]
    which: Which,
    /// Remove the entry even if GitLab does not answer
    #[arg(long)]
    force: bool,
}

/// Takes runners back: at GitLab first, then here.
pub(super) async fn unregister(file: &Path, args: &Unregister) -> anyhow::Result<()> {
    let config = Config::load(file)?.config;
    for runner in args.which.of(&config, false)? {
        let name = printable(&runner.name);
        let at_gitlab = match at_gitlab(&config, runner).await {
            Ok(said) => said,
            Err(error) if args.force => format!("GitLab was not told: {}", printable(&format!("{error:#}"))),
            Err(error) => {
                return Err(error.context(format!("unregister `{name}`; --force removes the entry all the same")));
            }
        };
        // Each time anew: the one before has changed the file.
        let entry = Entry::open(file)?;
        let tls = entry.resolve(Path::new("tls"));
        entry.remove(&runner.name)?;
        let own = [
            Some(&runner.token_file),
            runner.tls_ca_file.as_ref(),
            runner.tls_cert_file.as_ref(),
            runner.tls_key_file.as_ref(),
        ];
        let start = format!("{}.", entry::file_name(&runner.name));
        for (i, path) in own.into_iter().enumerate() {
            // Files of the operator's own stay, and credentials of systemd's.
            let ours = |path: &Path| match i {
                0 => entry.resolve(&entry::token_file(&runner.name)) == path,
                _ => {
                    path.parent() == Some(&tls)
                        && path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&start))
                }
            };
            if let Some(path) = path.filter(|path| ours(path)) {
                remove(path)?;
            }
        }
        writeln!(
            io::stdout(),
            "unregistered `{name}`: {at_gitlab}; its entry and token are gone from {}",
            entry.file().display()
        )?;
    }
    writeln!(io::stdout(), "next: systemctl reload dayfly, if it runs; jobs that it has go on")?;
    Ok(())
}

fn remove(path: &Path) -> anyhow::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove `{}`; the entry that named it is gone", path.display()))
        }
        _ => Ok(()),
    }
}

/// Takes this host's manager, or the whole of an old kind of runner, away at GitLab.
async fn at_gitlab(config: &Config, runner: &Runner) -> anyhow::Result<String> {
    let token = RunnerToken::from_file(&runner.token_file)?;
    let is_made_there = token.is_of_a_runner_made_in_gitlab();
    match real::ask(config, runner, token, async |api: &RunnerApi| api.unregister().await).await? {
        Ok(()) if is_made_there => {
            Ok("GitLab has forgotten this host as its manager; the runner itself is deleted on its page there".into())
        }
        Ok(()) => Ok("GitLab has deleted the runner".into()),
        Err(GitlabError::Forbidden { .. }) => Ok("GitLab did not know its token any more".into()),
        Err(error) => Err(super::register::explain(error, runner)),
    }
}

/// Has GitLab make a runner's token anew, and puts it in place of the old one.
pub(super) async fn reset_token(file: &Path, which: &Which) -> anyhow::Result<()> {
    let config = Config::load(file)?.config;
    for runner in which.of(&config, false)? {
        let name = printable(&runner.name);
        let token = RunnerToken::from_file(&runner.token_file)?;
        let place = Replacement::prepare(&runner.token_file)?;
        let fresh = match real::ask(&config, runner, token, async |api: &RunnerApi| api.reset_token().await).await? {
            Ok(fresh) => fresh,
            Err(error) => return Err(refused(error, runner).context(format!("reset the token of `{name}`"))),
        };
        place.commit(&fresh.token).with_context(|| {
            format!("keep the new token of `{name}`: the old one is no longer good; reset it on the runner's page in GitLab, then dayfly register --name '{name}'")
        })?;
        let until = fresh
            .expires_at
            .map_or(String::new(), |end| format!("; it expires on {}", end.strftime("%Y-%m-%d %H:%M UTC")));
        writeln!(io::stdout(), "reset the token of `{name}`, kept in {}{until}", runner.token_file.display())?;
    }
    writeln!(
        io::stdout(),
        "next: systemctl reload dayfly, if it runs; other hosts with the same token need the new one"
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        let text = "[[class]]\nname = \"s\"\nimage = \"i\"\n".to_owned()
            + &["a", "b"].map(|name| format!("[[runner]]\nname = \"{name}\"\nurl = \"https://g.example\"\ntoken_file = \"t/{name}\"\nclass = \"s\"\n")).concat();
        Config::assemble(Some(("/etc/dayfly/config.toml".into(), text)), []).unwrap().config
    }

    fn which(name: Option<&str>, all_runners: bool) -> Which {
        Which { name: name.map(str::to_owned), all_runners }
    }

    #[test]
    fn what_is_meant_must_be_said_where_it_takes_something_away() {
        let config = config();
        let names = |which: Which, else_all| {
            which.of(&config, else_all).map(|all| all.iter().map(|r| r.name.clone()).collect::<Vec<_>>())
        };
        assert_eq!(names(which(None, false), true).unwrap(), ["a", "b"]);
        assert_eq!(names(which(None, true), false).unwrap(), ["a", "b"]);
        assert_eq!(names(which(Some("b"), false), false).unwrap(), ["b"]);
        let error = names(which(None, false), false).unwrap_err();
        assert!(error.is::<Usage>() && error.to_string().contains("`a`, `b`"), "{error}");
        let error = names(which(Some("c"), false), true).unwrap_err().to_string();
        assert!(error.contains("find runner `c`") && error.contains("`a`, `b`"), "{error}");
    }

    #[test]
    fn a_list_holds_no_token() {
        let config = config();
        let json = serde_json::to_value(config.runner.iter().map(listed).collect::<Vec<_>>()).unwrap();
        assert_eq!(json[1]["name"], "b");
        assert_eq!(json[1]["token_file"], "/etc/dayfly/t/b");
    }
}
