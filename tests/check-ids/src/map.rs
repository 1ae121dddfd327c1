//! `docs/architecture.md` against the source: its map names each module of `src/lib.rs`, its table of kill points
//! each file that has one, and the decisions that are in the code say where.

use crate::Wrongs;
use crate::citations::DECISIONS;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The page, below the root.
pub(crate) const FILE: &str = "docs/architecture.md";

const MODULES: &str = "src/lib.rs";

/// What the pages say of the source and is not so.
pub(crate) fn check(root: &Path) -> Wrongs {
    let read = |file: &str| std::fs::read_to_string(root.join(file)).unwrap_or_default();
    let page = read(FILE);
    let mut wrong = Wrongs::new();
    map(&page, &read(MODULES), &mut wrong);
    points(root, &page, &mut wrong);
    let folder = std::fs::read_dir(root.join(DECISIONS)).into_iter().flatten().flatten();
    for name in folder.filter_map(|entry| entry.file_name().into_string().ok()) {
        let file = format!("{DECISIONS}/{name}");
        // The state may go over several lines, and ends with its paragraph.
        let text = read(&file).split("\n\n").nth(1).unwrap_or_default().replace('\n', " ");
        let Some((_, places)) = text.split_once(" in the code: ") else { continue };
        for place in ticked(places.split(';').next().unwrap_or_default()).filter(|place| !is_there(root, place)) {
            wrong.insert((file.clone(), 3, format!("there is no {place}")));
        }
    }
    wrong
}

fn numbered(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(at, line)| (at + 1, line))
}

/// Words in backticks.
fn ticked(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Rows of the table below this heading, by line.
fn rows<'a>(page: &'a str, heading: &str) -> Vec<(usize, Vec<&'a str>)> {
    let lines = numbered(page).skip_while(|(_, line)| !line.starts_with('#') || !line.ends_with(heading)).skip(1);
    let lines = lines.take_while(|(_, line)| !line.starts_with('#'));
    lines.filter(|(_, line)| line.starts_with("| ")).map(|(at, line)| (at, line.split(" | ").collect())).collect()
}

fn is_there(root: &Path, place: &str) -> bool {
    [format!("src/{place}.rs"), format!("src/{place}"), place.to_owned()].iter().any(|path| root.join(path).exists())
}

fn map(page: &str, library: &str, wrong: &mut Wrongs) {
    let module = |line: &str| {
        let name = line.split_once("mod ").filter(|(before, _)| before.is_empty() || before.starts_with("pub"))?.1;
        let name = name.split_once(';')?.0;
        name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_').then(|| name.to_owned())
    };
    let modules: BTreeSet<String> = library.lines().filter_map(module).collect();
    let mut named = BTreeSet::new();
    for (line, cells) in rows(page, "The map") {
        for name in ticked(cells[0]) {
            named.insert(name.to_owned());
            if !modules.contains(name) {
                wrong.insert((FILE.to_owned(), line, format!("{name} is no module of {MODULES}")));
            }
        }
    }
    for name in modules.difference(&named) {
        wrong.insert((FILE.to_owned(), 1, format!("the map does not name the module {name}")));
    }
}

/// The files below `src` that have kill points, by point: `K8`.
fn reached(root: &Path) -> BTreeMap<String, BTreeSet<String>> {
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut open = vec![PathBuf::from("src")];
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(root.join(&folder)).into_iter().flatten().flatten() {
            let path = folder.join(entry.file_name());
            if entry.path().is_dir() {
                open.push(path);
                continue;
            }
            let text = std::fs::read_to_string(root.join(&path)).unwrap_or_default();
            for line in text.lines().filter(|line| line.contains("reached(") && !line.contains("fn reached(")) {
                for point in line.split("Point::").skip(1) {
                    let point = point.split(|c: char| !c.is_ascii_alphanumeric()).next().unwrap_or_default();
                    let file = path.strip_prefix("src").unwrap_or(&path).display().to_string();
                    found.entry(point.to_owned()).or_default().insert(file);
                }
            }
        }
    }
    found
}

fn points(root: &Path, page: &str, wrong: &mut Wrongs) {
    let reached = reached(root);
    let mut named = BTreeSet::new();
    let is_of = |file: &str, place: &str| file.strip_prefix(place).is_some_and(|rest| rest.starts_with(['.', '/']));
    for (line, cells) in rows(page, "SIGKILL at every step") {
        let Some(point) = cells[0].strip_prefix("| ").filter(|point| point.starts_with('K')) else { continue };
        let places: Vec<&str> = cells.get(2).into_iter().flat_map(|cell| ticked(cell)).collect();
        let files = reached.get(point).cloned().unwrap_or_default();
        named.insert(point.to_owned());
        for place in places.iter().filter(|place| !files.iter().any(|file| is_of(file, place))) {
            wrong.insert((FILE.to_owned(), line, format!("{point} is not in src/{place}")));
        }
        for file in files.iter().filter(|file| !places.iter().any(|place| is_of(file, place))) {
            wrong.insert((FILE.to_owned(), line, format!("{point} is in src/{file}, too")));
        }
    }
    for point in reached.keys().filter(|point| !named.contains(*point)) {
        wrong.insert((FILE.to_owned(), 1, format!("the table of kill points does not name {point}")));
    }
}
