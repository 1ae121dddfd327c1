//! What differs between two images?

use super::manifest::Manifest;
use std::collections::BTreeSet;

/// A line for each difference; what only the first has with `-`, what only the other has with `+`.
#[must_use]
pub fn differences_of(one: &Manifest, other: &Manifest) -> Vec<String> {
    let runner = |manifest: &Manifest| format!("{} ({})", manifest.runner.version, manifest.runner.origin);
    let mut lines = Vec::new();
    for (what, one, other) in [
        ("suite", one.build.suite.clone(), other.build.suite.clone()),
        ("kernel", one.build.kernel.clone(), other.build.kernel.clone()),
        ("cmdline", one.cmdline.clone().unwrap_or_default(), other.cmdline.clone().unwrap_or_default()),
        ("executor", one.executor.to_string(), other.executor.to_string()),
        ("runner", runner(one), runner(other)),
        ("contract", one.contract.to_string(), other.contract.to_string()),
    ] {
        if one != other {
            lines.push(format!("{what}: {one} -> {other}"));
        }
    }
    let (one, other) = (&one.build.packages, &other.build.packages);
    let names: BTreeSet<&String> = one.keys().chain(other.keys()).collect();
    lines.extend(names.into_iter().filter_map(|name| match (one.get(name), other.get(name)) {
        (Some(one), Some(other)) => (one != other).then(|| format!("{name}: {one} -> {other}")),
        (Some(one), None) => Some(format!("- {name} {one}")),
        (None, other) => other.map(|other| format!("+ {name} {other}")),
    }));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::manifest::tests::example;

    #[test]
    fn a_difference_is_a_line_that_names_it() {
        let one = example();
        assert_eq!(differences_of(&one, &one), [""; 0]);
        let mut other = one.clone();
        other.build.suite = "debian trixie".into();
        other.runner.version = "20.0.0".into();
        other.build.packages = [("git", "9"), ("zsh", "1")].map(|(name, version)| (name.into(), version.into())).into();
        let mut one = one;
        one.build.suite = "debian bookworm".into();
        one.build.packages = [("git", "8"), ("jq", "2")].map(|(name, version)| (name.into(), version.into())).into();
        let version = &one.runner.version;
        let origin = one.runner.origin;
        assert_eq!(
            differences_of(&one, &other),
            [
                "suite: debian bookworm -> debian trixie",
                &format!("runner: {version} ({origin}) -> 20.0.0 ({origin})"),
                "git: 8 -> 9",
                "- jq 2",
                "+ zsh 1",
            ]
        );
    }
}
