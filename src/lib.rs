//! dayfly: each GitLab CI job in a fresh, throw-away virtual machine.
//!
//! The daemon looks like a runner to GitLab and like GitLab to the official gitlab-runner, and in
//! between owns one fresh VM per job. The modules, in the order in which a job meets them:

pub mod cli; // what did the operator ask for?
pub mod config; // what are we told to do, and by which source?
pub mod daemon; // who is wired to whom, and how do we stop?
pub mod poller; // may we ask GitLab for a job now?
pub mod capacity; // how much of the host is promised?
pub mod job; // what happens to this one job?
pub mod rules; // may it run here, and in which class?
pub mod spool; // what is the trace of a job?
pub mod uploader; // what has GitLab got of it, what is still owed?
pub mod machine_spec; // what machine does it get?
pub mod guest_config; // what is its guest told?
pub mod supply; // where does its machine come from, who takes it down?
pub mod golden; // which machines are frozen, for others to be restored from?
pub mod image; // which disk does the VM start from?
pub mod boot_test; // does an image boot and ask for a job?
pub mod vm; // how is a machine started, watched, ended?
pub mod network; // which address and port has this machine?
pub mod guest; // what may a guest say to us?
pub mod cache; // what have jobs left for later ones?
pub mod clones; // what have we of a job's repository already?
pub mod gitlab; // how do we speak the runner API?
pub mod recovery; // what exists, what should exist?
pub mod history; // which jobs have ended here, and how?
pub mod status; // how are we doing?
pub mod control; // what may the operator tell a running daemon?
pub mod shell; // what does an operator see and do inside of a machine?
pub mod web; // what does the status listener answer?
pub mod files; // how do bytes get to disk for good?
pub mod process; // how do we run another program?
pub mod clock; // what time is it, for people and protocols?
pub mod awake; // for how long did this process not run?
pub mod hex; // how do bytes stand in names and texts?
pub mod rng; // where do ids and jitter come from?
pub mod retry; // when do we try again?
pub mod latest; // who waits for the newest value?
pub mod secret; // what must never be printed?
pub mod metrics; // what do we count?
pub mod telemetry; // where do log lines go?
mod socket; // how is a socket of ours bound?
mod repeats; // how often may a guest fill the log?
pub mod failpoint; // where may a test pull the plug?

use std::future::Future;
use std::pin::Pin;

/// A boxed future, for the traits of the seams, which must be usable as `dyn`.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;
