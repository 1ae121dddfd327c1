//! Durations as people write them in `expire_in`: `1 week`, `2 hrs 20 mins`, `never`.

use std::time::Duration;

/// `Ok(None)` is never; `Err` no duration. A number without unit is seconds; 0 is never.
pub(in crate::standin) fn parse(text: &str) -> Result<Option<Duration>, ()> {
    let text = text.trim().to_ascii_lowercase();
    if text.is_empty() || text == "never" || text == "0" {
        return Ok(None);
    }
    let mut total = 0.0_f64;
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let number: f64 = rest[..digits].parse().map_err(|_| ())?;
        rest = rest[digits..].trim_start();
        let letters = rest.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(rest.len());
        total += number * unit(&rest[..letters])?;
        rest = rest[letters..].trim_start_matches([' ', ',', '&']);
        rest = rest.strip_prefix("and ").unwrap_or(rest).trim_start();
    }
    Duration::try_from_secs_f64(total).map(Some).map_err(|_| ())
}

/// Seconds of a unit. A month is 30 days, a year 365.25, as GitLab's parser has it.
fn unit(word: &str) -> Result<f64, ()> {
    Ok(match word {
        "" | "s" | "sec" | "secs" | "second" | "seconds" => 1.0,
        "m" | "min" | "mins" | "minute" | "minutes" => 60.0,
        "h" | "hr" | "hrs" | "hour" | "hours" => 3600.0,
        "d" | "day" | "days" => 86_400.0,
        "w" | "wk" | "wks" | "week" | "weeks" => 604_800.0,
        "mo" | "mos" | "month" | "months" => 2_592_000.0,
        "y" | "yr" | "yrs" | "year" | "years" => 31_557_600.0,
        _ => return Err(()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_as_people_write_them() {
        let seconds = |text| parse(text).map(|duration| duration.map(|duration| duration.as_secs()));
        assert_eq!(seconds("1 week"), Ok(Some(604_800)));
        assert_eq!(seconds("7d"), Ok(Some(604_800)));
        assert_eq!(seconds("3 mins 4 sec"), Ok(Some(184)));
        assert_eq!(seconds("2 hrs and 20 min"), Ok(Some(8400)));
        assert_eq!(seconds("42"), Ok(Some(42)));
        assert_eq!(seconds("never"), Ok(None));
        assert_eq!(seconds("soon"), Err(()));
    }
}
