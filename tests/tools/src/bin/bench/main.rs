//! `bench daemon`, `bench frozen`, `bench proxy`, `bench start`, `bench latency`, `bench abuse` and `bench wire`: what a
//! daemon weighs, what it weighs while its disk hangs, what it costs to go through it, what a cold start costs, when GitLab
//! sees what, and when beside a neighbour that does its worst, and how much goes over a guest's wire.
//!
//! The last lines are figures, `figure NAME NUMBER UNIT`; it fails if something could not be measured.

mod bare;
mod byhand;
mod daemon;
mod figures;
mod frozen;
mod guest;
mod latency;
mod process;
mod proxy;
mod start;
mod watched;
mod wire;

use std::process::ExitCode;

const USAGE: &str = "usage: bench daemon [--vms N]
       bench frozen [--seconds N] [--mount DIRECTORY]
       bench proxy [--mib N] [--pairs N]
       bench start [--runs N] --images DIRECTORY [--image NAME] [--accel auto|kvm|tcg]
       bench latency [--pairs N] --images DIRECTORY [--image NAME] [--accel auto|kvm|tcg]
       bench abuse [--runs N] --images DIRECTORY [--image NAME] [--accel auto|kvm|tcg]
       bench wire [--pairs N] --images DIRECTORY [--image NAME] [--accel auto|kvm|tcg]";

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let measured = match arguments.as_slice() {
        ["daemon", rest @ ..] => match options(rest, &["--vms"]).and_then(|o| number(&o, "--vms", 100)) {
            Some(vms) => daemon::measure(vms).await,
            None => return usage(),
        },
        ["frozen", rest @ ..] => {
            let read = options(rest, &["--seconds", "--mount"]);
            match read
                .and_then(|o| number(&o, "--seconds", 60).map(|seconds| (seconds, text(&o, "--mount").map(Into::into))))
            {
                Some((seconds, mount)) => frozen::measure(seconds, mount).await,
                None => return usage(),
            }
        }
        // The process that is weighed.
        ["daemon-process", url, token_file, vms, rest @ ..] => {
            match vms.parse().ok().zip(options(rest, &["--ca", "--state"])) {
                Some((vms, o)) => {
                    let path = |name| text(&o, name).map(Into::into);
                    let ways = daemon::Ways { ca_file: path("--ca"), state_below: path("--state") };
                    daemon::process(url, token_file, vms, ways).await
                }
                None => return usage(),
            }
        }
        ["proxy", rest @ ..] => {
            let read = options(rest, &["--mib", "--pairs"]);
            let numbers = read.and_then(|o| number(&o, "--mib", 1024).zip(number(&o, "--pairs", 5)));
            match numbers {
                Some((mib, pairs)) => proxy::measure(mib, pairs).await,
                None => return usage(),
            }
        }
        ["start", rest @ ..] => {
            let read = options(rest, &["--runs", "--images", "--image", "--accel"]);
            match read.and_then(|options| start::Wanted::read(&options, ("--runs", 5))) {
                Some(wanted) => start::measure(&wanted).await,
                None => return usage(),
            }
        }
        ["latency", rest @ ..] => {
            let read = options(rest, &["--pairs", "--images", "--image", "--accel"]);
            match read.and_then(|options| start::Wanted::read(&options, ("--pairs", 10))) {
                Some(wanted) => latency::measure(&wanted).await,
                None => return usage(),
            }
        }
        ["abuse", rest @ ..] => {
            let read = options(rest, &["--runs", "--images", "--image", "--accel"]);
            match read.and_then(|options| start::Wanted::read(&options, ("--runs", 5))) {
                Some(wanted) => latency::abuse::measure(&wanted).await,
                None => return usage(),
            }
        }
        ["wire", rest @ ..] => {
            let read = options(rest, &["--pairs", "--images", "--image", "--accel"]);
            match read.and_then(|options| start::Wanted::read(&options, ("--pairs", 5))) {
                Some(wanted) => wire::measure(&wanted).await,
                None => return usage(),
            }
        }
        _ => return usage(),
    };
    match measured {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("bench: failed to measure: {why}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    eprintln!("{USAGE}");
    ExitCode::from(64)
}

/// Options as pairs; `None` for one that is unknown or has no value.
fn options<'a>(arguments: &[&'a str], known: &[&str]) -> Option<Vec<(&'a str, &'a str)>> {
    let mut options = Vec::new();
    for pair in arguments.chunks(2) {
        let [name, value] = pair else { return None };
        options.push((*known.contains(name).then_some(name)?, *value));
    }
    Some(options)
}

/// The value of an option.
fn text<'a>(options: &[(&str, &'a str)], name: &str) -> Option<&'a str> {
    options.iter().rev().find(|(n, _)| *n == name).map(|(_, value)| *value)
}

/// The positive number of an option, or what counts without it.
fn number(options: &[(&str, &str)], name: &str, otherwise: u16) -> Option<u16> {
    text(options, name).map_or(Some(otherwise), |value| value.parse().ok().filter(|number| *number > 0))
}
