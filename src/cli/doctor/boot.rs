//! `dayfly doctor --boot`: a whole job in each class's machine, without a GitLab.
//!
//! By `dayfly-exec`, whose job goes the way of any other: machine, door, the image's runner, trace, verdict. It says more
//! than a boot that speaks, and takes as long as a job.

use super::Finding;
use crate::cli::exec;
use crate::config::{Class, Config};
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

const PIPELINE: &str = "doctor:\n  variables: {GIT_STRATEGY: none}\n  timeout: 10 minutes\n  script:\n    - printf 'a job %s\\n' 'runs here'\n";

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
        findings.push(job(config, class, &program, dir).await);
    }
    findings
}

async fn job(config: &Config, class: &Class, program: &Path, dir: &Path) -> Finding {
    let since = Instant::now();
    let ran = match fs::write(dir.join("doctor.yml"), PIPELINE) {
        Ok(()) => command(config, class, program, dir).run().await,
        Err(source) => {
            return Finding::bad(format!("no job was tried: {}: {source}", dir.display()), "make room there");
        }
    };
    judge(class, ran.map(|output| output.text()), since.elapsed())
}

fn command(config: &Config, class: &Class, program: &Path, dir: &Path) -> Program {
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
        .args(["--disk", &class.disk_gib.to_string()])
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
        job(&config, &config.class[0], &program, dir.path()).await
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
