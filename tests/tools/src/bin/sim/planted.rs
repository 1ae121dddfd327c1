//! Would the simulation notice? Bugs planted on purpose, one at a time, each between the daemon and one of its seams.
//!
//! A bug behaves like a mistake that somebody could make at the daemon's outermost line, so that the checkers see what
//! they would see of that. What no seam can do wrong (states, the order of record and effect, accounting) is a mutation
//! of the code: `tests/mutants.txt`.

mod dice;
mod disk;
mod gitlab;
mod host;
mod hunt;
mod settings;

pub(crate) use hunt::all;

use crate::mortal::Life;
use dayfly::config::Config;
use dayfly::files::Files;
use dayfly::gitlab::OpenTransport;
use dayfly::network::{Egress, Listen};
use dayfly::rng::Rng;
use dayfly::vm::Hypervisor;
use dayfly::vm::paths::Paths;
use dayfly_doubles::fake::FakeHypervisor;
use dayfly_doubles::workshop::FakeWorkshop;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

macro_rules! bugs {
    ($($(#[$doc:meta])+ $name:ident breaks $invariant:literal,)+) => {
        /// A mistake that somebody could make.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Bug { $($(#[$doc])+ $name,)+ }

        impl Bug {
            /// All of them, in the order in which they are tried.
            pub(crate) const ALL: &'static [Self] = &[$(Self::$name),+];

            /// The invariant of threats.md §4 that it breaks, and whose checker must find it.
            pub(crate) fn invariant(self) -> u8 {
                match self { $(Self::$name => $invariant,)+ }
            }
        }
    };
}

bugs! {
    /// A verdict that does not get through is never sent again.
    VerdictDropped breaks 1,
    /// The verdict is sent a second time, as the other state.
    DoubleReport breaks 2,
    /// When a success may or may not have arrived, `failed` is sent.
    SuccessTurnedFailed breaks 3,
    /// A failure of ours is called the author's.
    AuthorBlamed breaks 4,
    /// The verdict does not wait for the last of the trace.
    LostLastLine breaks 5,
    /// After GitLab has said where it stands, the trace goes on one byte too early.
    UploadOffByOne breaks 5,
    /// The verdict's checksum has its bytes the wrong way round.
    WrongChecksum breaks 5,
    /// The verdict's size is one byte short.
    WrongSize breaks 5,
    /// A piece of trace that the disk did not take counts as written.
    SpoolErrorIgnored breaks 5,
    /// The payload is parsed and written anew instead of passed on.
    PayloadRewritten breaks 6,
    /// A job that ran when the daemon ended is begun again on another machine.
    RunTwice breaks 6,
    /// The request for a job is logged, with the runner token in it.
    RunnerTokenInLog breaks 7,
    /// The guest's token is the runner token, all of it.
    RunnerTokenToGuest breaks 7,
    /// A job's token is logged.
    JobTokenInLog breaks 8,
    /// The payload is kept in the state directory, which outlives a reboot.
    PayloadOnDisk breaks 8,
    /// A piece of trace carries the job token in its URL too.
    CredentialInUrl breaks 9,
    /// GitLab's word on a job is not heard: a canceled one boots, and runs, nevertheless.
    CancelUnheard breaks 11,
    /// All machines have the same pass.
    PassReused breaks 12,
    /// Of a machine that could not be made the disk stays, and no sweep looks for overlays.
    LeakedOverlay breaks 13,
    /// The door of a machine that is gone stays open.
    DoorLeftOpen breaks 13,
    /// Who carries a machine's egress is left alone when that is gone, for it ends by itself.
    EgressLeft breaks 13,
    /// A machine that could not be destroyed at once counts as gone.
    DestroyGivenUp breaks 16,
    /// What a machine is given of its project's repository is another's.
    ForeignClone breaks 12,
    /// The disk that one machine had alone stays when that is gone.
    SlotKept breaks 13,
    /// One job more than configured.
    OneJobTooMany breaks 14,
    /// Machines of other installations are taken for ours.
    ForeignReaped breaks 15,
    /// A machine is made before a record names it.
    DomainBeforeRecord breaks 16,
    /// A record that the disk did not take counts as written.
    RecordErrorIgnored breaks 16,
    /// The record of a job that is over stays.
    RecordKept breaks 16,
    /// Adoption makes a second machine beside the one that is there.
    SecondMachine breaks 17,
    /// The boot deadline comes ten times too early.
    BootDeadlineEarly breaks 4,
    /// A guest that never asks for its job is waited for until the job's own end.
    BootDeadlineNever breaks 18,
    /// A running guest may be silent for ever.
    SilenceNever breaks 18,
    /// A guest counts as silent since ever when the daemon comes back.
    SilenceWhileAway breaks 4,
    /// A job's timeout ends nothing.
    CapIgnored breaks 18,
    /// A guest that was told to end, or has said its last word, may live as long as it likes.
    GraceNeverOver breaks 18,
    /// A machine that is kept after its job failed is kept for a month.
    KeptForEver breaks 18,
    /// The hypervisor's list is not looked at: a paused machine goes unnoticed.
    ListIgnored breaks 18,
    /// After an outage of GitLab it is minutes until the next poll.
    LateAfterOutage breaks 19,
    /// GitLab's word on when to come back is not heard.
    RetryAfterIgnored breaks 20,
    /// What has failed, or had no answer for us, is tried again at once, and again.
    RetryStorm breaks 20,
    /// A cache's bytes are another save's when the disk gets them.
    CacheBufferReused breaks 23,
    /// All projects share one cache.
    CacheTenantTooWide breaks 23,
    /// The jitter of a pause is the operating system's.
    OwnDice breaks 22,
}

/// What stands between the daemon and its seams: nothing, or one bug. It outlives each daemon.
pub(crate) struct Planted {
    bug: Option<Bug>,
    first_records: Arc<Mutex<BTreeMap<PathBuf, Vec<u8>>>>,
}

impl Planted {
    pub(crate) fn new(bug: Option<Bug>) -> Self {
        Self { bug, first_records: Arc::default() }
    }

    /// The way to GitLab.
    pub(crate) fn transport(&self, opener: Arc<dyn OpenTransport>) -> Arc<dyn OpenTransport> {
        match self.bug {
            None => opener,
            Some(bug) => Arc::new(gitlab::Opener { bug, opener }),
        }
    }

    /// The file layer.
    pub(crate) fn files(&self, files: Arc<dyn Files>) -> Arc<dyn Files> {
        match self.bug {
            None => files,
            Some(bug) => Arc::new(disk::Disk { bug, files, first_records: self.first_records.clone() }),
        }
    }

    /// Machines, their doors, and what lies beside them, as `life` sees them.
    pub(crate) fn host<H: Hypervisor + Paths>(
        &self,
        host: Arc<H>,
        fake: &FakeHypervisor,
        runner_token: &str,
    ) -> (Arc<dyn Hypervisor>, Arc<dyn Paths>) {
        let Some(bug) = self.bug else { return (host.clone(), host) };
        let host = Arc::new(host::Host {
            bug,
            hypervisor: host.clone(),
            paths: host,
            fake: fake.clone(),
            runner_token: runner_token.to_owned(),
            not_made: Mutex::default(),
        });
        (host.clone(), host)
    }

    /// Git, and the disks of repositories.
    pub(crate) fn workshop(&self, workshop: FakeWorkshop) -> FakeWorkshop {
        if self.bug == Some(Bug::ForeignClone) {
            workshop.mix_up();
        }
        workshop
    }

    /// Where doors are opened.
    pub(crate) fn listen(&self, listen: Arc<dyn Listen>, life: &Life) -> Arc<dyn Listen> {
        match self.bug {
            Some(Bug::DoorLeftOpen) => Arc::new(host::Doors { listen, life: life.clone() }),
            _ => listen,
        }
    }

    /// Who carries egress.
    pub(crate) fn egress(&self, egress: Arc<dyn Egress>) -> Arc<dyn Egress> {
        match self.bug {
            Some(Bug::EgressLeft) => Arc::new(host::LeftAlone(egress)),
            _ => egress,
        }
    }

    /// Where chance comes from.
    pub(crate) fn rng(&self, rng: &Rng) -> Rng {
        self.bug.map_or_else(|| rng.clone(), |bug| dice::plant(bug, rng))
    }

    /// What the daemon reads of its configuration in its `lives`-th life.
    pub(crate) fn config(&self, config: &Config, lives: u32) -> Config {
        let mut config = config.clone();
        if let Some(bug) = self.bug {
            settings::misread(bug, &mut config, lives);
        }
        config
    }
}
