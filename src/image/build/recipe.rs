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
    pub(super) packages: Vec<String>,
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
        Figment::from(Toml::string(text)).extract().map_err(|error| BuildError::RecipeText(Box::new(error)))
    }
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

    #[test]
    fn an_unknown_recipe_names_those_that_exist() {
        let error = Recipe::find("plan9").unwrap_err().to_string();
        assert_eq!(error, "no recipe `plan9`; there are: debian-12-shell");
    }
}
