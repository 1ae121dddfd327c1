//! Does the hypervisor answer? Noted with each question for its list; told when it stops answering, and when it does again.

use crate::telemetry::{chain, lasting};
use crate::vm::VmError;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// What is known; held for a few lines.
#[derive(Debug, Default)]
pub(super) struct Silence(Mutex<Option<(Instant, String)>>);

impl Silence {
    /// It was asked for its list.
    pub(super) fn note<T>(&self, result: &Result<T, VmError>) {
        let mut silence = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match (result, silence.take()) {
            (Ok(_), None) => {}
            (Ok(_), Some((since, _))) => {
                tracing::info!("the hypervisor answers again after {}", lasting(since.elapsed()));
            }
            (Err(error), before) => {
                let why = chain(error);
                if before.is_none() {
                    tracing::warn!(error = why, "the hypervisor does not answer; machines go on by themselves");
                }
                *silence = Some((before.map_or_else(Instant::now, |(since, _)| since), why));
            }
        }
    }

    pub(super) fn lasts(&self) -> Option<(Duration, String)> {
        let silence = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        silence.as_ref().map(|(since, why)| (since.elapsed(), why.clone()))
    }
}
