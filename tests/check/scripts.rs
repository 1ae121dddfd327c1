//! The scripts that users run: what they call, and what they say of what they did. Their functions run here beside
//! programs that are not what they look like.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Runs these lines of bash after `scripts/lib.sh`, in a trial that is a directory of the test's.
#[expect(clippy::disallowed_methods, reason = "a script is what is tested")]
fn bash(trial: &Path, lines: &str, environment: &[(&str, &str)]) -> Output {
    let lib = root().join("scripts/lib.sh");
    let script = format!(
        "set -euo pipefail\n. {}\ntrial={}\nas_test_user() {{ \"$@\"; }}\n{lines}",
        lib.display(),
        trial.display()
    );
    Command::new("bash").arg("-c").arg(script).envs(environment.iter().copied()).output().expect("bash runs")
}

/// A trial whose dayfly is this script.
fn trial(dayfly: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("bin")).unwrap();
    let program = dir.path().join("bin/dayfly");
    fs::write(&program, format!("#!/bin/sh\n{dayfly}\n")).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// U2: an installed dayfly changes nothing: neither its configuration nor an operator's variables reach a trial.
#[test]
fn a_trial_names_its_own_configuration_and_takes_no_other() {
    let trial = trial("echo \"args: $*\"; env | grep ^DAYFLY_ | sort");
    let operators = [
        ("DAYFLY_CONFIG", "/etc/dayfly/config.toml"),
        ("DAYFLY_CONCURRENT", "9"),
        ("DAYFLY_HYPERVISOR__URI", "qemu:///system"),
        ("DAYFLY_IMAGE_DIRECTORY", "/elsewhere"),
        ("DAYFLY_GITLAB_RUNNER", "/opt/runner"),
    ];
    let output = bash(trial.path(), "accel=tcg; trial_dayfly image list; make_image", &operators);
    let config = format!("--config {}/config.toml", trial.path().display());
    assert_eq!(
        out(&output).lines().collect::<Vec<_>>(),
        [format!("args: {config} image list").as_str(), "DAYFLY_GITLAB_RUNNER=/opt/runner"]
    );
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    let built = format!("args: {config} image --libvirt qemu:///session --accel tcg build debian-12-shell");
    assert!(told.contains(&built), "{told}");
}

/// U2: an operator's variables end where a script begins, also for what it builds and starts itself; those that a script
/// takes stay.
#[test]
fn an_operators_variables_reach_nothing_that_a_script_starts() {
    let operators = [
        ("DAYFLY_CONFIG", "/etc/dayfly/config.toml"),
        ("DAYFLY_LIMITS__KEEPALIVE", "1s"),
        ("DAYFLY_FAILPOINT", "K4"),
        ("DAYFLY_REGISTER_TOKEN", "secret"),
        ("DAYFLY_ACCEL", "tcg"),
        ("DAYFLY_PROFILE", "dev"),
        ("LIBVIRT_DEFAULT_URI", "qemu:///system"),
    ];
    let output = bash(&root(), "env | grep -E '^(DAYFLY|LIBVIRT)_[A-Z]' | grep -v ^DAYFLY_TEST_ | sort", &operators);
    assert_eq!(out(&output), "DAYFLY_ACCEL=tcg\nDAYFLY_PROFILE=dev\n");
}

/// U2: the kind: no script calls a dayfly of its own making without its configuration.
#[test]
fn every_call_of_dayfly_in_a_script_names_its_configuration() {
    let mut calls = 0;
    for entry in fs::read_dir(root().join("scripts")).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        for (at, line) in text.lines().enumerate().filter(|(_, line)| line.contains("bin/dayfly\"")) {
            let copied = line.contains("install -m") || line.contains("DAYFLY_E2E_DAYFLY=") || line.contains("[ ! -x");
            calls += usize::from(!copied);
            assert!(
                copied || line.contains("--config \"$trial/config.toml\""),
                "{}:{}: {line}",
                path.display(),
                at + 1
            );
        }
    }
    assert!(calls >= 2, "trial_dayfly and the example job");
}

/// U1: the scripts believe what doctor has proven, and say what it has found if that is nothing.
#[test]
fn scripts_fall_back_to_tcg_by_the_proof_of_doctor() {
    for (doctor, accel) in [
        ("ok    KVM runs guests: a VM of one boot sector spoke after 210 ms", "auto"),
        ("BAD   KVM is not proven: a VM of one boot sector was stopped by QEMU; the VM is paused", "tcg"),
        ("BAD   libvirt offers no KVM here", "tcg"),
        ("BAD   connect to hypervisor", "tcg"),
    ] {
        let trial = trial(&format!("echo '{doctor}'; exit 1"));
        let output = bash(trial.path(), "choose_accel", &[]);
        assert_eq!(out(&output).trim(), accel, "{doctor}");
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(told.contains("isolates NOTHING"), accel == "tcg", "{told}");
        assert!(!doctor.contains("not proven") || told.contains("stopped by QEMU"), "{told}");
    }
}

/// U1: the image's own kernel has the last word; any other failure of a build is one.
#[test]
fn an_image_whose_kernel_refutes_kvm_is_made_under_tcg() {
    let refuted = "case \"$*\" in *'--accel auto'*) echo 'error: prove KVM by a boot: a VM of the kernel ended' >&2; exit 1;; esac; echo built >&2";
    let trial_of = trial(refuted);
    let output = bash(trial_of.path(), "accel=auto; make_image; echo $accel", &[]);
    assert_eq!((out(&output).trim(), output.status.success()), ("tcg", true));
    let broken = trial("echo 'error: no space' >&2; exit 1");
    let output = bash(broken.path(), "accel=auto; make_image; echo $accel", &[]);
    assert_eq!((out(&output).trim(), output.status.success()), ("", false));
}

/// Runs `scripts/upgrade-test` of a checkout that has these files in `tests/data/last-version`, and no history.
#[expect(clippy::disallowed_methods, reason = "a script is what is tested")]
fn upgrade_test(files: &[(&str, &[u8])]) -> (String, Option<i32>) {
    let dir = tempfile::tempdir().unwrap();
    let kept = dir.path().join("tests/data/last-version");
    for below in [&dir.path().join("scripts"), &kept] {
        fs::create_dir_all(below).unwrap();
    }
    for script in ["upgrade-test", "lib.sh"] {
        fs::copy(root().join("scripts").join(script), dir.path().join("scripts").join(script)).unwrap();
    }
    for (name, bytes) in files {
        fs::write(kept.join(name), bytes).unwrap();
    }
    // No cargo: what is to be seen comes before the first build.
    let cargo = dir.path().join("cargo");
    fs::write(&cargo, "#!/bin/sh\necho built; exit 1\n").unwrap();
    fs::set_permissions(&cargo, fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap());
    let output = Command::new("bash")
        .arg(dir.path().join("scripts/upgrade-test"))
        .env("PATH", path)
        .env("HOME", dir.path())
        .env("GIT_CEILING_DIRECTORIES", dir.path())
        .output()
        .expect("it runs");
    (out(&output) + &String::from_utf8_lossy(&output.stderr), output.status.code())
}

/// U5: upgrades are tried from the last version's own programs, or not at all: a checkout without them fails and says
/// so, and so does one whose programs are others.
#[test]
fn upgrades_are_not_tried_without_the_last_version() {
    let data = root().join("tests/data/last-version");
    let sums = fs::read(data.join("SHA256SUMS")).unwrap();
    let commit = fs::read(data.join("COMMIT")).unwrap();
    let (told, code) = upgrade_test(&[("COMMIT", &commit), ("SHA256SUMS", &sums)]);
    assert_eq!(code, Some(1), "{told}");
    let name = String::from_utf8_lossy(&commit);
    assert!(told.contains("the last version is not here") && told.contains(name.trim()), "{told}");
    assert!(!told.contains("built"), "{told}");
    let guest = fs::read(data.join("kill-guest.xz")).unwrap();
    let swapped = [("COMMIT", &commit[..]), ("SHA256SUMS", &sums), ("dayfly.xz", &guest), ("kill-guest.xz", &guest)];
    let (told, code) = upgrade_test(&swapped);
    assert_eq!(code, Some(1), "{told}");
    assert!(told.contains("is not what SHA256SUMS says") && !told.contains("built"), "{told}");
}

#[expect(clippy::disallowed_methods, reason = "a script is what is tested")]
fn rings(definitions: &str) -> (String, Option<i32>) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("rings.sh");
    // Nothing of a trial was used, so nothing of a trial is anybody's to end: another run may be under way.
    fs::write(&file, format!("stop_session_libvirt() {{ echo ended a VM; }}\n{definitions}")).unwrap();
    let output = Command::new("bash")
        .args(["-c", "exec bash \"$0\" 2>&1"])
        .arg(root().join("scripts/test"))
        .env("DAYFLY_TEST_RINGS", &file)
        .output()
        .expect("it runs");
    let told = out(&output);
    assert!(!told.contains("ended a VM"), "{told}");
    (told, output.status.code())
}

/// The last lines of a run, from the line that announces them: rings without their seconds, then, after an empty string,
/// figures.
fn summary(told: &str) -> Vec<&str> {
    let (_, last) = told.split_once("== rings:\n").expect("a summary");
    let (rings, figures): (Vec<&str>, Vec<&str>) = last.lines().partition(|line| line.starts_with("== "));
    assert!(figures.iter().all(|line| line.starts_with("figure ci.seconds")), "{last}");
    assert!(last.trim_end().lines().last().unwrap().starts_with("figure ci.seconds "), "{last}");
    let named = rings.iter().map(|line| line.split_once(" in ").map_or(*line, |(ring, _)| ring));
    named.chain([""]).chain(figures).collect()
}

/// U53: a ring that did not run has not passed; the last lines say what ran, and the run fails for what was left out.
#[test]
fn a_ring_that_did_not_run_has_not_passed() {
    let all = "known=(one two three); rings=(one two three); ring_one() { true; }; ring_three() { true; }\n";
    let (told, code) = rings(&format!("{all}ring_two() {{ true; }}"));
    assert_eq!(code, Some(0), "{told}");
    assert_eq!(summary(&told)[..4], ["== ring one passed", "== ring two passed", "== ring three passed", ""], "{told}");
    assert!(told.contains("figure ci.seconds.two ") && told.contains("figure ci.seconds "), "{told}");
    let (told, code) = rings(&format!("{all}ring_two() {{ return 69; }}"));
    assert_eq!(code, Some(69), "{told}");
    let expected = ["== ring one passed", "== ring two LEFT OUT, it did not run", "== ring three passed", ""];
    assert_eq!(summary(&told)[..4], expected, "{told}");
    assert!(!told.contains("ring two passed") && !told.contains("figure ci.seconds.two"), "{told}");
    // A command in the middle of a ring that fails is the ring's end.
    let (told, code) = rings(&format!("{all}ring_two() {{ false; echo went on; }}"));
    assert_eq!(code, Some(1), "{told}");
    let expected = ["== ring one passed", "== ring two FAILED", "== ring three not reached, it did not run", ""];
    assert_eq!(summary(&told)[..4], expected, "{told}");
    assert!(!told.contains("went on") && !told.contains("== ring three\n"), "{told}");
}

/// Runs `scripts/mutants` over this list, with a cargo beside it whose mutants are `seen` and `unseen` by any tests.
#[expect(clippy::disallowed_methods, reason = "a script is what is tested")]
fn mutants(list: &str) -> (String, Option<i32>) {
    let dir = tempfile::tempdir().unwrap();
    let (file, bin) = (dir.path().join("list"), dir.path().join("bin"));
    fs::write(&file, list).unwrap();
    fs::create_dir(&bin).unwrap();
    let cargo = r#"#!/bin/bash
        case "$*" in
            --version) echo cargo 1.99.0 ;;
            "mutants --version") echo cargo-mutants 26.0.0 ;;
            *--list*) printf 'src/rng.rs:%s: replace %s with ()\n' 7:9 seen 8:9 unseen 9:9 unseen ;;
            mutants*)
                while [ "$1" != -o ]; do shift; done
                mkdir "$2/mutants.out" && cd "$2/mutants.out" || exit 1
                case $* in *":7:9: replace seen "*) echo it >caught.txt ;; *":9:9: replace unseen "*) echo it >missed.txt ;; esac ;;
            test*) echo "test result: ok. 3 passed" ;;
        esac"#;
    fs::write(bin.join("cargo"), cargo).unwrap();
    fs::set_permissions(bin.join("cargo"), fs::Permissions::from_mode(0o755)).unwrap();
    let output = Command::new("bash")
        .args(["-c", "exec bash \"$0\" 2>&1"])
        .arg(root().join("scripts/mutants"))
        .env("DAYFLY_TEST_MUTANTS", &file)
        .env("CARGO_TARGET_DIR", dir.path().join("target"))
        .env("PATH", format!("{}:/usr/bin:/bin", bin.display()))
        .env("HOME", dir.path())
        .output()
        .expect("it runs");
    (out(&output), output.status.code())
}

/// B4: a mutant that no test sees is missed, a line that names none any more is an error, and so is a control that is
/// not missed.
#[test]
fn a_mutant_that_no_test_sees_is_missed() {
    let seen = "Seen; 5; src/rng.rs; replace seen with (); lib rng::\n";
    let control = "Control; -; src/rng.rs; replace unseen with () #2; lib rng::\n";
    let (told, code) = mutants(&format!("# a comment\n\n{seen}{control}"));
    assert_eq!(code, Some(0), "{told}");
    assert!(told.ends_with("figure planted.controls 1\nfigure planted.tried 1\nfigure planted.missed 0\n"), "{told}");
    let (told, code) = mutants(&format!("{seen}Unseen; 5; src/rng.rs; replace unseen with () #2; lib rng::\n"));
    assert_eq!(code, Some(1), "{told}");
    assert!(
        told.contains("Unseen: MISSED: ") && told.contains("figure planted.tried 2\nfigure planted.missed 1\n"),
        "{told}"
    );
    let (told, code) = mutants("Control; -; src/rng.rs; replace seen with (); lib rng::\n");
    assert_eq!(code, Some(1), "{told}");
    assert!(told.contains("this script misjudges") && !told.contains("figure"), "{told}");
    for gone in
        ["src/rng.rs; replace gone with ()", "src/rng.rs; replace seen with () #2", "src/gone.rs; replace seen with ()"]
    {
        let (told, code) = mutants(&format!("{seen}Gone; 5; {gone}; lib rng::\n"));
        assert_eq!(code, Some(1), "{told}");
        assert!(told.contains("Gone: no mutation ") && !told.contains("Seen: caught"), "{told}");
    }
}
