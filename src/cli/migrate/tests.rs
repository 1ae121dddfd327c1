//! Ten config.toml as shops have them: what is taken over passes `dayfly check`, what is not is named by its line, and no
//! secret is shown. What each comes to is in `snapshots/`.

use super::*;
use crate::config::Config;
use std::os::unix::fs::PermissionsExt as _;

/// Secrets of the examples.
const SECRETS: [&str; 4] = ["s3cret", "access", "user:secret", "glrt-"];

/// Takes a config.toml over into a new configuration; what was said, and the directory.
fn taken(text: &str) -> (anyhow::Result<Plan>, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("gitlab-runner");
    std::fs::create_dir_all(from.join("certs")).unwrap();
    for name in ["ca.pem", "client.pem", "client.key", "certs/by-host.example.com.crt"] {
        std::fs::write(from.join(name), name).unwrap();
    }
    let entry = Entry::open(&dir.path().join("config.toml")).unwrap();
    (plan(text, &from.join("config.toml"), &entry), dir)
}

/// The report, and the keys of the configuration that is written.
fn story(name: &str, text: &str) -> String {
    let (plan, dir) = taken(text);
    let plan = plan.unwrap();
    let told: Vec<String> = plan.told.iter().map(|t| format!("line {}: {}: {}\n", t.line, t.key, t.words)).collect();
    let told = told.concat().replace(&dir.path().display().to_string(), "DIR");
    for secret in SECRETS {
        assert!(!told.contains(secret), "{name} shows {secret}");
    }
    let entry = Entry::open(&dir.path().join("config.toml")).unwrap();
    let new: DocumentMut = plan.text.parse().unwrap();
    if !plan.taken.is_empty() {
        entry.edited(plan.text).unwrap().write(&plan.files).unwrap();
        let loaded = Config::load(&dir.path().join("config.toml")).unwrap();
        loaded.check_for_running().unwrap_or_else(|error| panic!("{name}: {error}"));
        for runner in &loaded.config.runner {
            assert_eq!(std::fs::metadata(&runner.token_file).unwrap().permissions().mode() & 0o777, 0o600);
        }
    }
    // Without the comments, which are the example's.
    let lines: Vec<String> = new
        .to_string()
        .lines()
        .filter(|line| !line.starts_with('#') && !line.is_empty())
        .map(|line| format!("{line}\n"))
        .collect();
    format!("{told}\n{}", lines.concat())
}

/// U18: each of ten files, by its line.
#[test]
fn ten_configurations_of_shops_are_taken_over_as_far_as_they_go() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cli/migrate/examples");
    let mut files: Vec<PathBuf> = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert_eq!(files.len(), 10);
    for file in files {
        let name = file.file_stem().unwrap().to_str().unwrap();
        let text = std::fs::read_to_string(&file).unwrap();
        // A line that is no comment, no table's head and no blank is told, but for what every entry must have.
        let story = story(name, &text);
        insta::with_settings!({prepend_module_to_snapshot => false, omit_expression => true}, {
            insta::assert_snapshot!(name, story);
        });
    }
}

#[test]
fn a_second_time_takes_nothing_twice() {
    let text =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cli/migrate/examples/01-shell.toml"))
            .unwrap();
    let (first, dir) = taken(&text);
    let first = first.unwrap();
    let open = || Entry::open(&dir.path().join("config.toml")).unwrap();
    open().edited(first.text).unwrap().write(&first.files).unwrap();
    let again = plan(&text, &dir.path().join("gitlab-runner/config.toml"), &open()).unwrap();
    assert!(again.taken.is_empty());
    assert!(again.told.iter().any(|told| told.words.contains("has a runner of this name already")), "{:?}", again.told);
    assert!(again.told.iter().any(|told| told.words.contains("is set already, and stays")), "{:?}", again.told);
}

#[test]
fn what_is_no_toml_is_told_by_its_line() {
    let error = format!("{:#}", taken("concurrent = 1\n[[runners]\n").0.map(|_| ()).unwrap_err());
    assert!(error.contains("line 2: "), "{error}");
    let (plan, _dir) = taken("runners = 3\n");
    let plan = plan.unwrap();
    assert!(plan.taken.is_empty() && plan.told[0].words.contains("no [[runners]]"), "{:?}", plan.told);
}

/// The command as a whole, without its writing anything.
#[test]
fn a_dry_run_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("theirs.toml");
    std::fs::write(&file, "[[runners]]\nname = \"a\"\nurl = \"https://g.example\"\ntoken = \"glrt-a\"\n").unwrap();
    migrate(&dir.path().join("ours.toml"), &Args { file: file.clone(), dry_run: true }).unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    migrate(&dir.path().join("ours.toml"), &Args { file, dry_run: false }).unwrap();
    assert!(dir.path().join("tokens/a").exists());
    std::fs::write(dir.path().join("none.toml"), "concurrent = 1\n").unwrap();
    let none = migrate(&dir.path().join("ours.toml"), &Args { file: dir.path().join("none.toml"), dry_run: false });
    assert!(none.unwrap_err().to_string().contains("none of its 0 can be"));
}
