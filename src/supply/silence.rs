//! Does the hypervisor answer? Noted with each question for its list; told when it has not for a while, and when it does
//! again. One that answers every other time is seen by pollers, and is no news here.

use crate::telemetry::{chain, lasting};
use crate::vm::VmError;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// A libvirtd that is started anew is away for some seconds.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is known; held for a few lines.
#[derive(Debug, Default)]
pub(super) struct Silence(Mutex<Option<Silent>>);

#[derive(Debug)]
struct Silent {
    since: Instant,
    why: String,
    told: bool,
}

impl Silence {
    /// It was asked for its list.
    pub(super) fn note<T>(&self, result: &Result<T, VmError>) {
        let mut silence = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Err(error) = result else {
            if let Some(silent) = silence.take().filter(|silent| silent.told) {
                tracing::info!("the hypervisor answers again after {}", lasting(silent.since.elapsed()));
            }
            return;
        };
        let new = || Silent { since: Instant::now(), why: String::new(), told: false };
        let silent = silence.get_or_insert_with(new);
        silent.why = chain(error);
        if !silent.told && silent.since.elapsed() >= PATIENCE {
            silent.told = true;
            tracing::warn!(error = silent.why, "the hypervisor does not answer; machines go on by themselves");
        }
    }

    pub(super) fn lasts(&self) -> Option<(Duration, String)> {
        let silence = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        silence.as_ref().map(|silent| (silent.since.elapsed(), silent.why.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::{VmId, VmName};

    /// U19: what lasts is known from its first moment on, and gone with the first answer.
    #[tokio::test(start_paused = true)]
    async fn silence_lasts_from_the_first_question_without_an_answer() {
        let silence = Silence::default();
        let name = VmName::from("abcdefghijklmnop".parse::<VmId>().unwrap());
        let failed = || Err::<(), _>(VmError::refused("list", &name, "nobody is there"));
        silence.note(&Ok(()));
        assert_eq!(silence.lasts(), None);
        silence.note(&failed());
        tokio::time::sleep(Duration::from_secs(400)).await;
        silence.note(&failed());
        let (lasts, why) = silence.lasts().unwrap();
        assert!(lasts.as_secs() == 400 && why.contains("nobody is there"), "{lasts:?} {why}");
        silence.note(&Ok(()));
        assert_eq!(silence.lasts(), None);
    }
}
