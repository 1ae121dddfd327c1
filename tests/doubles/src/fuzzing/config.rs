//! The operator's configuration: no text of it upsets us, and messages point at what is there.

use crate::pieces::Cuts;
use dayfly::config::{Config, ConfigError, Origin};
use std::path::Path;

const FILE: &str = "/etc/dayfly/config.toml";

/// A file, and after a NUL variables of the environment, one a line. It gives one configuration, the same again, in
/// which every path is absolute, or one clear message that points into the file.
pub fn config(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let (file, environment) = text.split_once('\0').unwrap_or((text, ""));
    let environment: Vec<_> = environment
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (format!("DAYFLY_{name}"), value.to_owned()))
        .take(8)
        .collect();
    let lines = file.bytes().filter(|byte| *byte == b'\n').count() + 1;
    let within = |origin: &Origin| match origin {
        Origin::File(path, line) => assert!(path == Path::new(FILE) && (1..=lines).contains(line), "{origin}"),
        Origin::Environment(name) => assert!(environment.iter().any(|(known, _)| known == name), "{origin}"),
        Origin::Default => {}
    };
    let load = |file: String| Config::assemble(Some((FILE.into(), file)), environment.clone());
    match load(file.to_owned()) {
        Ok(loaded) => {
            // Loading takes longest of all here.
            if Cuts::of(input).number().is_multiple_of(4) {
                let again = load(format!("{file}\n# more\n")).expect("a comment changes nothing");
                assert_eq!(loaded.config, again.config);
            }
            for (_, _, origin) in loaded.resolved() {
                within(&origin);
            }
            let config = &loaded.config;
            for path in [&config.state_directory, &config.runtime_directory, &config.image_directory] {
                assert!(path.is_absolute(), "{}", path.display());
            }
            for runner in &config.runner {
                assert!(runner.token_file.is_absolute() && config.class.iter().any(|class| class.name == runner.class));
                assert!(runner.url.scheme() == "https" || runner.allow_insecure_http, "{}", runner.url);
            }
        }
        Err(ConfigError::Syntax { line, .. }) => assert!((1..=lines).contains(&line)),
        Err(ConfigError::Key(problem)) => within(problem.origin()),
        Err(ConfigError::Invalid(problems)) => {
            assert!(!problems.0.is_empty());
            for problem in &problems.0 {
                within(problem.origin());
            }
            let _ = problems.to_string();
        }
        Err(ConfigError::Read { .. }) => panic!("nothing was read"),
    }
}
