//! What a guest moves over its wire, over what it moved by TCP through SLIRP before there was one.
//!
//! Two machines of one image, by turns: each runs one job whose client asks the relay at 192.0.2.1 over HTTP/1.1, as the
//! runner beside it does. Both relays are the guest program's, both doors end in the same service of this process. The
//! processor's time is that of the whole QEMU, which is the machine and its network. One round goes before and does not
//! count.

mod machine;
mod service;

use crate::byhand::Told;
use crate::figures::{Spread, figure, say};
use crate::start::Wanted;
use bytes::Bytes;
use dayfly::clock::Clock;
use dayfly::image::store::{ImageStore, Images as _};
use dayfly::rng::Rng;
use dayfly::telemetry::chain;
use dayfly::vm::libvirt::Libvirt;
use dayfly::vm::{Accel, AccelChoice, Attachment, Config, Confinement, VmId, VmSpec};
use dayfly_exec::standin::{JobSpec, Standin, Variable, serve};
use machine::{Measured, Side};
use service::{Service, What};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;
use tokio::net::TcpListener;

/// Longest wait for what one order takes, a boot before the first one included.
const LIMIT: Duration = Duration::from_secs(300);

/// Bytes of a transfer.
const BYTES: u64 = 128 * 1024 * 1024;

/// New connections of one round.
const CONNECTIONS: usize = 100;

/// The machines' size.
const MEMORY_MIB: u64 = 1024;

/// The job's script: fetches the client and runs it.
const SCRIPT: &str = "curl -sSf -o client http://192.0.2.1/bench/client && chmod +x client && ./client";

/// The client's program, beside ours.
const CLIENT: &str = "dayfly-bench-client";

const SIDES: [Side; 2] = [Side::Wire, Side::Tcp];

/// What one order took: seconds of each time, and the QEMU's processor seconds in all.
#[derive(Clone, Debug)]
struct Took {
    seconds: Vec<f64>,
    cpu: f64,
}

/// Each side's, of each kind of order, a round each.
type Rounds = BTreeMap<(&'static str, &'static str), Vec<Took>>;

/// Measures and prints.
pub(crate) async fn measure(wanted: &Wanted) -> Result<(), String> {
    let images = ImageStore::new(&wanted.images);
    let image = images.load(&wanted.image).await.map_err(|error| chain(&error))?;
    let vms = Libvirt::new(&Config { uri: "qemu:///session".into(), accel: wanted.accel, ..Config::default() }).host();
    let standin = Standin::new(Clock::system(), Rng::system());
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.map_err(|error| format!("listen: {error}"))?;
    let served = serve(standin.clone(), listener, None).map_err(|error| format!("serve: {error}"))?;
    let rng = Rng::system();
    let like = VmSpec {
        id: VmId::random(&rng),
        installation: VmId::random(&rng),
        bound: None,
        cpus: 1,
        memory_mib: MEMORY_MIB,
        accel: if wanted.accel == AccelChoice::Tcg { Accel::Tcg } else { Accel::Kvm },
        boot: image.boot.clone(),
        overlay: PathBuf::new(),
        base: image.disk.clone(),
        frozen: None,
        attachment: Attachment::User,
        read_only: Vec::new(),
        nested: false,
        confine: Confinement::default(),
        socket_dir: PathBuf::new(),
    };
    let client = client().await?;
    let mut machines = Vec::new();
    for side in SIDES {
        let project = standin.add_project(&format!("group/{}", name(side)));
        let runner = standin.add_runner(project);
        let told = Told {
            clone_url: url::Url::parse("http://gitlab.invalid").map_err(|error| error.to_string())?,
            token: standin.runner_token(runner).ok_or("the runner has no token")?,
            executor: image.manifest.executor_of(&dayfly::machine_spec::DockerSettings::default()),
        };
        let machine = Measured::start(side, &vms, &like, &told, Service::new(served.address(), client.clone())).await?;
        let script = JobSpec::script([SCRIPT]).with_variable(Variable::new("GIT_STRATEGY", "none"));
        machines.push((side, standin.enqueue(project, script), machine));
    }
    let mut measured = rounds(wanted.runs, &mut machines).await;
    for (side, job, machine) in machines {
        if let (Err(error), Some(job)) = (&mut measured, standin.job(job)) {
            error.push_str(&format!("; the log of {side:?}:\n{}", String::from_utf8_lossy(&job.trace.bytes)));
        }
        machine.end().await?;
    }
    report(&measured?)
}

async fn client() -> Result<Bytes, String> {
    let here = std::env::current_exe().map_err(|error| error.to_string())?.with_file_name(CLIENT);
    let program = tokio::fs::read(&here).await.map_err(|error| format!("{}: {error}", here.display()))?;
    Ok(program.into())
}

async fn rounds(runs: u16, machines: &mut [(Side, dayfly::gitlab::JobId, Measured)]) -> Result<Rounds, String> {
    let mut rounds = Rounds::new();
    for run in 0..=runs {
        for (what, times, bytes) in [(What::Up, 1, BYTES), (What::Down, 1, BYTES), (What::Small, CONNECTIONS, 0)] {
            // Whoever was last is first in the next round.
            machines.reverse();
            for (side, _, machine) in &mut *machines {
                let before = machine.cpu_seconds()?;
                let seconds = machine.orders.give(what, times, bytes, LIMIT).await;
                let seconds = seconds.map_err(|error| format!("{side:?}: {}: {error}", what.word()))?;
                let took = Took { cpu: machine.cpu_seconds()? - before, seconds };
                if run > 0 {
                    rounds.entry((what.word(), name(*side))).or_default().push(took);
                }
            }
        }
        say(&format!("round {run}{}", if run == 0 { ", which does not count" } else { "" }))?;
    }
    for (_, _, machine) in machines {
        machine.orders.end().await?;
    }
    Ok(rounds)
}

fn name(side: Side) -> &'static str {
    match side {
        Side::Wire => "wire",
        Side::Tcp => "tcp",
    }
}

/// The spread of one number of each time.
fn spread(rounds: &Rounds, what: What, side: Side, numbers: impl Fn(&Took) -> Vec<f64>) -> Result<Spread, String> {
    let took = rounds.get(&(what.word(), name(side))).ok_or("nothing was measured")?;
    Spread::of(took.iter().flat_map(numbers).collect()).ok_or_else(|| "nothing was measured".into())
}

fn report(rounds: &Rounds) -> Result<(), String> {
    for (what, unit, scale) in [(What::Up, "MiB/s", None), (What::Down, "MiB/s", None), (What::Small, "ms", Some(1e3))]
    {
        let mut medians = Vec::new();
        for side in SIDES {
            let mib = f64::from(u32::try_from(BYTES >> 20).unwrap_or(u32::MAX));
            let of = |took: &Took| took.seconds.iter().map(|s| scale.map_or(mib / s, |scale| s * scale)).collect();
            let Spread { median, least, most } = spread(rounds, what, side, of)?;
            say(&format!("{} over {}: median {median:.2} {unit}, {least:.2} to {most:.2}", what.word(), name(side)))?;
            medians.push(median);
        }
        figure(&format!("wire.{}_ratio", what.word()), medians[0] / medians[1], "")?;
    }
    let mut both = Vec::new();
    for side in SIDES {
        let mut cpu = 0.0;
        for what in [What::Up, What::Down] {
            let Spread { median, least, most } = spread(rounds, what, side, |took| vec![took.cpu])?;
            say(&format!(
                "QEMU's processor, {} over {}: median {median:.2} s, {least:.2} to {most:.2}",
                what.word(),
                name(side)
            ))?;
            cpu += median;
        }
        both.push(cpu);
    }
    figure("wire.cpu_ratio", both[0] / both[1], "")?;
    let counted = rounds.values().map(Vec::len).min().unwrap_or(0);
    figure("wire.rounds", f64::from(u32::try_from(counted).unwrap_or(u32::MAX)), "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_of_medians_and_need_both_sides() {
        let mut rounds = Rounds::new();
        assert!(report(&rounds).is_err());
        for what in [What::Up, What::Down, What::Small] {
            for (side, seconds) in [(Side::Wire, [1.0, 2.0, 9.0]), (Side::Tcp, [4.0, 4.0, 4.0])] {
                let took = seconds.map(|s| Took { seconds: vec![s], cpu: s / 2.0 });
                rounds.insert((what.word(), name(side)), took.into());
            }
        }
        let up = spread(&rounds, What::Up, Side::Wire, |took| took.seconds.clone()).unwrap();
        assert_eq!((up.median, up.least, up.most), (2.0, 1.0, 9.0));
        assert_eq!(report(&rounds), Ok(()));
    }
}
