//! Files in memory, and files whose N-th call fails.

use bytes::Bytes;
use dayfly::BoxFuture;
use dayfly::files::{Entry, Files};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A file system in memory. Clones share it, so it survives a simulated crash of the daemon.
#[derive(Clone, Debug, Default)]
pub struct MemoryFiles(Arc<Mutex<Memory>>);

#[derive(Debug)]
struct Memory {
    /// By path, in the order of bytes: comparing by components took a tenth of a simulation. `None`: a directory.
    nodes: BTreeMap<OsString, Option<Vec<u8>>>,
    free_bytes: u64,
    calls: u64,
    fail: Option<(u64, io::ErrorKind)>,
    fail_writes: Option<io::ErrorKind>,
    fail_replaces: Option<io::ErrorKind>,
    history: Vec<String>,
    /// No history is kept: for simulations of many hours.
    quiet: bool,
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            nodes: BTreeMap::new(),
            free_bytes: 1 << 40,
            calls: 0,
            fail: None,
            fail_writes: None,
            fail_replaces: None,
            history: Vec::new(),
            quiet: false,
        }
    }
}

impl MemoryFiles {
    /// Files without [`MemoryFiles::history`], which would grow for ever.
    #[must_use]
    pub fn quiet() -> Self {
        Self(Arc::new(Mutex::new(Memory { quiet: true, ..Memory::default() })))
    }

    /// One file's bytes, looked at in place; `None`: no such file.
    pub fn look<T>(&self, path: &Path, look: impl FnOnce(Option<&[u8]>) -> T) -> T {
        look(self.memory().nodes.get(path.as_os_str()).and_then(|node| node.as_deref()))
    }

    /// Puts a file there, or takes it away, past all faults: what a hand or a disk does between two daemons.
    pub fn meddle(&self, path: &Path, bytes: Option<Vec<u8>>) {
        let mut memory = self.memory();
        match bytes {
            Some(bytes) => drop(memory.nodes.insert(path.into(), Some(bytes))),
            None => memory.remove(path),
        }
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets call number `n` from now (1 is the next) fail with `kind`, once.
    pub fn fail_call(&self, n: u64, kind: io::ErrorKind) {
        let mut memory = self.memory();
        memory.fail = Some((memory.calls + n, kind));
    }

    /// From now on every call that changes something fails so; `None`: no more.
    pub fn fail_writes(&self, kind: Option<io::ErrorKind>) {
        self.memory().fail_writes = kind;
    }

    /// From now on no whole file is written, as on a disk without inodes, while the others still grow; `None`: no more.
    pub fn fail_replaces(&self, kind: Option<io::ErrorKind>) {
        self.memory().fail_replaces = kind;
    }

    /// Whether the failure asked for by [`MemoryFiles::fail_call`] has not happened yet.
    #[must_use]
    pub fn failure_pending(&self) -> bool {
        self.memory().fail.is_some()
    }

    /// Calls so far.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.memory().calls
    }

    /// Sets what [`Files::free_bytes`] answers.
    pub fn set_free_bytes(&self, bytes: u64) {
        self.memory().free_bytes = bytes;
    }

    /// All paths of files (not directories) below `dir`.
    #[must_use]
    pub fn paths_below(&self, dir: &Path) -> Vec<PathBuf> {
        let memory = self.memory();
        memory.nodes.iter().filter(|(p, n)| n.is_some() && is_within(p, dir)).map(|(p, _)| p.into()).collect()
    }

    /// Every byte kept, for canary searches.
    #[must_use]
    pub fn contents(&self) -> Vec<(PathBuf, Vec<u8>)> {
        self.memory().nodes.iter().filter_map(|(p, n)| n.clone().map(|n| (p.into(), n))).collect()
    }

    /// One line per call, for failure reports.
    #[must_use]
    pub fn history(&self) -> Vec<String> {
        self.memory().history.clone()
    }

    fn call<T>(
        &self,
        what: &str,
        path: &Path,
        work: impl FnOnce(&mut Memory) -> io::Result<T>,
    ) -> BoxFuture<'static, io::Result<T>>
    where
        T: Send + 'static,
    {
        let mut memory = self.memory();
        memory.calls += 1;
        let result = match memory.fail {
            Some((n, kind)) if memory.calls >= n => {
                memory.fail = None;
                Err(io::Error::new(kind, "injected"))
            }
            _ => match memory
                .fail_writes
                .filter(|_| !READS.contains(&what))
                .or(memory.fail_replaces.filter(|_| what == "replace"))
            {
                Some(kind) => Err(io::Error::new(kind, "injected")),
                None => work(&mut memory),
            },
        };
        if !memory.quiet {
            let line = format!("{what} {} {}", path.display(), if result.is_ok() { "ok" } else { "failed" });
            memory.history.push(line);
        }
        Box::pin(std::future::ready(result))
    }
}

/// Calls that change nothing.
const READS: [&str; 5] = ["read", "read_at", "length", "list", "free_bytes"];

fn not_found() -> io::Error {
    io::Error::from(io::ErrorKind::NotFound)
}

impl Memory {
    fn file(&mut self, path: &Path) -> io::Result<&mut Vec<u8>> {
        self.nodes.get_mut(path.as_os_str()).and_then(Option::as_mut).ok_or_else(not_found)
    }

    fn parent_exists(&self, path: &Path) -> io::Result<()> {
        match path.parent().map(|p| self.nodes.get(p.as_os_str())) {
            Some(Some(None)) => Ok(()),
            _ => Err(not_found()),
        }
    }

    fn remove(&mut self, path: &Path) {
        self.nodes.retain(|p, _| !is_within(p, path));
    }
}

/// Whether this path is that one, or below it; both as `Path::join` makes them.
fn is_within(path: &OsStr, dir: &Path) -> bool {
    let rest = path.as_bytes().strip_prefix(dir.as_os_str().as_bytes());
    rest.is_some_and(|rest| rest.is_empty() || rest[0] == b'/' || dir == Path::new("/"))
}

impl Files for MemoryFiles {
    fn read<'a>(&'a self, path: &'a Path, bytes_max: u64) -> BoxFuture<'a, io::Result<Vec<u8>>> {
        self.call("read", path, |m| {
            let bytes = m.file(path)?.clone();
            if bytes.len() as u64 > bytes_max { Err(io::Error::from(io::ErrorKind::InvalidData)) } else { Ok(bytes) }
        })
    }

    fn read_at<'a>(&'a self, path: &'a Path, offset: u64, bytes: usize) -> BoxFuture<'a, io::Result<Vec<u8>>> {
        self.call("read_at", path, |m| {
            let file = m.file(path)?;
            let start = usize::try_from(offset).unwrap_or(usize::MAX).min(file.len());
            Ok(file[start..start.saturating_add(bytes).min(file.len())].to_vec())
        })
    }

    fn replace<'a>(&'a self, path: &'a Path, bytes: Vec<u8>) -> BoxFuture<'a, io::Result<()>> {
        self.call("replace", path, |m| {
            m.parent_exists(path)?;
            m.nodes.insert(path.into(), Some(bytes));
            Ok(())
        })
    }

    fn write_at<'a>(&'a self, path: &'a Path, offset: u64, bytes: Bytes) -> BoxFuture<'a, io::Result<()>> {
        self.call("write_at", path, |m| {
            m.parent_exists(path)?;
            if offset == 0 && !m.nodes.contains_key(path.as_os_str()) {
                m.nodes.insert(path.into(), Some(Vec::new()));
            }
            let file = m.file(path)?;
            let offset = usize::try_from(offset).unwrap_or(usize::MAX);
            if file.len() < offset {
                return Err(io::Error::from(io::ErrorKind::InvalidData));
            }
            file.truncate(offset);
            file.extend_from_slice(&bytes);
            Ok(())
        })
    }

    fn sync<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        self.call("sync", path, |m| m.file(path).map(|_| ()))
    }

    fn length<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<Option<u64>>> {
        self.call("length", path, |m| Ok(m.file(path).ok().map(|f| f.len() as u64)))
    }

    fn create_dir<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        self.call("create_dir", path, |m| {
            for dir in path.ancestors() {
                m.nodes.entry(dir.into()).or_insert(None);
            }
            Ok(())
        })
    }

    fn remove<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        self.call("remove", path, |m| {
            m.remove(path);
            Ok(())
        })
    }

    fn rename<'a>(&'a self, from: &'a Path, to: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        self.call("rename", from, |m| {
            m.parent_exists(to)?;
            let moved: Vec<OsString> = m.nodes.keys().filter(|p| is_within(p, from)).cloned().collect();
            if moved.is_empty() {
                return Err(not_found());
            }
            for path in moved {
                let node = m.nodes.remove(&path).flatten();
                let rest = Path::new(&path).strip_prefix(from).expect("filtered by this prefix");
                m.nodes.insert(if rest.as_os_str().is_empty() { to.into() } else { to.join(rest).into() }, node);
            }
            Ok(())
        })
    }

    fn list<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<Vec<Entry>>> {
        self.call("list", path, |m| {
            Ok(m.nodes
                .iter()
                .filter(|(p, _)| is_within(p, path))
                .map(|(p, n)| (Path::new(p), n))
                .filter(|(p, _)| p.parent() == Some(path))
                .filter_map(|(p, n)| Some(Entry { name: p.file_name()?.to_str()?.to_owned(), is_dir: n.is_none() }))
                .collect())
        })
    }

    fn free_bytes<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<u64>> {
        self.call("free_bytes", path, |m| Ok(m.free_bytes))
    }
}
