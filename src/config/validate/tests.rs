//! Each mistake that a configuration can hold, and the sentence that it gets.

use super::*;
use crate::web::Address;
use std::os::unix::fs::PermissionsExt as _;

/// A file that is right, to be spoilt.
const GOOD: &str = r#"
concurrent = 2
[[class]]
name = "small"
image = "debian-12-shell"
[[runner]]
name = "ci"
url = "https://gitlab.example.com"
token_file = "tokens/ci"
class = "small"
"#;

fn load(text: &str, environment: &[(&str, &str)]) -> Result<Loaded, ConfigError> {
    let environment = environment.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned()));
    Config::assemble(Some(("/etc/dayfly/config.toml".into(), text.into())), environment)
}

/// `text` is refused, and the message has all of `parts`.
fn refused(text: &str, parts: &[&str]) {
    let message = chain(&load(text, &[]).map(|loaded| loaded.config).unwrap_err());
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
}

/// `restored` is refused where nothing can be restored, and `warm`, which is not there, by name.
#[test]
fn a_start_that_this_host_cannot_give_is_refused() {
    let with = |start: &str, more: &str| {
        let class = format!("image = \"debian-12-shell\"\nstart = \"{start}\"");
        format!("{}\n{more}", GOOD.replace("image = \"debian-12-shell\"", &class))
    };
    let qemu = "[hypervisor]\nbackend = \"qemu\"\n";
    for (start, more) in [("auto", ""), ("cold", ""), ("auto", qemu), ("restored", qemu)] {
        assert!(load(&with(start, more), &[]).unwrap().warnings.is_empty(), "{start} {more}");
    }
    refused(&with("restored", ""), &["`class.0.start` ", "is `restored`, and libvirt's machines always boot"]);
    refused(&with("restored", &format!("{qemu}[goldens]\ndisk_gib = 0")), &["`class.0.start` ", "is 0: nothing"]);
    refused(&with("warm", qemu), &["`class.0.start` ", "cannot be `warm`; it is one of: auto, cold, restored"]);
}

#[test]
fn a_good_file_loads_and_relative_paths_are_its_own() {
    let loaded = load(GOOD, &[]).unwrap();
    assert_eq!(loaded.config.runner[0].token_file, Path::new("/etc/dayfly/tokens/ci"));
    assert_eq!(loaded.config.class[0].memory_mib, 2048);
    assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
}

#[test]
fn an_unknown_key_names_line_and_what_was_meant() {
    refused("concurent = 2\n", &["`concurent`", "/etc/dayfly/config.toml, line 1", "did you mean `concurrent`?"]);
    refused("[log]\n\nlevle = \"info\"\n", &["`log.levle`", "line 3", "did you mean `level`?"]);
    refused(&GOOD.replace("token_file", "token"), &["`runner.0.token`", "line 9"]);
    refused(&format!("{GOOD}check_interval = 3\n"), &["`runner.0.check_interval`", "line 11", "poll_interval"]);
    // gitlab-runner's own names, wherever they stand.
    refused("log_level = \"debug\"\n", &["`log_level`", "line 1", "`level` of `[log]`"]);
    refused("shutdown_timeout = 60\n", &["`drain_timeout` of `[limits]`"]);
    refused(&format!("{GOOD}executor = \"docker\"\n"), &["`runner.0.executor`", "leave it away", "`class`"]);
    refused(&format!("{GOOD}tls-ca-file = \"x\"\n"), &["`tls_ca_file`"]);
}

#[test]
fn a_missing_key_names_its_section() {
    refused(&GOOD.replace("class = \"small\"", ""), &["`runner.0.class`", "line 6", "is missing"]);
}

#[test]
fn a_value_of_the_wrong_form_names_its_line() {
    refused("concurrent = \"many\"\n", &["`concurrent`", "line 1", "string \"many\""]);
    refused("\n[limits]\nkeepalive = 30\n", &["`limits.keepalive`", "line 3"]);
    refused("[limits]\nkeepalive = \"soon\"\n", &["`limits.keepalive`", "line 2", "no duration"]);
    refused("[network]\nguest_ports = \"80-90\"\n", &["`network.guest_ports`", "no port range"]);
    refused("[hypervisor]\naccel = \"hvf\"\n", &["`hypervisor.accel`", "line 2", "auto, kvm, tcg"]);
    refused("a = [\n", &["/etc/dayfly/config.toml`, line "]);
}

#[test]
fn the_environment_beats_the_file_and_its_slips_are_named() {
    let loaded = load(
        GOOD,
        &[
            ("DAYFLY_CONCURRENT", "7"),
            ("DAYFLY_LIMITS__KEEPALIVE", "10s"),
            ("DAYFLY_CONFIG", "/x"),
            ("DAYFLY_REGISTER_TOKEN", "t"),
        ],
    )
    .unwrap();
    assert_eq!(loaded.config.concurrent, 7);
    assert_eq!(loaded.config.limits.keepalive.get(), Duration::from_secs(10));
    assert_eq!(loaded.origins.of("concurrent"), Origin::Environment("DAYFLY_CONCURRENT".into()));
    for (name, value) in [("DAYFLY_LOG__LEVLE", "info"), ("DAYFLY_CONCURENT", "2"), ("DAYFLY_LIMITS__KEEPALIVE", "x")] {
        let message = chain(&load(GOOD, &[(name, value)]).map(|l| l.config).unwrap_err());
        assert!(message.contains(&format!("environment variable {name}")), "{message}");
    }
}

#[test]
fn each_senseless_value_is_named() {
    for (from, to, part) in [
        ("concurrent = 2", "concurrent = 0", "`concurrent` (/etc/dayfly/config.toml, line 2) is 0"),
        ("concurrent = 2", "concurrent = 2000", "1000 ports for 2000 jobs"),
        (
            "concurrent = 2",
            "runtime_directory = \"/run/a-directory-that-is-much-too-long/for-any/unix-socket/that-should-be-made/below-it/here\"",
            "too long",
        ),
        ("class = \"small\"", "class = \"smal\"", "did you mean `small`?"),
        ("class = \"small\"", "class = \"gigantic\"", "add a [[class]]"),
        ("https:", "http:", "allow_insecure_http"),
        ("https:", "ssh:", "begins with `ssh:`"),
        ("https://", "https://me:secret@", "leave user, password"),
        ("name = \"ci\"", "name = \"\"", "printable"),
        ("name = \"ci\"", "name = \"a\\nb\"", "is `a\\nb`"),
        ("image = \"debian-12-shell\"", "image = \"../x\"", "dayfly image list"),
        ("image =", "cpus = 0\nimage =", "`class.0.cpus`"),
        ("image =", "container_image = \"-v /:/host x\"\nimage =", "`class.0.container_image`"),
        ("url =", "limit = 0\nurl =", "`runner.0.limit`"),
        ("url =", "poll_interval = \"5m\"\nurl =", "up to 60s"),
        ("url =", "tls_cert_file = \"c.pem\"\nurl =", "`tls_key_file` too"),
        ("url =", "tls_key_file = \"k.pem\"\nurl =", "`tls_cert_file` too"),
    ] {
        assert!(GOOD.contains(from), "{from}");
        refused(&GOOD.replacen(from, to, 1), &[part]);
    }
    for (line, part) in [
        ("[log]\nlevel = \"loud=very\"", "`log.level`"),
        ("[limits]\nguest_update_interval = \"4s\"", "1s, 2s or 3s"),
        ("[limits]\nguest_update_interval = \"1500ms\"", "1s, 2s or 3s"),
        ("[limits]\nboot_deadline = \"0s\"", "`limits.boot_deadline`"),
        ("[limits]\nspool_mib = 0", "`limits.spool_mib`"),
        ("[hypervisor]\nuri = \"\"", "`hypervisor.uri`"),
        ("[capacity]\ncpus = 0", "`capacity.cpus`"),
    ] {
        refused(&format!("{GOOD}\n{line}\n"), &[part]);
    }
}

#[test]
fn duplicates_are_refused() {
    let class = "[[class]]\nname = \"small\"\nimage = \"x\"\n";
    refused(&format!("{GOOD}{class}"), &["`class.1.name`", "line 12", "another [[class]]"]);
    let runner = &GOOD[GOOD.find("[[runner]]").unwrap()..];
    refused(&format!("{GOOD}{runner}"), &["`runner.1.name`", "and `runner.1.token_file`", "line 14"]);
}

#[test]
fn all_problems_come_in_one_message() {
    refused(
        &GOOD.replace("concurrent = 2", "concurrent = 0").replace("https:", "http:"),
        &["`concurrent`", "`runner.0.url`"],
    );
}

#[test]
fn ports_that_the_kernel_gives_away_are_warned_about() {
    let mut config = Config::default();
    let judge = |config: &Config| {
        let mut report = Report { origins: &Origins::default(), errors: Vec::new(), warnings: Vec::new() };
        network(config, "32768\t60999\n", &mut report);
        report.warnings.len()
    };
    assert_eq!(judge(&config), 0);
    config.network.guest_ports = "30000-33000".parse().unwrap();
    assert_eq!(judge(&config), 1);
    config.network.guest_ports = "61000-62000".parse().unwrap();
    assert_eq!(judge(&config), 0);
}

/// Classes choose their network; what did that before is read for one version, and says what takes its place.
#[test]
fn what_a_class_has_taken_the_place_of_is_read_with_a_warning() {
    let told = |text: &str| {
        let loaded = load(text, &[]).unwrap();
        let said = loaded.warnings.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
        (loaded.config.class[0].network, said)
    };
    assert_eq!(told(GOOD), (None, String::new()));
    let (network, said) = told(&format!("{GOOD}[network]\nmode = \"user\"\nguest_ports = \"20000-20009\"\n"));
    assert_eq!(network, Some(Choice::User));
    for part in ["`network.mode`", "set `network = \"user\"` in each [[class]]", "`network.guest_ports`", "line 13"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let own = GOOD.replace("[[runner]]", "network = \"relay\"\n[[runner]]");
    assert_eq!(told(&format!("{own}[network]\nmode = \"user\"\n")).0, Some(Choice::Relay), "a class has its own word");
    for text in [
        GOOD.replace("[[runner]]", "network = \"bridge\"\n[[runner]]"),
        format!("{GOOD}[network]\nmode = \"bridge\"\n"),
    ] {
        refused(&text, &["`bridge`, which this version does not offer yet; use \"relay\" or \"user\""]);
    }
    refused(
        &GOOD.replace("[[runner]]", "network = \"tap\"\n[[runner]]"),
        &["`class.0.network`", "relay, user, bridge"],
    );
}

#[test]
fn risky_but_allowed_settings_are_warnings() {
    let text = GOOD.replace("https:", "http:").replace("[[runner]]", "[[runner]]\nallow_insecure_http = true");
    let loaded = load(&format!("{text}[hypervisor]\naccel = \"tcg\"\n"), &[]).unwrap();
    let keys: Vec<_> = loaded.warnings.iter().map(Problem::key).collect();
    assert_eq!(keys, ["hypervisor.accel", "runner.0.url"]);
    let user = GOOD.replace("[[runner]]", "network = \"user\"\n[[runner]]");
    let keys = |text: &str| -> Vec<String> {
        load(text, &[]).unwrap().warnings.iter().map(|warning| warning.key().to_owned()).collect()
    };
    assert_eq!(keys(&user), ["class.0.network"], "there is no fence");
    let system = "[hypervisor]\nuri = \"qemu:///system\"\n";
    assert_eq!(keys(&format!("{user}{system}")), [""; 0]);
    let users = "vm_users = \"dayfly-vm-0..4\"\n";
    assert_eq!(keys(&format!("{GOOD}[hypervisor]\n{users}")), ["hypervisor.vm_users"]);
    assert_eq!(keys(&format!("{GOOD}{system}{users}")), [""; 0]);
}

/// U40: two jobs never have one user, so there is one for each and one more.
#[test]
fn fewer_users_than_jobs_and_limits_without_sense_are_refused() {
    let system = "[hypervisor]\nuri = \"qemu:///system\"\nvm_users = \"dayfly-vm-0..0\"\n";
    refused(&format!("{GOOD}{system}"), &["`hypervisor.vm_users`", "has 1 users for 2 jobs at once"]);
    refused(
        &format!("{GOOD}[hypervisor]\nvm_users = \"dayfly-vm\"\n"),
        &["`hypervisor.vm_users`", "is neither a range of at most 4096 users"],
    );
    let limits = GOOD.replace("[[runner]]", "[class.limits]\ncpu_weight = 0\n[[runner]]");
    refused(&limits, &["`class.0.limits.cpu_weight`", "is 0; choose 1 to 10000"]);
}

#[test]
fn running_needs_a_runner() {
    let message = chain(&load("concurrent = 1\n", &[]).unwrap().check_for_running().unwrap_err());
    assert!(message.contains("no runner is configured") && message.contains("dayfly register"), "{message}");
}

#[test]
fn running_needs_files_that_can_be_used_and_only_we_can_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let write = |name: &str, text: &str, mode: u32| {
        std::fs::write(path(name), text).unwrap();
        std::fs::set_permissions(path(name), std::fs::Permissions::from_mode(mode)).unwrap();
    };
    let text = GOOD.replace("tokens/ci", "token").replace(
        "[[runner]]",
        "[[runner]]\ntls_ca_file = \"ca.pem\"\ntls_cert_file = \"cert.pem\"\ntls_key_file = \"key.pem\"",
    );
    let check = || {
        let loaded = Config::assemble(Some((path("config.toml"), text.clone())), []).unwrap();
        loaded.check_for_running().map_err(|error| chain(&error))
    };
    let message = check().unwrap_err();
    for name in ["token", "ca.pem", "cert.pem", "key.pem"] {
        assert!(message.contains(&path(name).display().to_string()), "{name}: {message}");
    }
    write("token", "glrt-abcdefghijklmnopqrst\n", 0o644);
    write("key.pem", "", 0o640);
    write("ca.pem", "", 0o644);
    write("cert.pem", "", 0o644);
    let message = check().unwrap_err();
    assert!(message.contains("has mode 644") && message.contains("has mode 640"), "{message}");
    assert!(message.contains(&path("token").display().to_string()) && !message.contains("abcdefgh"), "{message}");
    write("token", "glrt-abcdefghijklmnopqrst\n", 0o600);
    write("key.pem", "", 0o400);
    assert_eq!(check(), Ok(()));
}

#[test]
fn what_goes_to_guests_is_looked_at_before_it_does() {
    for (lines, part) in [
        ("environment = [\"A B=c\"]", "`runner.0.environment.0`"),
        ("environment = [\"A=b\", \"A\"]", "`runner.0.environment.1`"),
        ("output_limit_mib = 0", "`runner.0.output_limit_mib`"),
        ("feature_flags = { FF_SUSPENDABLE_ENVIRONMENTS = true }", "is dayfly's to set"),
        ("feature_flags = { fastzip = true }", "is no name of a feature flag"),
        (&format!("pre_build_script = \"{}\"", "x".repeat(70_000)), "70000 bytes of scripts"),
    ] {
        let text = GOOD.replace("[[runner]]", &format!("[[runner]]\n{lines}"));
        let message = chain(&load(&text, &[]).unwrap_err());
        assert!(message.contains(part), "{message}");
    }
    let text = GOOD.replace("[[runner]]", "[[runner]]\noutput_limit_mib = 1000\nenvironment = [\"P=secret\"]");
    let loaded = load(&text, &[]).unwrap();
    assert_eq!(loaded.warnings.iter().map(Problem::key).collect::<Vec<_>>(), ["runner.0.output_limit_mib"]);
    let shown: Vec<String> = loaded.resolved().into_iter().map(|(key, value, _)| format!("{key} = {value}")).collect();
    assert!(shown.contains(&"runner.0.environment.0 = \"P=…\"".to_owned()), "{shown:?}");
    assert!(!format!("{:?} {shown:?}", loaded.config).contains("secret"));
}

#[test]
fn every_value_has_an_origin() {
    let resolved = load(GOOD, &[("DAYFLY_LOG__LEVEL", "debug")]).unwrap().resolved();
    let get =
        |key: &str| resolved.iter().find(|(k, ..)| k == key).map(|(_, v, o)| (v.as_str(), o.to_string())).unwrap();
    assert_eq!(get("log.level"), ("\"debug\"", "environment variable DAYFLY_LOG__LEVEL".into()));
    assert_eq!(get("concurrent"), ("2", "/etc/dayfly/config.toml, line 2".into()));
    assert_eq!(get("runner.0.poll_interval").1, "default");
    assert_eq!(get("capacity.cpus"), ("not set", "default".into()));
}

/// T35: metrics and health name projects and problems: no guest may read them, and no network.
#[test]
fn a_status_listener_that_guests_reach_is_refused_with_a_way_out() {
    let with = |listen: &str| format!("{GOOD}[status]\nlisten = \"{listen}\"\n");
    for loopback in ["127.0.0.1:9480", "[::1]:9480"] {
        refused(
            &with(loopback),
            &["`status.listen`", "line 12", "a job's machine reaches", "unix socket", "dayfly metrics"],
        );
        // Machines without a network card reach no loopback.
        let relay = GOOD.replace("[[runner]]", "network = \"relay\"\n[[runner]]");
        load(&format!("{relay}[status]\nlisten = \"{loopback}\"\n"), &[]).unwrap();
    }
    refused(&with("0.0.0.0:9480"), &["`status.listen`", "in the clear", "`status.tls_key_file`", "unix socket"]);
    let afar = format!("{}token_file = \"t\"\ntls_cert_file = \"c\"\n", with("0.0.0.0:9480"));
    refused(&afar, &["`status.listen`", "set `status.tls_key_file` too"]);
    let fleet = "fleet = [\"https://ci-2.example:9480\"]\n";
    let config = load(&format!("{afar}tls_key_file = \"k\"\n{fleet}"), &[]).unwrap().config;
    assert_eq!(config.status.token_file.as_deref(), Some(std::path::Path::new("/etc/dayfly/t")));
    refused(&format!("{}{fleet}", with("off")), &["`status.fleet`", "`status.token_file`"]);
    refused(
        &format!("{}token_file = \"t\"\nfleet = [\"http://ci-2.example\"]\n", with("off")),
        &["`status.fleet.0`", "a token goes there"],
    );
    refused(&with("localhost:9480"), &["`status.listen`", "`localhost:9480`"]);
    refused(&with(&format!("/{}", "x".repeat(110))), &["`status.listen`", "shorter path"]);
    for (listen, address) in [
        ("off", Address::Off),
        ("/run/x/s", Address::Unix("/run/x/s".into())),
        ("./s", Address::Unix("/etc/dayfly/./s".into())),
    ] {
        let config = load(&with(listen), &[]).unwrap().config;
        assert_eq!(config.status.address(&config.runtime_directory), address);
    }
    let config = load(GOOD, &[]).unwrap().config;
    assert_eq!(config.status.address(&config.runtime_directory), Address::Unix("/run/dayfly/status.sock".into()));
}

/// A rule's class whose machines are larger than what the runner's class reserves would be room that nobody has.
#[test]
fn a_rules_class_fits_into_what_is_reserved() {
    let with = |rest: &str| format!("{GOOD}{rest}");
    let big = "[[class]]\nname = \"big\"\nimage = \"i\"\nmemory_mib = 1024\nmax_memory_mib = 4096\n";
    let rule = "[[rule]]\nname = \"r\"\nclass = \"big\"\n";
    refused(
        &with(&format!("{big}{rule}")),
        &[
            "`rule.0.class`",
            "names `big`, whose machines may have 4096 MiB memory, not 2048",
            "runner `ci` (class `small`)",
            "raise `max_memory_mib` of class `small`",
        ],
    );
    let wide = GOOD.replace("[[runner]]", "max_memory_mib = 4096\n[[runner]]");
    let config = load(&format!("{wide}{big}{rule}"), &[]).unwrap().config;
    assert_eq!(config.classes_by_rule("ci").iter().map(|class| class.name.as_str()).collect::<Vec<_>>(), ["big"]);
    // Of a runner that it never fits, nothing is asked.
    refused(&with(&format!("{big}{rule}runner = [\"cj\"]\n")), &["is no runner: `cj`", "did you mean `ci`?"]);
}

#[test]
fn a_class_says_what_may_be_asked_for() {
    let class = |keys: &str| GOOD.replace("[[runner]]", &format!("{keys}\n[[runner]]"));
    refused(
        &class("cpus = 4\nmax_cpus = 2"),
        &["`class.0.max_cpus`", "is 2, less than what every job gets (`cpus`, 4)"],
    );
    refused(&class("images = [\"a\", \"../b\"]"), &["`class.0.images.1`", "is `../b`", "dayfly image list"]);
    refused(&class("unknown_image = \"ignore\""), &["`class.0.unknown_image`", "warn, fail"]);
    let class = load(&class("images = [\"b\", \"debian-12-shell\"]\nmax_disk_gib = 30"), &[]).unwrap().config.class;
    assert_eq!(class[0].all_images().collect::<Vec<_>>(), ["debian-12-shell", "b"]);
    assert_eq!((class[0].ceiling().cpus, class[0].ceiling().disk_gib), (2, 30));
}

#[test]
fn a_rule_that_makes_no_sense_is_named() {
    let rule = |keys: &str| format!("{GOOD}[[rule]]\nname = \"r\"\n{keys}\n");
    refused(&rule(""), &["`rule.0`", "says none of `allow`, `deny` and `class`"]);
    refused(&rule("allow = true\nprojects = [\"a\"]"), &["`rule.0.projects`", "did you mean `project`?"]);
    refused(&rule("class = \"smal\""), &["`rule.0.class`", "unknown class `smal`", "did you mean `small`?"]);
    refused(&rule("deny = \"\""), &["`rule.0.deny`", "is empty"]);
    let egress = |class: &str, keys: &str| {
        let good = GOOD.replace("[[runner]]", &format!("{class}\n[[runner]]"));
        format!("{good}[[rule]]\nname = \"r\"\n{keys}\n")
    };
    refused(
        &egress("", "allow = true\negress = { allow = [\"a.example\"], deny = [\"*.example\"] }"),
        &["`rule.0.egress`", "`a.example` in `allow` has no effect", "(with class `small`)", "remove one of them"],
    );
    refused(
        &egress("", "allow = true\negress = { allow = [\"10.0.0.1/8\"] }"),
        &["`rule.0.egress.allow.0`", "`10.0.0.0/8`"],
    );
    refused(
        &egress("", "allow = true\negress = { deny = [\"a.*.example\"] }"),
        &["`rule.0.egress.deny.0`", "a.*.example"],
    );
    refused(&egress("", "deny = \"no\"\negress = {}"), &["`rule.0.egress`", "of a rule that denies"]);
    refused(
        &egress("network = \"user\"", "allow = true\negress = {}"),
        &["`rule.0.egress`", "no effect in the network `user`"],
    );
    let narrower = "allow = true\negress = { mode = \"enforce\", deny = [\"b.example\"] }";
    load(&egress("[class.egress]\nallow = [\"b.example\"]", narrower), &[]).unwrap();
    let twice = format!("{}[[rule]]\nname = \"r\"\nallow = true\n", rule("deny = \"no\""));
    refused(&twice, &["`rule.1.name`", "as another [[rule]] is"]);
    let behind = load(&twice.replace("name = \"r\"\nallow", "name = \"s\"\nallow"), &[]).unwrap();
    assert!(behind.warnings[0].to_string().contains("no rule behind it is ever looked at"), "{:?}", behind.warnings);
}

#[test]
fn a_forward_is_one_that_a_machine_can_have() {
    let with = |lines: &str| format!("{GOOD}[[forward]]\nname = \"apt\"\n{lines}");
    let good = "address = \"127.0.0.1:3142\"\nport = 3142\nclasses = [\"small\"]\n";
    let loaded = load(&with(good), &[]).unwrap();
    assert_eq!((loaded.config.forward.len(), loaded.warnings.len()), (1, 0));
    for port in ["0", "53", "80", "9999"] {
        refused(
            &with(&good.replace("= 3142", &format!("= {port}"))),
            &["`forward.0.port`", "line 14", "guest program listens itself"],
        );
    }
    refused(&with(&good.replace("= 3142", "= 65536")), &["`forward.0.port`"]);
    for address in ["0.0.0.0:3142", "127.0.0.1:0", "[::]:1", "224.0.0.1:1"] {
        refused(&with(&good.replace("127.0.0.1:3142", address)), &["`forward.0.address`", "nobody can connect"]);
    }
    refused(&with(&good.replace("127.0.0.1:3142", "localhost")), &["`forward.0.address`"]);
    refused(&with(&good.replace("[\"small\"]", "[]")), &["`forward.0.classes`", "is empty"]);
    refused(&with(&good.replace("\"small\"", "\"smal\"")), &["is no class: `smal`", "did you mean `small`?"]);
    refused(&with(&good.replace("classes", "class")), &["`forward.0.class`"]);
    let twice = format!("{}[[forward]]\nname = \"pip\"\n{good}", with(good));
    refused(&twice, &["`forward.1.port`", "as that of forward `apt`"]);
    refused(&twice.replace("\"pip\"", "\"apt\""), &["as another [[forward]] is"]);
    // The daemon's own page is nothing for jobs.
    for listen in ["127.0.0.1:3142", "0.0.0.0:3142"] {
        let status = format!("[status]\nlisten = \"{listen}\"\n");
        refused(&format!("{}{status}", with(good)), &["`forward.0.address`", "own status page"]);
    }
}
