//! What are the programs made of? A CycloneDX 1.6 bill of materials, from Cargo's own resolver.
//!
//! Which crates are in is what `cargo tree` says of the packages alone: what a test's crate turns on is not in the
//! product. Licences come from `cargo metadata`, checksums from `Cargo.lock`. The same source gives the same bytes.
//! Format: <https://cyclonedx.org/docs/1.6/json/>; package URLs: <https://github.com/package-url/purl-spec>.

use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

/// The target that packages are made for.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Why there is no bill.
#[derive(Debug)]
pub struct SbomError(String);

impl std::fmt::Display for SbomError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for SbomError {}

/// A crate: its name and its version.
type Crate = (String, String);

/// One crate that is in.
#[derive(Debug, Default)]
struct Part {
    licence: Option<String>,
    description: Option<String>,
    /// SHA-256 of its package on crates.io; a crate of ours has none.
    sha256: Option<String>,
    needs: BTreeSet<Crate>,
}

/// The crates of some packages of this workspace.
#[derive(Debug)]
pub struct Sbom {
    whole: Crate,
    parts: BTreeMap<Crate, Part>,
}

impl Sbom {
    /// What these packages are made of; the first gives its name and version to the whole.
    ///
    /// # Errors
    /// Cargo cannot be run here, or does not know them.
    pub fn of_workspace(packages: &[String]) -> Result<Self, SbomError> {
        let mut tree = vec!["tree", "--locked", "--edges", "normal", "--target", TARGET, "--prefix", "none"];
        tree.extend(["--format", "{p}"]);
        for package in packages {
            tree.extend(["--package", package]);
        }
        let tree = cargo(&tree)?;
        let metadata = cargo(&["metadata", "--locked", "--format-version", "1", "--filter-platform", TARGET])?;
        let metadata: Value = serde_json::from_str(&metadata).map_err(|error| wrong("cargo metadata", &error))?;
        let root = metadata["workspace_root"].as_str().unwrap_or(".");
        let lock =
            std::fs::read_to_string(format!("{root}/Cargo.lock")).map_err(|error| wrong("Cargo.lock", &error))?;
        Self::new(packages, &tree, &metadata, &lock)
    }

    fn new(packages: &[String], tree: &str, metadata: &Value, lock: &str) -> Result<Self, SbomError> {
        let mut parts: BTreeMap<Crate, Part> =
            tree.lines().filter_map(in_tree).map(|name| (name, Part::default())).collect();
        let first = packages.first().map_or("", String::as_str);
        let whole = parts.keys().find(|(name, _)| name == first).cloned();
        let whole = whole.ok_or_else(|| SbomError(format!("there is no package `{first}` in Cargo's tree")))?;
        for (name, sha256) in checksums(lock)? {
            if let Some(part) = parts.get_mut(&name) {
                part.sha256 = Some(sha256);
            }
        }
        let mut by_id = BTreeMap::new();
        for package in list(&metadata["packages"]) {
            let name = (text(&package["name"]), text(&package["version"]));
            if let Some(part) = parts.get_mut(&name) {
                // Old manifests write `MIT/Apache-2.0`, which is no SPDX.
                part.licence = package["license"].as_str().map(|licence| licence.replace('/', " OR "));
                part.description =
                    package["description"].as_str().map(|told| told.split_whitespace().collect::<Vec<_>>().join(" "));
            }
            by_id.insert(text(&package["id"]), name);
        }
        for node in list(&metadata["resolve"]["nodes"]) {
            let Some(name) = by_id.get(&text(&node["id"])) else { continue };
            let is_normal = |dep: &&Value| list(&dep["dep_kinds"]).iter().any(|kind| kind["kind"].is_null());
            let needs = list(&node["deps"]).iter().filter(is_normal).filter_map(|dep| by_id.get(&text(&dep["pkg"])));
            let needs: BTreeSet<Crate> = needs.filter(|need| parts.contains_key(need)).cloned().collect();
            if let Some(part) = parts.get_mut(name) {
                part.needs = needs;
            }
        }
        Ok(Self { whole, parts })
    }

    /// The bill; `epoch` is its time, seconds since 1970.
    ///
    /// # Errors
    /// The time is none.
    pub fn to_json(&self, epoch: Option<&str>) -> Result<String, SbomError> {
        let mut metadata = Map::new();
        if let Some(epoch) = epoch {
            let time = epoch.parse().ok().and_then(|seconds| jiff::Timestamp::from_second(seconds).ok());
            let time = time.ok_or_else(|| SbomError(format!("SOURCE_DATE_EPOCH is `{epoch}`, which is no time")))?;
            metadata.insert("timestamp".into(), time.to_string().into());
        }
        let whole = self.parts.get(&self.whole).map(|part| component(&self.whole, part, "application"));
        metadata.insert("component".into(), whole.unwrap_or_default());
        let others = self.parts.iter().filter(|(name, _)| **name != self.whole);
        let components: Vec<Value> = others.map(|(name, part)| component(name, part, "library")).collect();
        let depends = |(name, part): (&Crate, &Part)| json!({"ref": purl(name), "dependsOn": part.needs.iter().map(purl).collect::<Vec<_>>()});
        let dependencies: Vec<Value> = self.parts.iter().map(depends).collect();
        let content = json!({"metadata": metadata, "components": components, "dependencies": dependencies});
        let bill = json!({
            "bomFormat": "CycloneDX",
            "specVersion": "1.6",
            "serialNumber": serial(&content.to_string()),
            "version": 1,
            "metadata": content["metadata"],
            "components": content["components"],
            "dependencies": content["dependencies"],
        });
        serde_json::to_string_pretty(&bill).map_err(|error| wrong("the bill", &error))
    }
}

fn component(name: &Crate, part: &Part, kind: &str) -> Value {
    let mut component = Map::new();
    component.insert("type".into(), kind.into());
    component.insert("bom-ref".into(), purl(name).into());
    component.insert("name".into(), name.0.as_str().into());
    component.insert("version".into(), name.1.as_str().into());
    if let Some(description) = &part.description {
        component.insert("description".into(), description.as_str().into());
    }
    if let Some(sha256) = &part.sha256 {
        component.insert("hashes".into(), json!([{"alg": "SHA-256", "content": sha256}]));
    }
    if let Some(licence) = &part.licence {
        component.insert("licenses".into(), json!([{"expression": licence}]));
    }
    component.insert("purl".into(), purl(name).into());
    Value::Object(component)
}

/// The crate's package URL. `+` of a version's build part is written as `%2B`.
fn purl((name, version): &Crate) -> String {
    format!("pkg:cargo/{name}@{}", version.replace('+', "%2B"))
}

/// A UUID (version 8, RFC 9562) that follows from the content.
fn serial(content: &str) -> String {
    let hex: String = Sha256::digest(content.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("urn:uuid:{}-{}-8{}-8{}-{}", &hex[..8], &hex[8..12], &hex[13..16], &hex[17..20], &hex[20..32])
}

/// Name and version in a line of `cargo tree`: `name v1.2.3 (path or what it was shown by)`.
fn in_tree(line: &str) -> Option<Crate> {
    let mut words = line.split(' ');
    let name = words.next().filter(|name| !name.is_empty())?;
    Some((name.to_owned(), words.next()?.strip_prefix('v')?.to_owned()))
}

fn checksums(lock: &str) -> Result<BTreeMap<Crate, String>, SbomError> {
    let lock: toml_edit::DocumentMut = lock.parse().map_err(|error| wrong("Cargo.lock", &error))?;
    let packages = lock.get("package").and_then(toml_edit::Item::as_array_of_tables);
    let value = |table: &toml_edit::Table, key| table.get(key).and_then(|item| item.as_str()).map(str::to_owned);
    let of =
        |table: &toml_edit::Table| Some(((value(table, "name")?, value(table, "version")?), value(table, "checksum")?));
    Ok(packages.into_iter().flat_map(|tables| tables.iter().filter_map(of)).collect())
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn wrong(what: &str, error: &dyn std::fmt::Display) -> SbomError {
    SbomError(format!("{what}: {error}"))
}

fn cargo(arguments: &[&str]) -> Result<String, SbomError> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    #[expect(clippy::disallowed_methods, reason = "a tool of the build's, not of the product; Cargo is its source")]
    let output = Command::new(program).args(arguments).output().map_err(|error| wrong("run cargo", &error))?;
    if !output.status.success() {
        return Err(wrong("cargo", &String::from_utf8_lossy(&output.stderr)));
    }
    String::from_utf8(output.stdout).map_err(|error| wrong("cargo", &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bill_has_what_the_tree_has_and_is_the_same_each_time() {
        let packages = ["a".to_owned(), "b".to_owned()];
        let tree = "a v1.0.0 (/src)\nlib v2.0.0+x\n\nb v1.0.0 (/src/b)\nlib v2.0.0+x (*)\n";
        let metadata = json!({
            "packages": [
                {"id": "1", "name": "a", "version": "1.0.0", "license": "MIT"},
                {"id": "2", "name": "lib", "version": "2.0.0+x", "license": "MIT/Apache-2.0", "description": "two\n  lines"},
                {"id": "3", "name": "for-tests", "version": "3.0.0"},
                {"id": "4", "name": "b", "version": "1.0.0"},
            ],
            "resolve": {"nodes": [
                {"id": "1", "deps": [
                    {"pkg": "2", "dep_kinds": [{"kind": null}]},
                    {"pkg": "3", "dep_kinds": [{"kind": null}]},
                    {"pkg": "4", "dep_kinds": [{"kind": "dev"}]},
                ]},
                {"id": "2", "deps": []},
            ]},
        });
        let lock = "[[package]]\nname = \"lib\"\nversion = \"2.0.0+x\"\nchecksum = \"abc\"\n";
        let bill = Sbom::new(&packages, tree, &metadata, lock).unwrap();
        let printed = bill.to_json(Some("86400")).unwrap();
        assert_eq!(printed, bill.to_json(Some("86400")).unwrap());
        let value: Value = serde_json::from_str(&printed).unwrap();
        assert_eq!(value["metadata"]["timestamp"], "1970-01-02T00:00:00Z");
        assert_eq!(value["metadata"]["component"]["purl"], "pkg:cargo/a@1.0.0");
        let components: Vec<&str> =
            list(&value["components"]).iter().filter_map(|part| part["purl"].as_str()).collect();
        assert_eq!(components, ["pkg:cargo/b@1.0.0", "pkg:cargo/lib@2.0.0%2Bx"]);
        let lib = &value["components"][1];
        assert_eq!(lib["licenses"][0]["expression"], "MIT OR Apache-2.0");
        assert_eq!((&lib["hashes"][0]["content"], &lib["description"]), (&json!("abc"), &json!("two lines")));
        assert_eq!(
            value["dependencies"][0],
            json!({"ref": "pkg:cargo/a@1.0.0", "dependsOn": ["pkg:cargo/lib@2.0.0%2Bx"]})
        );
        assert!(bill.to_json(Some("soon")).is_err());
        assert!(Sbom::new(&["c".into()], tree, &metadata, lock).is_err());
    }
}
