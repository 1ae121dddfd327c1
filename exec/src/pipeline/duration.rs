//! GitLab's durations in words: `1h 30m`, `90 minutes`, `2 hours and 15 min`, `3600`.
//!
//! GitLab reads them with its fork of the Ruby library chronic_duration: units may be cut short or
//! plural, a bare number is seconds, `1:30:00` is hours, minutes and seconds.

use std::time::Duration;

/// Longest timeout that GitLab takes: a month of 30 days (`Project::MAX_BUILD_TIMEOUT`).
pub(super) const TIMEOUT_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

/// Reads a duration; `None` if it is none, or nothing.
pub(super) fn parse(text: &str) -> Option<Duration> {
    let text = text.trim().to_ascii_lowercase();
    let seconds = if text.contains(':') { clock(&text)? } else { words(&text)? };
    (seconds > 0.0 && seconds < 1e10).then(|| Duration::from_secs_f64(seconds))
}

fn clock(text: &str) -> Option<f64> {
    let parts: Option<Vec<f64>> = text.split(':').map(number).collect();
    let parts = parts.filter(|p| p.len() <= 3)?;
    Some(parts.iter().fold(0.0, |sum, part| sum * 60.0 + part))
}

fn words(text: &str) -> Option<f64> {
    let mut rest = text;
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let value = number(rest.get(..digits)?)?;
        rest = rest.get(digits..)?.trim_start();
        let letters = rest.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(rest.len());
        seconds += value * unit(rest.get(..letters)?)?;
        rest = rest.get(letters..)?.trim_start_matches([' ', ',', '\t']);
        rest = rest.strip_prefix("and ").map_or(rest, str::trim_start);
    }
    Some(seconds)
}

fn number(text: &str) -> Option<f64> {
    text.parse().ok().filter(|_| text.starts_with(|c: char| c.is_ascii_digit()))
}

fn unit(name: &str) -> Option<f64> {
    Some(match name {
        "" | "s" | "sec" | "secs" | "second" | "seconds" => 1.0,
        "m" | "min" | "mins" | "minute" | "minutes" => 60.0,
        "h" | "hr" | "hrs" | "hour" | "hours" => 3600.0,
        "d" | "day" | "days" => 86_400.0,
        "w" | "wk" | "wks" | "week" | "weeks" => 7.0 * 86_400.0,
        "mo" | "mon" | "mos" | "month" | "months" => 30.0 * 86_400.0,
        "y" | "yr" | "yrs" | "year" | "years" => 365.0 * 86_400.0,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_people_write_them() {
        for (text, seconds) in [
            ("1h 30m", 5400),
            ("90 minutes", 5400),
            ("1h30m", 5400),
            ("3 hours and 5 min", 11_100),
            ("1 hour, 2 seconds", 3602),
            ("3600", 3600),
            ("1.5 hours", 5400),
            ("1:30:00", 5400),
            ("10:30", 630),
            (" 2 Weeks ", 1_209_600),
            ("1 mo", 2_592_000),
        ] {
            assert_eq!(parse(text), Some(Duration::from_secs(seconds)), "{text}");
        }
    }

    #[test]
    fn nonsense_is_no_duration() {
        for text in [
            "",
            "0",
            "0 minutes",
            "soon",
            "-5m",
            "5 parsecs",
            "1h m",
            "1:2:3:4",
            ":",
            "9e9 years",
            "99999999999 years",
            ". h",
            "and 5m",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
