//! What of a job's repository was in its machine already, as its author reads it.

use crate::clones::Told;

/// The line; `None`: nothing was there, and nothing is amiss.
#[must_use]
pub(in crate::job) fn clone(told: &Told) -> Option<String> {
    let here = (told.here > 0).then(|| format!("{} were here already", bytes(told.here)));
    let fetched = told.fetched.filter(|(count, _)| *count > 0).map(|(count, took)| {
        format!("{} were fetched while the machine booted, in {:.1} s", bytes(count), took.as_secs_f64())
    });
    let missing = told.missing.map(str::to_owned);
    let parts: Vec<String> = [here, fetched, missing].into_iter().flatten().collect();
    (!parts.is_empty()).then(|| format!("clone: {}", parts.join("; ")))
}

/// Bytes in the words of people.
fn bytes(count: u64) -> String {
    match count {
        0..10_240 => format!("{count} bytes"),
        10_240..10_485_760 => format!("{} KiB", count >> 10),
        _ => format!("{} MiB", count >> 20),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn what_was_there_what_came_and_what_did_not() {
        let told = |here, fetched, missing| clone(&Told { here, fetched, missing });
        let fetched = Some((300_000, Duration::from_millis(840)));
        assert_eq!(told(0, None, None), None);
        assert_eq!(told(212 << 20, None, None).unwrap(), "clone: 212 MiB were here already");
        assert_eq!(
            told(212 << 20, fetched, None).unwrap(),
            "clone: 212 MiB were here already; 292 KiB were fetched while the machine booted, in 0.8 s"
        );
        assert_eq!(told(0, fetched, None).unwrap(), "clone: 292 KiB were fetched while the machine booted, in 0.8 s");
        assert_eq!(
            told(5000, None, Some("what is new there was not fetched in time")).unwrap(),
            "clone: 5000 bytes were here already; what is new there was not fetched in time"
        );
    }
}
