//! Where packages come from: the building host's own sources for the recipe's suite, so that a
//! mirror or proxy that the operator has set up is used here too; else mmdebstrap's default.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

/// The keyring that signs Debian itself, and nobody else's archive.
const KEYRING: &str = "debian-archive-keyring";

/// The sources below `etc_apt` (`/etc/apt`) that are Debian's own for `suite`, as deb822 text; empty:
/// there are none (another distribution or release), and mmdebstrap knows better.
pub(super) fn of_host(etc_apt: &Path, suite: &str) -> String {
    let mut files = vec![etc_apt.join("sources.list")];
    if let Ok(entries) = fs::read_dir(etc_apt.join("sources.list.d")) {
        let mut more: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        more.sort();
        files.extend(more);
    }
    let mut sources = String::new();
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("sources") => stanzas(&text, suite, &mut sources),
            Some("list") => lines(&text, suite, &mut sources),
            _ => {} // apt reads no others
        }
    }
    // Updates alone install nothing.
    let base = sources
        .lines()
        .any(|line| line.strip_prefix("Suites:").is_some_and(|suites| suites.split_whitespace().any(|s| s == suite)));
    if base { sources } else { String::new() }
}

/// Stanzas of sources.list(5)'s deb822 form that are Debian's own.
fn stanzas(text: &str, suite: &str, sources: &mut String) {
    let text: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    for stanza in text.split(|line| line.trim().is_empty()) {
        let field = |name: &str| {
            let value =
                stanza.iter().find_map(|line| line.split_once(':').filter(|(key, _)| key.eq_ignore_ascii_case(name)));
            value.map(|(_, value)| value.trim()).unwrap_or_default()
        };
        let off = ["no", "false", "0"].contains(&field("Enabled").to_ascii_lowercase().as_str());
        let signed = field("Signed-By");
        if !off
            && field("Types").split_whitespace().any(|kind| kind == "deb")
            && (signed.is_empty() || signed.contains(KEYRING))
        {
            source(field("URIs"), field("Suites"), field("Components"), suite, sources);
        }
    }
}

/// Lines of the one-line form, `deb [options] uri suite component…`, that are Debian's own.
fn lines(text: &str, suite: &str, sources: &mut String) {
    for line in text.lines() {
        let Some(rest) = line.trim().strip_prefix("deb ") else { continue };
        let (options, rest) = match rest.trim_start().strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((options, rest)) => (options, rest),
            None => ("", rest),
        };
        if options.contains("signed-by") && !options.contains(KEYRING) {
            continue;
        }
        let mut words = rest.split_whitespace();
        if let (Some(uri), Some(line_suite)) = (words.next(), words.next()) {
            source(uri, line_suite, &words.collect::<Vec<_>>().join(" "), suite, sources);
        }
    }
}

/// Adds one source if it is Debian's own: its suite or that suite's updates, and component main.
fn source(uris: &str, suites: &str, components: &str, suite: &str, sources: &mut String) {
    let ours = [suite.to_owned(), format!("{suite}-updates"), format!("{suite}-security")];
    let suites: Vec<&str> = suites.split_whitespace().collect();
    let all_ours = !suites.is_empty() && suites.iter().all(|suite| ours.iter().any(|our| our == suite));
    if all_ours && components.split_whitespace().any(|component| component == "main") && !uris.is_empty() {
        // A String takes all.
        let _ = write!(sources, "Types: deb\nURIs: {uris}\nSuites: {}\nComponents: main\n\n", suites.join(" "));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: &str = "Types: deb\n# a comment\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\nComponents: main contrib\n\
                       Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\nTypes: deb\nURIs: http://mirror.example/debian-security\n\
                       Suites: bookworm-security\nComponents: main\n";

    fn of(files: &[(&str, &str)]) -> String {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("sources.list.d")).unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        of_host(dir.path(), "bookworm")
    }

    #[test]
    fn the_hosts_own_sources_are_taken_with_nothing_of_others() {
        let expected = "Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\nComponents: main\n\n\
                        Types: deb\nURIs: http://mirror.example/debian-security\nSuites: bookworm-security\nComponents: main\n\n";
        let others = "Types: deb\nURIs: https://vendor.example\nSuites: bookworm\nComponents: main\nSigned-By: /usr/share/keyrings/vendor.gpg\n\n\
                      Types: deb\nURIs: https://docker.example\nSuites: bookworm\nComponents: stable\n\n\
                      Types: deb\nURIs: https://pg.example\nSuites: bookworm-pgdg\nComponents: main\n\n\
                      Types: deb\nEnabled: no\nURIs: https://off.example\nSuites: bookworm\nComponents: main\n\n\
                      Types: deb-src\nURIs: https://src.example\nSuites: bookworm\nComponents: main\n";
        assert_eq!(of(&[("sources.list.d/debian.sources", OWN), ("sources.list.d/others.sources", others)]), expected);
    }

    #[test]
    fn the_one_line_form_is_read_too() {
        let text = "# deb http://no.example bookworm main\ndeb-src http://src.example bookworm main\n\
                    deb [arch=amd64 signed-by=/etc/vendor.gpg] http://vendor.example bookworm main\n\
                    deb [arch=amd64] http://mirror.example/debian bookworm main non-free-firmware\n";
        assert_eq!(
            of(&[("sources.list", text)]),
            "Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm\nComponents: main\n\n"
        );
    }

    #[test]
    fn another_release_leaves_it_to_the_default() {
        assert_eq!(of(&[("sources.list.d/debian.sources", &OWN.replace("bookworm", "trixie"))]), "");
        assert_eq!(of(&[("sources.list", "deb http://mirror.example bookworm-updates main\n")]), "");
        assert_eq!(of_host(Path::new("/no/such/place"), "bookworm"), "");
    }
}
