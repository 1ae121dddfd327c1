//! Where may a test pull the plug? The named places of a job's life at which the kill harness ends the process.
//!
//! Product code says that it has reached one, with [`reached`]: a look at one pointer, which nothing in the product ever
//! sets. The harness runs a program of its own, the same daemon with [`arm`] called first (`dayfly-under-test`).
//! The places are those of the table "SIGKILL at every step" in `docs/architecture.md`.

use std::sync::OnceLock;

/// A named place in a job's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the names are those of the table; the place itself says what it is")]
pub enum Point {
    K0,
    K1,
    K2,
    K3,
    K4,
    K5,
    K6,
    K7,
    K8,
    K9,
    K10,
    K11,
    K12,
    K13,
    K14,
    K15,
    K16,
    K17,
    K18,
    K19,
    K20,
}

/// What happens at a place: set once, by the program of a test.
static ARMED: OnceLock<fn(Point)> = OnceLock::new();

/// From now on `at` is called at each place that is reached: for the programs of tests, before anything else. The first
/// call counts.
pub fn arm(at: fn(Point)) {
    let _ = ARMED.set(at);
}

/// Says that this place has been reached. Does not return if a test asked for the process to end here.
#[inline]
pub fn reached(point: Point) {
    if let Some(at) = ARMED.get() {
        at(point);
    }
}
