//! `PATCH /jobs/:id/trace`: the guest's bytes go into the spool, by the guest's own offsets.
//!
//! 202 and 416 as GitLab answers them; 403 once the job is over; never 404, on which the official
//! runner goes on without a log (decision D13).

use super::answer::{self, Answer};
use super::body::RequestBody;
use super::handler::Handler;
use super::routes::Query;
use super::{GuestEvent, GuestView};
use crate::failpoint::{Point, reached};
use crate::gitlab::JobStatus;
use crate::spool::Appended;
use http::StatusCode;
use http::header::{CONTENT_RANGE, HeaderMap};
use http::request::Parts;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Bytes of one PATCH at most. The official runner sends at most 1 MiB.
const TRACE_BODY_BYTES_MAX: usize = 2 * 1024 * 1024;

impl Handler {
    /// Takes a piece of trace.
    pub(super) async fn trace(&self, parts: &Parts, query: &Query, mut body: RequestBody) -> Result<Answer, Answer> {
        // Waiting ones cost buffers, so they are few; a runner has one.
        let Ok(_turn) = self.trace_turns.try_acquire() else {
            self.metrics().refused.inc("trace_turns");
            return Err(answer::come_again(StatusCode::SERVICE_UNAVAILABLE));
        };
        // A permit bounds what is in memory, and lives as long as the bytes do: the write outlives a guest that hangs
        // up, and with it the next body would be read, and the next, as long as a disk hangs.
        let permit = Arc::clone(&self.trace_bodies).acquire_owned().await.expect("never closed");
        let body = self.read(&mut body, TRACE_BODY_BYTES_MAX).await?;
        if is_over(&self.view()) {
            return Err(self.refuse_over());
        }
        let offset = content_range(&parts.headers, body.len())
            .ok_or_else(|| self.refuse(StatusCode::BAD_REQUEST, "content_range"))?;
        // Told first: GitLab must hear of it before it shows the bytes to everybody.
        if query.get("debug_trace") == Some("true") && !self.debug_trace_told.swap(true, Ordering::AcqRel) {
            self.tell(GuestEvent::DebugTrace).await;
        }
        if let Some(delay) = self.trace_rate.take(body.len(), Duration::MAX)
            && !delay.is_zero()
        {
            tokio::time::sleep(delay).await;
        }
        reached(Point::K12);
        let (spool, bytes) = (self.spool.clone(), body.len() as u64);
        // In a task of its own: if the guest hangs up, the write still comes to its end.
        let write = self.writes.spawn(async move {
            let appended = spool.append(offset, body).await;
            drop(permit);
            appended
        });
        match write.await {
            Ok(Ok(Appended::Taken(next))) => {
                reached(Point::K12);
                self.metrics().trace_bytes.inc_by(bytes);
                let taken = answer::with_job(answer::text(StatusCode::ACCEPTED), &self.view());
                Ok(answer::with_range(taken, next))
            }
            // What the guest has sent, never more: beyond its own end 17.5 panics and 19.3 goes mute.
            Ok(Ok(Appended::WrongOffset(next))) => {
                self.metrics().refused.inc("offset");
                Ok(answer::with_range(answer::error(StatusCode::RANGE_NOT_SATISFIABLE), next))
            }
            Ok(Ok(Appended::Closed)) => Err(self.refuse_over()),
            Ok(Err(error)) => {
                self.trace_unwritten
                    .log(|line| tracing::warn!(vm = %self.vm(), job = %self.job, error = %error, "{line}"));
                Err(answer::come_again(StatusCode::SERVICE_UNAVAILABLE))
            }
            // A panic, which its own line reports.
            Err(_) => Err(answer::come_again(StatusCode::SERVICE_UNAVAILABLE)),
        }
    }

    /// 403, and why.
    pub(super) fn refuse_over(&self) -> Answer {
        self.metrics().refused.inc("job_over");
        answer::over(&self.view())
    }
}

/// Whether nothing more of the guest is wanted.
pub(super) fn is_over(view: &GuestView) -> bool {
    view.status == JobStatus::Over || view.verdict.is_some()
}

/// The offset of `Content-Range: <first>-<last>` if there is exactly one and it agrees with the
/// body. GitLab reads the first number only; a guest that contradicts itself is told so.
pub fn content_range(headers: &HeaderMap, length: usize) -> Option<u64> {
    let mut values = headers.get_all(CONTENT_RANGE).iter();
    let (Some(value), None) = (values.next(), values.next()) else { return None };
    parse_content_range(value.to_str().ok()?, length)
}

/// Where a piece of this length begins, by the value of its `Content-Range`; `None`: the two do not agree.
pub fn parse_content_range(value: &str, length: usize) -> Option<u64> {
    let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<u64>().ok()).flatten();
    let (first, last) = value.split_once('-')?;
    let (first, last) = (number(first)?, number(last)?);
    let told = last.checked_sub(first)?.checked_add(1)?;
    (told == length as u64).then_some(first)
}

#[cfg(test)]
mod tests {
    use super::parse_content_range;

    /// R6: `Content-Range` against the body.
    #[test]
    fn a_range_must_agree_with_its_body() {
        for (value, length, expected) in [
            ("0-0", 1, Some(0)),
            ("0-1048575", 1_048_576, Some(0)),
            ("5-9", 5, Some(5)),
            ("18446744073709551614-18446744073709551614", 1, Some(u64::MAX - 1)),
            ("0-1", 1, None),
            ("5-4", 0, None),
            ("9-5", 5, None),
            ("0-18446744073709551615", 1, None),
            ("0-18446744073709551616", 1, None),
            ("-5", 5, None),
            ("5-", 5, None),
            ("", 0, None),
            ("+0-0", 1, None),
            ("0-0/1", 1, None),
            ("bytes 0-0", 1, None),
            (" 0-0", 1, None),
            ("0--0", 1, None),
        ] {
            assert_eq!(parse_content_range(value, length), expected, "{value}");
        }
    }
}
