//! Would our tests notice? Bugs planted on purpose, one at a time, for the simulation to find.
//!
//! Each stands next to the right code, as `if planted::on(Bug::…)`. Without the feature `test-util`, [`on`] is the
//! constant `false`, and nothing of a bug is compiled in. The switch is the process's: a run with a planted bug is a
//! process of its own, or has its turn alone.

/// A mistake that somebody could make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Bug {
    /// The verdict is sent a second time, as another state.
    DoubleReport = 1,
}

impl Bug {
    /// All of them, in the order in which they are tried.
    pub const ALL: &'static [Self] = &[Self::DoubleReport];
}

#[cfg(any(test, feature = "test-util"))]
static ON: std::sync::atomic::AtomicU8 = std::sync::atomic::AtomicU8::new(0);

/// Whether this bug is switched on.
#[cfg(not(any(test, feature = "test-util")))]
#[inline]
pub(crate) const fn on(_: Bug) -> bool {
    false
}

/// Whether this bug is switched on.
#[cfg(any(test, feature = "test-util"))]
pub(crate) fn on(bug: Bug) -> bool {
    ON.load(std::sync::atomic::Ordering::Relaxed) == bug as u8
}

/// Switches one bug on, and the one before it off; `None`: all off.
#[cfg(any(test, feature = "test-util"))]
pub fn plant(bug: Option<Bug>) {
    ON.store(bug.map_or(0, |bug| bug as u8), std::sync::atomic::Ordering::Relaxed);
}
