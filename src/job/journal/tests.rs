//! Records on a file system in memory: torn, flipped, older, newer, somebody else's.

use super::*;
use crate::files::fake::MemoryFiles;

fn ours() -> InstallationId {
    "aaaaaaaaaaaaaaaa".parse().unwrap()
}

fn record(id: u64) -> Record {
    Record {
        version: RECORD_VERSION,
        installation: Some(ours()),
        key: JobKey { runner: "linux \"vm\"/1".into(), id: JobId(id) },
        gitlab: "https://gitlab.example".parse().unwrap(),
        job_token: Secret::new("glcbt-1"),
        received: Timestamp::UNIX_EPOCH,
        timeout_s: Some(3600),
        name: "test".into(),
        project: "g/p".into(),
        debug_trace: false,
        trace_sections: true,
        knows_interrupted: true,
        class: "small".into(),
        resources: crate::capacity::Resources { cpus: 1, memory_mib: 512, disk_gib: 10 },
        machine: None,
        guest_base: None,
        newer_token: None,
        last_lines: None,
        state: State::Accepted,
    }
}

async fn journal(files: &MemoryFiles) -> Journal {
    Journal::open(Arc::new(files.clone()), Path::new("/s"), Path::new("/r")).await.unwrap()
}

#[tokio::test]
async fn a_record_reads_back_and_goes_without_a_trace() {
    let files = MemoryFiles::default();
    let journal = journal(&files).await;
    journal.accept(&record(42), Bytes::from_static(b"{}")).await.unwrap();
    let Loaded { records, aside } = journal.load_all(&ours()).await.unwrap();
    assert_eq!((records.len(), aside.len()), (1, 0));
    assert_eq!(records[0].key.id, JobId(42));
    assert!(!format!("{:?}", records[0]).contains("glcbt"));
    journal.remove(&records[0].key).await.unwrap();
    assert!(files.contents().is_empty(), "{:?}", files.contents());
}

/// E13: a damaged record costs nobody else anything.
#[tokio::test]
async fn a_torn_record_is_set_aside_and_the_others_are_read() {
    let files = MemoryFiles::default();
    let journal = journal(&files).await;
    journal.accept(&record(1), Bytes::new()).await.unwrap();
    journal.accept(&record(2), Bytes::new()).await.unwrap();
    let path = Path::new("/s/jobs").join(record(1).key.directory()).join("record.json");
    let whole = files.read(&path, 1 << 20).await.unwrap();
    for cut in [0, 1, whole.len() / 2, whole.len() - 1] {
        files.create_dir(path.parent().unwrap()).await.unwrap();
        files.replace(&path, whole[..cut].to_vec()).await.unwrap();
        let Loaded { records, aside } = journal.load_all(&ours()).await.unwrap();
        assert_eq!(records.iter().map(|r| r.key.id.0).collect::<Vec<_>>(), [2]);
        assert_eq!(aside.len(), 1, "cut at {cut}");
    }
}

/// E13: whatever bit of it is flipped, a record is set aside; only one that claims to be newer stops the start.
#[tokio::test]
async fn a_flipped_bit_is_never_believed() {
    let files = MemoryFiles::default();
    let journal = journal(&files).await;
    journal.accept(&record(1), Bytes::new()).await.unwrap();
    journal.accept(&record(2), Bytes::new()).await.unwrap();
    let path = Path::new("/s/jobs").join(record(1).key.directory()).join("record.json");
    let whole = files.read(&path, 1 << 20).await.unwrap();
    let version = "{\"version\":".len();
    for at in 0..whole.len() {
        for bit in 0..8 {
            let mut flipped = whole.clone();
            flipped[at] ^= 1 << bit;
            files.create_dir(path.parent().unwrap()).await.unwrap();
            files.replace(&path, flipped).await.unwrap();
            match journal.load_all(&ours()).await {
                Ok(Loaded { records, aside }) => {
                    assert_eq!(records.iter().map(|r| r.key.id.0).collect::<Vec<_>>(), [2], "bit {bit} at {at}");
                    assert_eq!(aside.len(), 1, "bit {bit} at {at}");
                    files.remove(Path::new("/s/set-aside")).await.unwrap();
                }
                Err(error) => {
                    assert!(matches!(error, JournalError::Newer { .. }) && at == version, "bit {bit} at {at}: {error}");
                }
            }
        }
    }
}

/// E12: a record of the version before is read as it was written then.
#[tokio::test]
async fn a_record_of_the_version_before_is_read() {
    let files = MemoryFiles::default();
    let journal = journal(&files).await;
    let text = include_str!("record-1.json").trim_end();
    let key = JobKey { runner: "ci".into(), id: JobId(42) };
    let dir = Path::new("/s/jobs").join(key.directory());
    files.create_dir(&dir).await.unwrap();
    files.replace(&dir.join("record.json"), text.as_bytes().to_vec()).await.unwrap();
    let Loaded { records, aside } = journal.load_all(&ours()).await.unwrap();
    assert!(aside.is_empty(), "{aside:?}");
    assert_eq!((&records[0].key, records[0].guest_base), (&key, Some(512)));
    assert_eq!(records[0].job_token.expose(), "glcbt-64_token");
    assert!(matches!(records[0].state, State::Running { canceling: false }));
    assert_eq!((records[0].version, &records[0].last_lines), (RECORD_VERSION, &None));
}

/// A journal of another installation stops the daemon and nothing is touched.
#[tokio::test]
async fn a_record_of_another_installation_is_refused_untouched() {
    let files = MemoryFiles::default();
    let journal = journal(&files).await;
    journal.accept(&record(1), Bytes::new()).await.unwrap();
    let before = files.contents();
    let error = journal.load_all(&"bbbbbbbbbbbbbbbb".parse().unwrap()).await.unwrap_err();
    assert!(
        error.to_string().contains("another installation (aaaaaaaaaaaaaaaa, this one is bbbbbbbbbbbbbbbb)"),
        "{error}"
    );
    assert_eq!(files.contents(), before);
}

/// E12: a newer record stops the daemon and nothing is touched.
#[tokio::test]
async fn a_newer_record_is_refused_untouched() {
    let files = MemoryFiles::default();
    let journal = journal(&files).await;
    journal.accept(&record(1), Bytes::new()).await.unwrap();
    let path = Path::new("/s/jobs").join(record(1).key.directory()).join("record.json");
    files.replace(&path, br#"{"version":3,"something":"new"}"#.to_vec()).await.unwrap();
    let before = files.contents();
    let error = journal.load_all(&ours()).await.unwrap_err();
    assert!(matches!(error, JournalError::Newer { version: 3, .. }), "{error}");
    assert_eq!(files.contents(), before);
}
