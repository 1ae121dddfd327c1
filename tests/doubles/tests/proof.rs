//! What a guest must say to prove KVM, and what it must not.

#![expect(clippy::unwrap_used, reason = "tests: a panic is a failed one")]

use dayfly::rng::Rng;
use dayfly::vm::proof::{PROOF_LINE, PROOF_WORD, Places, Proof, ProofError, Subject, prove_kvm, sector};
use dayfly::vm::{Boot, Pause, VmId};
use dayfly_doubles::fake::{FakeHypervisor, Fault, GuestMachine, Op};
use std::path::Path;
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;
use tokio::time::{Instant, sleep};

async fn check(fake: &FakeHypervisor, subject: &Subject) -> Result<Proof, ProofError> {
    let dir = tempfile::tempdir().unwrap();
    let places = Places { disks: dir.path(), sockets: Path::new("/s") };
    let rng = Rng::seeded(1);
    let proof = prove_kvm(&fake.host(), subject, places, &VmId::random(&rng), &rng).await;
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left behind");
    proof
}

/// A guest that says these texts, each after its pause, and then nothing.
fn says(fake: &FakeHypervisor, script: &'static [(u64, &'static str)]) {
    fake.set_guest(move |mut machine: GuestMachine| async move {
        for (millis, text) in script {
            sleep(Duration::from_millis(*millis)).await;
            machine.console.write_all(text.as_bytes()).await.unwrap();
        }
        std::future::pending().await
    });
}

/// U1: a guest in real mode only, one that is silent, one that ends, one that is wrong, one that an emulator runs:
/// none of them proves KVM; a guest that does its work in time does.
#[tokio::test(start_paused = true)]
async fn only_a_guest_that_works_in_time_proves_kvm() {
    let fake = FakeHypervisor::new();
    says(&fake, &[(0, "SeaBIOS\r\nday"), (0, sector::BEGINS), (10, sector::LINE)]);
    assert!(check(&fake, &Subject::Sector).await.unwrap().took >= Duration::from_secs(5));
    // The first round meets a busy host, the second does not.
    says(&fake, &[(0, sector::BEGINS), (900, sector::LINE), (900, sector::BEGINS), (20, sector::LINE)]);
    check(&fake, &Subject::Sector).await.unwrap();

    says(&fake, &[(0, sector::BEGINS), (5000, sector::LINE), (1000, sector::BEGINS), (2500, sector::LINE)]);
    let error = check(&fake, &Subject::Sector).await.unwrap_err();
    assert!(error.to_string().contains("needed 2500 ms for ten million turns"), "{error}");
    // What the sector of before said.
    says(&fake, &[(0, "dayfly: boot sector begins\r\n")]);
    let error = check(&fake, &Subject::Sector).await.unwrap_err();
    assert!(matches!(error, ProofError::Silent { .. }), "{error}");
    says(&fake, &[(0, sector::BEGINS), (1, sector::WRONG)]);
    let error = check(&fake, &Subject::Sector).await.unwrap_err();
    assert!(matches!(error, ProofError::Wrong { .. }), "{error}");
    fake.set_guest(|_| std::future::pending());
    assert!(matches!(check(&fake, &Subject::Sector).await, Err(ProofError::Silent { .. })));
    fake.set_guest(|mut machine: GuestMachine| async move { machine.console.write_all(b"almost").await.unwrap() });
    assert!(matches!(check(&fake, &Subject::Sector).await, Err(ProofError::Ended { .. })));
    fake.fail_nth(Op::Start, 1, Fault::Refused("no /dev/kvm"));
    assert!(matches!(check(&fake, &Subject::Sector).await, Err(ProofError::Start(..))));
    fake.fail_nth(Op::OpenConsole, 1, Fault::Refused("no"));
    assert!(matches!(check(&fake, &Subject::Sector).await, Err(ProofError::Console(_))));
    assert!(fake.counts().is_clean(), "{:#?}", fake.history());
}

/// U1: an emulator is not believed because nobody listened while it worked: what was said while libvirt was asked, and
/// took its time, tells nothing of how long it took.
#[tokio::test(start_paused = true)]
async fn a_round_that_nobody_listened_to_is_no_round() {
    let fake = FakeHypervisor::new();
    // The first look at the VM's state, half a second after its start, takes ten seconds.
    fake.fail_nth(Op::State, 1, Fault::Hangs);
    says(&fake, &[(1000, sector::BEGINS), (2000, sector::LINE), (3000, sector::BEGINS), (2000, sector::LINE)]);
    let error = check(&fake, &Subject::Sector).await.unwrap_err();
    assert!(error.to_string().contains("needed 2000 ms"), "{error}");
}

/// U1: a guest that QEMU stops in the middle of its work is named as that, long before the deadline.
#[tokio::test(start_paused = true)]
async fn a_guest_that_qemu_stops_refutes_kvm_at_once() {
    let fake = FakeHypervisor::new();
    fake.set_guest(|mut machine: GuestMachine| async move {
        machine.console.write_all(sector::BEGINS.as_bytes()).await.unwrap();
        machine.power.pause(Pause::Itself);
        std::future::pending().await
    });
    let since = Instant::now();
    let error = check(&fake, &Subject::Sector).await.unwrap_err();
    assert!(matches!(error, ProofError::Stopped { .. }) && since.elapsed() < Duration::from_secs(15), "{error}");
    assert!(error.to_string().starts_with("a VM of one boot sector was stopped by QEMU; the VM is paused"), "{error}");
}

/// U1: where there is an image, its own kernel is the proof; one of an older contract does not know the word.
#[tokio::test(start_paused = true)]
async fn an_images_own_kernel_is_the_better_proof() {
    let boot = Boot::Direct { kernel: "/k".into(), initrd: "/i".into(), cmdline: "console=ttyS0 quiet".into() };
    let fake = FakeHypervisor::new();
    let seen = fake.clone();
    fake.set_guest(move |mut machine: GuestMachine| {
        let seen = seen.clone();
        async move {
            let Boot::Direct { cmdline, .. } = seen.vms()[0].0.boot.clone() else { panic!("a kernel is booted") };
            assert_eq!(cmdline, format!("console=ttyS0 quiet {PROOF_WORD}"));
            machine.console.write_all(format!("[    0.000000] Linux\r\n{PROOF_LINE}").as_bytes()).await.unwrap();
        }
    });
    check(&fake, &Subject::of(&boot, 2, "digest")).await.unwrap();
    // A sector's line is not what a kernel says.
    says(&fake, &[(0, sector::BEGINS), (1, sector::LINE)]);
    assert!(matches!(check(&fake, &Subject::of(&boot, 2, "digest")).await, Err(ProofError::Silent { .. })));
    assert!(matches!(Subject::of(&boot, 1, "digest"), Subject::Sector));
    assert!(matches!(Subject::of(&Boot::Disk, 2, "digest"), Subject::Sector));
}
