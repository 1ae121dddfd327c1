//! `dayfly cache list`, `show`, `clear`: what the running daemon keeps for later jobs (`cache:`).

use super::operate::{ask, unexpected};
use super::print;
use crate::cache::CachesFound;
use crate::clock::Clock;
use crate::control::{Answer, Request};
use crate::status::{CachesText, EntriesText};
use crate::telemetry::sized;
use anyhow::bail;
use std::path::Path;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Cache {
    /// Show whose caches there are, the largest first
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Show the caches of one project
    Show {
        /// Its path, its number, the name of a `[[cache.tenant]]`, or an id of the list
        project: String,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Throw caches away; jobs that read them just now read them to their end
    Clear {
        /// Of one project: as for `show`
        #[arg(required_unless_present = "all", conflicts_with = "all")]
        project: Option<String>,
        /// Only those of this key, as `show` has it
        #[arg(long)]
        key: Option<String>,
        /// Of all projects
        #[arg(long)]
        all: bool,
    },
}

/// Asks the daemon, and prints what it says.
pub(super) async fn cache(config: &Path, command: Cache) -> anyhow::Result<()> {
    match command {
        Cache::List { json } => match ask(config, &Request::Caches).await? {
            Answer::Caches { list: None } => disabled(),
            Answer::Caches { list: Some(list) } if json => {
                Ok(print(&format!("{}\n", serde_json::to_string_pretty(&list)?))?)
            }
            Answer::Caches { list: Some(list) } => {
                Ok(print(&CachesText { list: &list, now: Clock::system().now() }.to_string())?)
            }
            other => unexpected(&other),
        },
        Cache::Show { project, json } => {
            let found = found(config, &Request::CacheShow { whose: project.clone() }, &project).await?;
            match &found {
                _ if json => Ok(print(&format!("{}\n", serde_json::to_string_pretty(&found)?))?),
                CachesFound::Shown { tenant, entries, more } => {
                    let now = Clock::system().now();
                    Ok(print(&EntriesText { tenant, entries, more: *more, now }.to_string())?)
                }
                other => bail!("make sense of the daemon's answer {other:?}; is it of the same version?"),
            }
        }
        Cache::Clear { project, key, all: _ } => {
            let whose = project.clone().unwrap_or_default();
            match found(config, &Request::CacheClear { whose: project, key }, &whose).await? {
                CachesFound::Cleared { entries, bytes, failed: None } => {
                    Ok(print(&format!("{entries} caches, {}, are gone\n", sized(bytes)))?)
                }
                CachesFound::Cleared { entries, failed: Some(error), .. } => {
                    bail!("throw all of them away; {entries} are gone: {error}")
                }
                other => bail!("make sense of the daemon's answer {other:?}; is it of the same version?"),
            }
        }
    }
}

async fn found(config: &Path, request: &Request, whose: &str) -> anyhow::Result<CachesFound> {
    match ask(config, request).await? {
        Answer::Cache { found: CachesFound::Unknown } => {
            bail!("find caches of `{whose}`: there are none; `dayfly cache list` tells whose there are")
        }
        Answer::Cache { found: CachesFound::Ambiguous { ids } } => {
            bail!("find caches of `{whose}`: {} are called so; say which by its id", ids.join(", "))
        }
        Answer::Cache { found: CachesFound::Disabled } => disabled().map(|()| CachesFound::Disabled),
        Answer::Cache { found } => Ok(found),
        other => unexpected(&other).map(|()| CachesFound::Unknown),
    }
}

fn disabled() -> anyhow::Result<()> {
    bail!("look at caches: this daemon keeps none (`cache.enabled = false`)")
}
