//! Tests of `apply`, below a root of their own.

use super::*;
use dayfly_guest_config::{CONTRACT, GuestRunner};

const PEM: &str = "-----BEGIN CERTIFICATE-----\nMA==\n-----END CERTIFICATE-----\n";

fn config() -> GuestConfig {
    GuestConfig {
        version: CONTRACT,
        vm: "abcdefghijklmnop".into(),
        door: "10.0.2.2:40000".into(),
        pass: "A".repeat(43),
        hostname: "df-abc".into(),
        machine_id: "1".repeat(32),
        runner_machine_id: "2".repeat(32),
        boot_id: "6a1c1b0e-0000-4000-8000-000000000000".into(),
        seed: "00ff".into(),
        clock_us: 1,
        network: GuestNetwork {
            mac: None,
            address: "10.0.2.15/24".into(),
            gateway: "10.0.2.2".parse().unwrap(),
            dns: vec!["10.0.2.3".parse().unwrap()],
            relay: false,
        },
        forwards: Vec::new(),
        runner: GuestRunner {
            config_toml: "concurrent = 1\n".into(),
            ca_pem: None,
            name: "r".into(),
            user: "ci".into(),
            wait_timeout_s: 60,
        },
        clone: None,
        door_patience_s: 60,
        power_off_after_s: 1800,
        may_stay: false,
        hold: false,
    }
}

fn me() -> User {
    let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    User { name: "ci".into(), uid, gid, groups: vec![], home: "/".into() }
}

fn root() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir(root.path().join("etc")).unwrap();
    root
}

#[test]
fn all_files_are_written_and_a_second_time_changes_nothing() {
    let root = root();
    let mut config = config();
    config.runner.config_toml = format!("tls-ca-file = \"{CA_FILE}\"\n");
    config.runner.ca_pem = Some(PEM.into());
    let read = |path: &str| fs::read_to_string(below(root.path(), path)).unwrap();
    for _ in 0..2 {
        names(root.path(), &config).unwrap();
        files(root.path(), &config, &me()).unwrap();
        assert_eq!(read("/etc/hostname"), "df-abc\n");
        assert!(read("/etc/hosts").contains("127.0.1.1 df-abc\n"));
        assert_eq!(read("/etc/resolv.conf"), "nameserver 10.0.2.3\n");
        assert_eq!(read(CONFIG_FILE), config.runner.config_toml);
        assert_eq!(read(CA_FILE), PEM);
    }
    let mode = fs::metadata(below(root.path(), CONFIG_FILE)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "it holds the guest token");
}

#[test]
fn a_ca_file_that_the_runner_would_miss_is_an_error() {
    let (root, mut config) = (root(), config());
    config.runner.config_toml = format!("tls-ca-file = \"{CA_FILE}\"\n");
    assert!(matches!(files(root.path(), &config, &me()), Err(ApplyError::CaMissing)));
    config.runner.ca_pem = Some("<html>".into());
    assert!(matches!(files(root.path(), &config, &me()), Err(ApplyError::Member("ca_pem", _))));
    assert!(!below(root.path(), CONFIG_FILE).exists(), "nothing that a runner could start on");
}

#[test]
fn a_disk_that_cannot_be_written_is_an_error_with_its_path() {
    let root = tempfile::tempdir().unwrap(); // has no /etc
    let error = names(root.path(), &config()).unwrap_err();
    assert!(error.to_string().ends_with("/etc/hostname"), "{error}");
}

#[test]
fn no_name_server_is_said_and_not_left_open() {
    assert!(resolv_conf(&[]).contains("off"));
    assert!(!resolv_conf(&[]).contains("nameserver"));
}

#[test]
fn a_machine_id_replaces_a_longer_one_in_place() {
    let root = root();
    let file = below(root.path(), "/etc/machine-id");
    fs::write(&file, "x".repeat(90)).unwrap();
    machine_id(root.path(), &"a".repeat(32)).unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), format!("{}\n", "a".repeat(32)));
    for bad in ["", "uninitialized", &"g".repeat(32), &"a".repeat(34)] {
        assert!(machine_id(root.path(), bad).is_err(), "{bad}");
    }
}

#[test]
fn addresses_macs_and_hex_are_read_strictly() {
    assert_eq!(parse_address("10.213.0.9/16"), Some(("10.213.0.9".parse().unwrap(), 16)));
    assert_eq!(parse_address("fd00::2/64"), Some(("fd00::2".parse().unwrap(), 64)));
    for bad in ["10.0.0.1", "10.0.0.1/33", "10.0.0/8", "/8", "10.0.0.1/-1"] {
        assert_eq!(parse_address(bad), None, "{bad}");
    }
    assert_eq!(parse_mac("52:54:00:aA:01:ff"), Some([0x52, 0x54, 0, 0xaa, 1, 255]));
    for bad in ["52:54:00:aa:01", "52:54:00:aa:01:0", "52:54:00:aa:01:0001", "525400aa01ff", "52:54:00:aa:01:+f"] {
        assert_eq!(parse_mac(bad), None, "{bad}");
    }
    assert_eq!(from_hex("00fF"), Some(vec![0, 255]));
    assert_eq!(from_hex("0"), None);
}

#[test]
fn a_card_is_found_whatever_udev_calls_it() {
    let dir = tempfile::tempdir().unwrap();
    let device = |name: &str, hardware: bool| {
        let path = dir.path().join(name);
        fs::create_dir_all(if hardware { path.join("device") } else { path }).unwrap();
    };
    assert_eq!(card(dir.path()), None);
    device("lo", false);
    device("docker0", false);
    assert_eq!(card(dir.path()), None);
    device("enp0s2", true);
    assert_eq!(card(dir.path()).as_deref(), Some("enp0s2"));
    device("eth0", true);
    assert_eq!(card(dir.path()).as_deref(), Some("eth0"));
}
