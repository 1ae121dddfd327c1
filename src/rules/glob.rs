//! Does a name fit a pattern? `*` stands for anything but a slash, `**` for anything, `?` for one character but a slash.

/// Characters of a pattern at most: GitLab's paths and refs have up to 255.
pub(super) const PATTERN_CHARS_MAX: usize = 255;

/// Characters of a name that are looked at; a longer one fits no pattern.
const NAME_CHARS_MAX: usize = 1024;

/// Whether `name` fits `pattern` as a whole. `fold`: whatever the case of ASCII letters. The time taken is at most the
/// product of both lengths.
pub(super) fn fits(pattern: &str, name: &str, fold: bool) -> bool {
    let name: Vec<char> = name.chars().take(NAME_CHARS_MAX + 1).collect();
    if name.len() > NAME_CHARS_MAX {
        return false;
    }
    let same = |a: char, b: char| a == b || (fold && a.eq_ignore_ascii_case(&b));
    // `ends[n]`: what of the pattern was read so far fits the first `n` characters of the name.
    let mut ends = vec![false; name.len() + 1];
    ends[0] = true;
    let mut rest = pattern.chars().peekable();
    while let Some(c) = rest.next() {
        let mut next = vec![false; name.len() + 1];
        if c == '*' {
            let mut slashes = false;
            while rest.next_if_eq(&'*').is_some() {
                slashes = true;
            }
            for n in 0..=name.len() {
                next[n] = ends[n] || (n > 0 && next[n - 1] && (slashes || name[n - 1] != '/'));
            }
        } else {
            for n in 1..=name.len() {
                let one = if c == '?' { name[n - 1] != '/' } else { same(c, name[n - 1]) };
                next[n] = ends[n - 1] && one;
            }
        }
        ends = next;
    }
    ends[name.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(pattern: &str, name: &str, expected: bool) {
        assert_eq!(fits(pattern, name, false), expected, "{pattern} {name}");
    }

    #[test]
    fn patterns_fit_whole_names_and_a_star_stops_at_a_slash() {
        check("main", "main", true);
        check("main", "mainly", false);
        check("release-*", "release-1.2", true);
        check("release-*", "release-1/x", false);
        check("group/*", "group/project", true);
        check("group/*", "group/sub/project", false);
        check("group/**", "group/sub/project", true);
        check("**/project", "a/b/project", true);
        check("v?", "v1", true);
        check("v?", "v/", false);
        check("*", "", true);
        check("", "", true);
        check("", "a", false);
        check("[a]", "a", false);
        check("Main", "main", false);
        assert!(fits("Group/**", "gROUP/x", true));
        check("**", &"a".repeat(1024), true);
        check("**", &"a".repeat(1025), false);
    }

    /// As a recursion says it, which takes a lifetime on hostile patterns.
    fn plain(pattern: &[char], name: &[char]) -> bool {
        match pattern {
            [] => name.is_empty(),
            ['*', '*', ..] => {
                let rest = &pattern[pattern.iter().take_while(|c| **c == '*').count()..];
                (0..=name.len()).any(|n| plain(rest, &name[n..]))
            }
            ['*', rest @ ..] => {
                (0..=name.len()).take_while(|n| !name[..*n].contains(&'/')).any(|n| plain(rest, &name[n..]))
            }
            ['?', rest @ ..] => name.first().is_some_and(|c| *c != '/') && plain(rest, &name[1..]),
            [c, rest @ ..] => name.first() == Some(c) && plain(rest, &name[1..]),
        }
    }

    proptest! {
        #[test]
        fn it_fits_as_the_recursion_says(pattern in "[ab/*?]{0,9}", name in "[ab/]{0,9}") {
            let chars = |text: &str| text.chars().collect::<Vec<_>>();
            prop_assert_eq!(fits(&pattern, &name, false), plain(&chars(&pattern), &chars(&name)));
        }
    }
}
