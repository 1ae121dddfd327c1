//! Rules about the tree itself: what may be in it (deny.toml), and what must never be
//! (`CONTRIBUTING.md`, style).
//!
//! The first part does what `cargo deny check bans licenses sources` does, for hosts that have no
//! cargo-deny: compiling it takes longer than all the other checks together.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "tests: a panic is a failed one; cargo is asked for its metadata"
)]

mod advisories;
mod branches;
mod modules;
mod packaging;
mod pages;
mod programs;
mod prometheus;
mod scripts;

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use toml_edit::DocumentMut;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Folders whose code users get.
const SHIPPED: [&str; 2] = ["src", "exec/src"];

fn metadata() -> Value {
    #[expect(clippy::disallowed_methods, reason = "process.rs is the product's; a test may ask cargo")]
    let output = std::process::Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked", "--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(ROOT)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn deny() -> DocumentMut {
    std::fs::read_to_string(Path::new(ROOT).join("deny.toml")).unwrap().parse().unwrap()
}

fn texts(list: &toml_edit::Item) -> BTreeSet<&str> {
    list.as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect()
}

/// Whether an SPDX expression is met by `allowed`: OR needs one side, AND both.
fn licensed(expression: &str, allowed: &BTreeSet<&str>) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    let met = any(&words, &mut at, allowed);
    assert_eq!(at, words.len(), "cannot read `{expression}`");
    met
}

fn any(words: &[&str], at: &mut usize, allowed: &BTreeSet<&str>) -> bool {
    let mut met = all(words, at, allowed);
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        met |= all(words, at, allowed);
    }
    met
}

fn all(words: &[&str], at: &mut usize, allowed: &BTreeSet<&str>) -> bool {
    let mut met = one(words, at, allowed);
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        met &= one(words, at, allowed);
    }
    met
}

fn one(words: &[&str], at: &mut usize, allowed: &BTreeSet<&str>) -> bool {
    let word = *words.get(*at).unwrap_or(&"nothing");
    *at += 1;
    if word == "(" {
        let met = any(words, at, allowed);
        assert_eq!(words.get(*at), Some(&")"), "unbalanced: {words:?}");
        *at += 1;
        return met;
    }
    if words.get(*at) == Some(&"WITH") {
        let whole = format!("{word} WITH {}", words.get(*at + 1).unwrap_or(&"nothing"));
        *at += 2;
        return allowed.contains(whole.as_str());
    }
    allowed.contains(word)
}

#[test]
fn licence_expressions_are_read_right() {
    let allowed = BTreeSet::from(["MIT", "BSD-3-Clause", "Apache-2.0 WITH LLVM-exception"]);
    for good in [
        "MIT",
        "MIT/Apache-2.0",
        "GPL-3.0 OR MIT",
        "(GPL-3.0 OR MIT) AND BSD-3-Clause",
        "Apache-2.0 WITH LLVM-exception",
    ] {
        assert!(licensed(good, &allowed), "{good}");
    }
    for bad in [
        "GPL-3.0",
        "MIT AND GPL-3.0",
        "Apache-2.0",
        "GPL-2.0 WITH Classpath-exception-2.0",
        "(MIT AND GPL-3.0) OR GPL-2.0",
    ] {
        assert!(!licensed(bad, &allowed), "{bad}");
    }
}

/// T37: licence, source and name of each crate are allowed ones.
#[test]
fn every_crate_has_a_licence_a_source_and_a_name_that_deny_toml_allows() {
    let (metadata, deny) = (metadata(), deny());
    let allowed = texts(&deny["licenses"]["allow"]);
    let exceptions: BTreeMap<&str, BTreeSet<&str>> = deny["licenses"]["exceptions"]
        .as_array_of_tables()
        .unwrap()
        .iter()
        .map(|exception| (exception["crate"].as_str().unwrap(), texts(&exception["allow"])))
        .collect();
    let everywhere = |ban: &&toml_edit::InlineTable| !ban.contains_key("wrappers");
    let banned: BTreeSet<&str> = bans(&deny).filter(everywhere).map(|ban| ban["crate"].as_str().unwrap()).collect();
    let sources: BTreeSet<String> =
        texts(&deny["sources"]["allow-registry"]).into_iter().map(|url| format!("registry+{url}")).collect();
    let mut wrong = Vec::new();
    for package in metadata["packages"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap();
        let licence = package["license"].as_str().unwrap_or("none");
        let mut allowed = allowed.clone();
        allowed.extend(exceptions.get(name).into_iter().flatten());
        if !licensed(licence, &allowed) {
            wrong.push(format!("{name}: licence {licence}"));
        }
        if package["source"].as_str().is_some_and(|source| !sources.contains(source)) {
            wrong.push(format!("{name}: source {}", package["source"]));
        }
        if banned.contains(name) {
            wrong.push(format!("{name}: banned"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

fn bans(deny: &DocumentMut) -> impl Iterator<Item = &toml_edit::InlineTable> {
    deny["bans"]["deny"].as_array().unwrap().iter().map(|ban| ban.as_inline_table().unwrap())
}

#[test]
fn no_banned_crate_is_in_the_product_whoever_wants_it() {
    let product = programs::product_crates("normal,build");
    let names: BTreeSet<&str> = product.iter().filter_map(|line| line.split(' ').next()).collect();
    let deny = deny();
    let banned = bans(&deny).map(|ban| ban["crate"].as_str().unwrap()).filter(|name| names.contains(name));
    // Who may have it in the product is a package of ours; no other crate has it by that one's leave.
    let ours = |name: &&str| programs::users_of(name).iter().all(|user| user == "dayfly-wire");
    assert_eq!(banned.filter(|name| *name != "h2" || !ours(name)).collect::<Vec<_>>(), [""; 0]);
}

/// The product's source files and their text, comments taken away.
fn sources(dir: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                let code: Vec<&str> = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
                found.push((path, code.join("\n")));
            }
        }
    }
    found.sort();
    found
}

/// Whether `word` stands in `text`, and not as the end of a longer name.
fn holds(text: &str, word: &str) -> bool {
    let in_name = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(word).any(|(at, _)| !text[..at].ends_with(in_name) || !word.starts_with(in_name))
}

/// Only files below `at_home` hold `word`; at least one does, or the rule has lost its object.
fn only(word: &str, at_home: &[&str]) {
    // A file's own tests may say what they like: they come last in it.
    let product = |text: &str| text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default().to_owned();
    let mut holders: Vec<PathBuf> = Vec::new();
    for folder in SHIPPED.map(|folder| Path::new(ROOT).join(folder)) {
        let found = sources(&folder).into_iter().filter(|(_, text)| holds(&product(text), word));
        holders.extend(found.map(|(path, _)| path.strip_prefix(&folder).unwrap().to_owned()));
    }
    assert!(!holders.is_empty(), "`{word}` is nowhere: has it another name now?");
    let strays: Vec<_> = holders.iter().filter(|path| !at_home.iter().any(|home| path.starts_with(home))).collect();
    assert!(strays.is_empty(), "`{word}` belongs into {at_home:?} only: {strays:?}");
}

#[test]
fn what_belongs_into_one_place_stays_there() {
    // Handles of libvirt panic when they are dropped at the wrong moment.
    only("virt::", &["vm/libvirt"]);
    // One place knows deadlines, caps and what an argument may hold.
    only("Command::new(", &["process.rs", "process"]);
    // One place knows GitLab's URLs.
    only("/api/v4/", &["gitlab", "guest", "standin"]);
}

/// The bodies of the macros of `tracing` in a text: from the parenthesis to its partner.
fn log_calls(text: &str) -> Vec<&str> {
    let mut calls = Vec::new();
    for word in ["error!(", "warn!(", "info!(", "debug!(", "trace!(", "event!(", "span!("] {
        for (at, _) in text.match_indices(word) {
            let body = &text[at + word.len()..];
            let (mut depth, mut quoted, mut escaped) = (1, false, false);
            let end = body.find(|c: char| {
                match c {
                    _ if escaped => escaped = false,
                    '\\' => escaped = true,
                    '"' => quoted = !quoted,
                    '(' if !quoted => depth += 1,
                    ')' if !quoted => depth -= 1,
                    _ => {}
                }
                depth == 0
            });
            calls.push(&body[..end.unwrap_or(body.len())]);
        }
    }
    calls
}

/// Whether a call logs something in Rust's own form: a field `?value`, or `{:?}` in its text.
fn logs_debug(call: &str) -> bool {
    let mut before = ',';
    for c in call.chars().filter(|c| !c.is_whitespace()) {
        if c == '?' && matches!(before, ',' | '=' | '(' | ':') {
            return true;
        }
        before = c;
    }
    false
}

#[test]
fn a_value_in_rusts_own_form_is_found_in_a_log_call() {
    let calls = log_calls(r#"tracing::info!(a = 1, "a (text"); f(); tracing::warn!(?event, "x"); debug_span!("y")"#);
    assert_eq!(calls, [r#"?event, "x""#, r#"a = 1, "a (text""#, r#""y""#]);
    for bad in ["?event, \"x\"", "a = ?b.c(), \"x\"", "\n  ?event", "a = 1, \"{:?}\", b", "\"{event:?}\""] {
        assert!(logs_debug(bad), "{bad}");
    }
    for good in ["a = b?.c(), \"why?\"", "a = %b, \"{c}\"", "\"is it?\", a"] {
        assert!(!logs_debug(good), "{good}");
    }
}

/// U26: no line of the operator's log holds a value in Rust's own form.
#[test]
fn the_log_is_in_words() {
    let mut calls = 0;
    for (path, text) in SHIPPED.iter().flat_map(|folder| sources(&Path::new(ROOT).join(folder))) {
        for call in log_calls(&text) {
            calls += 1;
            assert!(!logs_debug(call), "{}: {call}", path.display());
        }
    }
    assert!(calls > 100, "only {calls} calls: have they another name now?");
}

#[test]
fn no_code_of_ours_is_unsafe() {
    let root = Path::new(ROOT);
    for dir in ["src", "exec", "tests", "vm-images"] {
        for (path, text) in sources(&root.join(dir)) {
            let word = ["unsafe", " {"].concat();
            assert!(!text.contains(&word), "{}", path.display());
        }
    }
    let manifest: DocumentMut = std::fs::read_to_string(root.join("Cargo.toml")).unwrap().parse().unwrap();
    assert_eq!(manifest["workspace"]["lints"]["rust"]["unsafe_code"].as_str(), Some("forbid"));
}
