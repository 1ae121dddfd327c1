//! How many machines of jobs that failed are kept, of which class? One of the things that jobs share: a mutex around some
//! numbers, held for a line.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The numbers, by class. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Keeps(Arc<Mutex<BTreeMap<String, u32>>>);

/// One of them; given back when dropped.
#[derive(Debug)]
pub(super) struct Keep {
    of: Keeps,
    class: String,
}

impl Keeps {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, u32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more of this class, if there are fewer than `most`.
    pub(super) fn take(&self, class: &str, most: u32) -> Option<Keep> {
        let mut keeps = self.lock();
        let count = keeps.entry(class.to_owned()).or_default();
        if *count >= most {
            return None;
        }
        *count += 1;
        Some(Keep { of: self.clone(), class: class.to_owned() })
    }

    /// One that a former daemon has begun to keep: it is there, however many there are.
    pub(super) fn adopt(&self, class: &str) -> Keep {
        *self.lock().entry(class.to_owned()).or_default() += 1;
        Keep { of: self.clone(), class: class.to_owned() }
    }
}

impl Drop for Keep {
    fn drop(&mut self) {
        let mut keeps = self.of.lock();
        if let Some(count) = keeps.get_mut(&self.class) {
            *count -= 1;
            if *count == 0 {
                keeps.remove(&self.class);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_are_kept_than_may_be_and_one_that_goes_makes_room() {
        let keeps = Keeps::default();
        let first = keeps.take("a", 1).unwrap();
        assert!(keeps.take("a", 1).is_none() && keeps.take("b", 1).is_some());
        let adopted = keeps.adopt("a");
        drop(first);
        assert!(keeps.take("a", 1).is_none(), "one of before counts");
        drop(adopted);
        assert!(keeps.take("a", 1).is_some());
        assert!(keeps.lock().is_empty(), "nothing is left of those that are gone");
    }
}
