//! The comments of a source file, line by line: `//` and `/* */` of Rust, `#` of scripts and settings.

/// A line's number and its comment.
pub(crate) type Comment = (usize, String);

/// Those of Rust source. What stands in a literal is no comment.
pub(crate) fn of_rust(text: &str) -> Vec<Comment> {
    let mut found = Vec::new();
    let (mut rest, mut line, mut in_name) = (text, 1, false);
    while let Some(first) = rest.chars().next() {
        let length = if rest.starts_with("//") {
            let length = rest.find('\n').unwrap_or(rest.len());
            found.push((line, rest[..length].trim_start_matches(['/', '!']).to_owned()));
            length
        } else if rest.starts_with("/*") {
            let length = block(rest);
            found.extend(rest[..length].lines().enumerate().map(|(at, text)| (line + at, text.to_owned())));
            length
        } else if first == '"' {
            string(rest)
        } else if first == '\'' {
            character(rest)
        } else if !in_name && let Some(length) = raw_string(rest) {
            length
        } else {
            first.len_utf8()
        };
        in_name = first.is_alphanumeric() || first == '_';
        line += rest[..length].matches('\n').count();
        rest = &rest[length..];
    }
    found
}

/// Those of a script or of settings: from a `#` that opens a word, and stands in no quotes of its line.
pub(crate) fn of_hash(text: &str) -> Vec<Comment> {
    let comment = |line: &str| {
        let opens = |at: usize| {
            let before = &line[..at];
            let quoted = |quote: char| before.matches(quote).count() % 2 == 1;
            before.chars().next_back().is_none_or(char::is_whitespace) && !quoted('"') && !quoted('\'')
        };
        line.match_indices('#').map(|(at, _)| at).find(|at| opens(*at)).map(|at| line[at + 1..].to_owned())
    };
    text.lines().enumerate().filter_map(|(at, line)| Some((at + 1, comment(line)?))).collect()
}

/// The length of the block comment that opens here; blocks nest.
fn block(text: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while let Some(found) = text[at..].find(['/', '*']) {
        at += found;
        let (step, length) = match text.get(at..at + 2) {
            Some("/*") => (1, 2),
            Some("*/") => (-1, 2),
            _ => (0, 1),
        };
        depth += step;
        at += length;
        if depth == 0 {
            return at;
        }
    }
    text.len()
}

/// The length of the literal that opens here.
fn string(text: &str) -> usize {
    let mut escaped = false;
    let end = text[1..].find(|c: char| {
        let ends = c == '"' && !escaped;
        escaped = c == '\\' && !escaped;
        ends
    });
    end.map_or(text.len(), |end| end + 2)
}

/// The length of a raw literal, `r"…"`, `r#"…"#`, if one opens here.
fn raw_string(text: &str) -> Option<usize> {
    let inside = text.strip_prefix('r')?;
    let hashes = inside.len() - inside.trim_start_matches('#').len();
    let body = inside[hashes..].strip_prefix('"')?;
    let close = format!("\"{}", &inside[..hashes]);
    Some(body.find(&close).map_or(text.len(), |end| 1 + hashes + 1 + end + close.len()))
}

/// The length of the character that opens here, or of the quote of a lifetime.
fn character(text: &str) -> usize {
    let mut chars = text.char_indices().skip(1);
    match (chars.next(), chars.next()) {
        // What is escaped may be the quote itself.
        (Some((_, '\\')), Some((at, c))) => {
            let after = at + c.len_utf8();
            text[after..].find('\'').map_or(text.len(), |end| after + end + 1)
        }
        (Some(_), Some((at, '\''))) => at + 1,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_comments_of_rust_are_found() {
        let text = r##"//! One
fn a<'a>(_: &'a str) -> char { '"' } // two
/// three
const B: &str = "// no \" // no";
const C: &str = r#"// " no"#; // four
const D: (char, char) = ('\'', '\\'); /* five /* six */
seven */ fn e() {} // eight
const F: &str = "over
// no
lines"; // nine
let r = 1; //"##;
        let found = of_rust(text);
        let found: Vec<(usize, &str)> = found.iter().map(|(line, text)| (*line, text.trim())).collect();
        let expected = [
            (1, "One"),
            (2, "two"),
            (3, "three"),
            (5, "four"),
            (6, "/* five /* six */"),
            (7, "seven */"),
            (7, "eight"),
            (10, "nine"),
            (11, ""),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn only_comments_of_scripts_are_found() {
        let text = "#!/bin/sh\n# One\na=${b#c} # two\necho \"# no\"\necho 'it # no' # three\n";
        let found = of_hash(text);
        let found: Vec<(usize, &str)> = found.iter().map(|(line, text)| (*line, text.trim())).collect();
        assert_eq!(found, [(1, "!/bin/sh"), (2, "One"), (3, "two"), (5, "three")]);
    }
}
