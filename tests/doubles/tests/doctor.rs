//! What `dayfly doctor` says of a hypervisor.

#![allow(clippy::unwrap_used, reason = "tests: a panic is a failed one")]

use dayfly::cli::doctor::{Finding, Level, machines};
use dayfly::config::{Config, EXAMPLE};
use dayfly::rng::Rng;
use dayfly::vm::HostInfo;
use dayfly_doubles::fake::{FakeHypervisor, Fault, Op};
use std::path::Path;

fn example() -> Config {
    Config::assemble(Some(("/etc/dayfly/config.toml".into(), EXAMPLE.into())), []).unwrap().config
}

fn levels(findings: &[Finding]) -> Vec<Level> {
    findings.iter().map(|finding| finding.level).collect()
}

#[tokio::test]
async fn a_libvirt_that_does_not_answer_is_bad() {
    let fake = FakeHypervisor::new();
    fake.set_reachable(false);
    let findings = machines(&example(), &fake.host(), Path::new("/tmp"), &Rng::seeded(1)).await;
    assert_eq!(levels(&findings), [Level::Bad]);
    assert!(findings[0].remedy.contains("virsh -c qemu:///session list"), "{findings:?}");
}

#[tokio::test]
async fn kvm_that_is_not_offered_or_does_not_start_is_bad() {
    let fake = FakeHypervisor::new();
    fake.set_host(HostInfo { version: "fake".into(), cpus: 1, memory_mib: 1024, kvm_offered: false });
    let findings = machines(&example(), &fake.host(), Path::new("/tmp"), &Rng::seeded(1)).await;
    assert_eq!(levels(&findings), [Level::Ok, Level::Bad]);
    let fake = FakeHypervisor::new();
    fake.fail_always(Op::Start, Fault::Refused("no"));
    let findings = machines(&example(), &fake.host(), Path::new("/tmp"), &Rng::seeded(1)).await;
    assert_eq!(levels(&findings), [Level::Ok, Level::Bad]);
    assert!(findings[1].what.starts_with("KVM is not proven: "), "{findings:?}");
}
