//! What is known of each job and VM of a run, kept from the events: the facts that the checkers compare.

mod notes;
mod trouble;

pub(crate) use notes::{JobNote, VmNote};

use crate::event::{DaemonDoes, Event, FileOp, GuestDoes, Trouble};
use crate::guest::Whose;
use dayfly::gitlab::JobId;
use dayfly::job::journal::format::parse;
use dayfly::job::state::State;
use dayfly::network::Lease;
use dayfly_doubles::fake::Op;
use dayfly_exec::standin::Route;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

/// Virtual time since the run began.
pub(crate) type At = Duration;

/// Everything known.
#[derive(Default)]
pub(crate) struct Ledger {
    /// The time of the event that is being judged.
    pub(crate) now: At,
    pub(crate) jobs: BTreeMap<JobId, JobNote>,
    pub(crate) vms: BTreeMap<String, VmNote>,
    /// Whose job token.
    pub(crate) tokens: BTreeMap<String, JobId>,
    /// What is down now, and since when.
    pub(crate) down: BTreeMap<Trouble, At>,
    /// Times at which something was down or a fault was met, from and to, by what it spoils.
    pub(crate) troubles: Vec<(Trouble, At, At)>,
    /// Lives of the daemon so far.
    pub(crate) lives: u32,
    /// When the newest life began.
    pub(crate) began_at: At,
    /// The life that runs has done its start.
    pub(crate) runs: bool,
    /// No new jobs are wanted: drain or hand-over under way.
    pub(crate) stopping: bool,
    /// The jobs that it has are being ended, and one that a poll under way brings as well.
    ending: bool,
    /// VMs, overlays and files that are not ours.
    pub(crate) foreign: BTreeSet<String>,
    /// When GitLab came back last: whether some runner had room to poll.
    pub(crate) has_room: bool,
    /// When that was.
    pub(crate) back_at: Option<At>,
    refused_at: Option<At>,
    /// Some life ended with a record that was behind: its VM and door may be somebody else's by now.
    pub(crate) stale_records: bool,
    /// Polls that GitLab has not answered.
    pub(crate) polls: u32,
    /// The image was gone at some time.
    pub(crate) image_was_missing: bool,
    /// Reboots of the host.
    pub(crate) reboots: u32,
    pub(crate) runner_tokens: Vec<String>,
    /// Caches that were saved, and the guest was told so.
    pub(crate) caches: BTreeSet<Whose>,
}

/// How long, at least, the daemon keeps the end of a job to itself while the disk does not take its record.
const END_PATIENCE: Duration = Duration::from_secs(57);

/// The job of a path below a `jobs` directory, and the file's name.
pub(crate) fn job_of(path: &Path) -> Option<(JobId, &str)> {
    let mut parts = path.components().rev().filter_map(|part| part.as_os_str().to_str());
    let last = parts.next()?;
    let (directory, file) = if last.contains('-') && !last.contains('.') { (last, "") } else { (parts.next()?, last) };
    Some((JobId(directory.rsplit('-').next()?.parse().ok()?), file))
}

impl Ledger {
    /// Notes what an event says.
    pub(crate) fn note(&mut self, event: &Event<'_>) {
        match event {
            Event::Assigned { job, payload } => {
                let now = self.now;
                if let Some(note) = self.jobs.get_mut(job) {
                    note.payloads.push(payload.to_vec());
                    note.lost = None;
                    note.assigned_at.get_or_insert(now);
                    if self.ending {
                        note.killed_at.get_or_insert(now);
                    }
                }
            }
            Event::AssignedInVain { job } => {
                if let Some(note) = self.jobs.get_mut(job)
                    && note.assigned_at.is_none()
                {
                    note.lost = Some("its payload did not arrive");
                }
            }
            Event::Request(request) => self.request(request),
            Event::Answer(answer) => self.answer(answer),
            Event::File { op, path, bytes, ok } => self.file(*op, path, bytes, *ok),
            Event::Calls { op, subject, spec } => {
                if let (Op::Start, Some(spec)) = (op, spec) {
                    let job = spec.bound.as_ref().map(|(_, job)| JobId(*job));
                    let port = job
                        .and_then(|job| Some(self.jobs.get(&job)?.record.as_ref()?.machine.as_ref()?.lease.clone()))
                        .and_then(|lease| match lease {
                            Lease::User { port } => Some(port),
                            Lease::Wire | Lease::Relay => None,
                        });
                    let vm = self.vms.entry((*subject).to_owned()).or_default();
                    vm.job = job;
                    vm.ours = true;
                    vm.port = port.unwrap_or(0);
                    if let Some(note) = job.and_then(|job| self.jobs.get_mut(&job))
                        && note.vms.last().is_none_or(|last| last != subject)
                    {
                        note.vms.push((*subject).to_owned());
                    }
                }
            }
            Event::Called { op, subject, ok } => {
                let now = self.now;
                if !ok {
                    self.spoil(Trouble::Libvirt, Duration::from_secs(15));
                    let name = subject.rsplit('/').next().unwrap_or(subject).trim_end_matches(".qcow2");
                    if let Some(vm) = self.vms.get_mut(name) {
                        vm.call_failed_at = Some(now);
                    }
                    // A VM that was never started is known by its record alone, a door of before by its port. Whether
                    // the VM of a job that begins is there already is seen in the list of all; the door of a new one is
                    // bound before a record names it.
                    let of_vm = |note: &&mut JobNote| {
                        let Some(record) = &note.record else { return false };
                        let begins = matches!(record.state, State::Booting { .. });
                        let Some(machine) = &record.machine else { return begins && *op == Op::Listen };
                        match (op, &machine.lease) {
                            (Op::List, _) => begins,
                            (Op::Listen, Lease::User { port }) => subject.ends_with(&format!(":{port}")),
                            _ => name.ends_with(machine.id.as_str()),
                        }
                    };
                    for note in self.jobs.values_mut().filter(of_vm) {
                        note.vm_call_failed = true;
                    }
                }
            }
            Event::Vm { name, word } => self.vm(name, word),
            Event::Guest { vm, job, does } => self.guest(vm, *job, does),
            Event::Daemon(does) => self.daemon(*does),
            Event::Fault(kind) => self.fault(*kind),
            Event::Held { job, last } => self.held(job, *last),
        }
    }

    fn held(&mut self, job: &dayfly_exec::standin::Job, last: bool) {
        let now = self.now;
        let Some(note) = self.jobs.get_mut(&job.id) else { return };
        note.changed_after_end |= note.over_at.is_some() && note.state != job.state;
        note.state = job.state;
        if !job.state.is_over() {
            return;
        }
        note.over_at.get_or_insert(now);
        note.verdicts = job.verdicts;
        note.over_by_gitlab = job.verdicts == 0;
        let gave_up =
            ["no_updates_running", "server_timeout_running", "job_token_expired", "runner_provisioning_timeout"];
        note.gitlab_gave_up = job.failure_reason.clone().filter(|reason| gave_up.contains(&reason.as_str()));
        note.erased = job.erased;
        if last {
            note.held_trace = job.trace.bytes.clone();
            note.artifacts = job.artifacts.values().map(|artifact| artifact.size).collect();
        }
    }

    fn request(&mut self, request: &crate::event::Request<'_>) {
        let now = self.now;
        self.polls += u32::from(request.route == Route::RequestJob);
        let Some(note) = request.job.and_then(|job| self.jobs.get_mut(&job)) else { return };
        match request.route {
            Route::UpdateJob => match request.update {
                Some(update) if update.state != "running" => {
                    note.sent.push((now, update.state.clone(), update.reason.clone()));
                }
                _ => note.words += 1,
            },
            // A refused job's only piece of trace: it has no record, or at least no spool.
            Route::AppendTrace if !note.had_record || !note.had_spool => note.refused = true,
            Route::UploadArtifacts | Route::DownloadArtifacts => note.forwarded += 1,
            _ => {}
        }
    }

    fn answer(&mut self, answer: &crate::event::Answer<'_>) {
        let now = self.now;
        if answer.route == Route::RequestJob {
            self.polls = self.polls.saturating_sub(1);
        }
        let Some(note) = answer.job.and_then(|job| self.jobs.get_mut(&job)) else { return };
        if !matches!(answer.route, Route::UpdateJob | Route::AppendTrace) {
            return;
        }
        let status = answer.headers.and_then(|h| h.get("job-status")).and_then(|v| v.to_str().ok());
        let is_final = answer.update.is_some_and(|update| update.state != "running");
        note.noted |= is_final && answer.status == Some(202) && !answer.faulted;
        match (answer.status, status) {
            // It may come late, or never whole: another call will tell.
            _ if answer.faulted => {}
            (Some(403), _) | (_, Some("canceled" | "failed")) => {
                note.over_known.get_or_insert(now);
            }
            (_, Some("canceling")) => {
                note.canceling_known.get_or_insert(now);
            }
            _ => {}
        }
    }

    fn file(&mut self, op: FileOp, path: &Path, bytes: &[u8], ok: bool) {
        let now = self.now;
        if !ok {
            self.spoil(Trouble::Disk, Duration::from_secs(5));
        }
        let Some((job, file)) = job_of(path) else { return };
        let Some(note) = self.jobs.get_mut(&job) else { return };
        if !ok {
            note.files_failed = Some(now);
            note.spool_failed |= file == "trace";
            if op == FileOp::Replace && file == "record.json" {
                note.record_stale.get_or_insert(now);
            }
            return;
        }
        match (op, file) {
            (FileOp::Replace, "record.json") => {
                note.record = parse(bytes).ok();
                note.guest_base = note.record.as_ref().and_then(|record| record.guest_base).or(note.guest_base);
                note.had_record = true;
                let kept = note.record.as_ref().is_some_and(|record| record.state.is_kept());
                if kept {
                    note.kept_since.get_or_insert(now);
                } else if note.kept_since.is_some() {
                    note.kept_over.get_or_insert(now);
                }
                note.record_stale = None;
                note.record_gone_at = None;
            }
            (FileOp::WriteAt, "trace") => {
                note.had_spool = true;
                note.full |= memchr::memmem::find(bytes, b"this log rea").is_some();
            }
            // Its bytes, as they were.
            (FileOp::Remove, "trace") => note.spool = Some(bytes.to_vec()),
            (FileOp::Remove, "") if path.starts_with("/state") => {
                note.record = None;
                note.record_gone_at = Some(now);
            }
            _ => {}
        }
    }

    fn vm(&mut self, name: &str, word: &str) {
        let now = self.now;
        if let Some(name) = vm_of_overlay(name) {
            let vm = self.vms.entry(name.to_owned()).or_default();
            match word {
                "overlay made" => (vm.overlay_at, vm.overlay_gone_at) = (Some(now), None),
                _ => vm.overlay_gone_at = Some(now),
            }
            return;
        }
        let Some(vm) = self.vms.get_mut(name) else { return };
        let mishap = match word {
            "started" => {
                vm.started_at = Some(now);
                vm.ended_at = None;
                return;
            }
            "destroyed" | "powered off" | "crashed" | "rebooted" | "gone with the host" => {
                vm.ended_at = Some((now, word.to_owned()));
                match word {
                    "destroyed" => return,
                    "powered off" => "powered off",
                    "crashed" => "crashed",
                    "rebooted" => "rebooted",
                    _ => "gone with the host",
                }
            }
            "paused" => "paused",
            "paused by somebody" => "paused by somebody",
            "stopped" => "stopped",
            "panicked" => "panicked",
            "slept" => "slept",
            _ => return,
        };
        if let Some(note) = vm.job.and_then(|job| self.jobs.get_mut(&job)) {
            note.mishap = Some((mishap, now));
            // Who was paused by somebody may go on, until its silence deadline.
            if mishap != "paused by somebody" && note.handed.last().is_some_and(|(vm, _)| vm == name) {
                note.lost_running.get_or_insert(now);
            }
        }
    }

    fn guest(&mut self, vm: &str, job: JobId, does: &GuestDoes<'_>) {
        let now = self.now;
        let machine = self.vms.entry(vm.to_owned()).or_default();
        match does {
            GuestDoes::Configured { pass, .. } => machine.pass = Some((*pass).to_owned()),
            GuestDoes::Greeted => machine.greeted = true,
            _ => {}
        }
        let Some(note) = self.jobs.get_mut(&job) else { return };
        match does {
            GuestDoes::Payload { .. } => note.handed.push((vm.to_owned(), now)),
            GuestDoes::Prints(bytes) => note.printed.extend_from_slice(bytes),
            GuestDoes::Taken(end) => note.taken = note.taken.max(*end),
            GuestDoes::Spoke => note.guest_spoke_at = Some(now),
            GuestDoes::Calls => note.guest_called_at = Some(now),
            GuestDoes::Verdict { state, reason } => {
                note.verdict_said.get_or_insert_with(|| ((*state).to_owned(), reason.map(str::to_owned)));
            }
            GuestDoes::VerdictTaken { state } => {
                note.verdict_taken.get_or_insert_with(|| ((*state).to_owned(), now));
            }
            GuestDoes::Transfers { uploads } => {
                note.transfers += 1;
                // Meant from here on: the guest may end before it learns that GitLab has it all.
                note.meant.extend(*uploads);
            }
            GuestDoes::Uploaded { bytes, status: Some(201) } => note.uploaded.push(*bytes),
            _ => {}
        }
    }

    fn daemon(&mut self, does: DaemonDoes) {
        let now = self.now;
        match does {
            DaemonDoes::Starts => {
                self.lives += 1;
                self.began_at = now;
                self.runs = false;
                (self.stopping, self.ending) = (false, false);
            }
            DaemonDoes::Runs => {
                self.runs = true;
                self.set_down(Trouble::Daemon, false);
                self.spoil(Trouble::Daemon, Duration::from_secs(5));
            }
            DaemonDoes::Dies | DaemonDoes::Gone | DaemonDoes::Refuses => {
                self.runs = false;
                for note in self.jobs.values_mut() {
                    let Some(since) = note.record_stale else { continue };
                    note.begun_anew |= since + END_PATIENCE <= now;
                    // The next life knows what is on disk.
                    (note.over_known, note.canceling_known) = (None, None);
                    self.stale_records = true;
                }
                // What it learnt in its last moment it may not have written down.
                let before = |at: &At| *at + Duration::from_secs(1) < now;
                for note in self.jobs.values_mut() {
                    note.over_known = note.over_known.filter(before);
                    note.canceling_known = note.canceling_known.filter(before);
                }
                for note in self.jobs.values_mut().filter(|note| note.assigned_at.is_some() && !note.had_record) {
                    note.lost.get_or_insert("the daemon ended before it was written down");
                }
                self.set_down(Trouble::Daemon, true);
            }
            DaemonDoes::HandsOver | DaemonDoes::Drains | DaemonDoes::Ends => {
                self.stopping = true;
                if does == DaemonDoes::Ends {
                    self.ending = true;
                    // Also one that is over at GitLab: the daemon need not know of it yet.
                    for note in self.jobs.values_mut().filter(|note| note.assigned_at.is_some()) {
                        note.killed_at.get_or_insert(now);
                    }
                }
                self.spoil(Trouble::Daemon, Duration::from_secs(6));
            }
            DaemonDoes::Kills(job) => {
                if let Some(note) = self.jobs.get_mut(&job) {
                    note.killed_at.get_or_insert(now);
                }
            }
            DaemonDoes::Rebooted => {
                self.reboots += 1;
                for note in self.jobs.values_mut().filter(|note| note.over_at.is_none() && note.record.is_some()) {
                    note.mishap = Some(("the host rebooted", now));
                }
            }
            DaemonDoes::Damaged(job) => {
                if let Some(note) = self.jobs.get_mut(&job) {
                    note.lost = Some("its record was damaged");
                    note.record = None;
                    note.record_gone_at = Some(now);
                }
            }
            DaemonDoes::Users(job, what) => {
                if let Some(note) = self.jobs.get_mut(&job) {
                    note.users.get_or_insert((what, now));
                }
            }
            DaemonDoes::Trouble(trouble, down) => {
                self.image_was_missing |= trouble == Trouble::Image;
                self.set_down(trouble, down);
            }
        }
    }
}

/// The VM whose overlay this path is.
pub(crate) fn vm_of_overlay(path: &str) -> Option<&str> {
    path.strip_suffix(".qcow2")?.rsplit('/').next()
}
