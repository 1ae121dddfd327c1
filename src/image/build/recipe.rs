//! Which recipe? Finds it, reads it, and puts it together with those that it extends.
//!
//! A recipe is a directory: `recipe.toml`, and, if they are wanted, `customize.sh` and overlays (directories of files). Those
//! of `vm-images/` are carried inside the binary, so an installed dayfly builds the same images as a source tree; a
//! directory of the operator's own comes before them. `vm-images/README.md` is the reference.

mod carried;
mod files;

pub(super) use files::{Overlay, write_text};

use carried::{CARRIED, CUSTOMIZE, SEAL, SHARED_FILES};

use super::{BuildError, file_error};
use crate::image::gpt;
use crate::image::manifest::{BootKind, ExecutorKind};
use crate::image::store::valid;
use figment::Figment;
use figment::providers::{Format as _, Toml};
use serde::Deserialize;
use std::collections::BTreeSet;
use std::io;
use std::path::{Component, Path, PathBuf};

/// Where operators put recipes, and where the package puts those of this dayfly for them to read and copy; the first that
/// has a name has it.
pub const RECIPE_DIRECTORIES: [&str; 2] = ["/etc/dayfly/recipes", "/usr/share/dayfly/recipes"];

const RECIPE_FILE: &str = "recipe.toml";
const CUSTOMIZE_FILE: &str = "customize.sh";

/// Bytes of a recipe.toml or a script at most.
const TEXT_BYTES_MAX: u64 = 1024 * 1024;

/// With one of these an image has a Docker: Debian's, and Docker's own.
const DOCKER_PACKAGES: [&str; 2] = ["docker.io", "docker-ce"];

/// A recipe that extends another that extends another: so long a chain is a mistake.
const CHAIN_MAX: usize = 8;

/// A recipe: its inputs, and what goes into the image.
#[derive(Clone, Debug)]
pub(super) struct Recipe {
    /// `recipe.toml`, with what it extends.
    pub(super) inputs: Inputs,
    /// The scripts that turn a minimal system into the guest, in their order.
    pub(super) scripts: Vec<String>,
    /// Files of ours: path below the root, and text.
    pub(super) files: &'static [(&'static str, &'static str)],
    /// Files of the recipes, in their order; a later one is put over an earlier one.
    pub(super) overlays: Vec<Overlay>,
}

/// The whole of what a recipe asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Inputs {
    pub(super) suite: String,
    pub(super) architecture: String,
    /// Who loads the kernel.
    pub(super) boot: BootKind,
    pub(super) executor: ExecutorKind,
    /// What the guest needs.
    pub(super) packages: Vec<String>,
    /// What jobs expect to find.
    pub(super) tools: Vec<String>,
    pub(super) kernel_package: String,
    pub(super) modules: Vec<String>,
    /// Modules that the running guest may load, without what they depend on.
    pub(super) guest_modules: Vec<String>,
    pub(super) cmdline: String,
    pub(super) disk_gib: u64,
    /// Whether all modules of the kernel are inside, to be loaded when something asks for them.
    pub(super) all_modules: bool,
    /// Whether there is a Docker.
    pub(super) has_docker: bool,
    /// The container image of a job that names none.
    pub(super) container_image: Option<String>,
    /// What Docker has when the machine starts.
    pub(super) preload: Vec<Preload>,
}

/// Container images for the image's Docker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Preload {
    /// What is in an archive.
    Archive(PathBuf),
    /// By its name, from its registry.
    Pull(String),
}

/// `recipe.toml`, as it is written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Written {
    extends: Option<String>,
    suite: Option<String>,
    architecture: Option<String>,
    boot: Option<BootKind>,
    executor: Option<ExecutorKind>,
    packages: Vec<String>,
    tools: Vec<String>,
    without: Vec<String>,
    kernel_package: Option<String>,
    modules: Vec<String>,
    guest_modules: Vec<String>,
    cmdline: Option<String>,
    add_cmdline: Option<String>,
    disk_gib: Option<u64>,
    overlays: Vec<String>,
    all_modules: Option<bool>,
    container_image: Option<String>,
    preload: Vec<String>,
}

/// Where recipes are looked for.
#[derive(Clone, Debug)]
pub struct Recipes(Vec<PathBuf>);

/// A recipe's name, and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its name.
    pub name: String,
    /// Its directory; none: inside this binary.
    pub directory: Option<PathBuf>,
}

impl Default for Recipes {
    fn default() -> Self {
        Self(RECIPE_DIRECTORIES.map(PathBuf::from).to_vec())
    }
}

impl Recipes {
    /// Those of `directory` before all others.
    #[must_use]
    pub fn before_others(mut self, directory: Option<PathBuf>) -> Self {
        self.0.splice(..0, directory);
        self
    }

    /// All that can be built, by name. What cannot be read is left out here, and named by who builds it.
    #[must_use]
    pub fn all(&self) -> Vec<Found> {
        let mut names: BTreeSet<String> = CARRIED.iter().map(|carried| carried.name.to_owned()).collect();
        for directory in &self.0 {
            let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
            names.extend(entries.filter_map(|entry| entry.file_name().into_string().ok()));
        }
        let found = names.into_iter().filter(|name| valid(name).is_ok()).filter_map(|name| {
            let place = self.place(&name, 0)?;
            let directory = self.0.get(place).map(|directory| directory.join(&name));
            Some(Found { name, directory })
        });
        found.collect()
    }

    /// The first place from `from` on that has this recipe: one of the directories, or behind them the binary.
    fn place(&self, name: &str, from: usize) -> Option<usize> {
        let has = |directory: &PathBuf| directory.join(name).join(RECIPE_FILE).symlink_metadata().is_ok();
        let carried = CARRIED.iter().any(|carried| carried.name == name);
        let found = self.0.iter().skip(from).position(has).map(|at| at + from);
        found.or_else(|| (carried && from <= self.0.len()).then_some(self.0.len()))
    }

    /// Whether there is a recipe of this name, and nothing is wrong with it: asked before anything is looked for that only
    /// a build needs.
    ///
    /// # Errors
    /// [`BuildError`]; it names the file that is wrong.
    pub fn check(&self, name: &str) -> Result<(), BuildError> {
        self.find(name).map(drop)
    }

    /// Whether this recipe's image has a Docker, for which the runner wants its helper image.
    ///
    /// # Errors
    /// As [`Recipes::check`].
    pub fn has_docker(&self, name: &str) -> Result<bool, BuildError> {
        self.find(name).map(|recipe| recipe.inputs.has_docker)
    }

    /// The recipe of this name, put together.
    ///
    /// # Errors
    /// [`BuildError`]; it names the file that is wrong.
    pub(super) fn find(&self, name: &str) -> Result<Recipe, BuildError> {
        let mut chain = Vec::new();
        let (mut wanted, mut from) = (name.to_owned(), 0);
        loop {
            valid(&wanted)?;
            let place = self.place(&wanted, from).ok_or_else(|| self.missing(&wanted, chain.last()))?;
            let link = self.read(&wanted, place)?;
            let extends = link.written.extends.clone();
            chain.push(link);
            let Some(parent) = extends else { break };
            // A recipe may have the name of the one that it extends: that is the next one of this name.
            from = if parent == wanted { place + 1 } else { 0 };
            let again = from == 0 && chain.iter().any(|link| link.name == parent);
            if again || chain.len() == CHAIN_MAX {
                let names = chain.iter().map(|link| link.name.as_str()).chain([parent.as_str()]);
                return Err(BuildError::RecipeCircle(names.collect::<Vec<_>>().join(" extends ")));
            }
            wanted = parent;
        }
        chain.reverse();
        put_together(name, &chain)
    }

    fn missing(&self, name: &str, extended_by: Option<&Link>) -> BuildError {
        let there_are = self.all().into_iter().map(|found| found.name).collect::<Vec<_>>().join(", ");
        let extended_by = extended_by.map_or(String::new(), |link| format!(", which `{}` extends", link.name));
        BuildError::Recipe { name: name.to_owned(), extended_by, there_are }
    }

    fn read(&self, name: &str, place: usize) -> Result<Link, BuildError> {
        let Some(directory) = self.0.get(place).map(|directory| directory.join(name)) else {
            let carried = CARRIED.iter().find(|carried| carried.name == name);
            let written = Written::parse(carried.map_or("", |carried| carried.text), Path::new(name))?;
            let customize = carried.and_then(|carried| carried.customize).map(str::to_owned);
            let overlays = carried.map(|carried| Overlay::Carried(carried.files)).into_iter().collect();
            return Ok(Link { name: name.to_owned(), written, customize, overlays, preload: Vec::new() });
        };
        let path = directory.join(RECIPE_FILE);
        let text = files::text(&path, TEXT_BYTES_MAX).map_err(file_error("read", &path))?;
        let written = Written::parse(&text, &path)?;
        let path = directory.join(CUSTOMIZE_FILE);
        let customize = match files::text(&path, TEXT_BYTES_MAX) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(file_error("read", &path)(error)),
        };
        let overlays: Result<_, _> = written.overlays.iter().map(|overlay| Overlay::of(&directory, overlay)).collect();
        let preload: Result<_, _> = written.preload.iter().map(|text| Preload::of(&directory, text)).collect();
        Ok(Link { name: name.to_owned(), written, customize, overlays: overlays?, preload: preload? })
    }
}

/// One recipe of a chain.
struct Link {
    name: String,
    written: Written,
    customize: Option<String>,
    overlays: Vec<Overlay>,
    preload: Vec<Preload>,
}

/// The one that extends nothing is the first.
fn put_together(name: &str, chain: &[Link]) -> Result<Recipe, BuildError> {
    let last = |of: fn(&Written) -> Option<String>, key: &'static str| {
        let found = chain.iter().rev().find_map(|link| of(&link.written));
        found.ok_or_else(|| BuildError::RecipeKey { name: name.to_owned(), key })
    };
    let (mut packages, mut tools, mut modules, mut guest_modules) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for Link { name, written, .. } in chain {
        for unwanted in &written.without {
            let before = packages.len() + tools.len();
            packages.retain(|package| package != unwanted);
            tools.retain(|tool| tool != unwanted);
            if packages.len() + tools.len() == before {
                return Err(BuildError::RecipeWithout { name: name.clone(), package: unwanted.clone() });
            }
        }
        for (all, more) in [
            (&mut packages, &written.packages),
            (&mut tools, &written.tools),
            (&mut modules, &written.modules),
            (&mut guest_modules, &written.guest_modules),
        ] {
            for one in more {
                if !all.contains(one) {
                    all.push(one.clone());
                }
            }
        }
    }
    let executor = chain.iter().rev().find_map(|link| link.written.executor);
    let suite = last(|written| written.suite.clone(), "suite")?;
    let mut cmdline = last(|written| written.cmdline.clone(), "cmdline")?;
    // Those of before the last `cmdline` are in it, or were not wanted.
    let from = chain.iter().rposition(|link| link.written.cmdline.is_some()).unwrap_or_default();
    for words in chain.iter().skip(from).filter_map(|link| link.written.add_cmdline.as_deref()) {
        cmdline = format!("{cmdline} {words}");
    }
    let preload: Vec<Preload> = chain.iter().flat_map(|link| link.preload.clone()).collect();
    let executor = executor.ok_or_else(|| BuildError::RecipeKey { name: name.to_owned(), key: "executor" })?;
    let has_docker = packages.iter().any(|package| DOCKER_PACKAGES.contains(&package.as_str()));
    if !has_docker && (executor == ExecutorKind::Docker || !preload.is_empty()) {
        return Err(BuildError::RecipeDocker(name.to_owned()));
    }
    let boot = chain.iter().rev().find_map(|link| link.written.boot).unwrap_or(BootKind::Direct);
    if boot == BootKind::Disk && !preload.is_empty() {
        return Err(BuildError::RecipePreload(name.to_owned()));
    }
    let disk_gib = chain.iter().rev().find_map(|link| link.written.disk_gib);
    let inputs = Inputs {
        suite,
        architecture: last(|written| written.architecture.clone(), "architecture")?,
        boot,
        executor,
        packages,
        tools,
        kernel_package: last(|written| written.kernel_package.clone(), "kernel_package")?,
        modules,
        guest_modules,
        cmdline,
        disk_gib: disk_gib.ok_or_else(|| BuildError::RecipeKey { name: name.to_owned(), key: "disk_gib" })?,
        all_modules: chain.iter().rev().find_map(|link| link.written.all_modules).unwrap_or_default(),
        has_docker,
        container_image: chain.iter().rev().find_map(|link| link.written.container_image.clone()),
        preload,
    };
    let own = chain.iter().filter_map(|link| link.customize.clone());
    Ok(Recipe {
        inputs,
        scripts: [CUSTOMIZE.to_owned()].into_iter().chain(own).chain([SEAL.to_owned()]).collect(),
        files: &SHARED_FILES,
        overlays: chain.iter().flat_map(|link| link.overlays.clone()).collect(),
    })
}

impl Written {
    fn parse(text: &str, path: &Path) -> Result<Self, BuildError> {
        let path = || path.to_owned();
        let written: Self = Figment::from(Toml::string(text))
            .extract()
            .map_err(|error| BuildError::RecipeText { path: path(), source: Box::new(error) })?;
        let all = written.packages.iter().chain(&written.tools).chain(&written.without).chain(&written.kernel_package);
        if let Some(name) = all.into_iter().find(|name| !is_package_name(name)) {
            return Err(BuildError::RecipeValue {
                path: path(),
                why: format!("`{name}` is no name of a Debian package"),
            });
        }
        if let Some(name) = written.modules.iter().chain(&written.guest_modules).find(|name| !is_module_name(name)) {
            let why = format!("`{}` is no name of a kernel module", name.escape_debug());
            return Err(BuildError::RecipeValue { path: path(), why });
        }
        if let Some(suite) = written.suite.as_deref().filter(|suite| !is_suite(suite)) {
            return Err(BuildError::RecipeValue { path: path(), why: format!("`{suite}` is no suite of Debian's") });
        }
        if let Some(size) = written.disk_gib.filter(|size| !(1..=1024).contains(size)) {
            return Err(BuildError::RecipeValue {
                path: path(),
                why: format!("disk_gib = {size} is not within 1 to 1024"),
            });
        }
        for (key, line) in [("cmdline", &written.cmdline), ("add_cmdline", &written.add_cmdline)] {
            if line.as_deref().is_some_and(|line| line.contains(char::is_control) || line.len() > 1024) {
                let why = format!("{key} is longer than 1024 bytes, or has control characters");
                return Err(BuildError::RecipeValue { path: path(), why });
            }
        }
        if let Some(image) = written.container_image.as_deref().filter(|image| !is_reference(image)) {
            let why = format!("container_image `{}` is no name of a container image", image.escape_debug());
            return Err(BuildError::RecipeValue { path: path(), why });
        }
        Ok(written)
    }
}

impl Inputs {
    /// All that is to be installed, as mmdebstrap's `--include` takes it.
    pub(super) fn all_packages(&self) -> impl Iterator<Item = &str> {
        // A disk with a boot loader has its kernel inside.
        let kernel = (self.boot == BootKind::Disk).then_some(&self.kernel_package);
        self.packages.iter().chain(&self.tools).chain(kernel).map(String::as_str)
    }

    /// Where the root file system begins on the disk, in bytes.
    pub(super) fn root_offset(&self) -> u64 {
        match self.boot {
            BootKind::Direct => 0,
            BootKind::Disk => gpt::ROOT_START * gpt::SECTOR,
        }
    }
}

impl Preload {
    /// `./NAME` is a file of the recipe's directory, all else the name of a container image.
    fn of(directory: &Path, text: &str) -> Result<Self, BuildError> {
        let bad = |why: String| BuildError::RecipeValue { path: directory.join(RECIPE_FILE), why };
        let Some(file) = text.strip_prefix("./") else {
            let why = || format!("preload `{}` is no name of a container image, and no ./FILE", text.escape_debug());
            return if is_reference(text) { Ok(Self::Pull(text.to_owned())) } else { Err(bad(why())) };
        };
        let is_within = Path::new(file).components().all(|part| matches!(part, Component::Normal(_)));
        let path = directory.join(file);
        match is_within && path.is_file() {
            true => Ok(Self::Archive(path)),
            false => Err(bad(format!("preload `{}` is no file beside it", text.escape_debug()))),
        }
    }
}

/// The name of a container image (`registry.example:5000/group/name:tag@sha256:…`): no option of a program's, and one word.
fn is_reference(text: &str) -> bool {
    let is_part = |c: char| c.is_ascii_alphanumeric() || "._-/:@".contains(c);
    text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.len() <= 512 && text.chars().all(is_part)
}

/// As Debian's policy has it (section 5.6.1). mmdebstrap takes more for a list of packages: commas, blanks, apt's
/// patterns, `/release`; what is no package of the suite it refuses by itself, and names it.
fn is_package_name(name: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    name.len() >= 2 && name.starts_with(is_plain) && name.chars().all(|c| is_plain(c) || "+-.".contains(c))
}

/// As the kernel has them: never an option of modprobe's, nor a path.
fn is_module_name(name: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric();
    name.starts_with(is_plain) && name.len() <= 64 && name.chars().all(|c| is_plain(c) || "_-".contains(c))
}

/// A code name: `bookworm`, `trixie`. Never an option of mmdebstrap's, nor a path.
fn is_suite(suite: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    suite.starts_with(is_plain) && suite.len() <= 64 && suite.chars().all(|c| is_plain(c) || c == '-')
}

#[cfg(test)]
mod tests;
