//! What the package brings for systemd: what it promises of limits and leftovers.

fn unit(name: &str) -> String {
    std::fs::read_to_string(std::path::Path::new(super::ROOT).join("packaging").join(name)).unwrap()
}

fn value<'a>(unit: &'a str, key: &str) -> &'a str {
    let line = unit.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    line.unwrap_or_else(|| panic!("no {key}"))
}

/// U44: a daemon that is killed for its memory is started again: its machines are in no cgroup of its own, and the next
/// one adopts its jobs (the kill ring shows that at every step).
#[test]
fn the_service_is_bounded_and_comes_back() {
    let unit = unit("dayfly.service");
    assert!(value(&unit, "MemoryMax").ends_with('G'));
    assert!(value(&unit, "TasksMax").parse::<u32>().unwrap() >= 1024);
    assert_eq!(value(&unit, "Restart"), "on-failure");
    assert_eq!(value(&unit, "KillMode"), "process");
    assert_eq!(value(&unit, "StartLimitIntervalSec"), "0");
    // A helper that was killed for its memory is an error of one job; the daemon itself is started again.
    assert_eq!(value(&unit, "OOMPolicy"), "continue");
}

/// U23: the host's libvirtd keeps a log for each machine, which only root can remove: a timer does, of our machines and
/// no others, within a fortnight. (Those of a session's libvirtd go with the machine.)
#[test]
#[expect(clippy::disallowed_methods, reason = "what the unit starts is what is tested")]
fn old_logs_of_our_machines_are_removed_and_no_others() {
    let service = unit("dayfly-logs.service");
    let command = value(&service.replace("\\\n", " "), "ExecStart").to_owned();
    let dir = tempfile::tempdir().unwrap();
    let old = std::time::SystemTime::now() - std::time::Duration::from_secs(13 * 86_400 + 3600);
    let files = [
        ("df-abcdefghijklmnop.log", true, false),
        ("df-abcdefghijklmno2.log.1.gz", true, false),
        ("df-abcdefghijklmno3.log.2", true, false),
        ("df-abcdefghijklmno4.log", false, true),
        ("df-short.log", true, true),
        ("web.log", true, true),
        ("other-df-abcdefghijklmnop.log", true, true),
        ("df-abcdefghijklmnop.xml", true, true),
    ];
    for (name, is_old, _) in files {
        let file = std::fs::File::create(dir.path().join(name)).unwrap();
        if is_old {
            file.set_modified(old).unwrap();
        }
    }
    let command = command.replace("/var/log/libvirt/qemu", &dir.path().display().to_string());
    assert!(std::process::Command::new("sh").arg("-c").arg(&command).status().unwrap().success(), "{command}");
    for (name, _, stays) in files {
        assert_eq!(dir.path().join(name).exists(), stays, "{name}");
    }
    assert_eq!(value(&unit("dayfly-logs.timer"), "OnCalendar"), "daily");
    assert!(unit("dayfly.service").contains("\nWants=dayfly-logs.timer\n"));
    let package = unit("build-deb");
    assert!(package.contains("dayfly-logs.service dayfly-logs.timer"), "both are in the package");
}

/// What a VM's egress is started by: for the daemon alone, one user for each, and free to confine itself, which a filter of
/// system calls would else hide from it.
#[test]
fn the_egress_of_each_vm_is_a_service_of_its_own() {
    let socket = unit("dayfly-egress.socket");
    assert_eq!(value(&socket, "Accept"), "yes");
    assert_eq!((value(&socket, "SocketUser"), value(&socket, "SocketMode")), ("dayfly", "0600"));
    assert!(value(&socket, "MaxConnections").parse::<u32>().unwrap() >= 512);
    let service = unit("dayfly-egress@.service");
    assert_eq!((value(&service, "DynamicUser"), value(&service, "StandardInput")), ("yes", "socket"));
    assert!(value(&service, "User").contains("%i"), "one for each instance");
    assert!(!service.contains("\nPartOf="), "it outlives a restart of the daemon");
    for filtered in [&service, &unit("dayfly.service")] {
        for call in ["seccomp", "landlock_create_ruleset", "landlock_restrict_self"] {
            assert!(
                filtered.lines().any(|line| line.starts_with("SystemCallFilter=") && line.contains(call)),
                "{call}"
            );
        }
    }
    let package = unit("build-deb");
    assert!(
        package.contains("dayfly-egress.socket dayfly-egress@.service")
            && package.contains("dayfly-exec dayfly-egress;")
    );
}
