//! Where is the record of a job kept? In the journal, where that takes it; the job ends without it too.
//!
//! A job of before has its record there, and nothing is told to anybody that the record does not say. A job that is not
//! run gets its first record with its end in it. Where the disk takes none and holds none, nothing of the job outlives
//! this process, and no next one would run it: GitLab is told all the same.

use super::journal::{JobKey, Journal, Record};
use crate::telemetry::chain;
use std::io;

/// What the journal has of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// Its record.
    There,
    /// Perhaps something: it did not take the first record, or was not asked yet.
    New,
    /// Its record, and writing it may be what makes the job's tasks panic.
    Suspect,
    /// Its record, as it was: writing it did panic. It goes with the job.
    Behind,
    /// Nothing of this job, and the record there may be, of another of the same id, is none of its business.
    Nothing,
}

impl Kept {
    /// Whether the next daemon would go on with the job.
    pub fn is_there(self) -> bool {
        matches!(self, Self::There | Self::Suspect | Self::Behind)
    }

    /// Whether something is to be removed when the job is over.
    pub fn leaves_files(self) -> bool {
        self != Self::Nothing
    }

    /// Writes the record, as far as that can be; what the journal has by then is in `self`.
    ///
    /// # Errors
    /// The file layer's: what the journal has is behind.
    pub async fn put(&mut self, journal: &Journal, record: &Record) -> io::Result<()> {
        match self {
            Self::There => journal.put(record).await,
            Self::New => {
                let Err(error) = journal.begin(record).await else {
                    *self = Self::There;
                    return Ok(());
                };
                // Where that is not taken either, it is tried again, and told by who tries.
                self.clear(journal, &record.key).await?;
                tracing::error!(error = chain(&error), "write down that a job is not run");
                Ok(())
            }
            Self::Suspect => {
                let (journal, record) = (journal.clone(), record.clone());
                #[expect(clippy::disallowed_methods, reason = "joined on the next line")]
                let put = tokio::spawn(async move { journal.put(&record).await });
                put.await.unwrap_or_else(|_| {
                    tracing::error!("writing the job's record panicked; GitLab is told without it");
                    *self = Self::Behind;
                    Ok(())
                })
            }
            Self::Behind | Self::Nothing => Ok(()),
        }
    }

    /// With nothing of it on disk, no next daemon would run the job.
    async fn clear(&mut self, journal: &Journal, key: &JobKey) -> io::Result<()> {
        journal.remove(key).await?;
        *self = Self::Nothing;
        Ok(())
    }
}
