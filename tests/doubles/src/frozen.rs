//! Files on a file system that can be frozen: what changes something waits, as under `fsfreeze`, and reads go on.

use bytes::Bytes;
use dayfly::BoxFuture;
use dayfly::files::{Entry, Files};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::watch;

/// Other files, with a switch. Clones share it.
#[derive(Clone)]
pub struct FreezableFiles {
    files: Arc<dyn Files>,
    frozen: watch::Sender<bool>,
    waiting: Arc<AtomicUsize>,
}

/// One call that waits.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl FreezableFiles {
    /// These files, not frozen.
    #[must_use]
    pub fn new(files: Arc<dyn Files>) -> Self {
        Self { files, frozen: watch::Sender::new(false), waiting: Arc::default() }
    }

    /// From now on what changes something waits; `false`: it goes on, and so does all that waits.
    pub fn freeze(&self, frozen: bool) {
        self.frozen.send_replace(frozen);
    }

    /// Calls that wait now.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    async fn thawed(&self) {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let _waiting = Waiting(&self.waiting);
        // The sender is ours.
        let _ = self.frozen.subscribe().wait_for(|frozen| !*frozen).await;
    }
}

impl Files for FreezableFiles {
    fn read<'a>(&'a self, path: &'a Path, bytes_max: u64) -> BoxFuture<'a, io::Result<Vec<u8>>> {
        self.files.read(path, bytes_max)
    }

    fn read_at<'a>(&'a self, path: &'a Path, offset: u64, bytes: usize) -> BoxFuture<'a, io::Result<Vec<u8>>> {
        self.files.read_at(path, offset, bytes)
    }

    fn replace<'a>(&'a self, path: &'a Path, bytes: Vec<u8>) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move {
            self.thawed().await;
            self.files.replace(path, bytes).await
        })
    }

    fn write_at<'a>(&'a self, path: &'a Path, offset: u64, bytes: Bytes) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move {
            self.thawed().await;
            self.files.write_at(path, offset, bytes).await
        })
    }

    fn sync<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move {
            self.thawed().await;
            self.files.sync(path).await
        })
    }

    fn length<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<Option<u64>>> {
        self.files.length(path)
    }

    fn create_dir<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move {
            self.thawed().await;
            self.files.create_dir(path).await
        })
    }

    fn remove<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move {
            self.thawed().await;
            self.files.remove(path).await
        })
    }

    fn rename<'a>(&'a self, from: &'a Path, to: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move {
            self.thawed().await;
            self.files.rename(from, to).await
        })
    }

    fn list<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<Vec<Entry>>> {
        self.files.list(path)
    }

    fn free_bytes<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<u64>> {
        self.files.free_bytes(path)
    }
}
