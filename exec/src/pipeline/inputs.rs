//! `spec:inputs` and `$[[ inputs.name ]]`: a file's header says what can be filled in, and the content is.
//!
//! GitLab's rules (CI/CD inputs, GitLab 18): a value that is nothing but one block takes the input's type; elsewhere
//! the block becomes text. Up to three functions follow: `expand_vars`, `truncate(offset, length)`, `posix_escape`.
//! What cannot be filled in is no fault of the file: the value becomes [`Value::Broken`], and a job that needs it is
//! refused in these words. Text that comes out has a bound over all files.

use super::error::{Fault, Line};
use super::model::Note;
use super::node::{Entry, Kind, Node, Pairs, Value};
use super::parse::{DEPTH_MAX, Document, NODES_MAX};
use super::sources::Sources;
use std::collections::BTreeMap;
use std::rc::Rc;

/// Bytes of text that filling in may make, in all files of a pipeline.
pub(super) const TEXT_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Functions of one block, as in GitLab.
const FUNCTIONS_MAX: usize = 3;

/// Values that an `include` gives to a file's inputs.
#[derive(Default)]
pub(super) struct Given<'a> {
    pub(super) entries: &'a [Entry],
}

/// What blocks are filled in with.
struct Context<'a> {
    /// A value, or why there is none.
    inputs: BTreeMap<String, Result<Rc<Node>, String>>,
    sources: &'a dyn Sources,
    bytes_left: &'a mut usize,
}

/// The content with its inputs filled in.
///
/// # Errors
/// A header that is none, values for inputs that it does not have, a key that cannot be filled in, an exceeded bound.
pub(super) fn apply(
    document: Document,
    given: &Given<'_>,
    sources: &dyn Sources,
    bytes_left: &mut usize,
    notes: &mut Vec<Note>,
) -> Result<Rc<Node>, Fault> {
    let Document { spec, content } = document;
    let declared = match &spec {
        Some(spec) => declared(spec, notes).map_err(|f| f.under("spec"))?,
        None => Vec::new(),
    };
    if let Some(unknown) = given.entries.iter().find(|e| !declared.iter().any(|input| input.key == e.key)) {
        return Err(Fault::at(unknown.line, "is no input in the `spec` of the included file")
            .under(&unknown.key)
            .under("inputs"));
    }
    if spec.is_none() {
        return Ok(content);
    }
    let mut inputs = BTreeMap::new();
    for input in declared {
        let given = given.entries.iter().find(|e| e.key == input.key);
        inputs.insert(input.key.clone(), input_value(input, given).map_err(|f| f.under("inputs"))?);
    }
    let mut context = Context { inputs, sources, bytes_left };
    let filled = context.fill(&content)?;
    if filled.weight > NODES_MAX || filled.depth > DEPTH_MAX {
        return Err(Fault::at(
            content.line,
            format!("more than {NODES_MAX} values or {DEPTH_MAX} levels, with inputs filled in"),
        ));
    }
    Ok(filled)
}

/// The entries of `spec:inputs`.
fn declared<'a>(spec: &'a Entry, notes: &mut Vec<Note>) -> Result<Vec<&'a Entry>, Fault> {
    if spec.value.is_null() {
        return Ok(Vec::new());
    }
    let mut declared = Vec::new();
    for entry in spec.value.mapping()? {
        if entry.key == "inputs" {
            if !entry.value.is_null() {
                declared.extend(entry.value.mapping().map_err(|f| f.under("inputs"))?);
            }
        } else {
            let what = "is ignored: exec knows `inputs` of a header only".to_owned();
            notes.push(Note { line: entry.line, job: None, key: format!("spec:{}", entry.key), what });
        }
    }
    Ok(declared)
}

/// The value of one input: given, else its default.
fn input_value(input: &Entry, given: Option<&Entry>) -> Result<Result<Rc<Node>, String>, Fault> {
    let name = &input.key;
    let mut kind = "string".to_owned();
    let mut default = None;
    let mut options = None;
    if !input.value.is_null() {
        for entry in input.value.mapping().map_err(|f| f.under(name))? {
            match entry.key.as_str() {
                "type" => {
                    entry.value.text().map(|text| kind = text.to_owned()).map_err(|f| f.under("type").under(name))?
                }
                "default" => default = Some(entry),
                "options" => options = Some(entry.value.sequence().map_err(|f| f.under("options").under(name))?),
                "description" | "regex" | "rules" => {}
                other => {
                    return Err(Fault::at(entry.line, "is no key of an input; correct or remove it")
                        .under(other)
                        .under(name));
                }
            }
        }
    }
    if !matches!(kind.as_str(), "string" | "number" | "boolean" | "array") {
        return Err(
            Fault::at(input.line, format!("its type `{kind}` must be string, number, boolean or array")).under(name)
        );
    }
    let Some(entry) = given.or(default) else {
        return Ok(Err(format!(
            "needs input `{name}`, which has no default; exec cannot give it one: write a default"
        )));
    };
    let value = &entry.value;
    let fits = match (kind.as_str(), value.kind()) {
        ("string", Some(Kind::Text | Kind::Null)) => true,
        ("number", Some(Kind::Integer(_) | Kind::Float)) => true,
        ("boolean", Some(Kind::Boolean(_))) => true,
        ("array", None) => value.sequence().is_ok(),
        _ => false,
    };
    if let Value::Broken(what) = &value.value {
        return Ok(Err(what.clone()));
    }
    if !fits {
        return Ok(Err(format!("needs input `{name}`, whose value is {}, and its type {kind}", value.noun())));
    }
    let known = |options: &[Rc<Node>]| options.iter().any(|option| option.scalar().ok() == value.scalar().ok());
    if options.is_some_and(|options| !known(options)) {
        return Ok(Err(format!("needs input `{name}`, whose value is none of its options")));
    }
    Ok(Ok(Rc::clone(value)))
}

impl Context<'_> {
    /// `node` with each block below it filled in; shared as it is where there is none.
    fn fill(&mut self, node: &Rc<Node>) -> Result<Rc<Node>, Fault> {
        let value = match &node.value {
            Value::Scalar { text, .. } if text.contains("$[[") => self.scalar(node.line, text)?,
            Value::Scalar { .. } | Value::Tagged(_) | Value::Broken(_) => return Ok(Rc::clone(node)),
            Value::Sequence(items) => {
                let filled = items.iter().map(|n| self.fill(n)).collect::<Result<Vec<_>, _>>()?;
                if filled.iter().zip(items).all(|(a, b)| Rc::ptr_eq(a, b)) {
                    return Ok(Rc::clone(node));
                }
                Value::Sequence(filled)
            }
            Value::Mapping(entries) => {
                let mut pairs = Pairs::default();
                let mut same = true;
                for entry in entries {
                    let key =
                        if entry.key.contains("$[[") { self.key(entry.line, &entry.key)? } else { entry.key.clone() };
                    let value = self.fill(&entry.value).map_err(|f| f.under(&entry.key))?;
                    same &= key == entry.key && Rc::ptr_eq(&value, &entry.value);
                    pairs.put(Entry { line: entry.line, key, value });
                }
                if same {
                    return Ok(Rc::clone(node));
                }
                Value::Mapping(pairs.into_entries())
            }
            Value::Reference(path) if path.iter().any(|part| part.contains("$[[")) => {
                Value::Reference(path.iter().map(|part| self.key(node.line, part)).collect::<Result<_, _>>()?)
            }
            Value::Reference(_) => return Ok(Rc::clone(node)),
        };
        let filled = Node::new(node.line, value);
        // Before the next one is built of it: an input of 100,000 values may stand in many places.
        if filled.weight > NODES_MAX {
            return Err(Fault::at(node.line, format!("more than {NODES_MAX} values, with inputs filled in")));
        }
        Ok(Rc::new(filled))
    }

    /// A key must be a text, whatever job asks.
    fn key(&mut self, line: Line, text: &str) -> Result<String, Fault> {
        match self.scalar(line, text)? {
            Value::Scalar { text, .. } => Ok(text),
            Value::Broken(what) => Err(Fault::at(line, what)),
            _ => Err(Fault::at(line, "an input that is a list is no key")),
        }
    }

    /// What a scalar with blocks comes to. Blocks in what is filled in stay as they are, as in GitLab.
    fn scalar(&mut self, line: Line, text: &str) -> Result<Value, Fault> {
        let mut filled = String::new();
        let mut rest = text;
        while let Some((before, block, after)) = next_block(rest) {
            let value = match self.block(block) {
                Ok(value) => value,
                Err(what) => return Ok(Value::Broken(what)),
            };
            if before.is_empty() && after.is_empty() && filled.is_empty() {
                if let Value::Scalar { text, .. } = &value.value {
                    self.spend(line, text.len())?;
                }
                return Ok(value.value.clone());
            }
            let Value::Scalar { text, .. } = &value.value else {
                return Ok(Value::Broken(format!("`$[[ {block} ]]` is {}, which can only stand alone", value.noun())));
            };
            self.spend(line, before.len() + text.len())?;
            filled.push_str(before);
            filled.push_str(text);
            rest = after;
        }
        self.spend(line, rest.len())?;
        filled.push_str(rest);
        Ok(Value::Scalar { text: filled, plain: false })
    }

    fn spend(&mut self, line: Line, bytes: usize) -> Result<(), Fault> {
        *self.bytes_left = self.bytes_left.checked_sub(bytes).ok_or_else(|| {
            Fault::at(line, format!("more than {} MiB of text, with inputs filled in", TEXT_BYTES_MAX >> 20))
        })?;
        Ok(())
    }

    /// The value of `inputs.name | function | …`.
    fn block(&self, block: &str) -> Result<Rc<Node>, String> {
        let mut parts = block.split('|').map(str::trim);
        let access = parts.next().unwrap_or_default();
        let Some(name) = access.strip_prefix("inputs.") else {
            return Err(format!("`$[[ {access} ]]` is filled in by GitLab only; exec knows `inputs.NAME`"));
        };
        let mut value = match self.inputs.get(name) {
            Some(value) => value.clone()?,
            None => return Err(format!("`$[[ {access} ]]` names no input of the file's `spec`")),
        };
        for (at, function) in parts.enumerate() {
            if at >= FUNCTIONS_MAX {
                return Err(format!("`$[[ {block} ]]` has more than {FUNCTIONS_MAX} functions"));
            }
            let (Some(Kind::Text | Kind::Null), Value::Scalar { text, .. }) = (value.kind(), &value.value) else {
                return Err(format!("`$[[ {block} ]]`: functions take texts only, and the input is {}", value.noun()));
            };
            let text = match (function, truncation(function)) {
                ("expand_vars", _) => expand(text, self.sources),
                ("posix_escape", _) => escape(text),
                (_, Some((offset, length))) => text.chars().skip(offset).take(length).collect(),
                _ => return Err(format!("`$[[ {block} ]]`: there is no function `{function}`")),
            };
            value = Rc::new(Node::new(value.line, Value::Scalar { text, plain: false }));
        }
        Ok(value)
    }
}

/// What is before the next block, the words in it, and what is behind it.
fn next_block(text: &str) -> Option<(&str, &str, &str)> {
    let (before, rest) = text.split_once("$[[")?;
    let (block, after) = rest.split_once("]]")?;
    Some((before, block.trim(), after))
}

/// `truncate(0, 8)`.
fn truncation(function: &str) -> Option<(usize, usize)> {
    let (offset, length) = function.strip_prefix("truncate(")?.strip_suffix(')')?.split_once(',')?;
    Some((offset.trim().parse().ok()?, length.trim().parse().ok()?))
}

/// `$NAME` and `${NAME}` replaced by values that are known, as GitLab expands them in names of includes; others stay.
/// Values are not looked into again.
pub(super) fn expand(text: &str, sources: &dyn Sources) -> String {
    let mut expanded = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        expanded.push_str(before);
        let braced = after.strip_prefix('{');
        let begin = braced.unwrap_or(after);
        let end = begin.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(begin.len());
        let (name, behind) = begin.split_at(end);
        let behind = if braced.is_some() { behind.strip_prefix('}') } else { Some(behind) };
        match behind.and_then(|behind| Some((sources.variable(name)?, behind))) {
            Some((value, behind)) => {
                expanded.push_str(&value);
                rest = behind;
            }
            None => {
                expanded.push('$');
                rest = after;
            }
        }
    }
    expanded.push_str(rest);
    expanded
}

/// As Ruby's `Shellwords.escape`.
fn escape(text: &str) -> String {
    if text.is_empty() {
        return "''".to_owned();
    }
    let mut escaped = String::new();
    for c in text.chars() {
        match c {
            '\n' => escaped.push_str("'\n'"),
            c if c.is_ascii_alphanumeric() || "_-.,:+/@".contains(c) => escaped.push(c),
            c => escaped.extend(['\\', c]),
        }
    }
    escaped
}
