//! Where may a test pull the plug? The named places of a job's life at which the kill harness ends the process.
//!
//! Product code says that it has reached one, with [`reached`]; without the feature `test-util` that is nothing at
//! all. With it, the environment variable [`VARIABLE`] names one place and which visit of it counts, `K8` or `K8:3`:
//! there the process ends itself by SIGKILL, so that nothing after that line has happened, not even a destructor.
//! The places are those of the table "SIGKILL at every step" in `docs/architecture.md`.

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
}

/// Names the place at which this process ends: `K8`, or `K8:3` for the third time that it is reached.
#[cfg(feature = "test-util")]
pub const VARIABLE: &str = "DAYFLY_FAILPOINT";

/// How the line on standard error begins that says where the process ended itself; the place's name follows.
#[cfg(feature = "test-util")]
pub const DIED_AT: &str = "dayfly: failpoint ";

/// Says that this place has been reached. Does not return if a test asked for the process to end here.
#[cfg(not(feature = "test-util"))]
#[inline]
pub(crate) const fn reached(_: Point) {}

/// Says that this place has been reached. Does not return if a test asked for the process to end here.
#[cfg(feature = "test-util")]
pub(crate) fn reached(point: Point) {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    static ASKED: LazyLock<Option<(String, u64)>> = LazyLock::new(|| {
        let asked = std::env::var(VARIABLE).ok()?;
        let (name, visit) = asked.split_once(':').unwrap_or((&asked, "1"));
        Some((name.to_owned(), visit.parse().unwrap_or(1)))
    });
    static VISITS: AtomicU64 = AtomicU64::new(0);

    let Some((name, visit)) = ASKED.as_ref() else { return };
    if *name == format!("{point:?}") && VISITS.fetch_add(1, Ordering::SeqCst) + 1 == *visit {
        // For whoever asked: it was this place, and no other SIGKILL.
        let _ = rustix::io::write(rustix::stdio::stderr(), format!("{DIED_AT}{name}\n").as_bytes());
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        // The signal is on its way; nothing more of this process may happen meanwhile.
        loop {
            std::hint::spin_loop();
        }
    }
}
