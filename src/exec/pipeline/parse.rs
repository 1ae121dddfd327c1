//! Text to [`Node`]: YAML events with their lines, anchors, aliases and merge keys.
//!
//! The bounds are against a file made to hurt (a clone of somebody's repository): 1 MiB of text,
//! 100 levels, 100,000 nodes with all aliases written out. GitLab's own: 2 MB, 100 levels.

use super::error::Fault;
use super::node::{Entry, Node, Pairs, Value};
use saphyr_parser::{Event, Parser, ScalarStyle, Tag};
use std::collections::BTreeMap;
use std::rc::Rc;

/// Size of a pipeline file at most, bytes.
pub(super) const FILE_BYTES_MAX: u64 = 1024 * 1024;
/// Mappings and lists inside each other at most.
const DEPTH_MAX: usize = 100;
/// Nodes at most, aliases written out ("billion laughs").
pub(super) const NODES_MAX: usize = 100_000;

/// A mapping or list that is not complete.
struct Open {
    line: usize,
    anchor: usize,
    tag: Option<String>,
    weight: usize,
    content: Content,
}

enum Content {
    Sequence(Vec<Rc<Node>>),
    Mapping { pairs: Pairs, key: Option<(usize, String)> },
}

/// Reads the one document of a pipeline file.
///
/// # Errors
/// Bad YAML, an exceeded bound, an empty file, a `spec` header or a second document.
pub(super) fn parse(text: &str) -> Result<Rc<Node>, Fault> {
    let mut documents = Vec::new();
    let mut stack: Vec<Open> = Vec::new();
    let mut anchors: BTreeMap<usize, Rc<Node>> = BTreeMap::new();
    // What ends too early, or is empty at the end, is found on the line after the last one.
    let last = 1 + text.matches(['\n', '\r']).count();
    for event in Parser::new_from_str(text.strip_prefix('\u{feff}').unwrap_or(text)) {
        let (event, span) = event.map_err(|e| {
            Fault::at(
                e.marker().line().min(last),
                format!("is no YAML (column {}): {}", e.marker().col() + 1, e.info()),
            )
        })?;
        let line = span.start.line().min(last);
        let node = match event {
            Event::DocumentStart(_) => {
                anchors.clear();
                continue;
            }
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => continue,
            Event::SequenceStart(anchor, tag) => {
                open(&mut stack, line, anchor, tag.as_deref(), Content::Sequence(Vec::new()))?;
                continue;
            }
            Event::MappingStart(anchor, tag) => {
                open(
                    &mut stack,
                    line,
                    anchor,
                    tag.as_deref(),
                    Content::Mapping { pairs: Pairs::default(), key: None },
                )?;
                continue;
            }
            Event::Alias(anchor) => match anchors.get(&anchor) {
                Some(node) => Rc::clone(node),
                None => return Err(Fault::at(line, "an alias (`*name`) to something that contains it")),
            },
            Event::Scalar(text, style, anchor, tag) => {
                let (plain, unknown) = match tag.as_deref() {
                    None => (style == ScalarStyle::Plain, None),
                    Some(tag) if tag.is_yaml_core_schema() => {
                        (tag.suffix != "str" && style == ScalarStyle::Plain, None)
                    }
                    Some(tag) => (false, Some(tag.to_string())),
                };
                let value = unknown.map_or(Value::Scalar { text: text.into_owned(), plain }, Value::Tagged);
                let node = Rc::new(Node::new(line, value));
                anchors.insert(anchor, Rc::clone(&node));
                node
            }
            Event::SequenceEnd | Event::MappingEnd => {
                let Some(closed) = stack.pop() else { continue };
                let anchor = closed.anchor;
                let node = Rc::new(close(closed)?);
                anchors.insert(anchor, Rc::clone(&node));
                node
            }
        };
        match stack.last_mut() {
            Some(parent) => add(parent, node, line)?,
            None => documents.push(node),
        }
    }
    let mut documents = documents.into_iter();
    match (documents.next(), documents.next()) {
        (None, _) => Err(Fault::at(1, "the file is empty; it must hold at least one job")),
        (Some(first), second)
            if first.entry("spec").is_some()
                && (second.is_some() || first.entry("spec").is_some_and(|e| e.value.get("inputs").is_some())) =>
        {
            let line = first.entry("spec").map_or(1, |e| e.line);
            Err(Fault::at(line, "inputs are filled in by GitLab only; exec cannot").under("spec"))
        }
        (_, Some(second)) => Err(Fault::at(second.line, "a second YAML document; GitLab reads one")),
        (Some(first), None) if first.is_null() => Err(Fault::at(1, "the file is empty; it must hold at least one job")),
        (Some(first), None) => first.mapping().map(|_| ()).and(Ok(Rc::clone(&first))),
    }
}

fn open(stack: &mut Vec<Open>, line: usize, anchor: usize, tag: Option<&Tag>, content: Content) -> Result<(), Fault> {
    if stack.len() >= DEPTH_MAX {
        return Err(Fault::at(line, format!("more than {DEPTH_MAX} levels of lists and mappings")));
    }
    let tag = tag.filter(|t| !t.is_yaml_core_schema()).map(Tag::to_string);
    stack.push(Open { line, anchor, tag, weight: 1, content });
    Ok(())
}

/// Puts a complete node into the mapping or list around it.
fn add(parent: &mut Open, node: Rc<Node>, line: usize) -> Result<(), Fault> {
    parent.weight = parent.weight.saturating_add(node.weight);
    if parent.weight > NODES_MAX {
        return Err(Fault::at(line, format!("more than {NODES_MAX} values, with aliases written out")));
    }
    match &mut parent.content {
        Content::Sequence(items) => items.push(node),
        Content::Mapping { pairs, key } => match key.take() {
            None => *key = Some((line, node.scalar().map_err(|_| Fault::at(line, "a key must be a text"))?.to_owned())),
            Some((line, key)) if key == "<<" => merge_key(pairs, line, node),
            Some((line, key)) => pairs.put(Entry { line, key, value: node }),
        },
    }
    Ok(())
}

/// `<<: *other` and `<<: [*one, *two]` (the first wins). As in Ruby's reader, it overwrites keys
/// that stand above it and is overwritten by keys below.
fn merge_key(pairs: &mut Pairs, line: usize, node: Rc<Node>) {
    let sources: Option<Vec<&[Entry]>> = match &node.value {
        Value::Mapping(source) => Some(vec![source]),
        Value::Sequence(items) => items.iter().rev().map(|n| n.mapping().ok()).collect(),
        _ => None,
    };
    match sources {
        Some(sources) => sources.into_iter().flatten().for_each(|entry| pairs.put(entry.clone())),
        // Kept under its name: an unknown key where it is read.
        None => pairs.put(Entry { line, key: "<<".into(), value: node }),
    }
}

fn close(closed: Open) -> Result<Node, Fault> {
    let value = match (closed.tag, closed.content) {
        (None, Content::Sequence(items)) => Value::Sequence(items),
        (None, Content::Mapping { pairs, .. }) => Value::Mapping(pairs.into_entries()),
        (Some(tag), Content::Sequence(items)) if tag == "!reference" => {
            let path: Result<Vec<String>, Fault> = items.iter().map(|n| n.scalar().map(str::to_owned)).collect();
            match path {
                Ok(path) if !path.is_empty() => Value::Reference(path),
                _ => return Err(Fault::at(closed.line, "a !reference needs a list of names: !reference [job, key]")),
            }
        }
        (Some(tag), _) => Value::Tagged(tag),
    };
    Ok(Node { line: closed.line, weight: closed.weight, value })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &str) {
        let shown = match parse(text) {
            Ok(node) => show(&node),
            Err(fault) => format!("error {fault}"),
        };
        assert_eq!(shown, expected, "{text}");
    }

    fn show(node: &Node) -> String {
        match &node.value {
            Value::Scalar { text, plain } => format!("{text}{}", if *plain { "" } else { "'" }),
            Value::Sequence(items) => format!("[{}]", items.iter().map(|n| show(n)).collect::<Vec<_>>().join(" ")),
            Value::Mapping(entries) => {
                format!(
                    "{{{}}}",
                    entries
                        .iter()
                        .map(|e| format!("{}@{}={}", e.key, e.line, show(&e.value)))
                        .collect::<Vec<_>>()
                        .join(" ")
                )
            }
            Value::Reference(path) => format!("ref({})", path.join("/")),
            Value::Tagged(tag) => format!("tag({tag})"),
        }
    }

    #[test]
    fn keys_remember_their_lines() {
        check("a: 1\nb:\n  - x\n  - 'y'\n", "{a@1=1 b@2=[x y']}");
        check("a: |\n  one\n  two\nb: z", "{a@1=one\ntwo\n' b@4=z}");
    }

    #[test]
    fn aliases_merge_keys_and_references_are_read() {
        check("x: &x {p: 1, q: 2}\ny:\n  <<: *x\n  q: 3\n", "{x@1={p@1=1 q@1=2} y@2={p@1=1 q@4=3}}");
        check("y:\n  q: 3\n  <<: &x {q: 4}\n", "{y@1={q@3=4}}");
        check(
            "a: &a {p: 1}\nb: &b {p: 2, r: 3}\nc:\n  <<: [*a, *b]\n",
            "{a@1={p@1=1} b@2={p@2=2 r@2=3} c@3={p@1=1 r@2=3}}",
        );
        check("a: !reference [.x, script]", "{a@1=ref(.x/script)}");
        check("a: !foo x\nb: !bar [1]\nc: !!str 5", "{a@1=tag(!foo) b@2=tag(!bar) c@3=5'}");
        check("a: [&q echo, *q]\na: 2", "{a@2=2}");
    }

    #[test]
    fn bad_files_are_refused_with_their_line() {
        check("", "error 1: the file is empty; it must hold at least one job");
        check("# nothing\n", "error 1: the file is empty; it must hold at least one job");
        check("- a", "error 1: is a list, must be a mapping");
        check("a: 1\n---\nb: 2\n", "error 3: a second YAML document; GitLab reads one");
        check("a: 1\n\n---", "error 3: a second YAML document; GitLab reads one");
        check(
            "spec:\n  inputs:\n    x:\n---\na: 1\n",
            "error 1: key `spec`: inputs are filled in by GitLab only; exec cannot",
        );
        check("a: &a [*a]", "error 1: an alias (`*name`) to something that contains it");
        check("a: !reference []", "error 1: a !reference needs a list of names: !reference [job, key]");
        check("? [a]\n: b", "error 1: a key must be a text");
        let fault = parse("a:\n\tb: 1\n").unwrap_err();
        assert!(fault.what.starts_with("is no YAML (column ") && fault.line == 2, "{fault}");
    }

    #[test]
    fn files_made_to_grow_are_refused() {
        let mut laughs = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for level in 1..10 {
            let item = format!("*a{}", level - 1);
            laughs.push_str(&format!("a{level}: &a{level} [{}]\n", vec![item; 10].join(", ")));
        }
        let fault = parse(&laughs).unwrap_err();
        assert_eq!(fault.what, "more than 100000 values, with aliases written out");
        let deep = format!("a: {}{}", "[".repeat(101), "]".repeat(101));
        assert_eq!(parse(&deep).unwrap_err().what, "more than 100 levels of lists and mappings");
        assert!(parse(&format!("a: {}{}", "[".repeat(99), "]".repeat(99))).is_ok());
    }
}
