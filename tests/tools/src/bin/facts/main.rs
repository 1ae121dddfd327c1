//! `facts FILE`: holds the stand-in GitLab to a file of facts about GitLab's runner API.
//!
//! Each fact gets a fresh stand-in on a socket: its state is set up (`given`), requests are sent by a
//! plain HTTP client without retries or redirects (`send`), and status, headers, body and the state
//! afterwards are compared (`expect`, `matcher`, `state`). One line for each failure and each skip; the
//! last lines are figures. Tier 3 is advice: it is reported and fails nothing.

mod expect;
mod fact;
mod given;
mod job;
mod matcher;
mod names;
mod run;
mod send;
mod state;

use fact::Fact;
use run::Outcome;
use std::io::Write as _;
use std::process::ExitCode;

#[derive(Default)]
struct Counts {
    run: u64,
    failed: u64,
    skipped: u64,
    advice_failed: u64,
    soft_failed: u64,
    firm: u64,
    firm_run: u64,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path] = arguments.as_slice() else {
        eprintln!("usage: facts FILE");
        return ExitCode::from(64);
    };
    let facts = match read(path) {
        Ok(facts) => facts,
        Err(error) => {
            eprintln!("facts: {path}: {error}");
            return ExitCode::FAILURE;
        }
    };
    let mut counts = Counts::default();
    let mut out = std::io::stdout();
    for fact in &facts {
        let line = judge(fact, &mut counts).await;
        if let Some(line) = line
            && writeln!(out, "{line}").is_err()
        {
            return ExitCode::FAILURE;
        }
    }
    let Counts { run, failed, skipped, advice_failed, soft_failed, firm, firm_run } = counts;
    let figures = [
        ("facts.firm", firm),
        ("facts.firm_run", firm_run),
        ("facts.soft_failed", soft_failed),
        ("facts.run", run),
        ("facts.failed", failed),
        ("facts.skipped", skipped),
        ("facts.advice_failed", advice_failed),
    ];
    for (name, number) in figures {
        if writeln!(out, "figure {name} {number}").is_err() {
            return ExitCode::FAILURE;
        }
    }
    if failed == 0 && run > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// `facts.json` out of an archive: the form in which the repository carries it.
fn member(path: &str) -> Result<String, String> {
    let file = std::fs::File::open(path).map_err(|error| error.to_string())?;
    let mut archive = zip::ZipArchive::new(file).map_err(|error| error.to_string())?;
    let mut text = String::new();
    let mut facts = archive.by_name("facts.json").map_err(|error| error.to_string())?;
    std::io::Read::read_to_string(&mut facts, &mut text).map_err(|error| error.to_string())?;
    Ok(text)
}

fn read(path: &str) -> Result<Vec<Fact>, String> {
    let text = if path.ends_with(".zip") {
        member(path)?
    } else {
        std::fs::read_to_string(path).map_err(|error| error.to_string())?
    };
    serde_json::from_str(&text).map_err(|error| error.to_string())
}

/// Runs one fact, counts it, and says what is to be said about it.
async fn judge(fact: &Fact, counts: &mut Counts) -> Option<String> {
    let advice = fact.tier >= 3;
    counts.firm += u64::from(!advice);
    let outcome = run::run(fact).await;
    if !matches!(outcome, Outcome::Skipped(_)) {
        counts.run += 1;
        counts.firm_run += u64::from(!advice);
    }
    let (id, title) = (&fact.id, &fact.title);
    match outcome {
        Outcome::Passed => None,
        Outcome::Soft(difference) => {
            counts.soft_failed += 1;
            Some(format!("soft {id}: {title}: {difference}"))
        }
        Outcome::Skipped(reason) => {
            counts.skipped += 1;
            Some(format!("skip {id}: {reason}: {title}"))
        }
        Outcome::Failed(difference) if advice => {
            counts.advice_failed += 1;
            Some(format!("advice {id}: {title}: {difference}"))
        }
        Outcome::Failed(difference) => {
            counts.failed += 1;
            Some(format!("FAIL {id}: {title}: {difference}"))
        }
    }
}
