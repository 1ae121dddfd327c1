//! What a guest or a broken disk can bring about again and again, and the log, or the trace, shall not tell each time.

use crate::repeats::Repeats;

pub(in crate::job) struct Repeated {
    /// Phases of the boot that the guest reports.
    pub(in crate::job) phases: Repeats,
    pub(in crate::job) failures: Repeats,
    pub(super) verdict_unkept: Repeats,
    pub(super) hand_out_unkept: Repeats,
    pub(super) record_unkept: Repeats,
}

impl Default for Repeated {
    fn default() -> Self {
        Self {
            phases: Repeats::new("boot goes on"),
            failures: Repeats::new("guest could not do its part"),
            verdict_unkept: Repeats::new("keep the guest's verdict; it is asked to send it again"),
            hand_out_unkept: Repeats::new("write the hand-out down"),
            record_unkept: Repeats::new("write the job's record"),
        }
    }
}
