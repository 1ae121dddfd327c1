//! The inside of a fake VM: a script that a test writes, and what it holds.

use super::FakeHypervisor;
use super::wire::GuestEnd;
use dayfly::BoxFuture;
use dayfly::vm::{Ending, Pause, Stream, VmId, VmName, VmSpec};
use dayfly_test_guest::Relay;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

/// What a guest does once it has booted. A closure `|machine| async move { .. }` is one.
///
/// The future is dropped when the VM ends, and is not polled while it is paused; when it returns,
/// the guest powers off. Keep everything of the guest inside it (`join!`, not `spawn`).
pub trait GuestScript: Send + Sync + 'static {
    /// Runs in one VM.
    fn run(&self, machine: GuestMachine) -> BoxFuture<'static, ()>;
}

impl<F, Fut> GuestScript for F
where
    F: Fn(GuestMachine) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    fn run(&self, machine: GuestMachine) -> BoxFuture<'static, ()> {
        Box::pin(self(machine))
    }
}

/// What a guest has.
#[derive(Debug)]
pub struct GuestMachine {
    /// What it was started from.
    pub spec: VmSpec,
    /// The port that the guest config comes through.
    pub channel: GuestEnd,
    /// The port that carries what it says to its door: one without a relay, or a hostile one.
    pub door: GuestEnd,
    /// The port by which a host asks for a shell.
    pub shell: GuestEnd,
    /// Its serial console.
    pub console: GuestEnd,
    /// Its relay, for which the script has a door behind a wire. Without a pass it leaves the port alone.
    pub relay: Relay,
    /// Its network: the doors of the host that are ports. (Any door: user mode separates guests by the pass only.)
    pub doors: Doors,
    /// Its power button, and worse.
    pub power: Power,
}

/// Reaches the host's doors.
#[derive(Clone, Debug)]
pub struct Doors(pub(super) FakeHypervisor);

impl Doors {
    /// Connects to a door.
    ///
    /// # Errors
    /// `ConnectionRefused` while nobody listens there, or its backlog is full.
    pub fn connect(&self, address: SocketAddr) -> io::Result<Box<dyn Stream>> {
        self.0.connect(address)
    }
}

/// Ends or stops one VM. The calling script is dropped at its next await.
#[derive(Clone, Debug)]
pub struct Power {
    pub(super) hypervisor: FakeHypervisor,
    pub(super) id: VmId,
}

impl Power {
    /// The guest powers off.
    pub fn off(&self) {
        self.end(Ending::PoweredOff, "powered off");
    }

    /// QEMU dies.
    pub fn crash(&self) {
        self.end(Ending::Died, "crashed");
    }

    /// The guest reboots, which ends the machine (`on_reboot=destroy`).
    pub fn reboot(&self) {
        self.end(Ending::Restarted, "rebooted");
    }

    /// The guest's kernel panics.
    pub fn panic(&self) {
        self.hypervisor.halt(&self.id, Ending::Panicked);
    }

    /// The guest goes to sleep (S3), on a machine that can.
    pub fn sleep(&self) {
        self.hypervisor.halt(&self.id, Ending::Slept);
    }

    /// The VM's CPUs are stopped.
    pub fn pause(&self, why: Pause) {
        self.hypervisor.pause(&self.id, why);
    }

    fn end(&self, ending: Ending, how: &str) {
        self.hypervisor.end(&VmName::from(self.id.clone()), ending, how);
    }
}

#[derive(Debug, Default)]
struct Switch {
    paused: bool,
    off: bool,
    waker: Option<Waker>,
}

/// Pauses and ends a script from outside; clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Control(Arc<Mutex<Switch>>);

impl Control {
    pub(super) fn set(&self, paused: bool, off: bool) {
        let mut switch = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        switch.paused = paused;
        switch.off |= off;
        if let Some(waker) = switch.waker.take() {
            waker.wake();
        }
    }

    /// `None`: go on. Else what to answer instead of polling the script.
    fn check(&self, cx: &Context<'_>) -> Option<Poll<()>> {
        let mut switch = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        switch.waker = Some(cx.waker().clone());
        if switch.off { Some(Poll::Ready(())) } else { switch.paused.then_some(Poll::Pending) }
    }
}

/// A script under a [`Control`].
pub(super) struct Controlled {
    pub(super) control: Control,
    pub(super) script: BoxFuture<'static, ()>,
}

impl Future for Controlled {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(answer) = self.control.check(cx) {
            return answer;
        }
        let polled = self.script.as_mut().poll(cx);
        // The script may have switched itself off in this very poll.
        match self.control.check(cx) {
            Some(Poll::Ready(())) => Poll::Ready(()),
            _ => polled,
        }
    }
}
