//! The daemon's program holds the daemon (decision D29): few crates, and nothing of what is for trials and tests.
//!
//! Cargo sees to it: what stands on the daemon's crate cannot be under it. Here the outcome is looked at.

use super::ROOT;
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::PathBuf;

/// Crates in the product's normal tree, and in the lock, at most.
const PRODUCT_CRATES_MAX: usize = 200;
const LOCK_CRATES_MAX: usize = 320;

/// Crates, by the words before their functions' names, that the daemon has nothing of.
const NOT_THE_DAEMONS: [&str; 3] = ["dayfly_exec::", "dayfly_doubles::", "saphyr_parser::"];

/// What this program prints; it must succeed.
fn printed_by(program: &str, args: &[&str]) -> String {
    #[expect(clippy::disallowed_methods, reason = "process.rs is the product's; a test may ask cargo and nm")]
    let output = std::process::Command::new(program).args(args).current_dir(ROOT).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Name and version of each crate that the product is built from, by Cargo's own resolver: what a test's crate turns on
/// is not in the product.
pub(super) fn product_crates(edges: &str) -> BTreeSet<String> {
    let args = ["tree", "--locked", "-p", "dayfly", "-e", edges, "--prefix", "none", "--format", "{p}"];
    let tree = printed_by(env!("CARGO"), &args);
    let crates: BTreeSet<String> =
        tree.lines().map(|line| line.split(' ').take(2).collect::<Vec<_>>().join(" ")).collect();
    assert!(crates.len() > 100, "{tree}");
    crates
}

/// The crates of the product that stand on this one themselves.
pub(super) fn users_of(name: &str) -> BTreeSet<String> {
    let args = ["tree", "--locked", "-p", "dayfly", "-e", "normal,build", "--prefix", "depth", "--depth", "1"];
    let tree = printed_by(env!("CARGO"), &[&args[..], &["--invert", name, "--format", " {p}"]].concat());
    let users: BTreeSet<String> =
        tree.lines().filter_map(|line| line.strip_prefix("1 ")?.split(' ').next()).map(str::to_owned).collect();
    assert!(!users.is_empty(), "{tree}");
    users
}

#[test]
fn the_tree_stays_small() {
    let crates = product_crates("normal");
    for exec in ["dayfly-exec ", "dayfly-doubles ", "multer ", "saphyr-parser ", "zip "] {
        assert!(!crates.iter().any(|name| name.starts_with(exec)), "{exec}is for exec or for tests");
    }
    let product = crates.len();
    let lock = std::fs::read_to_string(PathBuf::from(ROOT).join("Cargo.lock")).unwrap().matches("[[package]]").count();
    println!("figure product.crates {product}");
    assert!(product <= PRODUCT_CRATES_MAX, "{product} crates in the product");
    assert!(lock <= LOCK_CRATES_MAX, "{lock} crates in Cargo.lock");
}

/// The program of this name, built as who works here builds both.
fn built(name: &str) -> String {
    let args =
        ["build", "--locked", "--quiet", "-p", "dayfly", "-p", "dayfly-exec", "--bins", "--message-format", "json"];
    let messages = printed_by(env!("CARGO"), &args);
    let mut executables = messages.lines().filter_map(|line| {
        let message: Value = serde_json::from_str(line).ok()?;
        message["executable"].as_str().filter(|path| path.ends_with(&format!("/{name}"))).map(str::to_owned)
    });
    executables.next_back().unwrap()
}

/// How many functions and data of a program come from these crates.
fn symbols_of(program: &str, crates: &[&str]) -> usize {
    let symbols = printed_by("nm", &["-C", program]);
    symbols.lines().filter(|line| crates.iter().any(|name| super::holds(line, name))).count()
}

#[test]
fn the_daemons_program_holds_nothing_of_exec_and_nothing_of_tests() {
    // The same look does see what is there.
    let exec = built("dayfly-exec");
    for there in ["dayfly_exec::standin::", "dayfly_exec::pipeline::", "saphyr_parser::"] {
        assert!(symbols_of(&exec, &[there]) > 0, "no `{there}` in {exec}: have they other names now?");
    }
    let daemon = built("dayfly");
    assert!(symbols_of(&daemon, &["dayfly::job::"]) > 100, "no symbols in {daemon}");
    let strange = symbols_of(&daemon, &NOT_THE_DAEMONS);
    println!("figure product.strange_symbols {strange}");
    assert_eq!(strange, 0, "{NOT_THE_DAEMONS:?} in {daemon}");
    // Nothing in its environment, or its configuration, makes another program of it.
    let bytes = std::fs::read(&daemon).unwrap();
    let holds = |text: &str| bytes.windows(text.len()).any(|window| window == text.as_bytes());
    assert!(holds("DAYFLY_CONFIG"), "no texts in {daemon}");
    for text in ["DAYFLY_FAILPOINT", "processes://"] {
        assert!(!holds(text), "`{text}` in {daemon}");
    }
}
