//! Tests of what a build does before and after the programs of the host; the build itself needs a
//! package archive and is proven by the e2e ring.

use super::*;
use crate::files::plain::tests::{fifo, in_time};
use crate::image::manifest::RunnerOrigin;
use dayfly_guest_config::Can;

fn request(directory: &Path) -> BuildRequest {
    BuildRequest {
        recipe: "debian-12-shell".into(),
        recipes: Recipes::default(),
        store: ImageStore::new(directory.join("images")),
        runner: RunnerSource { path: directory.join("runner"), origin: RunnerOrigin::Path },
        helper: None,
        accel: AccelChoice::Tcg,
        guest_program: directory.join("guest"),
        init: directory.join("init"),
    }
}

#[tokio::test]
async fn programs_that_a_guest_could_not_start_are_refused_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    let mut request = request(dir.path());
    let error = build(&request, &mut |_| {}).await.unwrap_err();
    assert_eq!(error.to_string(), format!("read {}", request.guest_program.display()));
    // This test is linked dynamically, as a guest program built with the whole workspace is.
    request.guest_program = std::env::current_exe().unwrap();
    let error = build(&request, &mut |_| {}).await.unwrap_err().to_string();
    assert!(error.starts_with("find a statically linked dayfly-guest in "), "{error}");
    request.recipe = "debian-99".into();
    assert!(matches!(build(&request, &mut |_| {}).await, Err(BuildError::Recipe { .. })));
    assert!(!request.store.directory().exists(), "nothing was made");
}

/// U29: in `/var/tmp` anybody may make a name like that of our work directories: a lock that is a FIFO does not hold a
/// build, and nobody else's directory is removed, not even by root.
#[test]
fn a_build_leaves_work_directories_of_others_alone() {
    let parent = tempfile::tempdir().unwrap();
    let uid = rustix::process::geteuid().as_raw();
    let make = |name: &str| {
        let path = parent.path().join(format!("dayfly-image-{uid}-{name}"));
        fs::create_dir(&path).unwrap();
        path
    };
    let (trap, foreign, left_over) = (make("trap"), make("foreign"), make("killed"));
    fifo(&trap.join("lock"));
    for directory in [&foreign, &left_over] {
        fs::write(directory.join("lock"), "").unwrap();
    }
    let behind = tempfile::tempdir().unwrap();
    fs::write(behind.path().join("lock"), "").unwrap();
    std::os::unix::fs::symlink(behind.path(), parent.path().join(format!("dayfly-image-{uid}-link"))).unwrap();
    let is_root = Privilege::of_us() == Privilege::Root;
    if is_root {
        std::os::unix::fs::chown(&foreign, Some(65534), None).unwrap();
    }
    let path = parent.path().to_owned();
    in_time(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(Work::sweep(&path, Privilege::of_us()));
    });
    assert!(trap.exists() && behind.path().join("lock").exists());
    if is_root {
        assert!(foreign.exists() && !left_over.exists());
    }
}

#[test]
fn what_we_add_lies_where_units_and_docs_say() {
    let dir = tempfile::tempdir().unwrap();
    let request = request(dir.path());
    for path in [&request.guest_program, &request.runner.path] {
        fs::write(path, "program").unwrap();
    }
    let files = dir.path().join("files");
    lay_out(&request, &Recipes::default().find("debian-12-shell").unwrap(), &files).unwrap();
    for path in ["usr/lib/dayfly/dayfly-guest", "usr/bin/gitlab-runner"] {
        assert_eq!(fs::metadata(files.join(path)).unwrap().permissions().mode() & 0o777, 0o755, "{path}");
    }
    let unit = fs::read_to_string(files.join("etc/systemd/system/dayfly-guest.service")).unwrap();
    assert!(unit.contains("ExecStart=/usr/lib/dayfly/dayfly-guest\n"));
    assert!(files.join("etc/systemd/system/dayfly.target").exists());
}

/// U3: the kernel's end of a process for want of memory is the end of no unit, and no limit is a share of a small
/// machine's memory: of the guest's unit, of all others, and, by the same file, of users' units.
#[test]
fn no_unit_ends_with_one_of_its_processes() {
    let recipe = Recipes::default().find("debian-12-shell").unwrap();
    let text = |end: &str| recipe.files.iter().find(|(path, _)| path.ends_with(end)).unwrap().1;
    let unit = text("dayfly-guest.service");
    for line in ["OOMPolicy=continue", "TasksMax=infinity", "MemoryMax=infinity", "LimitNPROC=infinity"] {
        assert!(unit.lines().any(|l| l == line), "{line}");
    }
    let all = text("system.conf.d/dayfly.conf");
    assert!(all.contains("DefaultOOMPolicy=continue") && all.contains("DefaultTasksMax=infinity"), "{all}");
    assert!(recipe.scripts[0].contains("user.conf.d/dayfly.conf"), "users' units have the same");
}

/// U45: the runner's room for temporary files is not what its job calls its own.
#[test]
fn a_jobs_shell_does_not_have_its_runners_tmpdir() {
    let recipe = Recipes::default().find("debian-12-shell").unwrap();
    let line = recipe.scripts[0].lines().find(|line| line.contains("unset TMPDIR")).unwrap();
    assert!(line.contains("= /run/dayfly/runner ]") && line.ends_with("> \"$root/etc/profile\""), "{line}");
}

#[test]
fn a_staged_image_that_is_dropped_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let staging = Staging::new(dir.path()).unwrap();
    let path = staging.path().to_owned();
    let manifest = crate::image::manifest::tests::example();
    let mut staged = Staged { store: ImageStore::new(dir.path()), directory: staging, manifest };
    staged.learn(Learnt { info: "{\"features\":{}}".into(), contract: 2, can: Can::default() }).unwrap();
    let text = fs::read_to_string(path.join(MANIFEST_FILE)).unwrap();
    assert_eq!(Manifest::parse(&text).unwrap().info.as_deref(), Some("{\"features\":{}}"));
    // Its files are missing: it must not come into use.
    assert!(matches!(staged.promote(), Err(BuildError::Image(ImageError::File { .. }))));
    assert!(!path.exists());
}
