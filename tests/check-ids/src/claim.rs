//! One doc line: which rows of the tables does it claim to show?
//!
//! A claim opens its line: `G12: what happens`, or `R2, R3: what happens`. Ids in the middle of a
//! sentence explain, and claim nothing.

use std::fmt;

/// A row of the tables: its letter and its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Id(pub(crate) char, pub(crate) u32);

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.0, self.1)
    }
}

impl Id {
    /// `G12`; no leading zero, nothing around it.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let letter = text.chars().next().filter(char::is_ascii_uppercase)?;
        let digits = &text[1..];
        let plain = (1..=3).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit());
        let number = digits.parse().ok().filter(|_| plain && !(digits.starts_with('0') && digits != "0"))?;
        Some(Self(letter, number))
    }
}

/// The letters of the tables.
const LETTERS: &[char] = &['B', 'E', 'F', 'G', 'H', 'K', 'P', 'R', 'T', 'U', 'V'];

/// The ids that this line claims: none if it is prose, an error if it only looks like a claim.
pub(crate) fn claims(line: &str) -> Result<Vec<Id>, &'static str> {
    let line = line.trim();
    let looks = |word: &str| {
        let word = word.split([',', ':', '.', ';']).next().unwrap_or_default();
        let digits = word.trim_start_matches(|c: char| c.is_ascii_alphabetic());
        word.len() == digits.len() + 1 && (1..=3).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit())
    };
    // Other letters are other things: decisions (`decision D13:`), releases.
    let is_row = |word: &str| word.ends_with(':') && looks(word) && word.starts_with(LETTERS);
    let mut words = line.split_whitespace();
    let first = words.next().unwrap_or_default();
    let Some((head, text)) = line.split_once(": ").filter(|_| looks(first)) else {
        if looks(first) {
            return Err("begins with an id, but not as `G12: what happens` or `R2, R3: what happens`");
        }
        if line.split_whitespace().any(&is_row) {
            return Err("names an id with a colon in mid-line: a claim opens its line");
        }
        return Ok(Vec::new());
    };
    let ids: Option<Vec<Id>> = head.split(", ").map(Id::parse).collect();
    let ids = ids.ok_or("its ids are not of the form `R2, R3: what happens`")?;
    if ids.iter().enumerate().any(|(at, id)| ids[..at].contains(id)) {
        return Err("names an id twice");
    }
    if text.split_whitespace().count() < 2 {
        return Err("does not say what happens");
    }
    if text.split_whitespace().any(is_row) {
        return Err("names more ids in mid-line: a claim opens its line");
    }
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_opens_its_line_and_says_what_happens() {
        let of = |line: &str| claims(line).map(|ids| ids.iter().map(Id::to_string).collect::<Vec<_>>().join(" "));
        for (line, ids) in [
            (" G12: ten minutes without GitLab", "G12"),
            (" R2, R3, K0: twice, and once", "R2 R3 K0"),
            (" A hand-over (G13) is quick.", ""),
            (" Two jobs: each has its own.", ""),
            (" As V8 says, it ends.", ""),
            ("", ""),
        ] {
            assert_eq!(of(line).as_deref(), Ok(ids), "{line:?}");
        }
        for line in [
            " G12 without a colon",
            " G12:",
            " G12: short",
            " G12:no space",
            " g12: in small letters",
            " K1 to K18: a range",
            " R2,R3: without a space",
            " R2, R2: the same twice",
            " R2, and R3: with words between",
            " G012: with a zero in front",
            " G1: one thing. G2: another thing",
            " Invariant 17, E15: hidden behind a word",
        ] {
            assert!(of(line).is_err(), "{line:?}");
        }
    }
}
