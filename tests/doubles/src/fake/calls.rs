//! The fake as a [`Hypervisor`], and as the [`Paths`] beside it: how calls count, take their time, fail and take effect.

use super::faults::{Fault, Op};
use super::guest::{Control, Controlled, Doors, GuestMachine, Power};
use super::wire::Wire;
use super::{DOOR_BACKLOG, FakeHypervisor, Machine, Overlay, World};
use dayfly::BoxFuture;
use dayfly::network::{DoorListener, Listen};
use dayfly::vm::paths::Paths;
use dayfly::vm::{
    Ending, Host, HostInfo, Hypervisor, InstallationId, Pause, Stream, Usage, VmError, VmName, VmSpec, VmState,
    VmSummary,
};
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::DuplexStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

/// How calls run.
impl FakeHypervisor {
    /// The host of this world.
    #[must_use]
    pub fn host(&self) -> Host {
        Host::new(Arc::new(self.clone()), Arc::new(self.clone()))
    }

    /// Counts and notes a call; its number in the history, and its fault.
    fn begin(&self, op: Op, subject: &str) -> (usize, Option<Fault>) {
        let mut world = self.world();
        let planned = world.faults.next(op, subject);
        let fault = match planned {
            _ if op.needs_libvirtd() && !world.reachable => Some(Fault::Unreachable),
            Some(Fault::Unreachable) if !op.needs_libvirtd() => Some(Fault::Refused("injected failure")),
            planned => planned,
        };
        (world.note(Some(op), subject, "under way"), fault)
    }

    fn finish<T, E: std::error::Error>(&self, number: usize, result: Result<T, E>) -> Result<T, E> {
        let outcome = result.as_ref().map_or_else(|error| format!("{error}{}", cause(error)), |_| "ok".into());
        self.world().outcome(number, outcome);
        result
    }

    /// Runs a call that changes something. Its effect comes after its time, and a step where
    /// steps are asked for, even if nobody waits for it any more.
    async fn change<T: Send + 'static>(
        &self,
        op: Op,
        subject: String,
        effect: impl FnOnce(&Self) -> Result<T, VmError> + Send + 'static,
    ) -> Result<T, VmError> {
        let (number, fault) = self.begin(op, &subject);
        let takes = self.world().takes(op);
        let result = match fault {
            Some(Fault::Unreachable) => Err(unreachable(op)),
            Some(Fault::Refused(why)) => {
                sleep(takes).await;
                Err(refused(op, &subject, why))
            }
            Some(Fault::Hangs) => {
                sleep(op.deadline()).await;
                Err(no_answer(op, &subject))
            }
            None | Some(Fault::HangsAfterEffect | Fault::AnswerLost) => {
                let fake = self.clone();
                #[expect(
                    clippy::disallowed_methods,
                    reason = "stands for the other side, which goes on when its caller is gone"
                )]
                let done = tokio::spawn(async move {
                    sleep(takes).await;
                    fake.await_step().await;
                    effect(&fake)
                });
                let since = Instant::now();
                let answer = timeout(op.deadline(), done).await;
                if fault == Some(Fault::HangsAfterEffect) {
                    tokio::time::sleep_until(since + op.deadline()).await;
                }
                match (fault, answer) {
                    (Some(Fault::AnswerLost), Ok(_)) => Err(unreachable(op)),
                    (None, Ok(answer)) => answer.expect("effects do not panic"),
                    _ => Err(no_answer(op, &subject)),
                }
            }
        };
        self.finish(number, result)
    }

    /// Runs a call that only looks.
    async fn look<T>(&self, op: Op, subject: String, read: impl FnOnce(&World) -> T) -> Result<T, VmError> {
        let (number, fault) = self.begin(op, &subject);
        let result = match fault {
            None => Ok(read(&self.world())),
            Some(Fault::Refused(why)) => Err(refused(op, &subject, why)),
            Some(Fault::Unreachable | Fault::AnswerLost) => Err(unreachable(op)),
            Some(Fault::Hangs | Fault::HangsAfterEffect) => {
                sleep(op.deadline()).await;
                Err(no_answer(op, &subject))
            }
        };
        self.finish(number, result)
    }

    /// Runs a call on sockets, which is quick.
    pub(super) fn wire<T>(
        &self,
        op: Op,
        subject: &str,
        act: impl FnOnce(&mut World) -> io::Result<T>,
    ) -> io::Result<T> {
        let (number, fault) = self.begin(op, subject);
        let result = match fault {
            None => act(&mut self.world()),
            Some(Fault::Hangs) => Err(io::ErrorKind::TimedOut.into()),
            Some(fault) => Err(io::Error::other(format!("injected: {fault:?}"))),
        };
        self.finish(number, result)
    }

    async fn await_step(&self) {
        let steps = self.world().steps.clone();
        if let Some(steps) = steps {
            // Closed means let go.
            if let Ok(permit) = steps.acquire().await {
                permit.forget();
            }
        }
    }

    /// The VM is there from here on; its guest boots.
    fn boot(&self, spec: VmSpec) {
        let name = VmName::from(spec.id.clone());
        let [channel, door, shell, console] = std::array::from_fn(|_| Wire::default());
        let control = Control::default();
        // What was restored stands still, its guest up already.
        let restored = spec.frozen.is_some();
        control.set(restored, false);
        let state = if restored { VmState::Paused(Pause::Operator) } else { VmState::Running };
        let (relay, mut sessions) = dayfly_test_guest::relay();
        let port = door.guest_end();
        let mut world = self.world();
        let (timing, script) = (world.timing, Arc::clone(&world.script));
        let machine = GuestMachine {
            spec: spec.clone(),
            channel: channel.guest_end(),
            door: door.guest_end(),
            shell: shell.guest_end(),
            console: console.guest_end(),
            relay,
            doors: Doors(self.clone()),
            power: Power { hypervisor: self.clone(), id: spec.id.clone() },
        };
        world.sockets.insert((spec.socket_dir.clone(), spec.id.clone()));
        world.endings.remove(&name);
        world
            .vms
            .insert(name.clone(), Machine { spec, state, channel, door, shell, console, control: control.clone() });
        world.note(None, &name.to_string(), if restored { "restored" } else { "started" });
        drop(world);
        let fake = self.clone();
        let life = async move {
            if !restored {
                sleep(timing.boot).await;
                fake.await_step().await;
                fake.world().note(None, &name.to_string(), "booted");
            }
            let rest = timing.lifetime.map_or(Duration::MAX, |lifetime| lifetime.saturating_sub(timing.boot));
            // Returned or out of time: either way the guest powers off.
            let inside = async {
                let mut nonces = 0_u128;
                let nonce = || {
                    nonces += 1;
                    nonces.to_be_bytes()
                };
                let relay = async {
                    // It may have nobody left to open streams for; the script goes on.
                    sessions.run(port, nonce).await;
                    std::future::pending::<()>().await;
                };
                tokio::select! {
                    biased;
                    // The VM's end drops both.
                    () = script.run(machine) => {}
                    () = relay => {}
                }
            };
            let _ = timeout(rest, inside).await;
            fake.end(&name, Ending::PoweredOff, "powered off");
        };
        let script = Controlled { control, script: Box::pin(life) };
        #[expect(clippy::disallowed_methods, reason = "a guest is nobody's task: it ends with its VM")]
        tokio::spawn(script);
    }
}

fn cause(error: &dyn std::error::Error) -> String {
    error.source().map(|source| format!(": {source}")).unwrap_or_default()
}

fn unreachable(op: Op) -> VmError {
    VmError::Unreachable { uri: "fake:///".into(), source: format!("client socket is closed ({op})").into() }
}

fn refused(op: Op, subject: &str, why: &str) -> VmError {
    VmError::Refused { what: op.words(), name: subject.into(), source: why.into() }
}

fn no_answer(op: Op, subject: &str) -> VmError {
    VmError::Deadline { what: op.words(), name: subject.into(), seconds: op.deadline().as_secs() }
}

impl Hypervisor for FakeHypervisor {
    fn probe(&self) -> BoxFuture<'_, Result<HostInfo, VmError>> {
        Box::pin(self.look(Op::Probe, "host".into(), |world| world.host.clone()))
    }

    fn start<'a>(&'a self, spec: &'a VmSpec) -> BoxFuture<'a, Result<(), VmError>> {
        let (name, spec) = (VmName::from(spec.id.clone()), spec.clone());
        Box::pin(self.change(Op::Start, name.to_string(), move |fake| {
            let refuse = |why| Err(refused(Op::Start, &name.to_string(), why));
            let world = fake.world();
            match world.vms.get(&name) {
                Some(machine) if machine.spec.installation == spec.installation => return Ok(()),
                Some(_) => return refuse("a VM of this name is somebody else's"),
                None if !world.overlays.contains_key(&spec.overlay) => return refuse("overlay does not exist"),
                None => {}
            }
            if let Some(frozen) = &spec.frozen {
                match world.frozen.get(&frozen.state) {
                    None => return refuse("there is nothing of this name that was frozen"),
                    Some(digest) if *digest != frozen.sha256 => {
                        return Err(VmError::Damaged { name: name.to_string() });
                    }
                    Some(_) => {}
                }
            }
            drop(world);
            fake.boot(spec);
            Ok(())
        }))
    }

    fn can_freeze(&self) -> bool {
        self.world().freezes
    }

    fn freeze<'a>(&'a self, name: &'a VmName, state: &'a Path) -> BoxFuture<'a, Result<[u8; 32], VmError>> {
        let (name, state) = (name.clone(), state.to_owned());
        Box::pin(self.change(Op::Freeze, name.to_string(), move |fake| {
            let mut world = fake.world();
            let World { vms, frozen, .. } = &mut *world;
            let Some(machine) = vms.get_mut(&name) else {
                return Err(refused(Op::Freeze, &name.to_string(), "there is no such VM"));
            };
            machine.state = VmState::Paused(Pause::Operator);
            machine.control.set(true, false);
            let mut digest = [0; 32];
            digest[16..].copy_from_slice(name.id().as_str().as_bytes());
            frozen.insert(state, digest);
            world.note(None, &name.to_string(), "frozen");
            Ok(digest)
        }))
    }

    fn go_on<'a>(&'a self, name: &'a VmName) -> BoxFuture<'a, Result<(), VmError>> {
        let name = name.clone();
        Box::pin(self.change(Op::GoOn, name.to_string(), move |fake| {
            let state = fake.world().vms.get(&name).map(|machine| machine.state);
            match state {
                None => Err(refused(Op::GoOn, &name.to_string(), "there is no such VM")),
                Some(VmState::Paused(Pause::Operator)) => {
                    fake.resume(name.id());
                    Ok(())
                }
                Some(_) => Ok(()),
            }
        }))
    }

    fn state<'a>(&'a self, name: &'a VmName) -> BoxFuture<'a, Result<VmState, VmError>> {
        Box::pin(self.look(Op::State, name.to_string(), move |world| {
            let ended = || world.endings.get(name).map_or(VmState::Gone, |ending| VmState::Ended(*ending));
            world.vms.get(name).map_or_else(ended, |machine| machine.state)
        }))
    }

    fn usage<'a>(&'a self, _name: &'a VmName) -> BoxFuture<'a, Usage> {
        let (takes, usage) = self.world().usage;
        Box::pin(async move {
            tokio::time::sleep(takes).await;
            usage
        })
    }

    fn destroy<'a>(&'a self, name: &'a VmName) -> BoxFuture<'a, Result<(), VmError>> {
        let gone = name.clone();
        Box::pin(self.change(Op::Destroy, name.to_string(), move |fake| {
            fake.end(&gone, Ending::Destroyed, "destroyed");
            Ok(())
        }))
    }

    fn list<'a>(&'a self, installation: &'a InstallationId) -> BoxFuture<'a, Result<Vec<VmSummary>, VmError>> {
        Box::pin(self.look(Op::List, installation.to_string(), move |world| {
            // As the real one would list them.
            let ours = world.vms.iter().filter(|(_, machine)| machine.spec.installation == *installation);
            ours.map(|(name, machine)| VmSummary { name: name.clone(), state: machine.state }).collect()
        }))
    }
}

/// Disks and sockets of this world. Directories are there.
impl Paths for FakeHypervisor {
    fn make_passable<'a>(&'a self, _: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn make_private<'a>(&'a self, _: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn make_overlay<'a>(
        &'a self,
        overlay: &'a Path,
        base: &'a Path,
        disk_gib: u64,
    ) -> BoxFuture<'a, Result<(), VmError>> {
        let (path, made) = (overlay.to_owned(), Overlay { base: base.to_owned(), disk_gib });
        Box::pin(self.change(Op::CreateOverlay, overlay.display().to_string(), move |fake| {
            let mut world = fake.world();
            world.note(None, &path.display().to_string(), "overlay made");
            world.overlays.insert(path, made);
            Ok(())
        }))
    }

    fn unlink<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        let gone = path.to_owned();
        let removed = self.change(Op::RemoveOverlay, path.display().to_string(), move |fake| {
            let mut world = fake.world();
            if world.overlays.remove(&gone).is_some() {
                world.note(None, &gone.display().to_string(), "overlay removed");
            }
            Ok(())
        });
        Box::pin(async move { removed.await.map_err(io::Error::other) })
    }

    fn unlink_all_of<'a>(&'a self, dir: &'a Path, vm: &'a VmName) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move {
            self.wire(Op::RemoveSockets, &vm.to_string(), |world| {
                world.sockets.remove(&(dir.to_owned(), vm.id().clone()));
                Ok(())
            })
        })
    }

    fn names<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, io::Result<Vec<String>>> {
        let looked = self.look(Op::ListOverlays, dir.display().to_string(), move |world| {
            let in_dir = world.overlays.keys().filter(|path| path.parent() == Some(dir));
            in_dir.filter_map(|path| Some(path.file_name()?.to_str()?.to_owned())).collect()
        });
        Box::pin(async move { looked.await.map_err(io::Error::other) })
    }

    fn open_socket<'a>(&'a self, socket: &'a Path) -> BoxFuture<'a, io::Result<Box<dyn Stream>>> {
        Box::pin(async move {
            let (op, name) = Op::of_socket(socket).ok_or(io::ErrorKind::NotFound)?;
            let end = self.wire(op, &name.to_string(), |world| {
                let machine = machine(world, socket.parent().unwrap_or(Path::new("")), &name)?;
                match op {
                    Op::OpenChannel => machine.channel.connect(),
                    Op::OpenDoor => machine.door.connect(),
                    Op::OpenShell => machine.shell.connect(),
                    _ => machine.console.connect(),
                }
            })?;
            Ok(Box::new(end) as Box<dyn Stream>)
        })
    }
}

/// The VM behind a socket, if the socket lies where it is looked for.
fn machine<'w>(world: &'w World, socket_dir: &Path, name: &VmName) -> io::Result<&'w Machine> {
    match world.vms.get(name) {
        _ if !world.sockets.contains(&(socket_dir.to_owned(), name.id().clone())) => {
            Err(io::ErrorKind::NotFound.into())
        }
        Some(machine) => Ok(machine),
        None => Err(io::ErrorKind::ConnectionRefused.into()),
    }
}

impl Listen for FakeHypervisor {
    fn listen(&self, address: SocketAddr) -> BoxFuture<'_, io::Result<Box<dyn DoorListener>>> {
        Box::pin(async move {
            self.wire(Op::Listen, &address.to_string(), |world| {
                if world.doors.contains_key(&address) {
                    return Err(io::ErrorKind::AddrInUse.into());
                }
                let (sender, connections) = mpsc::channel(DOOR_BACKLOG);
                world.doors.insert(address, sender);
                Ok(Box::new(FakeDoor { fake: self.clone(), address, connections }) as Box<dyn DoorListener>)
            })
        })
    }
}

struct FakeDoor {
    fake: FakeHypervisor,
    address: SocketAddr,
    connections: mpsc::Receiver<DuplexStream>,
}

impl DoorListener for FakeDoor {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Box<dyn Stream>>> {
        Box::pin(async {
            let stream = self.connections.recv().await.expect("the world holds the sender for as long as this listens");
            Ok(Box::new(stream) as Box<dyn Stream>)
        })
    }
}

impl Drop for FakeDoor {
    fn drop(&mut self) {
        self.fake.world().doors.remove(&self.address);
    }
}
