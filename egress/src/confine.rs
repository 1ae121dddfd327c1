//! What can a process do that was taken over by its guest? Speak over sockets that it may open, and nothing else.
//!
//! No path of the file system (landlock, where the kernel has it), no program, no process, no listening socket (seccomp).
//! Both are required, not tried: a sandbox around us that forbids us to confine ourselves is an error, for it would hide
//! that we are not. Whether the kernel has landlock cannot be told from its refusal where a filter of somebody else answers
//! for it, so that is looked at first.
//!
//! Applies to the calling thread: before there is another one.

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, CompatLevel, Compatible as _, LandlockStatus, Ruleset, RulesetAttr as _,
    RulesetStatus, Scope,
};
use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};
use std::collections::BTreeMap;

/// Why a process is not confined, and so does not begin.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// The kernel has it, and refuses.
    #[error("apply landlock")]
    Landlock(#[from] landlock::RulesetError),
    /// Somebody else's filter refuses what landlock needs.
    #[error(
        "landlock is forbidden here: allow `landlock_create_ruleset` and `landlock_restrict_self` in the unit's `SystemCallFilter=`"
    )]
    Forbidden,
    /// It was not enforced.
    #[error("landlock is not in force, though the kernel has it")]
    NotEnforced,
    /// As of a sandbox that forbids it.
    #[error("apply the filter of system calls: allow `seccomp` in the unit's `SystemCallFilter=`")]
    Seccomp(#[from] seccompiler::Error),
    /// As [`ConfineError::Seccomp`].
    #[error("build the filter of system calls")]
    Filter(#[from] seccompiler::BackendError),
}

/// The newest version of landlock that is asked for; an older kernel gives what it has.
const NEWEST: ABI = ABI::V6;

/// Confines this process from here on: what it has opened stays open.
///
/// # Errors
/// [`ConfineError`]: it is not, or not wholly, confined.
pub(crate) fn confine() -> Result<(), ConfineError> {
    let _in_force: bool = landlock()?;
    let filter = BpfProgram::try_from(filter()?)?;
    Ok(seccompiler::apply_filter(&filter)?)
}

/// Whether it is in force: a kernel may have none.
fn landlock() -> Result<bool, ConfineError> {
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        // Any port may be reached, none listened on.
        .handle_access(AccessNet::BindTcp)?
        .scope(Scope::from_all(NEWEST))?
        .create()?
        .restrict_self()?;
    match (status.ruleset, status.landlock) {
        (RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced, _) => Ok(true),
        // Off since the kernel started, by its operator.
        (RulesetStatus::NotEnforced, LandlockStatus::NotEnabled) => Ok(false),
        (RulesetStatus::NotEnforced, LandlockStatus::NotImplemented) if !may_be_hidden() => Ok(false),
        (RulesetStatus::NotEnforced, LandlockStatus::NotImplemented) => Err(ConfineError::Forbidden),
        (RulesetStatus::NotEnforced, LandlockStatus::Available { .. }) => Err(ConfineError::NotEnforced),
    }
}

/// Whether it may be a filter of somebody else, and not the kernel, that says there is no landlock.
fn may_be_hidden() -> bool {
    let text = |path| std::fs::read_to_string(path).ok();
    if let Some(modules) = text("/sys/kernel/security/lsm") {
        return modules.split(',').any(|module| module.trim() == "landlock");
    }
    // 2: a filter is in force. A kernel from before 5.13 has no landlock, whatever a filter says.
    let filtered = text("/proc/thread-self/status").is_none_or(|status| !status.contains("\nSeccomp:\t0\n"));
    filtered && text("/proc/sys/kernel/osrelease").as_deref().and_then(version).is_none_or(|version| version >= (5, 13))
}

/// `6.1.0-56-cloud-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Calls that a running process makes, whatever their arguments.
const ALLOWED: &[c_long] = &[
    // Sockets and the audit file, which are open or may be opened below.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_connect,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_close,
    libc::SYS_ftruncate,
    libc::SYS_lseek,
    // Waiting.
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_futex,
    libc::SYS_clock_gettime,
    libc::SYS_restart_syscall,
    libc::SYS_sched_yield,
    // Memory; of pages that would run, none (below).
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_getrandom,
    // Signals that are ignored come in all the same.
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_sigaltstack,
    // The end.
    libc::SYS_exit,
    libc::SYS_exit_group,
];

fn filter() -> Result<SeccompFilter, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
    let is = |at, value| SeccompCondition::new(at, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value);
    let unset = |at, mask| SeccompCondition::new(at, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(mask), 0);
    let of = |value: i32| u64::from(value.unsigned_abs());
    // No unix socket leads anywhere, and no packet of another kind leaves.
    let mut sockets = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        for kind in [libc::SOCK_STREAM, libc::SOCK_DGRAM] {
            let kind = SeccompCondition::new(
                1,
                SeccompCmpArgLen::Dword,
                SeccompCmpOp::MaskedEq(!(of(libc::SOCK_NONBLOCK) | of(libc::SOCK_CLOEXEC))),
                of(kind),
            )?;
            sockets.push(SeccompRule::new(vec![is(0, of(family))?, kind])?);
        }
    }
    rules.insert(libc::SYS_socket, sockets);
    for (call, protection) in [(libc::SYS_mmap, 2), (libc::SYS_mprotect, 2)] {
        rules.insert(call, vec![SeccompRule::new(vec![unset(protection, of(libc::PROT_EXEC))?])?]);
    }
    let fcntl = [libc::F_GETFL, libc::F_SETFL, libc::F_GETFD, libc::F_SETFD];
    let fcntl: Result<Vec<_>, _> = fcntl.iter().map(|command| SeccompRule::new(vec![is(1, of(*command))?])).collect();
    rules.insert(libc::SYS_fcntl, fcntl?);
    rules.insert(libc::SYS_ioctl, vec![SeccompRule::new(vec![is(1, libc::FIONBIO)?])?]);
    let architecture = std::env::consts::ARCH.try_into()?;
    // A library may try something harmless: it is refused, and nobody is killed for it.
    let refused = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    SeccompFilter::new(rules, refused, SeccompAction::Allow, architecture)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::ErrorKind::PermissionDenied;
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::unix::net::UnixStream;

    /// Both bind a thread: this one's own.
    fn in_a_thread(test: impl FnOnce() + Send + 'static) {
        std::thread::spawn(test).join().unwrap();
    }

    #[test]
    fn no_file_can_be_opened_under_landlock() {
        in_a_thread(|| {
            assert!(File::open("/etc/passwd").is_ok());
            if landlock().unwrap() {
                assert_eq!(File::open("/etc/passwd").unwrap_err().kind(), PermissionDenied);
                assert_eq!(File::create("/tmp/dayfly-egress").unwrap_err().kind(), PermissionDenied);
            } else {
                println!("this kernel has no landlock");
            }
        });
    }

    /// A sandbox around us answers for the kernel, as systemd's does: that is told, and no process begins unconfined.
    #[test]
    fn a_filter_that_hides_landlock_is_an_error() {
        in_a_thread(|| {
            let calls = [libc::SYS_landlock_create_ruleset, libc::SYS_landlock_restrict_self];
            let rules = calls.iter().map(|call| (*call, Vec::new())).collect();
            let refused = SeccompAction::Errno(libc::EPERM.unsigned_abs());
            let architecture = std::env::consts::ARCH.try_into().unwrap();
            let hidden = SeccompFilter::new(rules, SeccompAction::Allow, refused, architecture).unwrap();
            seccompiler::apply_filter(&BpfProgram::try_from(hidden).unwrap()).unwrap();
            let error = confine().unwrap_err();
            assert!(matches!(error, ConfineError::Forbidden), "{error}");
            assert!(error.to_string().contains("SystemCallFilter="));
        });
    }

    /// What its guest could make of a process that it took over.
    #[test]
    #[expect(clippy::disallowed_methods, reason = "that it cannot be started is what is tested")]
    fn a_confined_thread_speaks_over_sockets_that_it_may_open_and_does_nothing_else() {
        in_a_thread(|| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let to = listener.local_addr().unwrap();
            let mut open = tempfile::tempfile().unwrap();
            let us = rustix::process::getpid();
            confine().unwrap();
            let refused = |what: &str, done: std::io::Result<()>| {
                assert_eq!(done.unwrap_err().kind(), PermissionDenied, "{what}");
            };
            refused("open", File::open("/etc/passwd").map(drop));
            refused("stat", std::fs::metadata("/etc/passwd").map(drop));
            refused("remove", std::fs::remove_file("/tmp/dayfly-egress"));
            refused("execute", std::process::Command::new("/bin/true").spawn().map(drop));
            refused("thread", std::thread::Builder::new().spawn(|| {}).map(drop));
            refused("listen", TcpListener::bind("127.0.0.1:0").map(drop));
            refused("bind", UdpSocket::bind("127.0.0.1:0").map(drop));
            refused("unix", UnixStream::connect("/run/x").map(drop));
            refused("pair", UnixStream::pair().map(drop));
            let raw = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::RAW, None);
            refused("raw", raw.map(drop).map_err(Into::into));
            let netlink = rustix::net::socket(rustix::net::AddressFamily::NETLINK, rustix::net::SocketType::RAW, None);
            refused("netlink", netlink.map(drop).map_err(Into::into));
            refused("signal", rustix::process::kill_process(us, rustix::process::Signal::TERM).map_err(Into::into));
            refused("chmod", std::fs::set_permissions("/tmp", std::os::unix::fs::PermissionsExt::from_mode(0o777)));
            // What it is for.
            open.write_all(b"line\n").unwrap();
            open.set_len(0).unwrap();
            let mut stream = TcpStream::connect(to).unwrap();
            stream.write_all(b"hello").unwrap();
            drop(stream);
            // This thread may accept no more, but the socket is there.
            assert!(open.read(&mut [0]).is_ok());
        });
    }

    #[test]
    fn a_kernels_version_is_read() {
        assert_eq!(version("6.1.0-56-cloud-amd64\n"), Some((6, 1)));
        assert_eq!(version("5.4.0"), Some((5, 4)));
        assert_eq!(version("nonsense"), None);
    }

    #[test]
    fn the_filter_is_one_that_the_kernel_takes() {
        let program = BpfProgram::try_from(filter().unwrap()).unwrap();
        assert!((100..4096).contains(&program.len()), "{}", program.len());
    }
}
