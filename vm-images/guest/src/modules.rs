//! Kernel modules: which the image has, and how one gets into the kernel with what it depends on.
//!
//! The kernel would load what a rule needs by itself, through `modprobe`: a process for each, 30 ms under TCG.

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::system::{finit_module, uname};
use std::collections::{HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};

/// Modules that are compressed (Debian 13) are unpacked by the kernel: linux/module.h.
const MODULE_INIT_COMPRESSED_FILE: i32 = 4;

/// What a machine without a network card needs, besides what these depend on: the expressions and chains of
/// [`crate::netfilter`]'s rules that are no part of `nf_tables`, and the other end of its queue.
pub const RELAY: [&str; 7] =
    ["nft_chain_nat", "nft_redir", "nft_nat", "nft_fib_ipv4", "nft_reject_ipv4", "nft_queue", "nfnetlink_queue"];

/// Why a module is not in the kernel.
#[derive(Debug, thiserror::Error)]
pub enum ModuleError {
    /// The list of the kernel's modules.
    #[error("read {0}")]
    List(PathBuf, #[source] io::Error),
    /// The image has none of this name.
    #[error("find the kernel's module `{0}` in the image")]
    Missing(String),
    /// The kernel does not take it.
    #[error("load {0}")]
    Load(PathBuf, #[source] Errno),
}

/// The modules of the kernel that runs.
#[derive(Debug)]
pub struct Modules {
    directory: PathBuf,
    /// A module's file and those that it depends on, the last of them first to be loaded. Relative to the directory.
    files: HashMap<String, Vec<String>>,
    /// Names of what is no module in this kernel.
    inside: HashSet<String>,
}

impl Modules {
    /// Reads what there is below `root` (`/`).
    ///
    /// # Errors
    /// [`ModuleError::List`].
    pub fn read(root: &Path) -> Result<Self, ModuleError> {
        let directory = root.join("lib/modules").join(uname().release().to_string_lossy().as_ref());
        Self::of(directory)
    }

    fn of(directory: PathBuf) -> Result<Self, ModuleError> {
        let read = |name: &str| {
            let path = directory.join(name);
            std::fs::read_to_string(&path).map_err(|error| ModuleError::List(path, error))
        };
        // modules.dep(5): `kernel/net/a.ko: kernel/lib/b.ko kernel/lib/c.ko`
        let parse = |line: &str| {
            let (file, needs) = line.split_once(':')?;
            let chain = std::iter::once(file).chain(needs.split_ascii_whitespace()).map(str::to_owned).collect();
            Some((name(file)?, chain))
        };
        let files = read("modules.dep")?.lines().filter_map(parse).collect();
        let inside = read("modules.builtin").unwrap_or_default().lines().filter_map(name).collect();
        Ok(Self { directory, files, inside })
    }

    /// Whether the kernel can have all of these.
    #[must_use]
    pub fn have(&self, names: &[&str]) -> bool {
        names.iter().all(|name| self.inside.contains(*name) || self.files.contains_key(*name))
    }

    /// Loads these with what they depend on. Those that the kernel has already are fine.
    ///
    /// # Errors
    /// [`ModuleError`].
    pub fn load(&self, names: &[&str]) -> Result<(), ModuleError> {
        let mut loaded = HashSet::new();
        for name in names.iter().filter(|name| !self.inside.contains(**name)) {
            let chain = self.files.get(*name).ok_or_else(|| ModuleError::Missing((*name).to_owned()))?;
            for file in chain.iter().rev() {
                if loaded.insert(file) {
                    let file = self.directory.join(file);
                    load_file(&file).map_err(|error| ModuleError::Load(file, error))?;
                }
            }
        }
        Ok(())
    }
}

/// `kernel/net/nft-redir.ko.xz` is `nft_redir`.
fn name(file: &str) -> Option<String> {
    let (name, _) = file.rsplit('/').next()?.split_once(".ko")?;
    Some(name.replace('-', "_"))
}

/// Loads one module. One that is there already is fine.
///
/// # Errors
/// The system's.
pub fn load_file(file: &Path) -> Result<(), Errno> {
    let flags =
        if file.extension().is_some_and(|extension| extension == "ko") { 0 } else { MODULE_INIT_COMPRESSED_FILE };
    let load = || finit_module(openat(CWD, file, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?, c"", flags);
    match load() {
        Ok(()) | Err(Errno::EXIST) => Ok(()), // built in is as good
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_module_comes_with_what_it_depends_on() {
        let dir = tempfile::tempdir().unwrap();
        let list = "kernel/net/nf_tables.ko.xz: kernel/net/nfnetlink.ko.xz kernel/lib/libcrc32c.ko.xz\n\
                    kernel/net/nfnetlink.ko.xz:\nkernel/lib/libcrc32c.ko.xz:\nkernel/net/nft-redir.ko: kernel/net/nf_tables.ko.xz\n";
        fs::write(dir.path().join("modules.dep"), list).unwrap();
        fs::write(dir.path().join("modules.builtin"), "kernel/net/nf_conntrack.ko\n").unwrap();
        let modules = Modules::of(dir.path().into()).unwrap();
        assert!(modules.have(&["nf_tables", "nf_conntrack", "nft_redir"]));
        assert!(!modules.have(&["nf_tables", "nft_nat"]));
        assert!(matches!(modules.load(&["nft_nat"]), Err(ModuleError::Missing(name)) if name == "nft_nat"));
        modules.load(&["nf_conntrack"]).unwrap();
        // The last of its line is the first to be loaded, and is not there.
        let Err(ModuleError::Load(file, Errno::NOENT)) = modules.load(&["nf_tables"]) else { panic!() };
        assert_eq!(file, dir.path().join("kernel/lib/libcrc32c.ko.xz"));
    }

    #[test]
    fn an_image_without_modules_is_one_without() {
        let dir = tempfile::tempdir().unwrap();
        let error = Modules::read(dir.path()).unwrap_err();
        assert!(matches!(error, ModuleError::List(path, _) if path.ends_with("modules.dep")));
    }
}
