//! A job's record on disk: torn, flipped, foreign. It costs its own job at most.

use crate::examples;
use crate::files::MemoryFiles;
use crate::pieces::now;
use bytes::Bytes;
use dayfly::files::Files as _;
use dayfly::job::journal::{JobKey, Journal, JournalError, RECORD_VERSION, Record};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The corpus holds records of these keys.
fn record(id: u64) -> Record {
    let record = examples::record(id);
    Record { key: JobKey { runner: "linux".into(), ..record.key }, ..record }
}

fn path(key: &JobKey) -> PathBuf {
    Path::new("/s/jobs").join(key.directory()).join("record.json")
}

/// The record of job 1 is these bytes. Its neighbour is always read; it is read as a record of that job, or set aside
/// with its bytes as they were; and a newer one stops the start with nothing touched.
pub fn journal(input: &[u8]) {
    now(async {
        let files = MemoryFiles::default();
        let journal = Journal::open(Arc::new(files.clone()), Path::new("/s"), Path::new("/r")).await.unwrap();
        let (one, neighbour) = (record(1), record(2));
        journal.accept(&one, Bytes::from_static(b"{}")).await.unwrap();
        journal.accept(&neighbour, Bytes::from_static(b"{}")).await.unwrap();
        files.replace(&path(&one.key), input.to_vec()).await.unwrap();
        let before = files.contents();

        let loaded = match journal.load_all().await {
            Ok(loaded) => loaded,
            Err(JournalError::Newer { version, path: told }) => {
                assert!(version > RECORD_VERSION && told == path(&one.key));
                assert_eq!(files.contents(), before, "a newer record was touched");
                return;
            }
            Err(error) => panic!("{error}"),
        };
        let (ours, others): (Vec<_>, Vec<_>) = loaded.records.iter().partition(|record| record.key == one.key);
        assert_eq!(others.iter().map(|record| &record.key).collect::<Vec<_>>(), [&neighbour.key]);
        assert_eq!(ours.len() + loaded.aside.len(), 1, "{loaded:?}");
        if let [aside] = loaded.aside.as_slice() {
            let kept = files.read(&aside.path.join("record.json"), u64::MAX).await.unwrap();
            assert_eq!(kept, input, "a record was changed when it was set aside");
            assert!(journal.payload(&one.key).await.is_err(), "a payload without a record stays");
        }
        if let [ours] = ours.as_slice() {
            assert!(ours.version <= RECORD_VERSION);
            // Written again it reads the same, and says the same about everything.
            let text = serde_json::to_vec(ours).unwrap();
            journal.put(ours).await.unwrap();
            let again = journal.load(&one.key).await.expect("what was read can be written and read");
            assert_eq!(serde_json::to_vec(&again).unwrap(), text);
            assert!(!format!("{ours:?}").contains(ours.job_token.expose()) || ours.job_token.expose().len() < 12);
        }
        let again = journal.load_all().await.unwrap();
        assert_eq!((again.records.len(), again.aside.len()), (loaded.records.len(), 0));
    })
    .expect("files in memory do not wait");
}
