//! Panics of a run's tasks: caught by Tokio, kept here, for a panic is a bug whoever catches it.

use std::cell::RefCell;

/// What panics say that were made on purpose.
pub(crate) const INJECTED: &str = "injected panic";

thread_local! {
    static PANICS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// From now on panics are kept, and not printed.
pub(crate) fn watch() {
    std::panic::set_hook(Box::new(|info| {
        let text = info.to_string().replace('\n', " ");
        if text.contains(INJECTED) {
            return;
        }
        PANICS.with(|panics| panics.borrow_mut().push(text));
    }));
}

/// Those of this thread since the last call.
pub(crate) fn take() -> Vec<String> {
    PANICS.with(|panics| std::mem::take(&mut *panics.borrow_mut()))
}
