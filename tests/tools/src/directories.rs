//! A fake host whose directories exist: for tools whose files are real ones. Everything else is the fake's.

use dayfly::BoxFuture;
use dayfly::vm::paths::Paths;
use dayfly::vm::{Host, Stream, VmError, VmName};
use dayfly_doubles::fake::FakeHypervisor;
use std::io;
use std::path::Path;
use std::sync::Arc;

/// The fake hypervisor, and directories that exist.
#[derive(Clone, Debug)]
pub struct RealDirectories(pub FakeHypervisor);

impl RealDirectories {
    /// The host of this world.
    #[must_use]
    pub fn host(self) -> Host {
        Host::new(Arc::new(self.0.clone()), Arc::new(self))
    }
}

impl Paths for RealDirectories {
    // The daemon looks for free disk in these directories, and its files here may be real ones.
    fn make_passable<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(tokio::fs::create_dir_all(dir))
    }

    fn make_private<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(tokio::fs::create_dir_all(dir))
    }

    fn make_overlay<'a>(
        &'a self,
        overlay: &'a Path,
        base: &'a Path,
        disk_gib: u64,
    ) -> BoxFuture<'a, Result<(), VmError>> {
        self.0.make_overlay(overlay, base, disk_gib)
    }

    fn unlink<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        self.0.unlink(path)
    }

    fn unlink_all_of<'a>(&'a self, dir: &'a Path, vm: &'a VmName) -> BoxFuture<'a, io::Result<()>> {
        self.0.unlink_all_of(dir, vm)
    }

    fn names<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, io::Result<Vec<String>>> {
        self.0.names(dir)
    }

    fn open_socket<'a>(&'a self, socket: &'a Path) -> BoxFuture<'a, io::Result<Box<dyn Stream>>> {
        self.0.open_socket(socket)
    }
}
