//! `dayfly egress suggest`: what jobs of a class have reached, as a list for `[class.egress]`.

use super::operate::{ask, unexpected};
use super::print;
use crate::control::{Answer, Request};
use anyhow::bail;
use std::path::Path;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Egress {
    /// Print which list would let the jobs of a class do what they have done, as far as ended jobs are kept (`[history]`)
    Suggest {
        /// The class
        class: String,
        /// Of the last so many days
        #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=3650))]
        days: u32,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
}

/// Prints the list.
pub(super) async fn egress(config: &Path, args: Egress) -> anyhow::Result<()> {
    let Egress::Suggest { class, days, json } = args;
    let suggestion = match ask(config, &Request::Suggest { class: class.clone(), days }).await? {
        Answer::Suggest { suggestion } => suggestion,
        other => return unexpected(&other),
    };
    if json {
        return Ok(print(&format!("{}\n", serde_json::to_string_pretty(&suggestion)?))?);
    }
    if suggestion.jobs == 0 {
        bail!(
            "suggest what jobs of class `{class}` may reach: no job of it that ended in the last {days} days is kept"
        );
    }
    Ok(print(&suggestion.text())?)
}
