//! A YAML document as a tree that remembers its lines.
//!
//! Aliases share their target, so a document of a mebibyte cannot grow in memory; `weight` counts
//! what it would be written out, and [`super::parse`] bounds that.

use super::error::{Fault, Line};
use std::collections::BTreeMap;
use std::rc::Rc;

/// One value and where it begins.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Node {
    /// Where it begins.
    pub(super) line: Line,
    /// Nodes below it and itself, aliases written out.
    pub(super) weight: usize,
    /// Levels of lists and mappings, itself included.
    pub(super) depth: usize,
    /// What it is.
    pub(super) value: Value,
}

/// What a node is.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    /// A scalar; `plain` if it had no quotes and so may be a number, a boolean or null.
    Scalar { text: String, plain: bool },
    /// A sequence.
    Sequence(Vec<Rc<Node>>),
    /// A mapping, in order, each key once.
    Mapping(Vec<Entry>),
    /// `!reference [job, key, …]`.
    Reference(Vec<String>),
    /// Any other tag: an error where it is read.
    Tagged(String),
    /// What an input could not be filled in for: an error, in these words, where it is read.
    Broken(String),
}

/// One pair of a mapping.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    /// Line of the key.
    pub(super) line: Line,
    pub(super) key: String,
    pub(super) value: Rc<Node>,
}

/// A mapping being put together: order is kept, and finding a key is quick however many there are.
#[derive(Default)]
pub(super) struct Pairs {
    entries: Vec<Entry>,
    index: BTreeMap<String, usize>,
}

impl Pairs {
    /// A key that stands twice counts where it stands last, as in GitLab.
    pub(super) fn put(&mut self, entry: Entry) {
        match self.index.get(&entry.key).and_then(|at| self.entries.get_mut(*at)) {
            Some(old) => *old = entry,
            None => {
                self.index.insert(entry.key.clone(), self.entries.len());
                self.entries.push(entry);
            }
        }
    }

    pub(super) fn get(&self, key: &str) -> Option<&Entry> {
        self.index.get(key).and_then(|at| self.entries.get(*at))
    }

    pub(super) fn into_entries(self) -> Vec<Entry> {
        self.entries
    }
}

/// What a scalar means to GitLab's YAML reader, which knows YAML 1.1.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Kind {
    Null,
    Boolean(bool),
    Integer(i128),
    Float,
    Text,
}

impl Node {
    /// A node of our own making at `line`.
    pub(super) fn new(line: Line, value: Value) -> Self {
        let sum = |children: &mut dyn Iterator<Item = &Rc<Node>>| {
            children.fold((1_usize, 1), |(weight, depth), n| (weight.saturating_add(n.weight), depth.max(n.depth + 1)))
        };
        let (weight, depth) = match &value {
            Value::Sequence(items) => sum(&mut items.iter()),
            Value::Mapping(entries) => sum(&mut entries.iter().map(|e| &e.value)),
            Value::Scalar { .. } | Value::Reference(_) | Value::Tagged(_) | Value::Broken(_) => (1, 0),
        };
        Self { line, weight, depth, value }
    }

    /// The first value at or below this one that could not be filled in.
    pub(super) fn broken(&self) -> Option<Fault> {
        match &self.value {
            Value::Broken(what) => Some(Fault::at(self.line, what)),
            Value::Sequence(items) => items.iter().find_map(|n| n.broken()),
            Value::Mapping(entries) => entries.iter().find_map(|e| e.value.broken().map(|f| f.under(&e.key))),
            Value::Scalar { .. } | Value::Reference(_) | Value::Tagged(_) => None,
        }
    }

    /// That this is something else than what it `must` be.
    fn wrong(&self, must: &str) -> Fault {
        match &self.value {
            Value::Broken(what) => Fault::at(self.line, what),
            _ => Fault::at(self.line, format!("is {}, must be {must}", self.noun())),
        }
    }

    /// The entry of `key`, if this is a mapping that has it with a value other than null: in
    /// GitLab, null is how a job drops what it would inherit.
    pub(super) fn get(&self, key: &str) -> Option<&Entry> {
        self.entry(key).filter(|e| !e.value.is_null())
    }

    /// The entry of `key`, null or not.
    pub(super) fn entry(&self, key: &str) -> Option<&Entry> {
        match &self.value {
            Value::Mapping(entries) => entries.iter().find(|e| e.key == key),
            _ => None,
        }
    }

    pub(super) fn is_null(&self) -> bool {
        matches!(self.kind(), Some(Kind::Null))
    }

    /// Meaning of a scalar; `None` for anything else.
    pub(super) fn kind(&self) -> Option<Kind> {
        match &self.value {
            Value::Scalar { text, plain: true } => Some(plain_kind(text)),
            Value::Scalar { .. } => Some(Kind::Text),
            _ => None,
        }
    }

    /// For messages: what this is.
    pub(super) fn noun(&self) -> String {
        match (&self.value, self.kind()) {
            (Value::Sequence(_), _) => "a list".into(),
            (Value::Mapping(_), _) => "a mapping".into(),
            (Value::Reference(_), _) => "a !reference".into(),
            (Value::Tagged(tag), _) => format!("tagged {tag}, a tag that GitLab does not know"),
            (Value::Broken(what), _) => what.clone(),
            (Value::Scalar { .. }, Some(Kind::Null)) => "empty".into(),
            (Value::Scalar { text, .. }, Some(Kind::Boolean(_))) => format!("the boolean {text}"),
            (Value::Scalar { text, .. }, Some(Kind::Integer(_) | Kind::Float)) => format!("the number {text}"),
            (Value::Scalar { .. }, _) => "a text".into(),
        }
    }

    /// A text that YAML takes for text.
    pub(super) fn text(&self) -> Result<&str, Fault> {
        match &self.value {
            Value::Scalar { text, .. } if self.kind() == Some(Kind::Text) => Ok(text),
            Value::Scalar { .. } => Err(self.wrong("a text; put it in quotes")),
            _ => Err(self.wrong("a text")),
        }
    }

    /// Any scalar, as it is written.
    pub(super) fn scalar(&self) -> Result<&str, Fault> {
        match &self.value {
            Value::Scalar { text, .. } => Ok(text),
            _ => Err(self.wrong("a text or a number")),
        }
    }

    pub(super) fn boolean(&self) -> Result<bool, Fault> {
        match self.kind() {
            Some(Kind::Boolean(value)) => Ok(value),
            _ => Err(self.wrong("true or false")),
        }
    }

    pub(super) fn integer(&self) -> Result<i128, Fault> {
        match self.kind() {
            Some(Kind::Integer(value)) => Ok(value),
            _ => Err(self.wrong("a whole number")),
        }
    }

    pub(super) fn sequence(&self) -> Result<&[Rc<Node>], Fault> {
        match &self.value {
            Value::Sequence(items) => Ok(items),
            _ => Err(self.wrong("a list")),
        }
    }

    pub(super) fn mapping(&self) -> Result<&[Entry], Fault> {
        match &self.value {
            Value::Mapping(entries) => Ok(entries),
            _ => Err(self.wrong("a mapping")),
        }
    }

    /// A list of texts.
    pub(super) fn texts(&self) -> Result<Vec<String>, Fault> {
        self.sequence()?.iter().map(|n| n.text().map(str::to_owned)).collect()
    }

    /// A list of texts, or one of them alone.
    pub(super) fn text_or_texts(&self) -> Result<Vec<String>, Fault> {
        match &self.value {
            Value::Sequence(_) => self.texts(),
            _ => Ok(vec![self.text()?.to_owned()]),
        }
    }
}

/// The rules of Ruby's YAML reader (psych, `scalar_scanner.rb`), which GitLab uses: YAML 1.1, so
/// `on` is a boolean and `0755` is 493.
fn plain_kind(text: &str) -> Kind {
    let lower = text.to_ascii_lowercase();
    match lower.as_str() {
        "" | "~" | "null" => return Kind::Null,
        "true" | "yes" | "on" => return Kind::Boolean(true),
        "false" | "no" | "off" => return Kind::Boolean(false),
        ".inf" | "+.inf" | "-.inf" | ".nan" => return Kind::Float,
        _ => {}
    }
    let (sign, digits) = match lower.strip_prefix(['-', '+']) {
        Some(digits) => (if lower.starts_with('-') { -1 } else { 1 }, digits),
        None => (1, lower.as_str()),
    };
    if !digits.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return Kind::Text;
    }
    let plain: String = digits.chars().filter(|c| !matches!(c, '_' | ',')).collect();
    let (radix, number) = match plain.as_bytes() {
        [b'0', b'x', ..] => (16, &plain[2..]),
        [b'0', b'b', ..] => (2, &plain[2..]),
        [b'0', _, ..] => (8, &plain[1..]),
        _ => (10, plain.as_str()),
    };
    if !number.is_empty() && number.chars().all(|c| c.is_digit(radix)) {
        // More than 38 digits: a number all the same, and nobody's intention.
        return i128::from_str_radix(number, radix).map_or(Kind::Float, |n| Kind::Integer(sign * n));
    }
    let float =
        plain.contains(|c: char| c.is_ascii_digit()) && plain.parse::<f64>().is_ok() && plain.contains(['.', 'e']);
    if float { Kind::Float } else { Kind::Text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_scalars_mean_what_they_mean_to_gitlab() {
        for (text, kind) in [
            ("", Kind::Null),
            ("~", Kind::Null),
            ("Null", Kind::Null),
            ("yes", Kind::Boolean(true)),
            ("Off", Kind::Boolean(false)),
            ("0", Kind::Integer(0)),
            ("-17", Kind::Integer(-17)),
            ("0755", Kind::Integer(493)),
            ("0x1F", Kind::Integer(31)),
            ("1_000", Kind::Integer(1000)),
            ("1.10", Kind::Float),
            ("1e3", Kind::Float),
            (".5", Kind::Float),
            ("1.2.3", Kind::Text),
            ("0899", Kind::Text),
            ("echo 1", Kind::Text),
            ("1h", Kind::Text),
            ("12 apples", Kind::Text),
            ("-", Kind::Text),
            ("truer", Kind::Text),
            (".", Kind::Text),
            ("inf", Kind::Text),
        ] {
            assert_eq!(plain_kind(text), kind, "{text:?}");
        }
    }
}
