//! Does Cargo.lock name a version that an advisory warns of? Held to a dated snapshot, for checks need no network.
//!
//! `tests/data/advisories.tsv` says where it is from. It catches what was known on its day; `cargo deny check
//! advisories` asks the database of today.

use semver::{Version, VersionReq};
use std::path::Path;
use toml_edit::DocumentMut;

/// One line of the snapshot.
struct Advisory<'a> {
    package: &'a str,
    id: &'a str,
    kind: &'a str,
    /// Versions that it does not warn of.
    harmless: Vec<VersionReq>,
}

impl<'a> Advisory<'a> {
    fn read(line: &'a str) -> Self {
        let columns: Vec<&str> = line.split('\t').collect();
        let [package, id, kind, patched, unaffected] = columns[..] else { panic!("five columns, not `{line}`") };
        let alternatives = [patched, unaffected].into_iter().flat_map(|list| list.split(" || "));
        let harmless = alternatives
            .filter(|requirement| !requirement.is_empty())
            .map(|requirement| requirement.parse().unwrap_or_else(|error| panic!("{id}: `{requirement}`: {error}")))
            .collect();
        Self { package, id, kind, harmless }
    }

    fn warns_of(&self, package: &str, version: &Version) -> bool {
        self.package == package && !self.harmless.iter().any(|harmless| harmless.matches(version))
    }
}

fn snapshot() -> String {
    std::fs::read_to_string(Path::new(super::ROOT).join("tests/data/advisories.tsv")).unwrap()
}

fn advisories(text: &str) -> Vec<Advisory<'_>> {
    text.lines().filter(|line| !line.starts_with('#')).map(Advisory::read).collect()
}

/// Each warning about a package of this lock file.
fn warnings(lock: &str, advisories: &[Advisory<'_>]) -> Vec<String> {
    let lock: DocumentMut = lock.parse().unwrap();
    let mut found = Vec::new();
    for package in lock["package"].as_array_of_tables().unwrap() {
        let (name, version) = (package["name"].as_str().unwrap(), package["version"].as_str().unwrap());
        let parsed = Version::parse(version).unwrap();
        let warning = advisories.iter().filter(|advisory| advisory.warns_of(name, &parsed));
        found.extend(warning.map(|advisory| format!("{name} {version}: {} ({})", advisory.id, advisory.kind)));
    }
    found
}

/// T37: no crate in the lock has a known flaw.
#[test]
fn no_crate_in_the_lock_has_an_advisory() {
    let text = snapshot();
    let advisories = advisories(&text);
    assert!(advisories.len() > 1000, "the snapshot is whole: {}", advisories.len());
    let lock = std::fs::read_to_string(Path::new(super::ROOT).join("Cargo.lock")).unwrap();
    assert_eq!(warnings(&lock, &advisories), [""; 0]);
}

#[test]
fn a_crate_with_an_advisory_is_found_and_its_patched_version_is_not() {
    let text = snapshot();
    let lock = |version: &str| format!("[[package]]\nname = \"hyper\"\nversion = \"{version}\"\n");
    assert!(warnings(&lock("0.14.11"), &advisories(&text)).iter().any(|w| w.contains("RUSTSEC-2022-0022")));
    assert_eq!(warnings(&lock("1.12.0"), &advisories(&text)), [""; 0]);
    // Decision D17 names a crate that nobody keeps any more.
    let unmaintained = "[[package]]\nname = \"backoff\"\nversion = \"0.4.0\"\n";
    assert_eq!(warnings(unmaintained, &advisories(&text)), ["backoff 0.4.0: RUSTSEC-2025-0012 (unmaintained)"]);
}
