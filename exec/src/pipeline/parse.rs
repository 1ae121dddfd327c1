//! Text to [`Node`]: YAML events with their lines, anchors, aliases and merge keys.
//!
//! The bounds are against a file made to hurt (a clone of somebody's repository): 1 MiB of text,
//! 100 levels, 100,000 nodes with all aliases written out. GitLab's own: 2 MB, 100 levels.

use super::error::{Fault, Line};
use super::node::{Entry, Node, Pairs, Value};
use saphyr_parser::{Event, Parser, ScalarStyle, Tag};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::rc::Rc;

/// Size of a pipeline file at most, bytes.
pub(super) const FILE_BYTES_MAX: u64 = 1024 * 1024;
/// Mappings and lists inside each other at most.
pub(super) const DEPTH_MAX: usize = 100;
/// Nodes at most, aliases written out ("billion laughs").
pub(super) const NODES_MAX: usize = 100_000;

/// A mapping or list that is not complete.
struct Open {
    line: Line,
    anchor: usize,
    tag: Option<String>,
    weight: usize,
    content: Content,
}

enum Content {
    Sequence(Vec<Rc<Node>>),
    Mapping { pairs: Pairs, key: Option<(Line, String)> },
}

/// A pipeline file: its header, if it has one, and its content.
pub(super) struct Document {
    /// `spec` of the header.
    pub(super) spec: Option<Entry>,
    /// The mapping with the jobs.
    pub(super) content: Rc<Node>,
}

/// Reads a pipeline file, the `file`th of a pipeline.
///
/// # Errors
/// Bad YAML, an exceeded bound, an empty file, a second document that has no `spec` header before it.
pub(super) fn parse(text: &str, file: usize) -> Result<Document, Fault> {
    let first_line = Line { file, number: 1 };
    let empty = || Fault::at(first_line, "the file is empty; it must hold at least one job");
    let mut documents = documents(text, file)?.into_iter();
    let (first, second, third) = (documents.next(), documents.next(), documents.next());
    let first = first.ok_or_else(empty)?;
    let spec = first.entry("spec").cloned();
    let content = match (&spec, second) {
        (Some(_), Some(second)) => {
            if let Some(other) = first.mapping()?.iter().find(|e| e.key != "spec") {
                return Err(Fault::at(other.line, "stands in the header, which holds `spec` only").under(&other.key));
            }
            if let Some(third) = third {
                return Err(Fault::at(third.line, "a third YAML document; GitLab reads a header and one more"));
            }
            second
        }
        (Some(spec), None) => {
            return Err(Fault::at(spec.line, "is a header; a line `---` and the jobs must follow it").under("spec"));
        }
        (None, Some(second)) => return Err(Fault::at(second.line, "a second YAML document; GitLab reads one")),
        (None, None) => first,
    };
    if content.is_null() {
        return Err(empty());
    }
    content.mapping()?;
    Ok(Document { spec, content })
}

/// Bytes that are read again at most, for lines that are not indented as the parser wants them.
const AGAIN_BYTES_MAX: usize = 32 * 1024 * 1024;
/// What such a line gets in front. In brackets and quotes white space at the beginning of a line means nothing.
const INDENTATION: &str = "                                                                                ";

/// All documents. libyaml, with which GitLab reads, knows no indentation within brackets and quotes: `]` may stand
/// below its key, and so may all that is between. YAML 1.2 and our parser want it further right than the key; where
/// that is all the parser misses, the line is moved and the text read again.
fn documents(text: &str, file: usize) -> Result<Vec<Rc<Node>>, Fault> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut lines: Vec<Cow<'_, str>> = Vec::new();
    let mut read_bytes = 0_usize;
    loop {
        let moved = (!lines.is_empty()).then(|| lines.concat());
        let fault = match read(moved.as_deref().unwrap_or(text), file) {
            Ok(documents) => return Ok(documents),
            Err(fault) => fault,
        };
        let (number, column) = match fault {
            Stop::Fault(fault) => return Err(fault),
            Stop::Yaml { line, column, .. } => (line, column),
        };
        let Stop::Yaml { what, misplaced, .. } = &fault else { continue };
        if lines.is_empty() {
            lines = split_lines(text);
        }
        let line = match misplaced {
            Misplaced::No => None,
            // Further right than it may be already.
            Misplaced::Line if column >= INDENTATION.len() => None,
            Misplaced::Line => lines.get_mut(number.saturating_sub(1)),
            // The parser names the line where the quotes open: the first one behind it that has not been moved.
            Misplaced::Quoted => lines.iter_mut().skip(number).find(|line| matches!(line, Cow::Borrowed(_))),
        };
        read_bytes = read_bytes.saturating_add(text.len());
        match line {
            Some(line) if matches!(line, Cow::Borrowed(_)) && read_bytes <= AGAIN_BYTES_MAX => {
                *line = Cow::Owned(format!("{INDENTATION}{line}"));
            }
            _ => {
                let is_moved = lines.get(number.wrapping_sub(1)).is_some_and(|line| matches!(line, Cow::Owned(_)));
                let column = if is_moved { column.saturating_sub(INDENTATION.len()) } else { column };
                return Err(Fault::at(Line { file, number }, format!("is no YAML (column {}): {what}", column + 1)));
            }
        }
    }
}

/// Lines with their ends; YAML ends one at a lone carriage return, too.
fn split_lines(text: &str) -> Vec<Cow<'_, str>> {
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let end = match rest.find(['\n', '\r']) {
            Some(at) if rest[at..].starts_with("\r\n") => at + 2,
            Some(at) => at + 1,
            None => rest.len(),
        };
        let (line, others) = rest.split_at(end);
        lines.push(Cow::Borrowed(line));
        rest = others;
    }
    lines
}

/// Why a text was not read to its end.
enum Stop {
    Fault(Fault),
    /// The parser's word, and whether moving a line may help.
    Yaml {
        line: usize,
        column: usize,
        what: String,
        misplaced: Misplaced,
    },
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

#[derive(PartialEq, Eq)]
enum Misplaced {
    No,
    /// The line itself.
    Line,
    /// One behind it, in quotes.
    Quoted,
}

fn read(text: &str, file: usize) -> Result<Vec<Rc<Node>>, Stop> {
    let mut documents = Vec::new();
    let mut stack: Vec<Open> = Vec::new();
    let mut anchors: BTreeMap<usize, Rc<Node>> = BTreeMap::new();
    // What ends too early, or is empty at the end, is found on the line after the last one.
    let last = 1 + text.matches(['\n', '\r']).count();
    for event in Parser::new_from_str(text) {
        let (event, span) = event.map_err(|e| Stop::Yaml {
            line: e.marker().line().min(last),
            column: e.marker().col(),
            what: e.info().to_owned(),
            misplaced: match e.info() {
                "invalid indentation" | "invalid indentation in flow construct" => Misplaced::Line,
                "invalid indentation in quoted scalar" => Misplaced::Quoted,
                _ => Misplaced::No,
            },
        })?;
        let line = Line { file, number: span.start.line().min(last) };
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
                None => return Err(Fault::at(line, "an alias (`*name`) to something that contains it").into()),
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
    Ok(documents)
}

fn open(stack: &mut Vec<Open>, line: Line, anchor: usize, tag: Option<&Tag>, content: Content) -> Result<(), Fault> {
    if stack.len() >= DEPTH_MAX {
        return Err(Fault::at(line, format!("more than {DEPTH_MAX} levels of lists and mappings")));
    }
    let tag = tag.filter(|t| !t.is_yaml_core_schema()).map(Tag::to_string);
    stack.push(Open { line, anchor, tag, weight: 1, content });
    Ok(())
}

/// Puts a complete node into the mapping or list around it.
fn add(parent: &mut Open, node: Rc<Node>, line: Line) -> Result<(), Fault> {
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
fn merge_key(pairs: &mut Pairs, line: Line, node: Rc<Node>) {
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
    Ok(Node::new(closed.line, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &str) {
        let shown = match parse(text, 0) {
            Ok(document) => show(&document.content),
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
            Value::Broken(what) => what.clone(),
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

    /// U34: brackets and quotes may close below their key, as GitLab's reader has it
    #[test]
    fn in_brackets_and_quotes_there_is_no_indentation() {
        check("job:\n  script: [\n    'a',\n  ]\n  stage: b\n", "{job@1={script@2=[a'] stage@5=b}}");
        check("job:\n  script: [\na, b\n]\n  stage: b\n", "{job@1={script@2=[a b] stage@5=b}}");
        check(
            "job:\n  needs: [\n  {job: a,\n  x: [1,\n2\n]}\n  ]\nb: c",
            "{job@1={needs@2=[{job@3=a x@4=[1 2]}]} b@8=c}",
        );
        check("job: {\n  a: b\n}\nk: v", "{job@1={a@2=b} k@4=v}");
        check("a:\n  job: {\nb: c # d\n# e\n}\nk: v", "{a@1={job@2={b@3=c}} k@6=v}");
        check("a:\n  b: \"one\ntwo\n\n  three\"\n  c: 'x\ny'\n", "{a@1={b@2=one two\nthree' c@6=x y'}}");
        check("a:\r\n  b: [\r\n  c\r\n  ]\r\n", "{a@1={b@2=[c]}}");
        let many = format!("a:\n  b: [\n{}  ]\n", "  x,\n".repeat(500));
        assert_eq!(parse(&many, 0).unwrap().content.weight, 503);
        // What is wrong otherwise stays wrong, at its own column.
        check("a:\n  b: [\n  c\n  ]]\n", "error 4: is no YAML (column 4): misplaced bracket");
        let open = parse("a:\n  b: [\n  c\nd: e\n", 0).err().unwrap();
        assert!(open.what.starts_with("is no YAML"), "{open}");
    }

    #[test]
    fn bad_files_are_refused_with_their_line() {
        check("", "error 1: the file is empty; it must hold at least one job");
        check("# nothing\n", "error 1: the file is empty; it must hold at least one job");
        check("- a", "error 1: is a list, must be a mapping");
        check("a: 1\n---\nb: 2\n", "error 3: a second YAML document; GitLab reads one");
        check("a: 1\n\n---", "error 3: a second YAML document; GitLab reads one");
        check("spec:\n  inputs:\n    x:\n---\na: 1\n", "{a@5=1}");
        check(
            "spec:\n  inputs:\n    x:\n",
            "error 1: key `spec`: is a header; a line `---` and the jobs must follow it",
        );
        check("spec:\na: 1\n---\nb: 1", "error 2: key `a`: stands in the header, which holds `spec` only");
        check("spec:\n---\na: 1\n---\nb: 1", "error 5: a third YAML document; GitLab reads a header and one more");
        check("a: &a [*a]", "error 1: an alias (`*name`) to something that contains it");
        check("a: !reference []", "error 1: a !reference needs a list of names: !reference [job, key]");
        check("? [a]\n: b", "error 1: a key must be a text");
        let fault = parse("a:\n\tb: 1\n", 0).err().unwrap();
        assert!(fault.what.starts_with("is no YAML (column ") && fault.line == Line::from(2), "{fault}");
    }

    #[test]
    fn files_made_to_grow_are_refused() {
        let mut laughs = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for level in 1..10 {
            let item = format!("*a{}", level - 1);
            laughs.push_str(&format!("a{level}: &a{level} [{}]\n", vec![item; 10].join(", ")));
        }
        let fault = parse(&laughs, 0).err().unwrap();
        assert_eq!(fault.what, "more than 100000 values, with aliases written out");
        let deep = format!("a: {}{}", "[".repeat(101), "]".repeat(101));
        assert_eq!(parse(&deep, 0).err().unwrap().what, "more than 100 levels of lists and mappings");
        assert!(parse(&format!("a: {}{}", "[".repeat(99), "]".repeat(99)), 0).is_ok());
    }
}
