//! Network namespaces of a test's own, where it may set what it likes. Needs no rights where the host lets users have
//! namespaces.
#![expect(clippy::disallowed_methods, reason = "tests start programs of the host")]

use std::fs::File;
use std::os::fd::AsFd as _;
use std::process::{Child, Command, Stdio};

/// Runs this test, an ignored one, in one; where the host lets nobody make one, says so.
pub(crate) fn run(test: &str) {
    let unshare = || {
        let mut command = Command::new("unshare");
        command.args(["--map-root-user", "--net", "--"]).stdin(Stdio::null());
        command
    };
    if !unshare().arg("true").status().is_ok_and(|status| status.success()) {
        eprintln!("LEFT OUT: {test}: no namespaces here");
        return;
    }
    let output = unshare()
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--nocapture", "--test-threads=1"])
        .output()
        .unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && out.contains("1 passed"), "{out}\n{err}");
    eprint!("{err}");
}

/// What a program of the host says, whether it succeeds or not. `None`: it is not here.
pub(crate) fn output(program: &str, arguments: &[&str]) -> Option<String> {
    match Command::new(program).args(arguments).stdin(Stdio::null()).output() {
        Ok(output) => Some(String::from_utf8(output.stdout).unwrap()),
        Err(error) => {
            eprintln!("LEFT OUT: what `{program}` shows: {error}");
            None
        }
    }
}

/// One more, inside of the test's: a container.
pub(crate) struct Nested(Child);

impl Nested {
    /// Makes it.
    pub(crate) fn new() -> Self {
        let mut command = Command::new("unshare");
        let child = command.args(["--net", "--", "sleep", "300"]).stdin(Stdio::null()).spawn().unwrap();
        let nested = Self(child);
        let own = std::fs::read_link("/proc/self/ns/net").unwrap();
        crate::apply::wait_for(std::time::Duration::from_secs(10), || {
            std::fs::read_link(nested.file()).is_ok_and(|its| its != own).then_some(())
        })
        .unwrap();
        nested
    }

    /// Of a process inside.
    pub(crate) fn id(&self) -> u32 {
        self.0.id()
    }

    fn file(&self) -> String {
        format!("/proc/{}/ns/net", self.id())
    }

    /// Does this inside.
    pub(crate) async fn run<T: Send + 'static>(&self, what: impl FnOnce() -> T + Send + 'static) -> T {
        let namespace = File::open(self.file()).unwrap();
        let thread = std::thread::spawn(move || {
            let kind = rustix::thread::LinkNameSpaceType::Network;
            rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(kind)).unwrap();
            what()
        });
        tokio::task::spawn_blocking(move || thread.join().unwrap()).await.unwrap()
    }
}

impl Drop for Nested {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
