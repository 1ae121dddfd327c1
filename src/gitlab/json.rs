//! A scanner that finds members of a JSON object as spans of the raw text.
//!
//! It exists for the two things that a parser can't do: splice one number into a payload that must
//! otherwise stay as it came, byte for byte, and make out what a truncated payload still says.
//! It doesn't validate: on anything odd it stops, and what was found before stands. It doesn't
//! recurse, so depth costs nothing.

use std::ops::Range;

/// Blank bytes.
fn skip_blank(text: &[u8], mut at: usize) -> usize {
    while matches!(text.get(at), Some(b' ' | b'\t' | b'\n' | b'\r')) {
        at += 1;
    }
    at
}

/// The end of the string that begins at `at`; `None` if it has none.
fn string_end(text: &[u8], at: usize) -> Option<usize> {
    let mut i = at + 1;
    loop {
        match text.get(i)? {
            b'\\' => i += 2,
            b'"' => return Some(i + 1),
            _ => i += 1,
        }
    }
}

/// The end of the value that begins at `at`; `None` if the text ends before it surely has.
fn value_end(text: &[u8], at: usize) -> Option<usize> {
    match text.get(at)? {
        b'"' => string_end(text, at),
        b'{' | b'[' => {
            let mut depth = 0_usize;
            let mut i = at;
            loop {
                match text.get(i)? {
                    b'"' => {
                        i = string_end(text, i)?;
                        continue;
                    }
                    b'{' | b'[' => depth += 1,
                    b'}' | b']' => {
                        depth -= 1;
                        if depth == 0 {
                            return Some(i + 1);
                        }
                    }
                    _ => {}
                }
                i += 1;
            }
        }
        _ => {
            // A bare word or number counts only if something ends it: `12` may be the head of `123`.
            let length =
                text[at..].iter().position(|b| matches!(b, b',' | b'}' | b']' | b' ' | b'\t' | b'\n' | b'\r'))?;
            (length > 0).then_some(at + length)
        }
    }
}

/// Walks over the members of the object that begins at or after `at`.
pub(super) struct Members<'a> {
    text: &'a [u8],
    /// Where the next member, or the end, is looked for; `None`: nothing more can be made out.
    next: Option<usize>,
}

/// The members of the object at `at` (blanks before it are skipped); none if there is no object.
pub(super) fn members(text: &[u8], at: usize) -> Members<'_> {
    let at = skip_blank(text, at);
    Members { text, next: (text.get(at) == Some(&b'{')).then_some(at + 1) }
}

impl<'a> Members<'a> {
    fn step(&mut self) -> Option<(&'a [u8], Range<usize>, usize)> {
        let key_at = skip_blank(self.text, self.next?);
        if self.text.get(key_at) != Some(&b'"') {
            return None;
        }
        let key_end = string_end(self.text, key_at)?;
        let colon = skip_blank(self.text, key_end);
        if self.text.get(colon) != Some(&b':') {
            return None;
        }
        let value_at = skip_blank(self.text, colon + 1);
        let value = value_at..value_end(self.text, value_at)?;
        let after = skip_blank(self.text, value.end);
        Some((self.text.get(key_at..key_end)?, value, after))
    }
}

impl<'a> Iterator for Members<'a> {
    /// The key as it stands, quotes included, and where its value is.
    type Item = (&'a [u8], Range<usize>);

    fn next(&mut self) -> Option<Self::Item> {
        let step = self.step();
        self.next = match &step {
            Some((_, _, after)) if self.text.get(*after) == Some(&b',') => Some(after + 1),
            _ => None,
        };
        step.map(|(key, value, _)| (key, value))
    }
}

/// Whether the key, quotes and escapes included, reads `name`.
pub(super) fn is_key(key: &[u8], name: &str) -> bool {
    serde_json::from_slice::<std::borrow::Cow<'_, str>>(key).is_ok_and(|key| key == name)
}

/// The greatest depth of arrays and objects in the text.
pub(super) fn depth(text: &[u8]) -> usize {
    let (mut depth, mut greatest, mut i) = (0_usize, 0, 0);
    while let Some(byte) = text.get(i) {
        match byte {
            b'"' => {
                let Some(end) = string_end(text, i) else { return greatest };
                i = end;
                continue;
            }
            b'{' | b'[' => {
                depth += 1;
                greatest = greatest.max(depth);
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        i += 1;
    }
    greatest
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn found(text: &str) -> Vec<(String, String)> {
        let name = |key: &[u8]| serde_json::from_slice::<String>(key).unwrap();
        members(text.as_bytes(), 0).map(|(key, value)| (name(key), text[value].to_owned())).collect()
    }

    #[test]
    fn members_are_found_as_they_stand() {
        let check = |text: &str, expected: &[(&str, &str)]| {
            let expected: Vec<_> = expected.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            assert_eq!(found(text), expected, "{text}");
        };
        check(r#"{"a":1}"#, &[("a", "1")]);
        check(
            r#" { "a" : 1 , "b\u0063" : { "x" : [ "}" , "\"" ] } } "#,
            &[("a", "1"), ("bc", r#"{ "x" : [ "}" , "\"" ] }"#)],
        );
        check(r#"{"a":"\\","b":-1.5e3}"#, &[("a", r#""\\""#), ("b", "-1.5e3")]);
        check("{}", &[]);
        check("[1]", &[]);
        check("", &[]);
    }

    #[test]
    fn a_cut_text_yields_what_surely_is_whole() {
        assert_eq!(found(r#"{"id":12"#), []);
        assert_eq!(found(r#"{"id":12,"#), [("id".into(), "12".into())]);
        assert_eq!(found(r#"{"id":12,"token":"ab"#), [("id".into(), "12".into())]);
        assert_eq!(
            found(r#"{"id":12,"token":"ab","x":[[["#),
            [("id".into(), "12".into()), ("token".into(), r#""ab""#.into())]
        );
        assert_eq!(found(r#"{"id":12 "token":"ab"}"#), [("id".into(), "12".into())]);
        assert_eq!(found(r#"{"a":"\"#), []);
    }

    #[test]
    fn depth_counts_brackets_outside_of_strings() {
        assert_eq!(depth(b"1"), 0);
        assert_eq!(depth(br#"{"a":[[],"[[[[["]}"#), 3);
        assert_eq!(depth("[".repeat(1_000_000).as_bytes()), 1_000_000);
    }

    proptest! {
        #[test]
        fn no_bytes_upset_the_scanner(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            for (key, value) in members(&text, 0) {
                let _ = (is_key(key, "a"), &text[value]);
            }
            let _ = depth(&text);
        }

        #[test]
        fn json_like_bytes_upset_it_neither(text in r#"[{}\[\]":,\\ a1u]{0,60}"#) {
            let _ = members(text.as_bytes(), 0).map(|(_, value)| text[value].len()).sum::<usize>();
        }
    }
}
