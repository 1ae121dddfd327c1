//! Records of other versions, and records that a disk has damaged.
//!
//! `golden/version-N.json` has one record a line, as that version wrote them: never edited, only added to.

use dayfly::files::Files as _;
use dayfly::gitlab::JobId;
use dayfly::job::journal::format::{Unreadable, parse, seal, unseal};
use dayfly::job::journal::{JobKey, Journal, JournalError, Loaded, RECORD_VERSION};
use dayfly::network::{Lease, Mode};
use dayfly_doubles::files::MemoryFiles;
use std::path::Path;
use std::sync::Arc;

const GOLDEN: [(&str, &str); 5] = [
    ("1", include_str!("golden/version-1.json")),
    ("2", include_str!("golden/version-2.json")),
    ("3", include_str!("golden/version-3.json")),
    ("4", include_str!("golden/version-4.json")),
    ("5", include_str!("golden/version-5.json")),
];

/// The newest version's record of a running job.
fn running() -> &'static str {
    GOLDEN[4].1.lines().nth(2).unwrap()
}

/// E12: records of this version and the one before are read, whatever state they are in.
#[test]
fn records_of_this_version_and_the_one_before_are_read() {
    for (version, lines) in GOLDEN {
        let mut words = Vec::new();
        for line in lines.lines() {
            let record = parse(line.as_bytes()).unwrap_or_else(|error| match error {
                Unreadable::Newer(found) => panic!("version {version} is newer: {found}"),
                Unreadable::Broken(reason) => panic!("version {version}: {reason}\n{line}"),
            });
            assert_eq!(
                (record.version, record.key.id, record.job_token.expose()),
                (RECORD_VERSION, JobId(42), "glcbt-64_golden")
            );
            assert_eq!(record.machine.as_ref().unwrap().id.as_str(), "abcdefghijklmnop");
            assert_eq!(
                (record.newer_token.is_some(), record.received_uptime_ms.is_some()),
                (version >= "2", version >= "2")
            );
            let spec = record.machine_spec.as_ref();
            assert_eq!(spec.map(|spec| spec.image.name.as_str()), (version >= "3").then_some("debian-12-shell"));
            let notes = spec.map_or(0, |spec| spec.notes.len());
            assert_eq!(notes, usize::from(version >= "5"));
            let lease = record.machine.as_ref().map(|machine| machine.lease.clone());
            assert_eq!(lease == Some(Lease::Wire), version >= "4", "{lease:?}");
            words.push(record.state.word());
            // What is read is written again as this version, and reads back the same.
            let again = parse(&seal(&serde_json::to_vec(&record).unwrap())).unwrap_or_else(|_| panic!("it reads back"));
            assert_eq!(format!("{again:?}"), format!("{record:?}"));
        }
        assert_eq!(words, ["accepted", "booting", "running", "releasing"], "version {version}");
    }
    assert_eq!(GOLDEN.len(), RECORD_VERSION as usize, "each version has its file");
}

/// E12: what a machine without a network card adds to a record is read, and written again the same.
#[test]
fn a_record_of_a_machine_without_a_network_card_is_read() {
    let line = include_str!("golden/version-5-relay.json").trim_end();
    let record = parse(line.as_bytes()).unwrap_or_else(|_| panic!("it is read"));
    assert_eq!(record.machine.as_ref().unwrap().lease, Lease::Relay);
    let spec = record.machine_spec.as_ref().unwrap();
    let policy = spec.egress.as_ref().unwrap();
    assert_eq!((spec.network, policy.allow.len(), policy.always.len()), (Mode::Relay, 2, 1));
    assert_eq!((record.reached.len(), record.reached[1].refused), (2, 1));
    let again = seal(&serde_json::to_vec(&record).unwrap());
    let read = |bytes: &[u8]| -> serde_json::Value { serde_json::from_slice(&unseal(bytes).0).unwrap() };
    assert_eq!(read(&again), read(line.as_bytes()));
}

/// E12: a record of the next version stops the daemon with its path, and nothing is touched: sealed, edited, or bare.
#[tokio::test]
async fn a_record_of_the_next_version_is_left_as_it_is() {
    let next = format!("\"version\":{}", RECORD_VERSION + 1);
    let (object, _) = unseal(running().as_bytes());
    let object = String::from_utf8(object).unwrap().replace("\"version\":5", &next);
    let edited = running().replace("\"version\":5", &next);
    for bytes in [seal(object.as_bytes()), edited.into_bytes(), format!("{{{next},\"new\":[1]}}").into_bytes()] {
        let files = MemoryFiles::default();
        let journal = Journal::open(Arc::new(files.clone()), Path::new("/s"), Path::new("/r")).await.unwrap();
        let dir = Path::new("/s/jobs/0123456789ab-42");
        files.create_dir(dir).await.unwrap();
        files.replace(&dir.join("record.json"), bytes).await.unwrap();
        let before = files.contents();
        let error = journal.load_all().await.unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("/s/jobs/0123456789ab-42/record.json")
                && text.contains(&format!("version {}", RECORD_VERSION + 1)),
            "{text}"
        );
        assert_eq!(files.contents(), before);
    }
}

/// E13: a bit turned at any offset, and a cut at any length: the record is set aside, and the other is read. Only a
/// turned digit of the version cannot be told from a newer one, and stops the start.
#[tokio::test]
async fn a_bit_turned_anywhere_is_noticed() {
    let whole = running().as_bytes();
    let version = running().find("\"version\":5").unwrap() + "\"version\":".len();
    let files = MemoryFiles::default();
    let journal = Journal::open(Arc::new(files.clone()), Path::new("/s"), Path::new("/r")).await.unwrap();
    let key = JobKey { runner: "linux \"vm\"/1".into(), id: JobId(42) };
    let good = JobKey { runner: "other".into(), id: JobId(7) };
    let other = String::from_utf8(unseal(whole).0).unwrap();
    let other = other.replace("\"linux \\\"vm\\\"/1\"", "\"other\"").replace("\"id\":42", "\"id\":7");
    let put = async |key: &JobKey, bytes: Vec<u8>| {
        let dir = Path::new("/s/jobs").join(key.directory());
        files.create_dir(&dir).await.unwrap();
        files.replace(&dir.join("record.json"), bytes).await.unwrap();
    };
    put(&good, seal(other.as_bytes())).await;
    put(&key, whole.to_vec()).await;
    assert_eq!(journal.load_all().await.unwrap().records.len(), 2, "both are good");
    let mut damages: Vec<(String, Vec<u8>)> =
        (0..whole.len()).map(|length| (format!("cut at {length}"), whole[..length].to_vec())).collect();
    for at in (0..whole.len()).filter(|at| *at != version) {
        for bit in 0..8 {
            let mut bytes = whole.to_vec();
            bytes[at] ^= 1 << bit;
            damages.push((format!("bit {bit} at {at}"), bytes));
        }
    }
    for (what, bytes) in damages {
        put(&key, bytes).await;
        let Loaded { records, aside } = journal.load_all().await.unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(records.iter().map(|record| record.key.id.0).collect::<Vec<_>>(), [7], "{what}");
        assert_eq!(aside.len(), 1, "{what}");
        files.remove(Path::new("/s/set-aside")).await.unwrap();
    }
    for digit in b'0'..=b'9' {
        let mut bytes = whole.to_vec();
        bytes[version] = digit;
        put(&key, bytes).await;
        match journal.load_all().await {
            Ok(loaded) => {
                assert_eq!(loaded.aside.len(), usize::from(u32::from(digit - b'0') != RECORD_VERSION), "{digit}")
            }
            Err(JournalError::Newer { version, .. }) => assert!(version > RECORD_VERSION),
            Err(error) => panic!("{error}"),
        }
    }
}
