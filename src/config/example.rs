//! `config.example.toml`, the reference of all keys: what `register` begins a new file with, and
//! the test that holds it to the code.

/// The text of `config.example.toml`: it loads as it stands, with one class and no runner.
pub const EXAMPLE: &str = include_str!("../../config.example.toml");

#[cfg(test)]
mod tests {
    use super::EXAMPLE;
    use crate::config::{Class, Config, Runner, Span, UnknownImage};
    use crate::machine_spec::{EnvironmentLine, Start};
    use crate::network::{Choice, EgressChange, EgressConfig, ForwardConfig};
    use crate::rules::Rule;
    use crate::vm::Limits;
    use serde_json::Value;
    use std::collections::BTreeSet;

    fn load(text: &str) -> Config {
        match Config::assemble(Some(("/etc/dayfly/config.toml".into(), text.to_owned())), []) {
            Ok(loaded) => loaded.config,
            Err(error) => panic!("{error}"),
        }
    }

    /// The example with each `#key = …` and `#[[runner]]` in force. Prose has a blank after its `#`.
    fn in_force() -> String {
        let lines = EXAMPLE.lines().map(|line| match line.strip_prefix('#') {
            Some(rest) if rest.starts_with(|c: char| c == '[' || c.is_ascii_lowercase()) => rest,
            _ => line,
        });
        lines.flat_map(|line| [line, "\n"]).collect()
    }

    fn object(value: impl serde::Serialize) -> serde_json::Map<String, Value> {
        match serde_json::to_value(value).unwrap() {
            Value::Object(members) => members,
            other => panic!("{other}"),
        }
    }

    /// A class and a runner with every key set. A new key does not compile until it stands here.
    fn full() -> (Class, Runner) {
        let class = Class {
            name: "n".into(),
            image: "i".into(),
            images: vec!["j".into()],
            unknown_image: UnknownImage::Fail,
            cpus: 1,
            max_cpus: Some(1),
            memory_mib: 1,
            max_memory_mib: Some(1),
            disk_gib: 1,
            max_disk_gib: Some(1),
            run_as_root: true,
            container_image: Some("c".into()),
            docker_socket: true,
            privileged_containers: true,
            allow_standin_runner: true,
            nested: true,
            keep_failed: Some(Span::from_secs(1)),
            keep_failed_projects: vec!["a".into()],
            keep_failed_max: 1,
            start: Start::Cold,
            network: Some(Choice::Relay),
            egress: EgressConfig::default(),
            limits: Limits::default(),
        };
        let runner = Runner {
            name: "n".into(),
            url: "https://a.example".parse().unwrap(),
            token_file: "t".into(),
            class: "n".into(),
            limit: Some(1),
            tls_ca_file: Some("a".into()),
            tls_cert_file: Some("b".into()),
            tls_key_file: Some("c".into()),
            clone_url: Some("https://b.example".parse().unwrap()),
            allow_insecure_http: true,
            direct_download: true,
            poll_interval: Span::from_secs(1),
            output_limit_mib: Some(1),
            environment: vec![EnvironmentLine("A=b".into())],
            pre_get_sources_script: Some("s".into()),
            post_get_sources_script: Some("s".into()),
            pre_build_script: Some("s".into()),
            post_build_script: Some("s".into()),
            feature_flags: [("FF_A".into(), true)].into(),
            custom_build_dir: true,
        };
        (class, runner)
    }

    /// A rule with every key set, though it would not be taken.
    fn rule() -> Rule {
        let list = || vec!["a".to_owned()];
        Rule {
            name: "n".into(),
            runner: list(),
            project: list(),
            group: list(),
            protected: Some(true),
            git_ref: list(),
            user_id: vec![1],
            image: list(),
            container: list(),
            min_cpus: Some(1),
            min_memory_mib: Some(1),
            min_disk_gib: Some(1),
            allow: true,
            deny: Some("d".into()),
            class: Some("c".into()),
            egress: Some(EgressChange::default()),
            dry_run: true,
        }
    }

    #[test]
    fn the_example_as_it_stands_is_the_defaults_and_one_class() {
        let mut config = load(EXAMPLE);
        assert_eq!(config.class.len(), 1);
        assert_eq!(config.class[0].image, "debian-12-shell");
        config.class.clear();
        assert_eq!(config, Config::default());
    }

    #[test]
    fn every_key_stands_in_the_example() {
        let document: toml_edit::DocumentMut = in_force().parse().unwrap();
        let (class, runner) = full();
        let mut known: BTreeSet<String> = BTreeSet::new();
        for (key, value) in object(Config::default()) {
            match value {
                Value::Object(members) => known.extend(members.keys().map(|member| format!("{key}.{member}"))),
                _ => drop(known.insert(key)),
            }
        }
        known.extend(object(class).keys().map(|key| format!("class.{key}")));
        let forward =
            ForwardConfig { name: "n".into(), address: ([127, 0, 0, 1], 1).into(), port: 1, classes: vec!["n".into()] };
        known.extend(object(forward).keys().map(|key| format!("forward.{key}")));
        known.extend(object(rule()).keys().map(|key| format!("rule.{key}")));
        known.extend(object(runner).keys().map(|key| format!("runner.{key}")));
        let mut found: BTreeSet<String> = BTreeSet::new();
        for (key, item) in document.as_table() {
            found.insert(key.to_owned());
            let tables = item.as_table().into_iter().chain(item.as_array_of_tables().into_iter().flatten());
            found.extend(tables.flat_map(|table| table.iter().map(move |(member, _)| format!("{key}.{member}"))));
        }
        let missing: Vec<_> = known.difference(&found).collect();
        assert!(missing.is_empty(), "config.example.toml does not mention {missing:?}");
    }

    #[test]
    fn what_the_example_calls_a_default_is_one() {
        // An unknown key would not load.
        let config = load(&in_force());
        let (shown, defaults) = (object(&config), object(Config::default()));
        for (key, default) in defaults {
            match default {
                // What is not set has no value to be shown.
                Value::Array(_) | Value::Null => {}
                Value::Object(members) => {
                    for (member, default) in members.into_iter().filter(|(_, default)| !default.is_null()) {
                        assert_eq!(shown[&key][&member], default, "{key}.{member}");
                    }
                }
                default => assert_eq!(shown[&key], default, "{key}"),
            }
        }
        let minimal = "[[class]]\nname = \"default\"\nimage = \"debian-12-shell\"\n[[runner]]\nname = \"ci\"\nurl = \"https://gitlab.example.com\"\ntoken_file = \"tokens/ci\"\nclass = \"default\"\n";
        let minimal = load(minimal);
        // What is not set is left out of a serialised runner.
        for (shown, default) in [
            (object(&config.class[0]), object(&minimal.class[0])),
            (object(&config.runner[0]), object(&minimal.runner[0])),
        ] {
            for (key, default) in default {
                assert_eq!(shown[&key], default, "{key}");
            }
        }
    }
}
