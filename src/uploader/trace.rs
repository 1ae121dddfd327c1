//! The trace on its way to GitLab: a piece, the answer, and where the next one begins.

use super::{Step, Uploader};
use crate::failpoint::{Point, reached};
use crate::gitlab::JobStatus;
use crate::telemetry::chain;
use bytes::Bytes;
use std::io;
use std::time::Duration;
use tokio::time::Instant;

/// Bytes of one PATCH at most, as the official runner sends them.
pub(super) const PATCH_BYTES_MAX: usize = 1024 * 1024;

/// GitLab's pieces are halved down to this where something says that they are too large.
const PATCH_BYTES_MIN: usize = 4096;

/// One read of the spool; a disk that hangs must not keep the verdict for ever.
const SPOOL_READ_MAX: Duration = Duration::from_secs(60);

/// Failed reads of the spool after which the verdict goes without the rest of the trace.
const SPOOL_READ_TRIES: u32 = 20;

impl Uploader {
    /// Sends what there is from `offset`: the bytes that GitLab lacks, or one that it should have.
    pub(super) async fn patch(&mut self, offset: u64) -> Step {
        let asks = offset < self.sent;
        let wanted = usize::try_from(self.end() - offset).map_or(self.piece_max, |n| n.min(self.piece_max));
        let bytes = match self.read(offset, wanted).await {
            Ok(bytes) if !bytes.is_empty() => {
                self.read_failures = 0;
                bytes
            }
            read => {
                let error = read.err().map_or_else(|| "file is shorter than it was".to_owned(), |e| e.to_string());
                self.read_failures += 1;
                tracing::error!(error, "read the trace's spool");
                if asks {
                    self.doubt = false;
                } else if self.read_failures >= SPOOL_READ_TRIES {
                    self.truncated_at = Some(offset);
                }
                self.owed.trace_failed();
                self.not_before = Instant::now() + self.backoff.next(&self.upload.rng);
                return Step::Continue;
            }
        };
        let (sending, length) = (bytes.len(), bytes.len() as u64);
        self.last_patch = Some(Instant::now());
        let debug = *self.upload.debug_trace.borrow();
        let (at, tried) = (self.lead.unwrap_or(0) + offset, std::mem::replace(&mut self.tried, true));
        reached(Point::K12);
        match self.upload.client.append_trace(at, bytes, debug).await {
            Ok(answer) => {
                reached(Point::K12);
                self.answered(answer.interval);
                // GitLab takes the mark from a PATCH at offset 0, even from one that it refuses.
                self.marked_debug |= debug && at == 0;
                match answer.continue_at {
                    None if answer.status != JobStatus::Over => {
                        self.lead.get_or_insert(0);
                        self.sent = offset + length;
                        self.doubt = false;
                        self.progressed();
                        if self.owed.holds(self.sent) {
                            self.tell(String::new()).await;
                        }
                    }
                    None => {}
                    Some(held) => {
                        let held = self.of_spool(held, tried);
                        if held > self.end() {
                            self.upload.metrics.job().trace_ahead.inc();
                            tracing::error!(
                                held,
                                ours = self.end(),
                                "GitLab holds more of the trace than was ever sent"
                            );
                        }
                        // GitLab may have lost bytes (resend them) or have taken a piece whose answer was lost.
                        self.sent = held;
                        self.doubt = !asks && held > offset + length;
                        self.refused();
                        if self.refusals > 1 {
                            self.owed.trace_failed();
                        }
                    }
                }
                self.status(answer.status).await
            }
            Err(error) if error.status() == Some(413) && sending > PATCH_BYTES_MIN => {
                let halved = (sending / 2).max(PATCH_BYTES_MIN);
                tracing::warn!(
                    bytes = length,
                    halved,
                    "a piece of the trace is too large for GitLab; sending smaller ones"
                );
                self.piece_max = halved;
                Step::Continue
            }
            Err(error) => {
                self.owed.trace_failed();
                self.failed(&error, "log").await
            }
        }
    }

    /// Of the bytes that GitLab says it holds, those of the spool. `tried`: some of it may have come through unheard.
    fn of_spool(&mut self, held: u64, tried: bool) -> u64 {
        let lead = match self.lead {
            Some(lead) if lead <= held => lead,
            None if tried && held <= self.end() => 0,
            // A trace from before, or less of it than there was.
            Some(_) | None => held,
        };
        self.lead = Some(lead);
        held - lead
    }

    async fn read(&self, offset: u64, bytes: usize) -> io::Result<Bytes> {
        let read = tokio::time::timeout(SPOOL_READ_MAX, self.upload.spool.read(offset, bytes)).await;
        read.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    /// GitLab takes the mark from a PATCH at offset 0 only, and even from one that it answers 416.
    pub(super) async fn mark_debug(&mut self) -> Step {
        let first = match self.read(0, 1).await {
            Ok(first) => first,
            Err(error) => {
                tracing::error!(error = chain(&error), "read the trace's spool");
                self.owed.trace_failed();
                self.not_before = Instant::now() + self.backoff.next(&self.upload.rng);
                return Step::Continue;
            }
        };
        match self.upload.client.append_trace(0, first, true).await {
            Ok(answer) => {
                self.answered(answer.interval);
                self.marked_debug = true;
                if answer.continue_at.is_none() && self.sent == 0 && answer.status != JobStatus::Over {
                    self.sent = 1;
                }
                self.status(answer.status).await
            }
            Err(error) => {
                self.owed.trace_failed();
                self.failed(&error, "log").await
            }
        }
    }
}
