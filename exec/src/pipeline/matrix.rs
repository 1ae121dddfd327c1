//! `parallel`: one key of the file that is several jobs, `test 1/4` or `test: [linux, 3.11]`.
//!
//! Names, order and variables are GitLab's (CI/CD YAML syntax reference, `parallel:matrix`): all combinations of each
//! entry's values, the last variable changing quickest, at most 200.

use super::error::Fault;
use super::model::Variable;
use super::node::{Kind, Node};

/// Jobs of one key at most, as in GitLab.
const JOBS_MAX: usize = 200;
/// Names that a message shows.
pub(super) const SHOWN_MAX: usize = 10;

/// One of several jobs of a key.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Variant {
    pub(super) name: String,
    /// From 1.
    pub(super) index: usize,
    pub(super) total: usize,
    /// Those of the matrix; they win over the job's own.
    pub(super) variables: Vec<Variable>,
}

/// What `parallel` makes of the job `key`; `None`: one job, whose name the key is.
pub(super) fn variants(key: &str, parallel: &Node) -> Result<Option<Vec<Variant>>, Fault> {
    if parallel.mapping().is_err() {
        let total = usize::try_from(parallel.integer()?).unwrap_or(0);
        if !(1..=JOBS_MAX).contains(&total) {
            return Err(Fault::at(parallel.line, format!("must be between 1 and {JOBS_MAX}")));
        }
        let variant = |index| Variant { name: format!("{key} {index}/{total}"), index, total, variables: Vec::new() };
        return Ok(Some((1..=total).map(variant).collect()));
    }
    for entry in parallel.mapping()? {
        if entry.key != "matrix" {
            return Err(Fault::at(entry.line, "is no key of `parallel`; it has `matrix`").under(&entry.key));
        }
    }
    let Some(matrix) = parallel.get("matrix") else { return Err(Fault::at(parallel.line, "has no `matrix`")) };
    let combinations = combinations(&matrix.value).map_err(|f| f.under("matrix"))?;
    let total = combinations.len();
    let variant = |(at, variables): (usize, Vec<Variable>)| Variant {
        name: name(key, &variables),
        index: at + 1,
        total,
        variables,
    };
    Ok(Some(combinations.into_iter().enumerate().map(variant).collect()))
}

/// Names of the jobs of `key` that `needs:parallel` means.
pub(super) fn names(key: &str, parallel: &Node) -> Result<Vec<String>, Fault> {
    Ok(variants(key, parallel)?.into_iter().flatten().map(|variant| variant.name).collect())
}

fn name(key: &str, variables: &[Variable]) -> String {
    let values: Vec<&str> = variables.iter().map(|v| v.value.as_str()).collect();
    format!("{key}: [{}]", values.join(", "))
}

fn combinations(matrix: &Node) -> Result<Vec<Vec<Variable>>, Fault> {
    let mut all: Vec<Vec<Variable>> = Vec::new();
    let too_many = || Fault::at(matrix.line, format!("makes more than {JOBS_MAX} jobs"));
    for item in matrix.sequence()? {
        let mut of_item: Vec<Vec<Variable>> = vec![Vec::new()];
        for entry in item.mapping()? {
            let under = |f: Fault| f.under(&entry.key);
            let values = match entry.value.sequence() {
                Ok(items) => items.iter().map(|n| value(n)).collect::<Result<Vec<_>, _>>().map_err(under)?,
                Err(_) => vec![value(&entry.value).map_err(under)?],
            };
            if of_item.len().saturating_mul(values.len()) > JOBS_MAX {
                return Err(too_many());
            }
            let mut longer = Vec::new();
            for before in &of_item {
                for value in &values {
                    let mut variables = before.clone();
                    variables.push(Variable { key: entry.key.clone(), value: value.clone(), raw: false });
                    longer.push(variables);
                }
            }
            of_item = longer;
        }
        all.extend(of_item.into_iter().filter(|variables| !variables.is_empty()));
        if all.len() > JOBS_MAX {
            return Err(too_many());
        }
    }
    if all.is_empty() {
        return Err(Fault::at(matrix.line, "has no variables with values"));
    }
    Ok(all)
}

/// A value as GitLab writes it into the name: a text, or a number in its usual form.
fn value(node: &Node) -> Result<String, Fault> {
    match node.kind() {
        Some(Kind::Integer(number)) => Ok(number.to_string()),
        // `3.10` is the number 3.1.
        Some(Kind::Float) => {
            node.scalar().map(|text| text.parse::<f64>().map_or(text.to_owned(), |n| format!("{n:?}")))
        }
        _ => node.text().map(str::to_owned),
    }
}
