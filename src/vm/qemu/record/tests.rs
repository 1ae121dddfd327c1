//! Records with and without a process that holds them.

use super::*;
use crate::rng::Rng;
use std::process::Stdio;
use std::time::Duration;

struct Bench {
    _dir: tempfile::TempDir,
    records: Records,
    name: VmName,
    owner: Owner,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let rng = Rng::system();
        let owner = Owner { installation: VmId::random(&rng), vm: VmId::random(&rng) };
        let records = Records { directory: dir.path().to_owned() };
        Self { _dir: dir, records, name: owner.vm.clone().into(), owner }
    }

    fn look(&self) -> Found {
        self.records.look(&self.name).unwrap()
    }
}

/// A machine is there from its lock on, whatever it has said, and as long as its process, not as long as us.
#[tokio::test]
async fn the_lock_is_the_machine_and_a_number_never_is() {
    let bench = Bench::new();
    assert_eq!(bench.look(), Found::Nothing);
    let lock = bench.records.create(&bench.name, &bench.owner).unwrap();
    crate::process::start_outliving("sleep".as_ref(), &["100"], &[], lock, Stdio::null()).unwrap();
    let alive = |up, ended| Found::Alive { owner: bench.owner.clone(), up, ended };
    assert_eq!(bench.look(), alive(false, None));
    bench.records.note_up(&bench.name).unwrap();
    assert_eq!(bench.look(), alive(true, None));
    assert!(bench.records.create(&bench.name, &bench.owner).is_err(), "one of a name");

    let other = Bench::new();
    drop(other.records.create(&other.name, &other.owner).unwrap());
    other.records.signal(&other.name, Signal::KILL).unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(bench.look(), alive(true, None), "whose input is another file is another machine");
    bench.records.signal(&bench.name, Signal::KILL).unwrap();
    let gone = async {
        while bench.look() != (Found::Gone { ended: None }) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), gone).await.expect("it is killed");
    for ending in [Ending::Restarted, Ending::Destroyed] {
        bench.records.note_ended(&bench.name, ending).unwrap();
    }
    assert_eq!(bench.look(), Found::Gone { ended: Some(Ending::Restarted) }, "the first word counts");
    assert_eq!(bench.records.names().unwrap(), std::slice::from_ref(&bench.name));
    bench.records.remove(&bench.name).unwrap();
    bench.records.remove(&bench.name).unwrap();
    assert_eq!((bench.look(), bench.records.names().unwrap()), (Found::Nothing, vec![]));
}

/// Cut after the file, in the middle of its line, after it, and with QEMU's files beside it.
#[test]
fn what_a_cut_start_has_left_is_removed_by_the_first_look() {
    let bench = Bench::new();
    for text in ["", "{\"installa", "{\"installation\":\"a\"}\n"] {
        fs::write(bench.records.path(&bench.name, "vm"), text).unwrap();
        fs::write(bench.records.path(&bench.name, "log"), "").unwrap();
        assert_eq!(bench.look(), Found::Nothing);
        assert_eq!(fs::read_dir(&bench.records.directory).unwrap().count(), 0, "{text}");
    }
    drop(bench.records.create(&bench.name, &bench.owner).unwrap());
    assert_eq!(bench.look(), Found::Nothing);
    assert_eq!(fs::read_dir(&bench.records.directory).unwrap().count(), 0);
}

/// Each ending is noted by a word that is read again as the same.
#[test]
fn endings_are_read_as_they_were_noted() {
    for (ending, _) in ENDINGS {
        let bench = Bench::new();
        drop(bench.records.create(&bench.name, &bench.owner).unwrap());
        bench.records.note_ended(&bench.name, ending).unwrap();
        assert_eq!(bench.look(), Found::Gone { ended: Some(ending) });
    }
}
