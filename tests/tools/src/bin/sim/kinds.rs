//! The kinds of faults, each with the rows of threats.md that it injects, and how often each was met.

/// Makes the list: variant, ids, words.
macro_rules! kinds {
    ($($name:ident $ids:literal $words:literal;)*) => {
        /// One kind of fault.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub(crate) enum Kind { $(#[doc = $words] $name),* }

        impl Kind {
            /// All of them.
            pub(crate) const ALL: &'static [Self] = &[$(Self::$name),*];

            /// Rows of threats.md §3.
            pub(crate) fn ids(self) -> &'static str {
                match self { $(Self::$name => $ids),* }
            }

            /// The fault in words.
            pub(crate) fn words(self) -> &'static str {
                match self { $(Self::$name => $words),* }
            }
        }
    };
}

kinds! {
    ServerError "G1" "500, 502 or 504";
    HtmlError "G2" "503 with a page";
    RateLimited "G3" "429 with Retry-After";
    RateLimitedUntil "G3" "429 with RateLimit-ResetTime";
    RunnerRefused "G4" "401 or 403 to a poll";
    Conflict "G5" "409 to a poll";
    AssignTruncated "G6" "a 201 that breaks off";
    AssignNonsense "G6" "a 201 of broken JSON";
    StrangeMembers "G7" "a payload with unknown members";
    ConnectFails "G8" "no connection";
    BlackHole "G8 G10" "no head of an answer, ever";
    SlowHead "G10" "a head that comes late";
    SlowBody "G10" "a body of a few bytes a second";
    Outage "G1 G12" "GitLab is down for minutes";
    HeldPoll "G13" "a long poll under way at a hand-over";
    CancelBooting "G14" "canceled while booting";
    CancelRunning "G15" "canceled gracefully while running";
    HardCancel "G16" "canceled at once";
    Erased "G16" "the job is erased";
    ProjectDeleted "G16" "the project is deleted";
    AssignedTwice "G17" "the same job assigned again";
    OverAtFirstWord "G18" "canceled before our first word";
    FirstWordLost "G19" "the answer to the first `running` is lost";
    TwoPhase "G20" "a server that waits for our first word";
    ClockSkew "G21" "GitLab's clock is hours off";
    LoginPage "G22" "200 with a login page";
    NotFound "G22" "404 on a job route";
    Redirect "G22" "a redirect";
    PatchLost "R1" "a piece of trace cut before it arrived";
    PatchReplyLost "R2" "a piece of trace taken, the answer lost";
    TraceLostPart "R3" "GitLab lost a part of the trace";
    TraceAhead "R4" "GitLab holds more than was sent";
    TraceReset "R5" "GitLab lost the whole trace";
    BadOffsets "R6" "a guest's nonsense offsets";
    ParallelPatches "R7" "two pieces at once from a guest";
    FinalWaits "R8" "202 to the verdict";
    FinalRefused "R9" "412 to the verdict";
    FinalReplyLost "R10" "the verdict taken, the answer lost";
    FinalLost "R10" "the verdict cut before it arrived";
    DiesBeforeFinal "R11" "the VM dies between trace and verdict";
    TraceTooLarge "R12" "the trace outgrows GitLab's limit";
    UploadReset "R14" "an upload reset by GitLab";
    UploadVmDies "R15" "a VM that dies in mid-upload";
    UploadRefused "R16" "413 or 403 before the upload's end";
    UploadBusy "R17" "503 to an upload";
    DownloadRange "R19" "a dependency fetched in parts";
    CreateRefused "V1" "the VM cannot be created";
    OverlayRefused "H6 H13" "the overlay cannot be made";
    OverlayHangs "H13" "making the overlay hangs";
    CreateHangs "H4" "creating the VM hangs";
    CreateAnswerLost "K8" "the VM is created, the answer lost";
    NeverPolls "V2" "the guest never asks";
    NoRunner "V18" "the image's runner does not start";
    PollsAtDeadline "V3" "the first poll in the last moment";
    ParallelPolls "V4" "two polls at once";
    AsksAgain "V5" "the guest asks again before it begins";
    AsksLate "V6" "a second poll in mid-job";
    RebootsBooting "V5" "a reboot before the first request";
    RebootsRunning "V6" "a reboot in mid-job";
    WrongPass "V7 P10" "a wrong pass";
    WrongGuestToken "V7" "a poll with another guest token";
    CrashesBooting "V8" "QEMU dies while booting";
    CrashesRunning "V8" "QEMU dies in mid-job";
    PowersOff "V8" "power-off in mid-job";
    CrashesAfterFinal "V9" "QEMU dies after the verdict";
    Hangs "V10" "the guest goes silent";
    DiskPaused "V11 H7" "QEMU pauses the VM";
    QemuStops "V11" "QEMU stops the VM of its own accord";
    OperatorPauses "V11" "somebody pauses the VM for good";
    KernelPanics "V6" "the guest's kernel panics in mid-job";
    Sleeps "V10" "the guest suspends itself in mid-job";
    OomKilled "V12" "QEMU is killed from outside";
    IgnoresShutdown "V13" "the guest never powers off";
    DestroyFails "V14" "destroy is refused";
    DestroyHangs "V14" "destroy hangs";
    EgressRefused "V1" "the process that carries a VM's egress does not begin";
    EgressHangs "V1" "beginning it hangs";
    EgressDies "V12" "it is killed from outside";
    EgressStays "V13" "it does not end with its VM";
    AuditFails "H8" "what it wrote down cannot be read";
    SlowLoris "P1" "a head that never ends";
    ManyConnections "P2" "more connections than are served";
    HugeHead "P3" "a head beyond all limits";
    HugeBody "P4" "a body beyond its route's limit";
    Pipelined "P5" "many requests in one write";
    Tunnel "P6" "CONNECT, h2c, PRI, absolute-form";
    HalfClosed "P7" "a connection closed in mid-request";
    KeptOpen "P8" "a connection kept after the job";
    OthersJob "P9" "another job's id";
    NoGreeting "P10" "HTTP without the pass";
    WireCut "E4" "a session of the wire cut at any byte";
    HandOver "E1" "SIGTERM";
    SecondSignal "E2" "a second signal";
    Drain "E3" "SIGQUIT";
    Killed "E4" "SIGKILL at any call";
    KillJob "E2" "`dayfly kill`";
    Panics "E5" "a task of a job panics";
    FdShort "E7" "no file descriptor for an accept or a listen";
    WallJump "E9" "the wall clock jumps";
    RecordDamaged "E13" "a record damaged between two lives";
    KillStorm "E15" "SIGKILL again and again at the start";
    LibvirtBlips "H1" "a call to libvirt fails";
    LibvirtDown "H2 H3" "libvirt is away for minutes";
    ListHangs "H4" "the list of VMs hangs";
    HostReboot "H5" "the host reboots";
    NoSpaceStart "H6" "ENOSPC for record, payload or guest config";
    LowDisk "H6" "free disk below the reserve";
    NoSpaceSpool "H7" "ENOSPC for the spool";
    ReadOnly "H8" "the state directory is read-only";
    SyncFails "H9" "fsync fails";
    ReadFails "H8" "a read fails";
    ImageMissing "H10" "the base image is gone";
    PortsShort "H15" "more jobs than ports";
    PortTaken "H15" "a door's port is somebody else's";
    Leftovers "H16" "VMs and overlays of ours without a record";
    Foreign "H16" "look-alikes of another installation";
    KillK0 "K0" "killed when idle";
    KillK1 "K1" "killed while a poll is answered";
    KillK2 "K2" "killed while the payload is read";
    KillK3 "K3" "killed before the record is written";
    KillK4 "K4" "killed after the record";
    KillK5 "K5" "killed after the overlay";
    KillK6 "K6" "killed after the guest config";
    KillK7 "K7" "killed after the listener";
    KillK8 "K8" "killed in mid-create";
    KillK9 "K9" "killed after the create";
    KillK10 "K10" "killed around the hand-out";
    KillK11 "K11" "killed while saying `running`";
    KillK12 "K12" "killed in mid-PATCH";
    KillK13 "K13" "killed in mid-upload";
    KillK14 "K14" "killed around the final PUT";
    KillK15 "K15" "killed after the final PUT";
    KillK16 "K16" "killed after the destroy";
    KillK17 "K17" "killed after the overlay's removal";
    KillK18 "K18" "killed after the record's removal";
    LateTrace "T12" "trace after the verdict";
    SecondVerdict "T11" "another verdict after the first";
    StrangeVerdict "T11" "states and reasons that nobody knows";
    IgnoresTimeout "T13" "a script that no timeout ends";
    IgnoresCancel "T13 G15" "a script that no cancel ends";
    LyingReports "T21" "a guest that lies on its channel";
}

/// How often each kind was met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hits(Vec<u64>);

impl Default for Hits {
    fn default() -> Self {
        Self(vec![0; Kind::ALL.len()])
    }
}

impl Hits {
    /// One more.
    pub(crate) fn hit(&mut self, kind: Kind) {
        self.0[kind as usize] += 1;
    }

    /// So many.
    pub(crate) fn of(&self, kind: Kind) -> u64 {
        self.0[kind as usize]
    }

    /// All of another count.
    pub(crate) fn add(&mut self, other: &Self) {
        for (mine, theirs) in self.0.iter_mut().zip(&other.0) {
            *mine += theirs;
        }
    }

    /// Kinds that were met at all.
    pub(crate) fn kinds(&self) -> usize {
        self.0.iter().filter(|count| **count > 0).count()
    }

    /// The rarest kind and its count.
    pub(crate) fn rarest(&self) -> (Kind, u64) {
        let rarest = Kind::ALL.iter().map(|kind| (*kind, self.of(*kind))).min_by_key(|(_, count)| *count);
        rarest.expect("there are kinds")
    }
}
