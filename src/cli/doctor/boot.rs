//! `dayfly doctor --boot`: a whole job in each class's machine, without a GitLab.
//!
//! By `dayfly-exec`, whose job goes the way of any other: machine, door, the image's runner, trace, verdict. It says more
//! than a boot that speaks, and takes as long as a job.

use super::Finding;
use crate::cli::exec;
use crate::config::{Class, Config, Runner};
use crate::image::store::ImageStore;
use crate::network::{self, Mode};
use crate::process::{ProcessError, Program};
use crate::telemetry::chain;
use crate::vm::{AccelChoice, Backend};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::Instant;

/// A boot under TCG takes minutes; then the job says one line.
const DEADLINE: Duration = Duration::from_secs(15 * 60);

/// What it says. The log also shows the command, so the words are made of two.
const WORD: &str = "a job runs here";

/// The job: it speaks, and then looks for each GitLab of its class as jobs do, by name and by connection. Bash and glibc
/// are in every image.
const PIPELINE: &str = r#"doctor:
  variables: {GIT_STRATEGY: none}
  timeout: 10 minutes
  script:
    - printf 'a job %s\n' 'runs here'
    - |
      for target in $DAYFLY_DOCTOR_TARGETS; do
        host=${target%:*} port=${target##*:} host=${host#[} host=${host%]}
        if ! getent ahosts "$host" >/dev/null; then found=unknown
        elif timeout 20 bash -c "exec 3<>/dev/tcp/$host/$port" 2>/dev/null; then found=reached
        else found=refused
        fi
        echo "dayfly-doctor $target $found"
      done
"#;

/// What a line of the job about a GitLab begins with.
const ABOUT: &str = "dayfly-doctor ";

/// A line for each class; `dir` is for the jobs' files, and may be passed by QEMU.
pub(super) async fn jobs(config: &Config, dir: &Path) -> Vec<Finding> {
    let program = match exec::program() {
        Ok(program) => program,
        Err(error) => {
            return vec![Finding::warn(
                format!("no job was tried: {}", chain(&error)),
                "see above; the daemon needs none",
            )];
        }
    };
    let mut findings = Vec::new();
    for class in &config.class {
        findings.extend(job(config, class, &program, dir).await);
    }
    findings
}

/// The GitLabs that jobs of a class must reach, as they know them.
fn targets(config: &Config, class: &Class) -> Vec<String> {
    let has_it = |runner: &&Runner| {
        runner.class == class.name || config.classes_by_rule(&runner.name).iter().any(|by| by.name == class.name)
    };
    let of_jobs = config.runner.iter().filter(has_it).map(|runner| runner.clone_url.as_ref().unwrap_or(&runner.url));
    network::always(of_jobs, &[]).iter().map(ToString::to_string).collect()
}

/// The network that jobs of a class have.
fn network_of(config: &Config, class: &Class) -> &'static str {
    let image = ImageStore::new(&config.image_directory).get(&class.image);
    match image.ok().and_then(|image| crate::job::network_of(class, &image).ok()) {
        Some(Mode::Relay) => "relay",
        Some(Mode::User) | None => "user",
    }
}

async fn job(config: &Config, class: &Class, program: &Path, dir: &Path) -> Vec<Finding> {
    let since = Instant::now();
    let (targets, network) = (targets(config, class), network_of(config, class));
    let ran = match fs::write(dir.join("doctor.yml"), PIPELINE) {
        Ok(()) => command(config, class, (network, &targets), program, dir).run().await,
        Err(source) => {
            return vec![Finding::bad(format!("no job was tried: {}: {source}", dir.display()), "make room there")];
        }
    };
    let text = ran.map(|output| output.text());
    let reached = text.as_deref().map(|text| reached(class, network, &targets, text)).unwrap_or_default();
    [judge(class, text, since.elapsed())].into_iter().chain(reached).collect()
}

/// What the job has said of each GitLab.
fn reached(class: &Class, network: &str, targets: &[String], text: &str) -> Vec<Finding> {
    let class = &class.name;
    let of = |target: &String| {
        let said = text.lines().find_map(|line| {
            let (_, rest) = line.split_once(ABOUT)?;
            rest.trim_end().strip_prefix(target.as_str())?.strip_prefix(' ')
        });
        match said {
            Some("reached") => {
                Finding::ok(format!("class `{class}`: a job finds {target} by name and connects (network `{network}`)"))
            }
            Some("unknown") => Finding::bad(
                format!("class `{class}`: a job finds no address of {target} (network `{network}`)"),
                if network == "user" {
                    "QEMU asks the first IPv4 resolver of /etc/resolv.conf: name one there that knows it (a VPN's, if that has it), or set `network = \"relay\"`"
                } else {
                    "dayfly-egress asks the resolvers of /etc/resolv.conf: name one there that knows it (a VPN's, if that has it), or give `clone_url` a name that is known"
                },
            ),
            Some(_) => Finding::bad(
                format!("class `{class}`: a job finds {target} by name, and cannot connect (network `{network}`)"),
                if network == "user" {
                    "a private address must be listed in /etc/dayfly/fence.d where there is a fence; else look at what is in between"
                } else {
                    "look at what is between this host and it"
                },
            ),
            None => Finding::warn(
                format!("class `{class}`: what a job reaches of {target} is not known: its log does not say it"),
                "dayfly doctor --boot again",
            ),
        }
    };
    targets.iter().map(of).collect()
}

fn command(
    config: &Config,
    class: &Class,
    (network, targets): (&str, &[String]),
    program: &Path,
    dir: &Path,
) -> Program {
    let accel = match config.hypervisor.accel {
        AccelChoice::Auto => "auto",
        AccelChoice::Kvm => "kvm",
        AccelChoice::Tcg => "tcg",
    };
    let libvirt = match config.hypervisor.backend {
        Backend::Libvirt => config.hypervisor.uri.as_str(),
        Backend::Qemu => "none",
    };
    let path = |name: &str| -> PathBuf { dir.join(name) };
    let command = Program::new(program, DEADLINE)
        .args(["doctor", "--image", &class.image, "--accel", accel, "--libvirt", libvirt])
        .args(["--cpus", &class.cpus.to_string(), "--memory", &class.memory_mib.to_string()])
        .args(["--disk", &class.disk_gib.to_string(), "--network", network])
        .args(["--variable", &format!("DAYFLY_DOCTOR_TARGETS={}", targets.join(" "))])
        .arg("--file")
        .arg(path("doctor.yml"))
        .arg("--image-directory")
        .arg(&config.image_directory)
        .arg("--work-directory")
        .arg(path("work"))
        .arg("--artifacts")
        .arg(path("artifacts"))
        .env("HOME", dir)
        .directory(dir);
    // A libvirt of the user's own is found by it.
    let command = match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(directory) => command.env("XDG_RUNTIME_DIR", directory),
        None => command,
    };
    let reach = if network == "relay" { targets } else { &[] };
    let command = reach.iter().fold(command, |command, target| command.args(["--reach", target]));
    if class.run_as_root { command.arg("--root") } else { command }
}

fn judge(class: &Class, ran: Result<String, ProcessError>, took: Duration) -> Finding {
    let name = &class.name;
    match ran {
        Ok(text) if text.contains(WORD) => {
            Finding::ok(format!("class `{name}`: a whole job ran in {:.1} s", took.as_secs_f64()))
        }
        Ok(_) => Finding::bad(
            format!("class `{name}`: a job ended well, and what it said did not arrive"),
            format!("dayfly image test {}", class.image),
        ),
        Err(error) => Finding::bad(
            format!("class `{name}`: a job did not run: {}", chain(&error)),
            format!("dayfly image test {} shows more", class.image),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;
    use crate::config::EXAMPLE;
    use std::os::unix::fs::PermissionsExt as _;

    fn config() -> Config {
        Config::assemble(Some(("/etc/dayfly/config.toml".into(), EXAMPLE.into())), []).unwrap().config
    }

    /// What is said of a `dayfly-exec` that is this script.
    async fn with(script: &str) -> Finding {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("dayfly-exec");
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let config = config();
        job(&config, &config.class[0], &program, dir.path()).await.remove(0)
    }

    /// U52: a resolver that guests cannot use, and one that does not know GitLab's name for them, are seen from inside a
    /// machine, and each has its remedy.
    #[tokio::test]
    async fn what_a_job_cannot_resolve_or_reach_is_bad() {
        let mut config = config();
        let url = |text: &str| text.parse().unwrap();
        config.runner = vec![
            Runner::new("a", url("https://gitlab.example"), "t", "default"),
            Runner {
                clone_url: Some(url("http://[fd00::1]:8080")),
                ..Runner::new("b", url("https://outside.example"), "t", "default")
            },
            Runner::new("c", url("https://other.example"), "t", "another"),
        ];
        let class = config.class[0].clone();
        let targets = targets(&config, &class);
        assert_eq!(targets, ["gitlab.example:443", "[fd00::1]:8080"]);
        let levels = |text: &str| -> Vec<Level> {
            reached(&class, "user", &targets, text).into_iter().map(|finding| finding.level).collect()
        };
        let said = |a: &str, b: &str| {
            format!(
                "00O {ABOUT}gitlab.example:443 {a}\r\n{ABOUT}gitlab.example:4430 reached\n{ABOUT}[fd00::1]:8080 {b}\n"
            )
        };
        assert_eq!(levels(&said("reached", "reached")), [Level::Ok, Level::Ok]);
        assert_eq!(levels(&said("unknown", "refused")), [Level::Bad, Level::Bad]);
        assert_eq!(levels(""), [Level::Warn, Level::Warn]);
        let findings = reached(&class, "user", &targets, &said("unknown", "refused"));
        assert!(
            findings[0].what.contains("finds no address") && findings[0].remedy.contains("IPv4"),
            "{}",
            findings[0]
        );
        assert!(
            findings[1].what.contains("cannot connect") && findings[1].remedy.contains("fence.d"),
            "{}",
            findings[1]
        );
    }

    #[tokio::test]
    async fn a_job_that_speaks_and_ends_well_is_the_proof() {
        let good = with(&format!("echo '{WORD}'")).await;
        assert_eq!(good.level, Level::Ok);
        assert!(good.what.contains("class `default`: a whole job ran"), "{good}");
        let silent = with("true").await;
        assert_eq!(silent.level, Level::Bad);
        let failed = with("echo 'the image is not there' >&2; exit 125").await;
        assert_eq!(failed.level, Level::Bad);
        assert!(failed.what.contains("the image is not there"), "{failed}");
    }

    /// The class's machine, and the daemon's own images and hypervisor.
    #[tokio::test]
    async fn the_job_gets_the_classs_machine() {
        let said =
            with(&format!("grep -q GIT_STRATEGY doctor.yml && echo '{WORD}'; [ \"$1\" = doctor ] && exit 0; exit 3"))
                .await;
        assert_eq!(said.level, Level::Ok, "{said}");
        let told = with("echo \"$*\" >&2; exit 1").await.what;
        for part in
            ["--cpus 2 --memory 2048 --disk 20", "--image debian-12-shell", "--libvirt qemu:///session", "--accel auto"]
        {
            assert!(told.contains(part), "{part}: {told}");
        }
    }
}
