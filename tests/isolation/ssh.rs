//! GitLab's other entrance: what `git clone` over SSH wants is a server that knows a key, and a repository.

use crate::lab::{run, succeeded};
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// The home of the user `git`, whom the ring's script makes.
const HOME: &str = "/run/git";

/// And its number there: `git` in a user namespace, who is whoever runs the test.
const ID: &str = "1500";

/// The server, as long as this lives.
pub(crate) struct Ssh {
    server: Child,
    /// Who shows this is let in.
    pub(crate) key: String,
}

impl Ssh {
    /// Serves the repository of a lab's folder as `git@HOST:repository.git`.
    pub(crate) fn new(at: SocketAddr, dir: &Path) -> Self {
        let path = |name: &str| dir.join(name).display().to_string();
        let (host, key, openssh) = (path("ssh-host"), path("ssh-key"), path("ssh-key.openssh"));
        succeeded(&run("dropbearkey", &["-t", "ed25519", "-f", &host]));
        let printed = succeeded(&run("dropbearkey", &["-t", "ed25519", "-f", &key]));
        let public = printed.lines().find(|line| line.starts_with("ssh-")).expect("the public half is printed");
        succeeded(&run("dropbearconvert", &["dropbear", "openssh", &key, &openssh]));
        let known = Path::new(HOME).join(".ssh/authorized_keys");
        fs::write(known, format!("{public}\n")).expect("the ring's script makes the home of `git`");
        let repository = Path::new(HOME).join("repository.git");
        // Of the test before.
        let _ = fs::remove_file(&repository);
        std::os::unix::fs::symlink(dir.join("repository.git"), repository).unwrap();
        // In the foreground, by keys only. Who has no root's rights becomes nobody else, and there is nobody else.
        let server = Command::new("unshare")
            .args(["--user", &format!("--map-user={ID}"), &format!("--map-group={ID}")])
            .args(["/usr/sbin/dropbear", "-F", "-E", "-s", "-r", &host, "-P", &path("ssh-pid"), "-p", &at.to_string()])
            .stdin(Stdio::null())
            .stderr(fs::File::create(dir.join("ssh-log")).unwrap())
            .spawn()
            .expect("unshare starts");
        Self { server, key: fs::read_to_string(openssh).unwrap() }
    }
}

impl Drop for Ssh {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}
