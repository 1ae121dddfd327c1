//! `extends` and `!reference`, in GitLab's order: a job is merged with what it extends first, then
//! references are filled in, and those see other jobs merged as well.
//!
//! Only what is asked for is resolved, so a job that cannot be read harms no other.
//! GitLab's limits: 11 levels of `extends`, 10 references inside each other.

use super::error::{Fault, Line};
use super::node::{Entry, Node, Pairs, Value};
use super::parse::NODES_MAX;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// Levels that a job may inherit through.
const EXTENDS_DEPTH_MAX: usize = 11;
/// References inside references.
const REFERENCE_DEPTH_MAX: usize = 10;

/// Resolves parts of one document.
pub(super) struct Resolver {
    root: Rc<Node>,
    /// Jobs merged already.
    merged: RefCell<BTreeMap<String, Rc<Node>>>,
    /// Nodes that resolving may still make: references can grow like aliases.
    budget: RefCell<usize>,
    /// What is added where something is missing that an include which is not read may have.
    hint: String,
}

impl Resolver {
    /// `hint` goes on with the message of what is missing; it may be empty.
    pub(super) fn new(root: Rc<Node>, hint: String) -> Self {
        Self { root, merged: RefCell::default(), budget: RefCell::new(NODES_MAX), hint }
    }

    /// What is added where something is missing.
    pub(super) fn hint(&self) -> &str {
        &self.hint
    }

    /// As much room as at first: for one more job that has nothing to do with the others.
    pub(super) fn refill(&self) {
        *self.budget.borrow_mut() = NODES_MAX;
    }

    pub(super) fn root(&self) -> &Node {
        &self.root
    }

    /// A top-level entry (a job, `default`, `variables`), merged and with references filled in.
    pub(super) fn top(&self, name: &str) -> Result<Option<Entry>, Fault> {
        let Some(entry) = self.root.get(name) else { return Ok(None) };
        let merged = self.extended(name, &mut Vec::new())?.unwrap_or_else(|| Rc::clone(&entry.value));
        let value = self.references(&merged, &mut Vec::new())?;
        Ok(Some(Entry { line: entry.line, key: entry.key.clone(), value }))
    }

    /// Top-level entry `name` merged with what it extends; `None` if there is none. `chain` holds
    /// the names being merged.
    fn extended(&self, name: &str, chain: &mut Vec<String>) -> Result<Option<Rc<Node>>, Fault> {
        if let Some(done) = self.merged.borrow().get(name) {
            return Ok(Some(Rc::clone(done)));
        }
        let Some(entry) = self.root.entry(name) else { return Ok(None) };
        let Some(extends) = entry.value.get("extends") else { return Ok(Some(Rc::clone(&entry.value))) };
        let fault = |what: String| Err(Fault::at(extends.line, what).under("extends").of_job(name));
        if chain.iter().any(|n| n == name) {
            return fault(format!("a circle: {} extends {name}", chain.join(" extends ")));
        }
        if chain.len() >= EXTENDS_DEPTH_MAX {
            return fault(format!("more than {EXTENDS_DEPTH_MAX} levels"));
        }
        let bases = extends.value.text_or_texts().map_err(|f| f.under("extends").of_job(name))?;
        chain.push(name.to_owned());
        let mut merged: Option<Rc<Node>> = None;
        for base in &bases {
            let Some(next) = self.extended(base, chain)? else {
                return fault(format!("there is no `{base}` in this file{}", self.hint));
            };
            if next.mapping().is_err() {
                return fault(format!("`{base}` is {}, no job", next.noun()));
            }
            merged = Some(match merged {
                Some(merged) => self.deep_merge(&merged, &next)?,
                None => next,
            });
        }
        chain.pop();
        let merged = match merged {
            Some(merged) => self.deep_merge(&merged, &entry.value)?,
            None => Rc::clone(&entry.value),
        };
        self.merged.borrow_mut().insert(name.to_owned(), Rc::clone(&merged));
        Ok(Some(merged))
    }

    fn deep_merge(&self, base: &Rc<Node>, over: &Rc<Node>) -> Result<Rc<Node>, Fault> {
        deep_merge(base, over, &mut |line| self.spend(line))
    }

    /// `node` with each reference below it replaced. `chain` holds the references being filled in.
    fn references(&self, node: &Rc<Node>, chain: &mut Vec<Vec<String>>) -> Result<Rc<Node>, Fault> {
        self.spend(node.line)?;
        let value = match &node.value {
            Value::Scalar { .. } | Value::Tagged(_) | Value::Broken(_) => return Ok(Rc::clone(node)),
            Value::Sequence(items) => {
                Value::Sequence(items.iter().map(|n| self.references(n, chain)).collect::<Result<_, _>>()?)
            }
            Value::Mapping(entries) => {
                let mut filled = Vec::with_capacity(entries.len());
                for entry in entries {
                    let value = self.references(&entry.value, chain).map_err(|f| f.under(&entry.key))?;
                    filled.push(Entry { line: entry.line, key: entry.key.clone(), value });
                }
                Value::Mapping(filled)
            }
            Value::Reference(path) => return self.reference(node.line, path, chain),
        };
        Ok(Rc::new(Node::new(node.line, value)))
    }

    fn reference(&self, line: Line, path: &[String], chain: &mut Vec<Vec<String>>) -> Result<Rc<Node>, Fault> {
        let fault = |what: &str| Err(Fault::at(line, format!("!reference [{}] {what}", path.join(", "))));
        if chain.iter().any(|p| p == path) {
            return fault("leads back to itself");
        }
        if chain.len() >= REFERENCE_DEPTH_MAX {
            return fault(&format!("is nested deeper than {REFERENCE_DEPTH_MAX} references"));
        }
        let mut names = path.iter();
        let mut target = match names.next() {
            Some(first) => self.extended(first, &mut Vec::new())?,
            None => None,
        };
        for name in names {
            target = target.and_then(|node| node.entry(name).map(|e| Rc::clone(&e.value)));
        }
        let Some(target) = target else {
            return fault(&format!("is not in this file{}", self.hint));
        };
        chain.push(path.to_vec());
        let filled = self.references(&target, chain)?;
        chain.pop();
        Ok(filled)
    }

    fn spend(&self, line: Line) -> Result<(), Fault> {
        let mut budget = self.budget.borrow_mut();
        *budget = budget.checked_sub(1).ok_or_else(|| {
            Fault::at(line, format!("more than {NODES_MAX} values, with extends and references written out"))
        })?;
        Ok(())
    }
}

/// Mappings are merged key by key; anything else of `over` replaces what `base` has. `spend` is asked for each entry.
pub(super) fn deep_merge(
    base: &Rc<Node>,
    over: &Rc<Node>,
    spend: &mut dyn FnMut(Line) -> Result<(), Fault>,
) -> Result<Rc<Node>, Fault> {
    let (Value::Mapping(base_entries), Value::Mapping(over_entries)) = (&base.value, &over.value) else {
        return Ok(Rc::clone(over));
    };
    let mut pairs = Pairs::default();
    for entry in base_entries {
        spend(entry.line)?;
        pairs.put(entry.clone());
    }
    for entry in over_entries {
        spend(entry.line)?;
        let value = match pairs.get(&entry.key) {
            Some(old) => deep_merge(&Rc::clone(&old.value), &entry.value, spend)?,
            None => Rc::clone(&entry.value),
        };
        pairs.put(Entry { line: entry.line, key: entry.key.clone(), value });
    }
    Ok(Rc::new(Node::new(over.line, Value::Mapping(pairs.into_entries()))))
}

#[cfg(test)]
mod tests {
    use super::super::parse::parse;
    use super::*;

    fn of(text: &str) -> Resolver {
        Resolver::new(parse(text, 0).unwrap().content, String::new())
    }

    fn check(text: &str, name: &str, expected: &str) {
        let resolver = Resolver::new(parse(text, 0).unwrap().content, String::new());
        let shown = match resolver.top(name) {
            Ok(entry) => entry.map_or("none".into(), |e| show(&e.value)),
            Err(fault) => format!("error {fault}"),
        };
        assert_eq!(shown, expected, "{text}");
    }

    fn show(node: &Node) -> String {
        match &node.value {
            Value::Scalar { text, .. } => text.clone(),
            Value::Sequence(items) => format!("[{}]", items.iter().map(|n| show(n)).collect::<Vec<_>>().join(" ")),
            Value::Mapping(entries) => {
                let pairs = entries.iter().filter(|e| e.key != "extends");
                format!("{{{}}}", pairs.map(|e| format!("{}={}", e.key, show(&e.value))).collect::<Vec<_>>().join(" "))
            }
            Value::Reference(_) | Value::Tagged(_) | Value::Broken(_) => "unresolved".into(),
        }
    }

    #[test]
    fn a_job_is_merged_with_what_it_extends() {
        let text = "
.a: {script: [a], variables: {X: 1, Y: 1}}
.b: {script: [b], variables: {Y: 2}, stage: s}
.c: {extends: .b, stage: t}
one: {extends: .a, variables: {Z: 3}}
both: {extends: [.a, .c], script: [own], stage: }
";
        check(text, "one", "{script=[a] variables={X=1 Y=1 Z=3}}");
        check(text, "both", "{script=[own] variables={X=1 Y=2} stage=}");
    }

    #[test]
    fn references_see_merged_jobs_and_may_nest() {
        let text = "
.base: {script: [base, deep]}
.x: {extends: .base}
.y: {script: [!reference [.x, script], y]}
job:
  script:
    - !reference [.y, script]
    - z
  variables: {A: !reference [.v, A]}
.v: {A: 1}
";
        check(text, "job", "{script=[[[base deep] y] z] variables={A=1}}");
    }

    #[test]
    fn wrong_references_and_bases_are_named_with_their_line() {
        check("a: {extends: .b}", "a", "error 1: job `a`: key `extends`: there is no `.b` in this file");
        check(
            "a: {extends: b}\nb: {extends: a}",
            "a",
            "error 1: job `a`: key `extends`: a circle: a extends b extends a",
        );
        check(".s: [x]\na: {extends: .s}", "a", "error 2: job `a`: key `extends`: `.s` is a list, no job");
        check(
            "a:\n  script:\n    - !reference [.b, script]",
            "a",
            "error 3: key `script`: !reference [.b, script] is not in this file",
        );
        check(
            ".b: {script: !reference [.b, script]}\na: {script: !reference [.b, script]}",
            "a",
            "error 1: key `script`: !reference [.b, script] leads back to itself",
        );
    }

    #[test]
    fn other_jobs_are_not_looked_at() {
        check("a: {script: [x]}\nbroken: {extends: .nothing, script: !reference [.no, way]}", "a", "{script=[x]}");
    }

    #[test]
    fn depth_and_growth_have_an_end() {
        let chain = |levels: usize| {
            let jobs: String = (0..levels).map(|n| format!("j{n}: {{extends: j{}}}\n", n + 1)).collect();
            of(&format!("{jobs}j{levels}: {{script: [x]}}\n")).top("j0")
        };
        assert!(chain(11).is_ok());
        assert_eq!(chain(12).unwrap_err().what, "more than 11 levels");

        let nested = |levels: usize| {
            let jobs: String =
                (0..levels).map(|n| format!("j{n}: {{script: [!reference [j{}, script]]}}\n", n + 1)).collect();
            of(&format!("{jobs}j{levels}: {{script: [x]}}\n")).top("j0")
        };
        assert!(nested(10).is_ok());
        assert!(nested(11).unwrap_err().what.ends_with("is nested deeper than 10 references"));

        let wide: String = (0..9)
            .map(|n| format!("j{n}: {{s: [{}]}}\n", vec![format!("!reference [j{}, s]", n + 1); 10].join(", ")))
            .collect();
        let grown = of(&format!("{wide}j9: {{s: [x]}}\n")).top("j0");
        assert_eq!(grown.unwrap_err().what, "more than 100000 values, with extends and references written out");
    }
}
