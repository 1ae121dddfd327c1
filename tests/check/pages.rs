//! The pages that a newcomer meets first say what is so.

use super::ROOT;
use std::path::Path;

fn page(name: &str) -> String {
    std::fs::read_to_string(Path::new(ROOT).join(name)).unwrap()
}

#[test]
fn the_changelogs_newest_version_is_the_products() {
    let changelog = page("CHANGELOG.md");
    let newest = changelog.lines().find_map(|line| line.strip_prefix("## ")).unwrap();
    assert_eq!(newest.split(' ').next(), Some(env!("CARGO_PKG_VERSION")));
}

#[test]
fn every_page_is_named_by_another() {
    let mut pages: Vec<String> = std::fs::read_dir(Path::new(ROOT).join("docs"))
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().into_string().ok())
        .filter(|name| name.ends_with(".md"))
        .map(|name| format!("docs/{name}"))
        .collect();
    pages.extend(["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/decisions/README.md"].map(str::to_owned));
    let texts: Vec<(String, String)> = pages.iter().map(|name| (name.clone(), page(name))).collect();
    for name in pages.iter().filter(|name| *name != "README.md") {
        let short = name.strip_prefix("docs/").unwrap_or(name);
        let named = texts.iter().any(|(other, text)| other != name && text.contains(short));
        assert!(named, "no page names {name}: nobody finds it");
    }
}

#[test]
fn the_index_of_decisions_has_each_by_its_title() {
    let index = page("docs/decisions/README.md");
    let mut count = 0;
    for entry in std::fs::read_dir(Path::new(ROOT).join("docs/decisions")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.starts_with('D') {
            count += 1;
            let text = page(&format!("docs/decisions/{name}"));
            let (id, title) = text.lines().next().unwrap().strip_prefix("# ").unwrap().split_once(": ").unwrap();
            assert!(index.contains(&format!("| [{id}]({name}) | {title} |")), "{name}");
            assert!(text.contains("\n## Decision\n") && text.contains("\n## Why\n"), "{name}");
        }
    }
    assert_eq!(index.matches("| [D").count(), count);
}
