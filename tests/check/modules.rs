//! The modules of the daemon form no cycle: each can be read, and moved, with what it stands on alone.
//!
//! A module is what `src/lib.rs` names. Every path counts that leads from one to another, wherever it stands: in
//! imports, bodies, macros and re-exports. Tests of a module may look at whatever they like.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

/// Who uses whom.
type Uses = BTreeMap<String, BTreeSet<String>>;

/// The modules that `lib.rs` names.
fn modules(lib: &str) -> BTreeSet<String> {
    let name = |line: &str| {
        let line = line.trim_start().trim_start_matches("pub(crate) ").trim_start_matches("pub ");
        Some(line.strip_prefix("mod ")?.split_once(';')?.0.to_owned())
    };
    lib.lines().filter_map(name).collect()
}

/// A file's own code: its tests come last in it.
fn product(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default()
}

fn is_test(path: &Path) -> bool {
    let name = path.file_stem().unwrap().to_string_lossy();
    name == "tests" || name.ends_with("_tests") || path.components().any(|c| c.as_os_str() == "tests")
}

/// Names after `root::` in `text`: one, or each of a list in braces.
fn names_after(text: &str, root: &str) -> Vec<String> {
    let word = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut names = Vec::new();
    for (at, _) in text.match_indices(root) {
        if text[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':') {
            continue;
        }
        let rest = &text[at + root.len()..];
        let Some(list) = rest.strip_prefix('{') else {
            names.push(word(rest));
            continue;
        };
        let mut depth = 0;
        for (at, c) in list.char_indices() {
            let starts =
                depth == 0 && (at == 0 || list[..at].trim_end().ends_with(',') || list[..at].trim().is_empty());
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                c if starts && !c.is_whitespace() && c != ',' => names.push(word(&list[at..])),
                _ => {}
            }
        }
    }
    names
}

/// What the file at `path` (below `src`) of module `module` uses of the others.
fn uses(path: &Path, text: &str, module: &str, modules: &BTreeSet<String>) -> BTreeSet<String> {
    // `src/a.rs` and `src/a/mod.rs` are one step below the root, `src/a/b.rs` two.
    let parts = path.components().filter(|c| matches!(c, Component::Normal(_))).count();
    let depth = if path.file_stem().is_some_and(|stem| stem == "mod") { parts - 1 } else { parts };
    let up = "super::".repeat(depth);
    let mut names = names_after(text, "crate::");
    names.extend(names_after(text, &up));
    names.into_iter().filter(|name| name != module && modules.contains(name)).collect()
}

/// Sets of modules each of which leads to all the others.
fn cycles(uses: &Uses) -> Vec<BTreeSet<String>> {
    let reach = |from: &String| {
        let (mut seen, mut open) = (BTreeSet::new(), vec![from]);
        while let Some(module) = open.pop() {
            for next in uses.get(module).into_iter().flatten() {
                if seen.insert(next.clone()) {
                    open.push(next);
                }
            }
        }
        seen
    };
    let reached: BTreeMap<&String, BTreeSet<String>> = uses.keys().map(|module| (module, reach(module))).collect();
    let knots: BTreeSet<BTreeSet<String>> = reached
        .iter()
        .filter(|(module, seen)| seen.contains(**module))
        .map(|(module, seen)| seen.iter().filter(|other| reached[other].contains(*module)).cloned().collect())
        .collect();
    knots.into_iter().collect()
}

fn of_the_product() -> Uses {
    let src = Path::new(super::ROOT).join("src");
    let modules = modules(&std::fs::read_to_string(src.join("lib.rs")).unwrap());
    let mut found: Uses = modules.iter().map(|module| (module.clone(), BTreeSet::new())).collect();
    for (path, text) in super::sources(&src) {
        let path = path.strip_prefix(&src).unwrap();
        let first = path.components().next().unwrap().as_os_str().to_string_lossy();
        let module = first.trim_end_matches(".rs").to_owned();
        if let Some(used) = found.get_mut(&module).filter(|_| !is_test(path)) {
            used.extend(uses(path, product(&text), &module, &modules));
        }
    }
    found
}

#[test]
fn the_modules_form_no_cycle() {
    let uses = of_the_product();
    let cycles = cycles(&uses);
    println!("figure modules.cycles {}", cycles.len());
    println!("figure modules.counted {}", uses.len());
    assert!(uses["job"].contains("supply") && uses["guest"].contains("spool"), "nothing is found any more");
    assert!(cycles.is_empty(), "these modules stand on each other: {cycles:?}");
}

#[test]
fn a_planted_cycle_is_found_wherever_its_path_stands() {
    let modules: BTreeSet<String> = ["a", "b", "c"].map(str::to_owned).into();
    for text in [
        "use crate::b::X;",
        "use crate::{c::Y, b};",
        "use crate::{\n    c::{Y, Z},\n    b::X,\n};",
        "pub use crate::b::X;",
        "fn f() { crate::b::go(); }",
        "m!(crate::b::X);",
        "use super::b::X;",
    ] {
        let a = uses(Path::new("a.rs"), text, "a", &modules);
        assert!(a.contains("b"), "{text}");
        let b = uses(Path::new("b/inner.rs"), "use super::super::a::Y;", "b", &modules);
        let cycles = cycles(&[("a".to_owned(), a), ("b".to_owned(), b), ("c".to_owned(), BTreeSet::new())].into());
        assert_eq!(cycles, [["a", "b"].map(str::to_owned).into()], "{text}");
    }
    assert!(uses(Path::new("a/inner.rs"), "use super::b::X; use scrate::b; other::crate::b", "a", &modules).is_empty());
    assert!(product("use crate::a;\n#[cfg(test)]\nmod tests {\nuse crate::b;}").ends_with("a;\n"));
}
