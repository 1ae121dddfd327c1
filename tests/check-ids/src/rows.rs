//! Rows as a page of ours lists them, one a line, by id: in order, and each once.

use crate::Wrongs;
use crate::claim::Id;
use std::collections::BTreeMap;
use std::path::Path;

/// The rows of a page, and what is wrong with the page.
#[derive(Debug)]
pub(crate) struct Rows<R> {
    file: &'static str,
    rows: BTreeMap<Id, R>,
    wrong: Wrongs,
    last: Option<Id>,
}

impl<R> Rows<R> {
    /// None yet, and the page's text; `None`: it cannot be read.
    pub(crate) fn of(root: &Path, file: &'static str) -> (Self, Option<String>) {
        let mut rows = Self { file, rows: BTreeMap::new(), wrong: Wrongs::new(), last: None };
        let text = std::fs::read_to_string(root.join(file));
        match text {
            Ok(text) => (rows, Some(text)),
            Err(error) => {
                rows.complain(1, error.to_string());
                (rows, None)
            }
        }
    }

    /// Something is wrong with this line.
    pub(crate) fn complain(&mut self, line: usize, what: String) {
        self.wrong.insert((self.file.into(), line, what));
    }

    /// The row of this line; `is_listed` is how the page says that it has one.
    pub(crate) fn put(&mut self, id: Id, line: usize, row: R, is_listed: &str) {
        if self.rows.contains_key(&id) {
            self.complain(line, format!("{id} {is_listed} twice"));
        } else if self.last.is_some_and(|last| last > id) {
            self.complain(line, format!("{id} is out of order"));
        }
        self.last = Some(id);
        self.rows.entry(id).or_insert(row);
    }

    /// Whether there is such a row.
    pub(crate) fn has(&self, id: Id) -> bool {
        self.rows.contains_key(&id)
    }

    pub(crate) fn done(self) -> (BTreeMap<Id, R>, Wrongs) {
        (self.rows, self.wrong)
    }
}
