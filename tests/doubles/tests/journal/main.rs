//! Records on a file system in memory: torn, newer, somebody else's.

#![allow(clippy::unwrap_used, reason = "tests: a panic is a failed one")]

mod damage;

use bytes::Bytes;
use dayfly::files::Files as _;
use dayfly::gitlab::JobId;
use dayfly::job::journal::{Journal, JournalError, Loaded, RECORD_VERSION, Record};
use dayfly::vm::InstallationId;
use dayfly_doubles::examples;
use dayfly_doubles::files::MemoryFiles;
use std::io;
use std::path::Path;
use std::sync::Arc;

async fn journal(files: &MemoryFiles) -> Journal {
    Journal::open(Arc::new(files.clone()), Path::new("/s"), Path::new("/r")).await.unwrap()
}

#[tokio::test]
async fn a_record_reads_back_and_goes_without_a_trace() {
    let files = MemoryFiles::default();
    let journal = journal(&files).await;
    journal.accept(&examples::record(42), Bytes::from_static(b"{}")).await.unwrap();
    let Loaded { records, aside } = journal.load_all().await.unwrap();
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
    journal.accept(&examples::record(1), Bytes::new()).await.unwrap();
    journal.accept(&examples::record(2), Bytes::new()).await.unwrap();
    let path = Path::new("/s/jobs").join(examples::record(1).key.directory()).join("record.json");
    let whole = files.read(&path, 1 << 20).await.unwrap();
    for cut in [0, 1, whole.len() / 2, whole.len() - 1] {
        files.create_dir(path.parent().unwrap()).await.unwrap();
        files.replace(&path, whole[..cut].to_vec()).await.unwrap();
        let Loaded { records, aside } = journal.load_all().await.unwrap();
        assert_eq!(records.iter().map(|r| r.key.id.0).collect::<Vec<_>>(), [2]);
        assert_eq!(aside.len(), 1, "cut at {cut}");
    }
}

/// A journal of another installation stops the daemon and nothing is touched.
#[tokio::test]
async fn a_record_of_another_installation_is_refused_untouched() {
    let files = MemoryFiles::default();
    let theirs: InstallationId = "aaaaaaaaaaaaaaaa".parse().unwrap();
    let record = Record { installation: Some(theirs.clone()), ..examples::record(1) };
    journal(&files).await.accept(&record, Bytes::new()).await.unwrap();
    let before = files.contents();
    let ours = journal(&files).await.of("bbbbbbbbbbbbbbbb".parse().unwrap());
    let error = ours.load_all().await.unwrap_err();
    assert!(
        error.to_string().contains("another installation (aaaaaaaaaaaaaaaa, this one is bbbbbbbbbbbbbbbb)"),
        "{error}"
    );
    assert_eq!(files.contents(), before);
    assert_eq!(journal(&files).await.of(theirs).load_all().await.unwrap().records.len(), 1);
}

/// E12: a newer record stops the daemon and nothing is touched.
#[tokio::test]
async fn a_newer_record_is_refused_untouched() {
    let files = MemoryFiles::default();
    let journal = journal(&files).await;
    journal.accept(&examples::record(1), Bytes::new()).await.unwrap();
    let path = Path::new("/s/jobs").join(examples::record(1).key.directory()).join("record.json");
    let newer = RECORD_VERSION + 1;
    files.replace(&path, format!(r#"{{"version":{newer},"something":"new"}}"#).into_bytes()).await.unwrap();
    let before = files.contents();
    let error = journal.load_all().await.unwrap_err();
    assert!(matches!(error, JournalError::Newer { version, .. } if version == newer), "{error}");
    assert_eq!(files.contents(), before);
}

/// H8: a full disk is tried by writing; a daemon that dies over it leaves nothing for ever.
#[tokio::test]
async fn what_a_disk_is_tried_with_is_removed_at_the_latest_by_the_next_start() {
    let files = MemoryFiles::default();
    let journal = journal(&files).await;
    files.fail_writes(Some(io::ErrorKind::StorageFull));
    journal.accept(&examples::record(1), Bytes::new()).await.unwrap_err();
    journal.look_well().await.unwrap_err();
    files.fail_writes(None);
    // Written, and the call that removes it fails.
    files.fail_call(2, io::ErrorKind::Other);
    journal.look_well().await.unwrap_err();
    assert!(!files.contents().is_empty());
    journal.load_all().await.unwrap();
    assert!(files.contents().is_empty(), "{:?}", files.contents());
}
