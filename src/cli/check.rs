//! `dayfly check`: would the daemon start with this configuration, and what would it go by?

use super::fit::{Size, TooLarge};
use super::resolved::unresolved;
use crate::config::{Config, Loaded};
use crate::image::alike::told;
use crate::image::store::{Image, ImageError, ImageStore};
use crate::job;
use std::io::{self, Write};
use std::path::Path;

/// A class's image is here, and not what the class wants. Exit code 78.
#[derive(Debug, thiserror::Error)]
#[error("take jobs of class `{class}`")]
pub(super) struct UnfitImage {
    class: String,
    #[source]
    source: ImageError,
}

/// Prints each value with its source, then the warnings; errors say all that is wrong.
pub(super) fn check(config: &Path, json: bool) -> anyhow::Result<()> {
    let loaded = Config::load(config)?;
    if !json {
        show(&loaded, &mut io::stdout().lock())?;
    }
    loaded.check_for_running()?;
    alike(&loaded.config)?;
    networks(&loaded.config)?;
    // Of this host: a file may be checked elsewhere than where it is for.
    let never = Size::of_host(&loaded.config).map(|size| size.too_large(&loaded.config)).unwrap_or_default();
    let unresolved = unresolved(&loaded.config);
    if json {
        return Ok(super::print(&format!(
            "{}\n",
            serde_json::to_string_pretty(&facts(&loaded, &never, &unresolved))?
        ))?);
    }
    conclude(&never, &unresolved, &mut io::stdout().lock())?;
    Ok(())
}

/// Whether the images that are here, of each runner's jobs, are such that GitLab can be told of all of them at once. One
/// that is not here is no fault of the file's: it may be checked elsewhere than where it is for.
fn alike(config: &Config) -> anyhow::Result<()> {
    let store = ImageStore::new(&config.image_directory);
    for runner in &config.runner {
        let images: Vec<Image> = config.images_of(runner).filter_map(|(_, name)| store.get(&name).ok()).collect();
        let tested: Vec<Image> = images.into_iter().filter(|image| image.manifest.info.is_some()).collect();
        if let (false, Err(reason)) = (tested.is_empty(), told(&tested)) {
            anyhow::bail!("runner `{}`: {reason}", runner.name);
        }
    }
    Ok(())
}

/// Whether the images of a class that wants machines without a network card know such machines. One that is not here is
/// no mistake of the configuration's.
fn networks(config: &Config) -> Result<(), UnfitImage> {
    let store = ImageStore::new(&config.image_directory);
    for class in &config.class {
        for image in class.all_images().filter_map(|name| store.get(name).ok()) {
            if let Err(error) = job::network_of(class, &image) {
                return Err(UnfitImage { class: class.name.clone(), source: error });
            }
        }
    }
    Ok(())
}

/// What is shown, for programs.
fn facts(loaded: &Loaded, never: &[TooLarge], unresolved: &[String]) -> serde_json::Value {
    let values = loaded.resolved().into_iter().map(|(key, value, origin)| {
        // What stands for no value is no JSON, and stays a text.
        let value = serde_json::from_str::<serde_json::Value>(&value).unwrap_or_else(|_| value.into());
        serde_json::json!({ "key": key, "value": value, "source": origin.to_string() })
    });
    let never = never.iter().map(|found| format!("{}: it can never run on this host; {}", found.what, found.remedy));
    let warnings: Vec<String> =
        loaded.warnings.iter().map(ToString::to_string).chain(never).chain(unresolved.to_vec()).collect();
    serde_json::json!({ "values": values.collect::<Vec<_>>(), "warnings": warnings })
}

fn conclude(never: &[TooLarge], unresolved: &[String], out: &mut impl Write) -> io::Result<()> {
    for found in never {
        writeln!(out, "warning: {}: it can never run on this host; {}", found.what, found.remedy)?;
    }
    for found in unresolved {
        writeln!(out, "warning: {found}")?;
    }
    let mut classes: Vec<&str> = never.iter().map(|found| found.class.as_str()).collect();
    classes.dedup();
    match classes[..] {
        [] => writeln!(out, "the configuration is good"),
        _ => {
            writeln!(out, "the configuration is good, but no job of class {} can run on this host", classes.join(", "))
        }
    }
}

fn show(loaded: &Loaded, out: &mut impl Write) -> io::Result<()> {
    let values = loaded.resolved();
    let width = values.iter().map(|(key, ..)| key.len()).max().unwrap_or(0);
    for (key, value, origin) in values {
        writeln!(out, "{key:<width$} = {value}  ({origin})")?;
    }
    for warning in &loaded.warnings {
        writeln!(out, "warning: {warning}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// U22: a class that is larger than the host is no good configuration without a word.
    #[test]
    fn what_can_never_run_is_said_last() {
        let said = |never: &[TooLarge]| {
            let mut out = Vec::new();
            conclude(never, &["a name".to_owned()], &mut out).unwrap();
            String::from_utf8(out).unwrap()
        };
        assert_eq!(said(&[]), "warning: a name\nthe configuration is good\n");
        let found = TooLarge { class: "big".into(), what: "class `big` has 9 CPUs".into(), remedy: "lower it".into() };
        let text = said(&[found.clone(), found]);
        assert!(text.contains("warning: class `big` has 9 CPUs: it can never run on this host; lower it"), "{text}");
        assert!(text.ends_with("but no job of class big can run on this host\n"), "{text}");
    }

    #[test]
    fn values_show_their_sources_and_no_token() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("token"), "glrt-secret").unwrap();
        let text = "[[class]]\nname = \"s\"\nimage = \"i\"\n[[runner]]\nname = \"ci\"\nurl = \"http://g.example\"\nallow_insecure_http = true\ntoken_file = \"token\"\nclass = \"s\"\n";
        let file = dir.path().join("config.toml");
        let loaded =
            Config::assemble(Some((file.clone(), text.into())), [("DAYFLY_CONCURRENT".into(), "4".into())]).unwrap();
        let facts = facts(&loaded, &[], &[]);
        let values = facts["values"].as_array().unwrap();
        assert!(values.iter().any(|value| value["key"] == "concurrent" && value["value"] == 4), "{facts}");
        assert!(values.iter().any(|value| value["key"] == "limits.keepalive" && value["value"] == "10s"), "{facts}");
        assert!(facts["warnings"][0].as_str().unwrap().contains("http"), "{facts}");
        let mut out = Vec::new();
        show(&loaded, &mut out).unwrap();
        let out = String::from_utf8(out).unwrap();
        let line = |start: &str| {
            out.lines().find(|line| line.starts_with(start)).unwrap_or_else(|| panic!("{start}: {out}")).to_owned()
        };
        assert!(line("concurrent ").ends_with(" = 4  (environment variable DAYFLY_CONCURRENT)"));
        assert!(line("limits.keepalive ").ends_with(" = \"10s\"  (default)"));
        assert!(line("runner.0.class ").ends_with(&format!(" = \"s\"  ({}, line 9)", file.display())));
        assert!(line("warning: ").contains("http"));
        assert!(!out.contains("glrt-secret"));
    }
}
