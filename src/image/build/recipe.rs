//! The recipes of `vm-images/`, carried inside the binary: an installed dayfly builds the same
//! images as a source tree.

use super::BuildError;
use figment::Figment;
use figment::providers::{Format as _, Toml};
use serde::Deserialize;

/// A recipe: its inputs, and the files that go into the image.
#[derive(Clone, Debug)]
pub(super) struct Recipe {
    /// `recipe.toml`.
    pub(super) inputs: Inputs,
    /// The script that turns a minimal system into the guest.
    pub(super) customize: &'static str,
    /// Files of its own: path below the root, and text.
    pub(super) files: &'static [(&'static str, &'static str)],
}

/// `recipe.toml`, as its comments explain it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Inputs {
    pub(super) suite: String,
    pub(super) architecture: String,
    pub(super) executor: String,
    /// What the guest needs.
    pub(super) packages: Vec<String>,
    /// What jobs expect to find.
    pub(super) tools: Vec<String>,
    pub(super) kernel_package: String,
    pub(super) modules: Vec<String>,
    pub(super) cmdline: String,
    pub(super) disk_gib: u64,
}

/// Names of all recipes.
pub const RECIPES: [&str; 1] = ["debian-12-shell"];

impl Recipe {
    /// The recipe of this name.
    pub(super) fn find(name: &str) -> Result<Self, BuildError> {
        match name {
            "debian-12-shell" => Ok(Self {
                inputs: Inputs::parse(include_str!("../../../vm-images/debian-12-shell/recipe.toml"))?,
                customize: include_str!("../../../vm-images/debian-12-shell/customize.sh"),
                files: &[
                    (
                        "etc/systemd/system/dayfly-guest.service",
                        include_str!("../../../vm-images/debian-12-shell/dayfly-guest.service"),
                    ),
                    (
                        "etc/systemd/system/dayfly.target",
                        include_str!("../../../vm-images/debian-12-shell/dayfly.target"),
                    ),
                    (
                        "etc/systemd/system.conf.d/dayfly.conf",
                        include_str!("../../../vm-images/debian-12-shell/limits.conf"),
                    ),
                ],
            }),
            _ => Err(BuildError::Recipe(name.to_owned())),
        }
    }
}

impl Inputs {
    fn parse(text: &str) -> Result<Self, BuildError> {
        let inputs: Self =
            Figment::from(Toml::string(text)).extract().map_err(|error| BuildError::RecipeText(Box::new(error)))?;
        if let Some(name) = inputs.all_packages().find(|name| !is_package_name(name)) {
            return Err(BuildError::PackageName(name.to_owned()));
        }
        Ok(inputs)
    }

    /// All that is to be installed, as mmdebstrap's `--include` takes it.
    pub(super) fn all_packages(&self) -> impl Iterator<Item = &str> {
        self.packages.iter().chain(&self.tools).map(String::as_str)
    }
}

/// As Debian's policy has it (section 5.6.1). mmdebstrap takes more for a list of packages: commas, blanks, apt's
/// patterns, `/release`; what is no package of the suite it refuses by itself, and names it.
fn is_package_name(name: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    name.len() >= 2 && name.starts_with(is_plain) && name.chars().all(|c| is_plain(c) || "+-.".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_recipe_can_be_read_and_is_whole() {
        for name in RECIPES {
            let recipe = Recipe::find(name).unwrap();
            assert!(recipe.inputs.cmdline.contains("systemd.unit=dayfly.target"), "{name}");
            assert!(
                recipe
                    .files
                    .iter()
                    .any(|(path, text)| path.ends_with("dayfly-guest.service") && text.contains("Environment=HOME=")),
                "{name}"
            );
            assert!(recipe.customize.starts_with("#!/bin/sh"), "{name}");
            for module in ["virtio_blk", "virtio_net", "virtio_console", "virtio-rng", "pvpanic-mmio"] {
                assert!(recipe.inputs.modules.iter().any(|listed| listed == module), "{name}: a guest needs {module}");
            }
        }
    }

    /// U49: what a CI image is expected to have is asked for, by names of packages and nothing else.
    #[test]
    fn tools_are_packages_and_the_expected_ones_are_among_them() {
        let recipe = Recipe::find("debian-12-shell").unwrap();
        let all: Vec<&str> = recipe.inputs.all_packages().collect();
        for tool in ["procps", "make", "gcc", "libc6-dev", "python3", "jq", "sudo", "git", "curl"] {
            assert!(all.contains(&tool), "{tool}");
        }
        let text = include_str!("../../../vm-images/debian-12-shell/recipe.toml");
        for bad in ["jq zip", "jq,zip", "jq/sid", "?essential", "Jq", "-o", "jq=1.6", "j", ""] {
            let error = Inputs::parse(&text.replace("\"jq\"", &format!("\"{bad}\""))).unwrap_err().to_string();
            assert_eq!(error, format!("read the recipe: `{bad}` is no name of a Debian package"));
        }
        for good in ["g++", "libc6-dev", "python3.11", "0ad"] {
            assert!(is_package_name(good), "{good}");
        }
        let without = text.replace("tools = [", "tolls = [");
        assert!(matches!(Inputs::parse(&without), Err(BuildError::RecipeText(_))));
    }

    #[test]
    fn an_unknown_recipe_names_those_that_exist() {
        let error = Recipe::find("plan9").unwrap_err().to_string();
        assert_eq!(error, "no recipe `plan9`; there are: debian-12-shell");
    }
}
