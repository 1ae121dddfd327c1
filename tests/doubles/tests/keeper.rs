//! Where the record of a job is kept, on disks that take it and disks that do not.

#![allow(clippy::unwrap_used, reason = "tests: a panic is a failed one")]

use dayfly::job::journal::Journal;
use dayfly::job::keeper::Kept;
use dayfly_doubles::examples;
use dayfly_doubles::files::MemoryFiles;
use std::io;
use std::path::Path;
use std::sync::Arc;

async fn journal(files: &MemoryFiles) -> Journal {
    Journal::open(Arc::new(files.clone()), Path::new("/state"), Path::new("/run")).await.unwrap()
}

/// H6: a first record that no disk takes leaves nothing that the next daemon would run.
#[tokio::test]
async fn what_the_journal_has_of_a_job_that_is_not_run_is_known() {
    let files = MemoryFiles::default();
    let (journal, record) = (journal(&files).await, examples::record(7));
    let mut kept = Kept::New;
    kept.put(&journal, &record).await.unwrap();
    assert!(kept == Kept::There && kept.is_there() && journal.load(&record.key).await.is_some());
    // It counts from then on.
    files.fail_replaces(Some(io::ErrorKind::StorageFull));
    assert!(kept.put(&journal, &record).await.is_err() && kept == Kept::There);
    let mut kept = Kept::New;
    kept.put(&journal, &record).await.unwrap();
    assert!(kept == Kept::Nothing && !kept.leaves_files(), "nothing of it is left");
    assert_eq!(files.paths_below(Path::new("/")), [] as [&Path; 0]);
    kept.put(&journal, &record).await.unwrap();
}

/// H8: as long as something may be there, nobody is told.
#[tokio::test]
async fn a_disk_that_takes_nothing_may_hold_something() {
    let files = MemoryFiles::default();
    let (journal, record) = (journal(&files).await, examples::record(7));
    files.fail_writes(Some(io::ErrorKind::ReadOnlyFilesystem));
    let mut kept = Kept::New;
    assert!(kept.put(&journal, &record).await.is_err());
    assert!(kept == Kept::New && kept.leaves_files() && !kept.is_there());
    files.fail_writes(None);
    kept.put(&journal, &record).await.unwrap();
    assert_eq!(kept, Kept::There);
}
