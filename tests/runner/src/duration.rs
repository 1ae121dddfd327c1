//! Go's way to write durations, which the runner's variables and messages use.

use std::time::Duration;

/// Reads `1h30m`, `90s`, `1.5h`, `250ms`; `None` for anything else, also for a negative one.
pub(crate) fn parse(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit_end = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        let seconds = match &rest[..unit_end] {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 0.001,
            _ => return None,
        };
        total = total.checked_add(Duration::try_from_secs_f64(number * seconds).ok()?)?;
        rest = &rest[unit_end..];
    }
    (!text.is_empty()).then_some(total)
}

/// Writes whole seconds as Go does: `20s`, `1m0s`, `1h0m0s`.
pub(crate) fn print(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s}s"),
        (0, m, s) => format!("{m}m{s}s"),
        (h, m, s) => format!("{h}h{m}m{s}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gos_notation_is_read() {
        assert_eq!(parse("8s"), Some(Duration::from_secs(8)));
        assert_eq!(parse("1h30m"), Some(Duration::from_secs(5400)));
        assert_eq!(parse("1.5m250ms"), Some(Duration::from_millis(90_250)));
        for nonsense in ["", "5", "5 s", "s", "-3s", "1d"] {
            assert_eq!(parse(nonsense), None, "{nonsense}");
        }
    }

    #[test]
    fn gos_notation_is_written() {
        for (seconds, text) in [(20, "20s"), (60, "1m0s"), (3600, "1h0m0s"), (3725, "1h2m5s")] {
            assert_eq!(print(Duration::from_secs(seconds)), text);
        }
    }
}
