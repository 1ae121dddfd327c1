//! Recipes that are put together from others, and what is wrong with one in words.

use super::*;
use crate::files::plain::tests::{fifo, in_time};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;

/// A directory of recipes: `(file, text)`.
fn recipes(files: &[(&str, &str)]) -> (tempfile::TempDir, Recipes) {
    let dir = tempfile::tempdir().unwrap();
    for (file, text) in files {
        let path = dir.path().join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    let recipes = Recipes(vec![dir.path().to_owned()]);
    (dir, recipes)
}

fn fails(files: &[(&str, &str)], name: &str) -> String {
    let (dir, recipes) = recipes(files);
    let error = recipes.find(name).unwrap_err();
    crate::telemetry::chain(&error).replace(&dir.path().display().to_string(), "DIR")
}

#[test]
fn every_recipe_of_ours_can_be_read_and_is_whole() {
    for carried::Carried { name, .. } in CARRIED {
        let recipe = Recipes(Vec::new()).find(name).unwrap();
        assert!(recipe.inputs.cmdline.contains("systemd.unit=dayfly.target"), "{name}");
        let unit = recipe.files.iter().find(|(path, _)| path.ends_with("dayfly-guest.service")).unwrap();
        assert!(unit.1.contains("Environment=HOME="), "{name}");
        assert!(recipe.scripts.iter().all(|script| script.starts_with("#!/bin/sh")), "{name}");
        for module in ["virtio_blk", "virtio_net", "virtio_console", "virtio-rng", "pvpanic-mmio"] {
            assert!(recipe.inputs.modules.iter().any(|listed| listed == module), "{name}: a guest needs {module}");
        }
        // What `dayfly-guest` loads in a machine without a network card.
        for module in
            ["nft_chain_nat", "nft_redir", "nft_nat", "nft_fib_ipv4", "nft_reject_ipv4", "nft_queue", "nfnetlink_queue"]
        {
            assert!(
                recipe.inputs.guest_modules.iter().any(|listed| listed == module),
                "{name}: a guest needs {module}"
            );
        }
    }
    let both = ["debian-12-shell", "debian-13-shell"].map(|name| Recipes(Vec::new()).find(name).unwrap().inputs);
    assert_eq!(Inputs { suite: "bookworm".into(), ..both[1].clone() }, both[0]);
}

#[test]
fn a_disk_with_a_boot_loader_has_its_kernel_inside() {
    let inputs = |name: &str| Recipes(Vec::new()).find(name).unwrap().inputs;
    let (direct, disk) = (inputs("debian-13-shell"), inputs("debian-13-disk"));
    assert_eq!((direct.boot, direct.root_offset()), (BootKind::Direct, 0));
    assert!(!direct.all_packages().any(|package| package.starts_with("linux-image")));
    assert_eq!((disk.boot, disk.root_offset()), (BootKind::Disk, 2 << 20));
    for package in ["linux-image-cloud-amd64", "grub-pc-bin", "fdisk", "git", "jq"] {
        assert!(disk.all_packages().any(|name| name == package), "{package}");
    }
    assert!(disk.cmdline.contains(" root=/dev/vda2 ") && direct.cmdline.contains(" root=/dev/vda "));
    let why = fails(&[("x/recipe.toml", "extends = \"debian-12-docker\"\nboot = \"disk\"\npreload = [\"a:1\"]")], "x");
    assert!(why.contains("`preload` is for images whose kernel the hypervisor loads"), "{why}");
    let why = fails(&[("x/recipe.toml", "extends = \"debian-12-shell\"\nboot = \"floppy\"")], "x");
    assert!(why.contains("floppy") && why.contains("`direct` or `disk`"), "{why}");
}

/// U49: what a CI image is expected to have is asked for, by names of packages and nothing else.
#[test]
fn tools_are_packages_and_the_expected_ones_are_among_them() {
    let recipe = Recipes(Vec::new()).find("debian-12-shell").unwrap();
    let all: Vec<&str> = recipe.inputs.all_packages().collect();
    for tool in ["procps", "make", "gcc", "libc6-dev", "python3", "jq", "sudo", "git", "curl"] {
        assert!(all.contains(&tool), "{tool}");
    }
    for bad in ["jq zip", "jq,zip", "jq/sid", "?essential", "Jq", "-o", "jq=1.6", "j", ""] {
        for key in ["tools", "packages", "without"] {
            let text = format!("extends = \"debian-12-shell\"\n{key} = [\"{bad}\"]\n");
            let error = fails(&[("x/recipe.toml", &text)], "x");
            assert_eq!(error, format!("read DIR/x/recipe.toml: `{bad}` is no name of a Debian package"));
        }
    }
    for good in ["g++", "libc6-dev", "python3.11", "0ad"] {
        assert!(is_package_name(good), "{good}");
    }
}

#[test]
fn three_lines_are_a_recipe() {
    let text = "extends = \"debian-13-shell\"\npackages = [\"cmake\", \"git\"]\nwithout = [\"jq\", \"less\"]\n";
    let (_dir, recipes) = recipes(&[("builder/recipe.toml", text)]);
    let recipe = recipes.find("builder").unwrap();
    let base = recipes.find("debian-12-shell").unwrap();
    let expected: Vec<&str> = base.inputs.packages.iter().map(String::as_str).chain(["cmake"]).collect();
    assert_eq!(recipe.inputs.packages, expected, "more, and none twice");
    assert_eq!(recipe.inputs.suite, "trixie");
    assert!(!recipe.inputs.tools.iter().any(|tool| ["jq", "less"].contains(&tool.as_str())));
    assert_eq!(recipe.scripts, base.scripts);
    assert_eq!((recipe.inputs.disk_gib, recipe.inputs.cmdline), (base.inputs.disk_gib, base.inputs.cmdline));
}

/// The file that stands beside ours in a source tree is the one inside this binary.
#[test]
fn carried_recipes_are_those_of_the_tree() {
    let tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("vm-images");
    for carried in &CARRIED {
        let directory = tree.join(carried.name);
        let mut found = Vec::new();
        let mut directories: Vec<PathBuf> =
            directory.join("files").is_dir().then(|| directory.join("files")).into_iter().collect();
        while let Some(next) = directories.pop() {
            for entry in std::fs::read_dir(next).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() { directories.push(path) } else { found.push(path) }
            }
        }
        found.sort();
        let expected: Vec<PathBuf> = carried.files.iter().map(|(path, _)| directory.join("files").join(path)).collect();
        assert_eq!(found, expected);
        assert_eq!(directory.join("customize.sh").exists(), carried.customize.is_some(), "{}", carried.name);
    }
}

#[test]
fn docker_images_are_the_shell_images_and_docker() {
    let (_dir, recipes) = recipes(&[("lazy/recipe.toml", "extends = \"debian-13-docker\"\nexecutor = \"shell\"\n")]);
    let (shell, docker) = (recipes.find("debian-13-shell").unwrap(), recipes.find("debian-13-docker").unwrap());
    assert_eq!((docker.inputs.executor, docker.inputs.suite.as_str()), (ExecutorKind::Docker, "trixie"));
    assert_eq!(docker.inputs.cmdline, format!("{} apparmor=0", shell.inputs.cmdline));
    assert!(docker.inputs.all_modules && !shell.inputs.all_modules);
    let files = tempfile::tempdir().unwrap();
    docker.overlays.iter().for_each(|overlay| overlay.copy_to(files.path()).unwrap());
    let unit = std::fs::read_to_string(files.path().join("etc/systemd/system/dayfly-docker.service")).unwrap();
    assert!(unit.contains("ExecStart=/usr/sbin/dockerd -H fd://"), "{unit}");
    assert_eq!(docker.scripts.len(), 3);
    let lazy = recipes.find("lazy").unwrap();
    assert_eq!((lazy.inputs.executor, lazy.scripts.len()), (ExecutorKind::Shell, 3));
}

#[test]
fn what_docker_has_at_its_start_is_a_file_or_a_name() {
    let text = "extends = \"debian-12-docker\"\npreload = [\"./job.tar\", \"registry.example:5000/a/b:1\"]\n\
                container_image = \"a/b:1\"\nadd_cmdline = \"x=y\"\n";
    let (dir, recipes) = recipes(&[("x/recipe.toml", text), ("x/job.tar", "")]);
    let inputs = recipes.find("x").unwrap().inputs;
    let file = dir.path().join("x/job.tar");
    assert_eq!(inputs.preload, [Preload::Archive(file), Preload::Pull("registry.example:5000/a/b:1".into())]);
    assert_eq!(inputs.container_image.as_deref(), Some("a/b:1"));
    assert!(inputs.cmdline.ends_with(" apparmor=0 x=y"));
}

#[test]
fn an_operators_recipe_comes_before_ours_and_may_extend_it_by_its_own_name() {
    let (_dir, recipes) = recipes(&[
        ("debian-12-shell/recipe.toml", "extends = \"debian-12-shell\"\ndisk_gib = 9\n"),
        ("debian-12-shell/customize.sh", "#!/bin/sh\necho first\n"),
        ("more/recipe.toml", "extends = \"debian-12-shell\"\n"),
        ("more/customize.sh", "#!/bin/sh\necho second\n"),
        ("nothing/readme", ""),
    ]);
    let recipe = recipes.find("more").unwrap();
    assert_eq!(recipe.inputs.disk_gib, 9);
    assert_eq!(recipe.scripts[1..3], ["#!/bin/sh\necho first\n", "#!/bin/sh\necho second\n"]);
    assert_eq!((recipe.scripts.len(), recipe.scripts[0].as_str(), recipe.scripts[3].as_str()), (4, CUSTOMIZE, SEAL));
    let found: Vec<_> = recipes.all().into_iter().map(|found| (found.name, found.directory.is_some())).collect();
    assert_eq!(
        found,
        [
            ("debian-12-docker".into(), false),
            ("debian-12-shell".into(), true),
            ("debian-13-disk".into(), false),
            ("debian-13-docker".into(), false),
            ("debian-13-shell".into(), false),
            ("more".into(), true)
        ]
    );
}

#[test]
fn what_is_wrong_with_a_recipe_is_one_sentence_that_names_it() {
    let with = |text: &str| fails(&[("x/recipe.toml", text)], "x");
    for (text, error) in [
        (
            "",
            "read recipe `x`: it has no `suite`, and extends none that has; most begin with `extends = \"debian-12-shell\"`",
        ),
        (
            "extends = \"y\"",
            "find recipe `y`, which `x` extends; there are: debian-12-docker, debian-12-shell, debian-13-disk, debian-13-docker, debian-13-shell, x",
        ),
        ("extends = \"../x\"", "`../x` is no image name (lower-case letters, digits, `-`, `_`, `.`; at most 64)"),
        (
            "extends = \"x\"",
            "find recipe `x`, which `x` extends; there are: debian-12-docker, debian-12-shell, debian-13-disk, debian-13-docker, debian-13-shell, x",
        ),
        (
            "extends = \"debian-12-shell\"\nwithout = [\"emacs\"]",
            "read recipe `x`: `without` names emacs, which none that it extends has",
        ),
        ("suite = \"--help\"", "read DIR/x/recipe.toml: `--help` is no suite of Debian's"),
        ("disk_gib = 0", "read DIR/x/recipe.toml: disk_gib = 0 is not within 1 to 1024"),
        ("cmdline = \"a\\nb\"", "read DIR/x/recipe.toml: cmdline is longer than 1024 bytes, or has control characters"),
        ("guest_modules = [\"-r\"]", "read DIR/x/recipe.toml: `-r` is no name of a kernel module"),
        ("modules = [\"../x\"]", "read DIR/x/recipe.toml: `../x` is no name of a kernel module"),
        (
            "extends = \"debian-12-shell\"\nexecutor = \"docker\"",
            "read recipe `x`: it wants containers (executor docker, or preload), and has no Docker; extend `debian-12-docker`, or put docker.io among its packages",
        ),
        (
            "extends = \"debian-12-docker\"\npreload = [\"-v /:/host\"]",
            "read DIR/x/recipe.toml: preload `-v /:/host` is no name of a container image, and no ./FILE",
        ),
        (
            "extends = \"debian-12-docker\"\npreload = [\"./../x\"]",
            "read DIR/x/recipe.toml: preload `./../x` is no file beside it",
        ),
        ("container_image = \"a b\"", "read DIR/x/recipe.toml: container_image `a b` is no name of a container image"),
        ("overlays = [\"files\"]", "read DIR/x/recipe.toml: overlay `files` is no directory beside it"),
        ("overlays = [\"../files\"]", "read DIR/x/recipe.toml: overlay `../files` does not lie beside it"),
        ("overlays = [\"/etc\"]", "read DIR/x/recipe.toml: overlay `/etc` does not lie beside it"),
    ] {
        assert_eq!(with(text), error);
    }
    let unknown = with("extends = \"debian-12-shell\"\npakcages = []\n");
    assert!(unknown.starts_with("read DIR/x/recipe.toml: ") && unknown.contains("pakcages"), "{unknown}");
    let executor = with("executor = \"docker-windows\"");
    assert!(executor.contains("`docker-windows`") && executor.contains("`shell` or `docker`"), "{executor}");
    let circle = fails(&[("x/recipe.toml", "extends = \"y\""), ("y/recipe.toml", "extends = \"x\"")], "x");
    assert_eq!(circle, "read the recipes: x extends y extends x, and so on");
    let missing = fails(&[], "plan9");
    assert_eq!(
        missing,
        "find recipe `plan9`; there are: debian-12-docker, debian-12-shell, debian-13-disk, debian-13-docker, debian-13-shell"
    );
    let long = "#".repeat(1024 * 1024 + 1);
    assert_eq!(with(&long), "read DIR/x/recipe.toml: longer than 1048576 bytes");
}

#[test]
fn overlays_go_one_over_the_other_and_can_be_read_by_all() {
    let extends = "extends = \"debian-12-shell\"\noverlays = [\"files\"]\n";
    let (dir, recipes) = recipes(&[
        ("a/recipe.toml", extends),
        ("a/files/etc/motd", "a"),
        ("a/files/etc/secret", "a"),
        ("a/files/usr/local/bin/tool", "#!/bin/sh\n"),
        ("b/recipe.toml", "extends = \"a\"\noverlays = [\"files\"]\n"),
        ("b/files/etc/motd", "b"),
    ]);
    let mode = |path: &str, mode| {
        fs::set_permissions(dir.path().join(path), fs::Permissions::from_mode(mode)).unwrap();
    };
    mode("a/files/etc/secret", 0o600);
    mode("a/files/usr/local/bin/tool", 0o755);
    std::os::unix::fs::symlink("motd", dir.path().join("b/files/etc/secret")).unwrap();
    let out = tempfile::tempdir().unwrap();
    for (name, secret) in [("a", "a"), ("b", "b")] {
        for overlay in recipes.find(name).unwrap().overlays {
            overlay.copy_to(out.path()).unwrap();
        }
        assert_eq!(fs::read_to_string(out.path().join("etc/secret")).unwrap(), secret, "{name}");
        assert_eq!(fs::read_to_string(out.path().join("etc/motd")).unwrap(), name);
    }
    assert_eq!(fs::read_link(out.path().join("etc/secret")).unwrap(), Path::new("motd"));
    let modes = |path: &str| fs::metadata(out.path().join(path)).unwrap().permissions().mode() & 0o777;
    assert_eq!((modes("usr/local/bin/tool"), modes("etc/motd") & 0o444), (0o755, 0o444));

    fifo(&dir.path().join("b/files/fifo"));
    let overlay = recipes.find("b").unwrap().overlays.pop().unwrap();
    let refused = in_time(move || overlay.copy_to(out.path()).unwrap_err().to_string());
    assert!(refused.starts_with("copy ") && refused.ends_with("b/files/fifo"), "{refused}");
}
