//! What is known of one job, and of one VM.

use super::At;
use crate::plan::Script;
use dayfly::gitlab::JobId;
use dayfly::job::journal::Record;
use dayfly_exec::standin::JobState;
use std::sync::Arc;

/// One job.
pub(crate) struct JobNote {
    pub(crate) script: Arc<Script>,
    pub(crate) token: String,
    /// Payloads that reached the daemon whole.
    pub(crate) payloads: Vec<Vec<u8>>,
    pub(crate) assigned_at: Option<At>,
    /// Why GitLab may have to give it up by itself, or hold another trace than ours.
    pub(crate) lost: Option<&'static str>,
    /// Why GitLab's trace need not be ours.
    pub(crate) trace_spoilt: Option<&'static str>,
    /// The durable record.
    pub(crate) record: Option<Record>,
    pub(crate) had_record: bool,
    /// Since when its record says that its machine is kept.
    pub(crate) kept_since: Option<At>,
    /// And since when it says so no longer.
    pub(crate) kept_over: Option<At>,
    pub(crate) record_gone_at: Option<At>,
    /// The spool, when it was removed.
    pub(crate) spool: Option<Vec<u8>>,
    /// A write or read of its spool failed.
    pub(crate) spool_failed: bool,
    /// Its spool reached its bound.
    pub(crate) full: bool,
    /// It was refused, not run: its trace at GitLab was never in a spool.
    pub(crate) refused: bool,
    pub(crate) had_spool: bool,
    /// Its record on disk is behind what its task knows, since then.
    pub(crate) record_stale: Option<At>,
    /// It was so when a life ended, for so long that the end of the job may have been told without it.
    pub(crate) begun_anew: bool,
    /// Any file of its failed.
    pub(crate) files_failed: Option<At>,
    pub(crate) vms: Vec<String>,
    /// VMs that were given the payload, with the time.
    pub(crate) handed: Vec<(String, At)>,
    pub(crate) printed: Vec<u8>,
    pub(crate) taken: usize,
    /// PUTs of `running` so far.
    pub(crate) words: u32,
    pub(crate) guest_spoke_at: Option<At>,
    /// When it last asked for a cache, or was answered.
    pub(crate) guest_called_at: Option<At>,
    pub(crate) verdict_said: Option<(String, Option<String>)>,
    pub(crate) verdict_taken: Option<(String, At)>,
    /// Verdicts that the daemon sent.
    pub(crate) sent: Vec<(At, String, Option<String>)>,
    /// GitLab's newest state, and when it was over there.
    pub(crate) state: JobState,
    pub(crate) over_at: Option<At>,
    /// When the daemon learnt that it is being canceled, or over.
    pub(crate) canceling_known: Option<At>,
    pub(crate) over_known: Option<At>,
    /// What users did to it.
    pub(crate) users: Option<(&'static str, At)>,
    pub(crate) killed_at: Option<At>,
    /// Its VM met something that may end it: when, and what.
    pub(crate) mishap: Option<(&'static str, At)>,
    /// The same for a VM that held the payload.
    pub(crate) lost_running: Option<At>,
    /// When a task of it was made to panic last.
    pub(crate) panicked: Option<At>,
    pub(crate) transfers: u32,
    pub(crate) forwarded: u32,
    pub(crate) uploaded: Vec<usize>,
    /// Sizes of artifacts that its guest meant to upload.
    pub(crate) meant: Vec<usize>,
    /// A call to the hypervisor about one of its VMs failed.
    pub(crate) vm_call_failed: bool,
    /// Verdicts that GitLab took.
    pub(crate) verdicts: u32,
    pub(crate) changed_after_end: bool,
    /// It ended at GitLab without a verdict.
    pub(crate) over_by_gitlab: bool,
    /// Why GitLab's own workers ended it, if they did.
    pub(crate) gitlab_gave_up: Option<String>,
    pub(crate) erased: bool,
    /// GitLab has noted a verdict, and is still storing the trace.
    pub(crate) noted: bool,
    /// Where its guest's bytes begin in the spool, by its record.
    pub(crate) guest_base: Option<u64>,
    /// At the end: GitLab's copy.
    pub(crate) held_trace: Vec<u8>,
    pub(crate) artifacts: Vec<u64>,
}

/// One VM.
#[derive(Default)]
pub(crate) struct VmNote {
    pub(crate) job: Option<JobId>,
    pub(crate) ours: bool,
    pub(crate) overlay_at: Option<At>,
    pub(crate) started_at: Option<At>,
    pub(crate) ended_at: Option<(At, String)>,
    pub(crate) overlay_gone_at: Option<At>,
    pub(crate) pass: Option<String>,
    pub(crate) greeted: bool,
    /// Faults were met by a call about it.
    pub(crate) call_failed_at: Option<At>,
    pub(crate) port: u16,
}

impl VmNote {
    /// Whether it exists now.
    pub(crate) fn lives(&self) -> bool {
        self.started_at.is_some() && self.ended_at.is_none()
    }
}

impl JobNote {
    pub(crate) fn new(script: Arc<Script>, token: String) -> Self {
        Self {
            script,
            token,
            payloads: Vec::new(),
            assigned_at: None,
            kept_since: None,
            kept_over: None,
            lost: None,
            trace_spoilt: None,
            record: None,
            had_record: false,
            record_gone_at: None,
            spool: None,
            spool_failed: false,
            record_stale: None,
            begun_anew: false,
            full: false,
            refused: false,
            had_spool: false,
            files_failed: None,
            vms: Vec::new(),
            handed: Vec::new(),
            printed: Vec::new(),
            taken: 0,
            words: 0,
            guest_spoke_at: None,
            guest_called_at: None,
            verdict_said: None,
            verdict_taken: None,
            sent: Vec::new(),
            state: JobState::Pending,
            over_at: None,
            canceling_known: None,
            over_known: None,
            users: None,
            killed_at: None,
            mishap: None,
            lost_running: None,
            panicked: None,
            transfers: 0,
            forwarded: 0,
            uploaded: Vec::new(),
            meant: Vec::new(),
            vm_call_failed: false,
            verdicts: 0,
            changed_after_end: false,
            over_by_gitlab: false,
            gitlab_gave_up: None,
            erased: false,
            noted: false,
            guest_base: None,
            held_trace: Vec::new(),
            artifacts: Vec::new(),
        }
    }
}
