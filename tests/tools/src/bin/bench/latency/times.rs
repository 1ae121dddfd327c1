//! From what came to how long it took.
//!
//! The guest's clock stands to ours as the quickest stamp says: it was written no later than it came, and on a
//! connection within one host the quickest of a dozen takes well below a millisecond. A latency is from the
//! writing, by that, to the arrival of the request at GitLab that carried the line's last byte and was taken.

use super::script::{END, Stamp, line};
use dayfly::gitlab::JobId;
use dayfly_exec::standin::{Model, Recorded, Route};
use http::StatusCode;
use jiff::Timestamp;

/// Milliseconds from the writing to the arrival.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Times {
    /// The script's first line.
    pub(super) first: f64,
    /// All later ones.
    pub(super) later: Vec<f64>,
    /// From the script's end to the final report.
    pub(super) verdict: f64,
    /// The part of it from the report at the door to the report at GitLab, where there is a door.
    pub(super) held: Option<f64>,
}

/// What GitLab got of one job, and when.
#[derive(Clone, Debug, Default)]
pub(super) struct Got {
    trace: Vec<u8>,
    /// Where the log ended after each piece that was taken, oldest first.
    pieces: Vec<(usize, Timestamp)>,
    verdict: Option<Timestamp>,
}

impl Got {
    pub(super) fn of(model: &Model, job: JobId) -> Self {
        let requests = || model.history.iter().filter(|request| request.job == Some(job));
        Self {
            trace: model.jobs.get(&job).map(|job| job.trace.bytes.clone()).unwrap_or_default(),
            pieces: requests().filter_map(piece).collect(),
            verdict: requests().find(|request| is_verdict(request)).map(|request| request.at),
        }
    }

    /// Milliseconds from then to the arrival of the final report.
    pub(super) fn verdict_after(&self, then: Timestamp) -> Option<f64> {
        Some(milliseconds(self.verdict?.as_microsecond() - then.as_microsecond()))
    }

    /// When the last byte of this text was here.
    fn had(&self, text: &str) -> Option<Timestamp> {
        let at = self.trace.windows(text.len()).position(|window| window == text.as_bytes())?;
        let end = at + text.len();
        self.pieces.iter().find(|(length, _)| *length >= end).map(|(_, when)| *when)
    }

    pub(super) fn times(&self, stamps: &[Stamp]) -> Result<Times, String> {
        let offset = offset(stamps).ok_or("no stamps came")?;
        let took = |stamp: &Stamp, arrived: Timestamp| {
            let written = micros(&stamp.text).ok_or_else(|| format!("`{}` is no stamp", stamp.text))?;
            Ok::<_, String>(milliseconds(arrived.as_microsecond() - written - offset))
        };
        let mut lines = Vec::new();
        let mut verdict = None;
        for stamp in stamps {
            if stamp.name == END {
                verdict = Some(took(stamp, self.verdict.ok_or("GitLab got no verdict")?)?);
            } else {
                let arrived = self.had(&line(&stamp.name, &stamp.text));
                lines.push(took(stamp, arrived.ok_or_else(|| format!("line {} is not in the log", stamp.name))?)?);
            }
        }
        let verdict = verdict.ok_or("the script did not come to its end")?;
        if lines.is_empty() {
            return Err("the script said nothing".into());
        }
        Ok(Times { first: lines.remove(0), later: lines, verdict, held: None })
    }
}

/// How far our clock is ahead of the guest's, microseconds.
fn offset(stamps: &[Stamp]) -> Option<i64> {
    stamps.iter().filter_map(|stamp| Some(stamp.came.as_microsecond() - micros(&stamp.text)?)).min()
}

/// The slowest stamp behind the quickest, milliseconds: what the clocks' relation may be wrong by at most.
pub(super) fn jitter(stamps: &[Stamp]) -> Option<f64> {
    let ahead = stamps.iter().filter_map(|stamp| Some(stamp.came.as_microsecond() - micros(&stamp.text)?));
    Some(milliseconds(ahead.max()? - offset(stamps)?))
}

/// `EPOCHREALTIME` in microseconds.
fn micros(text: &str) -> Option<i64> {
    let (seconds, fraction) = text.split_once(['.', ','])?;
    if fraction.len() != 6 {
        return None;
    }
    seconds.parse::<i64>().ok()?.checked_mul(1_000_000)?.checked_add(fraction.parse().ok()?)
}

fn milliseconds(micros: i64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "hours at most")]
    let micros = micros as f64;
    micros / 1000.0
}

/// A piece of trace that was taken: where the log ended then, and when it came.
fn piece(request: &Recorded) -> Option<(usize, Timestamp)> {
    if request.route != Route::AppendTrace || request.status != Some(StatusCode::ACCEPTED) {
        return None;
    }
    let range = request.headers.get("content-range")?.to_str().ok()?;
    let start: usize = range.split('-').next()?.parse().ok()?;
    Some((start + usize::try_from(request.body_bytes).ok()?, request.at))
}

fn is_verdict(request: &Recorded) -> bool {
    let state = || {
        let body: serde_json::Value = serde_json::from_slice(request.body.as_ref()?).ok()?;
        Some(body.get("state")?.as_str()? == "success")
    };
    request.route == Route::UpdateJob && request.status == Some(StatusCode::OK) && state() == Some(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: i64) -> Timestamp {
        Timestamp::from_millisecond(1_800_000_000_000 + ms).unwrap()
    }

    fn stamp(name: &str, text: &str, came: i64) -> Stamp {
        Stamp { name: name.into(), text: text.into(), came: at(came) }
    }

    /// A guest whose clock is 100 s behind ours, and whose second stamp was held up for 5 ms.
    fn stamps() -> Vec<Stamp> {
        vec![
            stamp("0", "1799999900.000000", 0),
            stamp("1", "1799999901.000000", 1005),
            stamp(END, "1799999902.000000", 2000),
        ]
    }

    fn got(cut: usize) -> Got {
        let trace = format!("first\n{}\n{}\n", line("0", "1799999900.000000"), line("1", "1799999901.000000"));
        let pieces = vec![(cut, at(700)), (trace.len(), at(3000))];
        Got { trace: trace.into_bytes(), pieces, verdict: Some(at(2250)) }
    }

    #[test]
    fn a_line_is_there_with_the_piece_that_has_its_last_byte() {
        let first_ends = "first\n".len() + line("0", "1799999900.000000").len();
        let times = got(first_ends).times(&stamps()).unwrap();
        assert_eq!(times, Times { first: 700.0, later: vec![2000.0], verdict: 250.0, held: None });
        assert_eq!(got(first_ends - 1).times(&stamps()).unwrap().first, 3000.0);
        assert_eq!(jitter(&stamps()), Some(5.0));
        assert_eq!(got(first_ends).verdict_after(at(2230)), Some(20.0));
    }

    #[test]
    fn nothing_is_made_up_for_what_did_not_come() {
        assert!(got(9).times(&stamps()[..2]).is_err(), "a script without an end");
        assert!(got(9).times(&[]).is_err(), "no stamps");
        assert!(Got { verdict: None, ..got(9) }.times(&stamps()).is_err(), "no verdict");
        assert!(Got { pieces: Vec::new(), ..got(9) }.times(&stamps()).is_err(), "no piece of trace");
        let other = [stamp("0", "1799999900.000001", 0), stamp(END, "1799999902.000000", 2000)];
        assert!(got(9).times(&other).is_err(), "a line that is not in the log");
    }

    #[test]
    fn a_stamp_is_seconds_and_six_digits() {
        assert_eq!(micros("1799999900.000042"), Some(1_799_999_900_000_042));
        assert_eq!(micros("1799999900,5"), None);
        assert_eq!(micros("now"), None);
    }
}
