//! The file layer: each call is told, fails where a fault strikes, and is where many lives end.

use crate::event::{Event, FileOp, Trouble};
use crate::kinds::Kind;
use crate::ledger::job_of;
use crate::story::Story;
use bytes::Bytes;
use dayfly::BoxFuture;
use dayfly::files::{Entry, Files};
use dayfly::job::journal::format::parse;
use dayfly::job::state::State;
use dayfly_doubles::files::MemoryFiles;
use std::io;
use std::path::Path;

/// Files in memory, seen by the story.
pub(crate) struct Disk {
    pub(crate) files: MemoryFiles,
    pub(crate) story: Story,
}

impl Disk {
    /// One call. `bytes`: what is written.
    async fn call<T>(
        &self,
        op: FileOp,
        path: &Path,
        bytes: &[u8],
        call: impl Future<Output = io::Result<T>>,
    ) -> io::Result<T> {
        let ends = std::mem::take(&mut self.story.inner().kill_at_next_file);
        if ends {
            self.story.point(Kind::KillK15).await;
        }
        let file = job_of(path).map_or("", |(_, file)| file);
        let fault = self.fault(op, file);
        if file == "trace" && matches!(op, FileOp::WriteAt | FileOp::ReadAt) && self.story.strikes(Kind::Panics) {
            if let Some((job, _)) = job_of(path) {
                self.story.inner().ledger.panics(job);
            }
            panic!("{}", crate::panics::INJECTED);
        }
        // What is about to go is looked at once more.
        let gone = (op == FileOp::Remove && file == "trace" && fault.is_none())
            .then(|| self.files.look(path, |bytes| bytes.map(<[u8]>::to_vec)).unwrap_or_default());
        let result = match fault {
            Some(kind) => Err(io::Error::new(kind, "injected")),
            None => call.await,
        };
        let bytes = gone.as_deref().unwrap_or(bytes);
        self.story.tell(&Event::File { op, path, bytes, ok: result.is_ok() || is_absence(&result) });
        if result.is_ok()
            && let Some(kind) = point_of(op, path, file, bytes)
            && self.story.armed() == Some(kind)
        {
            self.story.point(kind).await;
        }
        result
    }

    fn fault(&self, op: FileOp, file: &str) -> Option<io::ErrorKind> {
        let mut inner = self.story.inner();
        let writes =
            matches!(op, FileOp::Replace | FileOp::WriteAt | FileOp::CreateDir | FileOp::Remove | FileOp::Rename);
        if writes && inner.ledger.down.contains_key(&Trouble::Disk) {
            return Some(io::ErrorKind::ReadOnlyFilesystem);
        }
        match op {
            FileOp::Sync if inner.strikes(Kind::SyncFails) => Some(io::ErrorKind::Other),
            FileOp::Replace if inner.strikes(Kind::SyncFails) => Some(io::ErrorKind::Other),
            FileOp::Replace | FileOp::CreateDir if inner.strikes(Kind::NoSpaceStart) => {
                Some(io::ErrorKind::StorageFull)
            }
            FileOp::WriteAt if file == "trace" && inner.strikes(Kind::NoSpaceSpool) => Some(io::ErrorKind::StorageFull),
            FileOp::Read | FileOp::ReadAt if inner.strikes(Kind::ReadFails) => Some(io::ErrorKind::Other),
            _ => None,
        }
    }
}

/// A file that is not there is an answer, no failure.
fn is_absence<T>(result: &io::Result<T>) -> bool {
    result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// The point of a life that this call is, once it is done.
fn point_of(op: FileOp, path: &Path, file: &str, bytes: &[u8]) -> Option<Kind> {
    match (op, file) {
        (FileOp::Replace, "payload") => Some(Kind::KillK3),
        (FileOp::Replace, "guest") => Some(Kind::KillK6),
        (FileOp::Replace, "record.json") => match parse(bytes).ok()?.state {
            State::Accepted => Some(Kind::KillK4),
            State::Running { .. } => Some(Kind::KillK10),
            _ => None,
        },
        (FileOp::Remove, "") if path.starts_with("/state") => Some(Kind::KillK18),
        _ => None,
    }
}

impl Files for Disk {
    fn read<'a>(&'a self, path: &'a Path, bytes_max: u64) -> BoxFuture<'a, io::Result<Vec<u8>>> {
        Box::pin(self.call(FileOp::Read, path, &[], async move { self.files.read(path, bytes_max).await }))
    }

    fn read_at<'a>(&'a self, path: &'a Path, offset: u64, bytes: usize) -> BoxFuture<'a, io::Result<Vec<u8>>> {
        Box::pin(self.call(FileOp::ReadAt, path, &[], async move { self.files.read_at(path, offset, bytes).await }))
    }

    fn replace<'a>(&'a self, path: &'a Path, bytes: Vec<u8>) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move {
            let written = bytes.clone();
            self.call(FileOp::Replace, path, &written, async move { self.files.replace(path, bytes).await }).await
        })
    }

    fn write_at<'a>(&'a self, path: &'a Path, offset: u64, bytes: Bytes) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move {
            let written = bytes.clone();
            self.call(FileOp::WriteAt, path, &written, async move { self.files.write_at(path, offset, bytes).await })
                .await
        })
    }

    fn sync<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(self.call(FileOp::Sync, path, &[], async move { self.files.sync(path).await }))
    }

    fn length<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<Option<u64>>> {
        Box::pin(self.call(FileOp::Length, path, &[], async move { self.files.length(path).await }))
    }

    fn create_dir<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(self.call(FileOp::CreateDir, path, &[], async move { self.files.create_dir(path).await }))
    }

    fn remove<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(self.call(FileOp::Remove, path, &[], async move { self.files.remove(path).await }))
    }

    fn rename<'a>(&'a self, from: &'a Path, to: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(self.call(FileOp::Rename, from, &[], async move { self.files.rename(from, to).await }))
    }

    fn list<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<Vec<Entry>>> {
        Box::pin(self.call(FileOp::List, path, &[], async move { self.files.list(path).await }))
    }

    fn free_bytes<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<u64>> {
        Box::pin(self.call(FileOp::FreeBytes, path, &[], async move { self.files.free_bytes(path).await }))
    }
}
