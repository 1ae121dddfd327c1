//! The process, from its first call to its end.

use crate::audit::Log;
use crate::port::Port;
use crate::serve::{Vm, serve};
use crate::start::{self, Received, StartError};
use dayfly_guest_config::Pass;
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::io::{self, Write as _};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::rc::Rc;
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::LocalSet;

/// A wrong command line (sysexits.h).
const USAGE: u8 = 64;

/// Runs the program: it has no arguments, and is told over its standard input what it is for.
#[must_use]
pub fn run() -> ExitCode {
    if std::env::args_os().len() > 1 {
        complain("dayfly-egress has no arguments: the daemon starts it, and tells it the rest over its standard input");
        return ExitCode::from(USAGE);
    }
    match begin() {
        Ok(process) => {
            process.serve();
            ExitCode::SUCCESS
        }
        Err(error) => {
            complain(&crate::chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn complain(text: &str) {
    // Nobody may be there to hear it.
    let _ = writeln!(io::stderr(), "dayfly-egress: {text}");
}

/// Confined, and ready to serve.
struct Process {
    runtime: Runtime,
    port: Port,
    pass: Pass,
    vm: Rc<Vm>,
    /// Taken, and nothing is done about them: a process outlives what sends them.
    _signals: Vec<Signal>,
}

/// From the first line to the answer.
fn begin() -> Result<Process, StartError> {
    let socket = UnixStream::from(rustix::io::dup(rustix::stdio::stdin()).map_err(io::Error::from)?);
    // A socket that is held here would tell the daemon nothing, and its end is not ours.
    rustix::stdio::dup2_stdin(std::fs::File::open("/dev/null")?).map_err(io::Error::from)?;
    let process = start::receive(&socket).and_then(prepare);
    start::answer(&socket, process.as_ref().map(|_| ()));
    process
}

fn prepare(received: Received) -> Result<Process, StartError> {
    let Received { start, port, audit } = received;
    let (pass, policy, resolvers) = start.into_parts()?;
    flock(&audit, FlockOperation::NonBlockingLockExclusive).map_err(|_| StartError::Locked)?;
    limit();
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let (port, signals) = {
        let _inside = runtime.enter();
        port.set_nonblocking(true)?;
        let port = Port::new(tokio::net::UnixStream::from_std(port)?);
        let ignored = [SignalKind::hangup(), SignalKind::interrupt(), SignalKind::quit(), SignalKind::terminate()];
        (port, ignored.into_iter().map(signal).collect::<io::Result<Vec<_>>>()?)
    };
    let log = Log::open(audit)?;
    crate::confine::confine()?;
    let vm = {
        let _inside = runtime.enter();
        Rc::new(Vm::new(policy, resolvers, log))
    };
    Ok(Process { runtime, port, pass, vm, _signals: signals })
}

/// As many descriptors as may be had, for streams and questions; and no image of the memory, which holds the pass.
fn limit() {
    let files = getrlimit(Resource::Nofile);
    // What is missing then shows as a connection that cannot be made.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: files.maximum, maximum: files.maximum });
    let _ = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
}

impl Process {
    fn serve(self) {
        self.runtime.block_on(LocalSet::new().run_until(serve(&self.port, &self.pass, &self.vm)));
    }
}
