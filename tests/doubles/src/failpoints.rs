//! Where the kill harness ends a daemon: the environment names one of the product's failpoints, and a visit of it.
//!
//! There the process ends itself by SIGKILL, so that nothing after that line has happened, not even a destructor.

use dayfly::failpoint::{self, Point};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Names the place at which this process ends: `K8`, or `K8:3` for the third time that it is reached.
pub const VARIABLE: &str = "DAYFLY_FAILPOINT";

/// How the line on standard error begins that says where the process ended itself; the place's name follows.
pub const DIED_AT: &str = "dayfly: failpoint ";

/// Arms the place that [`VARIABLE`] names, if it names one.
pub fn arm() {
    if ASKED.is_some() {
        failpoint::arm(at);
    }
}

static ASKED: LazyLock<Option<(String, u64)>> = LazyLock::new(|| {
    let asked = std::env::var(VARIABLE).ok()?;
    let (name, visit) = asked.split_once(':').unwrap_or((&asked, "1"));
    Some((name.to_owned(), visit.parse().unwrap_or(1)))
});

fn at(point: Point) {
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
