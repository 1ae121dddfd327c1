//! The whole check on small trees: what somebody may try, and what it says.

use super::{Found, check};
use crate::threats::TABLES;
use std::fs;
use tempfile::TempDir;

/// A tree in which everything is right: each owned id is shown by one test of the lifecycle ring.
struct Tree(TempDir);

/// The owned ids, in order.
fn owned() -> Vec<String> {
    let families: [(char, &[(u32, u32)]); 8] = [
        ('E', &[(1, 15)]),
        ('G', &[(1, 22)]),
        ('H', &[(1, 17)]),
        ('K', &[(0, 19)]),
        ('P', &[(1, 10)]),
        ('R', &[(1, 19)]),
        ('T', &[(1, 13), (17, 17), (19, 19), (21, 21), (23, 31), (33, 33)]),
        ('V', &[(1, 18)]),
    ];
    let mut ids = Vec::new();
    for (letter, ranges) in families {
        ids.extend(ranges.iter().flat_map(|(a, b)| *a..=*b).map(|number| format!("{letter}{number}")));
    }
    ids
}

/// The numbers of the faults that use has found.
fn field() -> impl Iterator<Item = u32> {
    (1..=53).filter(|number| *number != 32)
}

/// The rows of the page of threats, those that are in no list open.
fn tables() -> String {
    let owned = owned();
    let rows = TABLES.iter().flat_map(|(letter, first, last)| (*first..=*last).map(move |n| format!("{letter}{n}")));
    rows.map(|id| {
        let open = if owned.contains(&id) { "" } else { "***open***: " };
        format!("| {id} | it breaks | {open}it holds |\n")
    })
    .collect()
}

/// U1 to U3 are of `faults`, U4 of two, the others of `isolation`.
fn owner(number: u32) -> &'static str {
    match number {
        1..=3 => "faults",
        4 => "faults, images",
        _ => "isolation",
    }
}

/// A test of its own for this id.
fn test_of(id: &str) -> String {
    format!("/// {id}: it holds.\n#[test]\nfn {}() {{\n    assert!(true);\n}}\n", id.to_lowercase())
}

impl Tree {
    fn new() -> Self {
        let tree = Self(tempfile::tempdir().expect("a folder"));
        let issue = |id: &str| match &id[..1] {
            "E" | "H" | "K" | "V" => "6",
            _ if ["T17", "T19", "T33"].contains(&id) => "6",
            _ => "5",
        };
        let list: String = owned().iter().map(|id| format!("{id} | it holds | {}\n", issue(id))).collect();
        tree.write("tests/ids.txt", &format!("# A list.\n{list}"));
        let field: String = field().map(|n| format!("| U{n} | it broke | it holds | {} |\n", owner(n))).collect();
        tree.write(
            "docs/field.md",
            &format!("# Faults\n\n| Id | What | Right | Owner |\n| --- | --- | --- | --- |\n{field}"),
        );
        tree.write("docs/threats.md", &format!("# Tables\n\n{}\n## 4. Invariants\n\n1. It ends.\n", tables()));
        tree.write("docs/decisions/D09-runner.md", "# D9: The runner\n");
        tree.write(
            "docs/architecture.md",
            "# Map\n\n## The map\n\n| `job` | what? |\n\n### SIGKILL at every step\n\n| K8 | killed | `job` | on |\n",
        );
        tree.write("src/job/mod.rs", "fn a() {\n    reached(Point::K8);\n}\n");
        tree.write("src/lib.rs", LIBRARY);
        tree.write("scripts/test", "cargo test -p dayfly --test lifecycle\ntests --lib --bins\n");
        tree.write("tests/lifecycle/main.rs", "//! The ring.\nmod rows;\n");
        tree.write("tests/lifecycle/rows.rs", &owned().iter().map(|id| test_of(id)).collect::<String>());
        tree
    }

    fn write(&self, file: &str, text: &str) {
        let file = self.0.path().join(file);
        fs::create_dir_all(file.parent().expect("a folder")).expect("made");
        fs::write(file, text).expect("written");
    }

    /// Replaces the first `from` of a file.
    fn change(&self, file: &str, from: &str, to: &str) {
        let text = fs::read_to_string(self.0.path().join(file)).expect("read");
        assert!(text.contains(from), "no {from:?}");
        self.write(file, &text.replacen(from, to, 1));
    }

    fn check(&self) -> Found {
        check(self.0.path(), &[])
    }

    /// One thing is wrong, or more, and one of them says this.
    #[track_caller]
    fn complains(&self, of: &[&str]) {
        let found = self.check();
        for text in of {
            let lines: Vec<String> =
                found.wrong.iter().map(|(file, line, what)| format!("{file}:{line}: {what}")).collect();
            assert!(lines.iter().any(|line| line.contains(text)), "no {text:?}: {lines:#?}");
        }
        assert!(!found.wrong.is_empty());
    }
}

/// Its modules; no test is in them.
const LIBRARY: &str = "pub mod job;\n";

const ROWS: &str = "tests/lifecycle/rows.rs";

#[test]
fn a_tree_in_which_each_id_is_shown_is_right() {
    let found = Tree::new().check();
    assert!(found.wrong.is_empty(), "{:#?}", found.wrong);
    assert_eq!(found.ids, (owned().len(), owned().len()));
    assert_eq!(owned().len(), 74 + 73);
}

#[test]
fn an_id_that_no_test_names_any_more_is_missing() {
    let tree = Tree::new();
    tree.change(ROWS, "/// G12: it holds.\n", "");
    tree.complains(&["G12 is in no test's doc line: it holds"]);
    let (listed, shown) = tree.check().ids;
    assert_eq!(shown, listed - 1);
}

#[test]
fn the_list_is_held_to_its_form_and_to_what_the_issues_own() {
    for (from, to, says) in [
        ("G12 | it holds | 5\n", "", "G12 of issue 5 is not listed"),
        ("G12 | it holds | 5\n", "G12 | it holds | 5\nG12 | it holds | 5\n", "G12 is listed twice"),
        ("G12 | it holds | 5\n", "G12 | it holds | 6\n", "G12 is not of issue \"6\""),
        ("G12 | it holds | 5\n", "G12 | it holds\n", "not of the form"),
        ("G12 | it holds | 5\n", "G12 |  | 5\n", "G12 has no outcome"),
        ("G12 | it holds | 5\n", "g12 | it holds | 5\n", "\"g12\" is no id"),
        ("G12 | it holds | 5\n", "", "is not in tests/ids.txt"),
        ("G1 | it holds | 5\nG2 | it holds | 5\n", "G2 | it holds | 5\nG1 | it holds | 5\n", "G1 is out of order"),
        ("# A list.\n", "# A list.\nB1 | it holds | 7\n", "B1 is not of issue \"7\""),
        ("V18 | it holds | 6\n", "V18 | it holds | 6\nV19 | it holds | 6\n", "V19 is in no test's doc line"),
    ] {
        let tree = Tree::new();
        tree.change("tests/ids.txt", from, to);
        tree.complains(&[says]);
    }
}

#[test]
fn an_id_that_the_list_does_not_know_is_an_orphan() {
    let tree = Tree::new();
    tree.change(ROWS, "/// G12: it holds.", "/// G12, G99: it holds.");
    tree.complains(&["tests/lifecycle/rows.rs:", "G99 is not in tests/ids.txt"]);
}

#[test]
fn a_line_that_only_looks_like_a_claim_is_told() {
    for line in [
        "/// G12 it holds.",
        "/// G12,R3: it holds.",
        "/// K1 to K18: it holds.",
        "/// G12:",
        "/// G12, G12: it holds.",
    ] {
        let tree = Tree::new();
        tree.change(ROWS, "/// G12: it holds.", line);
        tree.complains(&["G12 is in no test's doc line"]);
        assert!(tree.check().wrong.iter().any(|(file, ..)| file == ROWS), "{line}");
    }
    let tree = Tree::new();
    tree.change(ROWS, "/// G12: it holds.", "/// G12: it holds.\n/// G12: it holds again.");
    tree.complains(&["names G12 twice"]);
}

#[test]
fn what_does_not_run_shows_nothing() {
    let whole = test_of("G12");
    for (kind, instead) in [
        ("ignored", whole.replace("#[test]", "#[test]\n#[ignore]")),
        ("ignored with a reason", whole.replace("#[test]", "#[test]\n#[ignore = \"slow\"]")),
        ("ignored by a condition", whole.replace("#[test]", "#[cfg_attr(unix, ignore)]\n#[test]")),
        ("no test", whole.replace("#[test]\n", "")),
        ("turned off", whole.replace("#[test]", "#[cfg(any())]\n#[test]")),
        ("of another feature", whole.replace("#[test]", "#[cfg(feature = \"other\")]\n#[test]")),
        ("for another system", whole.replace("#[test]", "#[test]\n#[cfg(windows)]")),
        ("without a body", whole.replace("assert!(true);", "")),
        ("inside a function", format!("fn outer() {{\n{whole}}}\n")),
        ("inside a macro", format!("macro_rules! never {{ () => {{\n{whole}}} }}\n")),
        ("in a module that is off", format!("#[cfg(any())]\nmod off {{\n{whole}}}\n")),
        ("in a module off from inside", format!("mod off {{\n#![cfg(not(test))]\n{whole}}}\n")),
        ("a doc line of a constant", "/// G12: it holds.\nconst X: u8 = 1;\n".into()),
        ("a doc line of a module", "/// G12: it holds.\nmod inner {}\n".into()),
        ("a doc line of a field", "struct X {\n    /// G12: it holds.\n    x: u8,\n}\n".into()),
    ] {
        let tree = Tree::new();
        tree.change(ROWS, &whole, &instead);
        tree.complains(&["G12 is in no test's doc line", "G12 is named by"]);
        assert!(tree.check().wrong.iter().any(|(file, ..)| file == ROWS), "{kind}");
    }
}

#[test]
fn what_is_commented_out_or_a_text_is_not_there() {
    let whole = test_of("G12");
    for instead in [
        whole.lines().map(|line| format!("// {line}\n")).collect::<String>(),
        format!("/*\n{whole}*/\n"),
        format!("/* /* nested */\n{whole}*/\n"),
        format!("const TEXT: &str = r#\"\n{whole}\"#;\n"),
        whole.replace("/// G12", "// G12"),
        whole.replace("/// G12: it holds.", "/// Not so: G12 is only mentioned."),
    ] {
        let tree = Tree::new();
        tree.change(ROWS, &whole, &instead);
        tree.complains(&["G12 is in no test's doc line"]);
    }
}

#[test]
fn a_file_that_nothing_includes_shows_nothing() {
    let tree = Tree::new();
    tree.change(ROWS, &test_of("G12"), "");
    tree.write("tests/lifecycle/more.rs", &test_of("G12"));
    tree.complains(&["G12 is in no test's doc line", "tests/lifecycle/more.rs:1: G12 is named in a file that"]);
    // An integration test that no ring runs is no better.
    tree.write("tests/other.rs", "mod more;");
    tree.complains(&["G12 is in no test's doc line"]);
    tree.change("tests/lifecycle/main.rs", "mod rows;", "mod rows;\n// mod more;");
    tree.complains(&["G12 is in no test's doc line"]);
    tree.change("tests/lifecycle/main.rs", "// mod more;", "mod more;");
    assert!(tree.check().wrong.is_empty(), "{:#?}", tree.check().wrong);
}

#[test]
fn a_ring_that_does_not_run_shows_nothing() {
    for ring in ["", "# cargo test -p dayfly --test lifecycle\n", "cargo test -p dayfly --test lifecycles\n"] {
        let tree = Tree::new();
        tree.write("scripts/test", ring);
        tree.complains(&["`--test lifecycle` is in no ring", "G12 is in no test's doc line"]);
    }
}

#[test]
fn tests_are_found_wherever_the_compiler_finds_them() {
    let whole = test_of("G12");
    for (file, text, includes) in [
        ("tests/lifecycle/deep/mod.rs", whole.clone(), "mod deep;"),
        ("tests/support/far.rs", whole.clone(), "#[path = \"../support/far.rs\"]\nmod far;"),
        ("tests/lifecycle/a/b.rs", whole.clone(), "mod a { pub mod b; }"),
        ("src/lib.rs", format!("{LIBRARY}#[cfg(test)]\nmod tests {{ use super::*;\n{whole}}}"), ""),
        ("src/lib.rs", format!("{LIBRARY}proptest::proptest! {{\n#![proptest_config(x)]\n{whole}}}"), ""),
        (
            "tests/lifecycle/p.rs",
            whole.replace("#[test]\nfn", "#[tokio::test(start_paused = true)]\nasync fn"),
            "mod p;",
        ),
        ("tests/lifecycle/q.rs", whole.replace("#[test]", "#[test]\n#[should_panic]"), "pub(crate) mod q;"),
        ("tests/lifecycle/r.rs", format!("fn x<'a>(_: &'a str) -> char {{ '\"' }}\n{whole}"), "mod r;"),
        ("tests/lifecycle/s.rs", whole.replace("/// G12: it holds.", "/// Of old.\n/// G12: it holds."), "mod s;"),
    ] {
        let tree = Tree::new();
        tree.change(ROWS, &whole, "");
        tree.write(file, &text);
        tree.change("tests/lifecycle/main.rs", "mod rows;", &format!("mod rows;\n{includes}"));
        assert!(tree.check().wrong.is_empty(), "{file}: {:#?}", tree.check().wrong);
    }
}

#[test]
fn a_row_of_the_field_may_be_open_until_its_owner_is_settled() {
    let tree = Tree::new();
    let found = tree.check();
    assert_eq!((found.wrong.len(), found.field, found.open.len()), (0, (52, 0), 52));
    assert_eq!(found.open[3], "U4 (faults, images): it holds");
    let of_settled = || {
        let found = check(tree.0.path(), &["faults"]);
        found.wrong.iter().map(|(file, line, what)| format!("{file}:{line}: {what}")).collect::<Vec<_>>()
    };
    let missing = |row: &u32| format!("docs/field.md:{}: U{row} is in no test's doc line: it holds", row + 4);
    assert_eq!(of_settled(), [1, 2, 3, 4].iter().map(missing).collect::<Vec<_>>());
    // A row with two owners is one row, and one test shows it.
    tree.write("tests/lifecycle/more.rs", &format!("{}{}", test_of("U1"), test_of("U4")));
    tree.change("tests/lifecycle/main.rs", "mod rows;", "mod rows;\nmod more;");
    assert_eq!(of_settled(), [2, 3].iter().map(missing).collect::<Vec<_>>());
    assert_eq!((tree.check().field, tree.check().open.len()), ((52, 2), 50));
}

#[test]
fn the_table_of_the_field_is_held_to_its_form() {
    let row = "| U5 | it broke | it holds | isolation |\n";
    for (instead, says) in [
        ("", "docs/field.md:1: U5 is not in the table"),
        ("| U5 | it broke | isolation |\n", "docs/field.md:9: not of the form"),
        ("| U05 | it broke | it holds | isolation |\n", "\"U05\" is no id"),
        ("| U5 | it broke |  | isolation |\n", "U5 has an empty cell"),
        ("| U5 | it broke | it holds | nobody |\n", "U5 is of nobody known: \"nobody\""),
        ("| U5 | it broke | it holds | isolation, |\n", "U5 is of nobody known"),
        (&format!("{row}{row}"), "docs/field.md:10: U5 is there twice"),
        (&format!("| U6 | it broke | it holds | isolation |\n{row}"), "U5 is out of order"),
    ] {
        let tree = Tree::new();
        tree.change("docs/field.md", row, instead);
        tree.complains(&[says]);
    }
    let tree = Tree::new();
    tree.change("docs/field.md", row, "| U5 | a \\| b broke | it holds | isolation |\n");
    assert!(tree.check().wrong.is_empty(), "a bar of a cell's own: {:#?}", tree.check().wrong);
}

#[test]
fn ids_of_the_field_are_looked_up_in_its_table_only() {
    let tree = Tree::new();
    tree.change(ROWS, "/// G12: it holds.", "/// G12, U54: it holds.");
    tree.complains(&["tests/lifecycle/rows.rs:", "U54 is not in docs/field.md"]);
    let tree = Tree::new();
    tree.change(ROWS, "/// G12: it holds.", "/// G12: it holds.\n/// U5 it holds.");
    tree.complains(&["begins with an id, but not as"]);
    let tree = Tree::new();
    tree.change(ROWS, &test_of("G12"), &format!("{}{}", test_of("G12"), test_of("U5").replace("#[test]\n", "")));
    tree.complains(&["U5 is named by what is no test"]);
    std::fs::remove_file(tree.0.path().join("docs/field.md")).expect("removed");
    tree.complains(&["docs/field.md:1: "]);
}

#[test]
fn the_tables_are_held_to_their_form_and_to_the_list() {
    let row = "| G12 | it breaks | it holds |\n";
    for (instead, says) in [
        ("", "G12 is in no table"),
        ("", "G12 is in tests/ids.txt and in no table"),
        ("| G12 | it breaks |\n", "G12 has an empty cell"),
        ("| G12 | it breaks |  |\n", "G12 has an empty cell"),
        (&format!("{row}{row}"), "G12 is there twice"),
        (&format!("| G13 | it breaks | it holds |\n{row}"), "G12 is out of order"),
        ("| G12 | it breaks | ***open***: it holds |\n", "G12 says ***open***, and a test shows it"),
        (&format!("{row}| G23 | it breaks | it holds |\n"), "G23 is not in tests/ids.txt, and does not say ***open***"),
    ] {
        let tree = Tree::new();
        tree.change("docs/threats.md", row, instead);
        tree.complains(&[says]);
    }
    let tree = Tree::new();
    std::fs::remove_file(tree.0.path().join("docs/threats.md")).expect("removed");
    tree.complains(&["docs/threats.md:1: ", "T14 is in no table"]);
}

#[test]
fn what_a_comment_names_is_there_or_is_dead() {
    for (file, text, says) in [
        ("src/a.rs", "//! As G99 says.\n", "src/a.rs:1: G99 is in no table"),
        ("src/a.rs", "fn a() {} // decision D10\n", "src/a.rs:1: D10 is in no table, and no decision"),
        ("src/a.rs", "\n/* See law.md. */\n", "src/a.rs:2: there is no page law.md"),
        ("src/a.rs", "/// (threats.md §5)\nfn a() {}\n", "src/a.rs:1: there is no §5 in threats.md"),
        ("src/a.rs", "/// As design §4 says.\nfn a() {}\n", "src/a.rs:1: there is no §4 in this file"),
        ("src/a.rs", "// Invariant 2.\n", "src/a.rs:1: there is no invariant 2"),
        ("vm-images/a/recipe.toml", "a = 1 # as U32\n", "vm-images/a/recipe.toml:1: U32 is in no table"),
        ("scripts/a", "#!/bin/sh\n# K20\n", "scripts/a:2: K20 is in no table"),
        ("docs/a.md", "[Law](law.md)\n", "docs/a.md:1: there is no page law.md"),
    ] {
        let tree = Tree::new();
        let (seen, dead) = tree.check().citations;
        assert!(seen > 300 && dead == 0, "{:#?}", tree.check().wrong);
        tree.write(file, text);
        tree.complains(&[says]);
        assert_eq!(tree.check().citations.1, 1, "{text}");
    }
    let tree = Tree::new();
    let text = "//! threats.md G12, docs/threats.md §4, decision D9, U1, invariant 1.\nconst A: &str = \"G99\";\n";
    let (before, _) = tree.check().citations;
    tree.write("src/a.rs", text);
    let found = tree.check();
    assert_eq!((found.citations, found.wrong.len()), ((before + 7, 0), 0), "{:#?}", found.wrong);
}

#[test]
fn the_map_is_held_to_the_source() {
    for (file, from, to, says) in [
        ("docs/architecture.md", "| `job` |", "| `job`, `poller` |", "architecture.md:5: poller is no module"),
        ("src/lib.rs", "pub mod job;", "pub mod job;\nmod rng;", "the map does not name the module rng"),
        ("docs/architecture.md", "killed | `job`", "killed | `jo`", "architecture.md:9: K8 is not in src/jo"),
        ("docs/architecture.md", "killed | `job`", "killed | `jo`", "architecture.md:9: K8 is in src/job/mod.rs, too"),
        ("src/job/mod.rs", "K8", "K9", "the table of kill points does not name K9"),
        (
            "docs/decisions/D09-runner.md",
            "runner\n",
            "runner\n\n*State: in the code: `job`,\n`a/b`.*\n",
            ":3: there is no a/b",
        ),
    ] {
        let tree = Tree::new();
        tree.change(file, from, to);
        tree.complains(&[says]);
    }
}
