//! How is a unix socket of ours bound, so that at no instant anybody else can connect? Used by `control` and `web`.

use std::fs::{DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, chown};
use std::path::Path;
use tokio::net::UnixListener;

/// Where a socket is made, beside its place.
const HIDDEN: &str = ".new-socket";

/// Binds where nobody else can look, and moves the socket into place once its mode is right. One that an earlier process
/// left is replaced: who calls holds the lock on the state directory, so no other daemon lives.
///
/// # Errors
/// The file system's.
///
/// # Panics
/// Outside a runtime of Tokio's.
pub(crate) fn bind(socket: &Path, mode: u32, group: Option<u32>) -> io::Result<UnixListener> {
    let dir = socket.parent().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "path has no parent"))?;
    // One name, for ours is the only daemon here: what one that was killed in between has left is taken away.
    let hidden = dir.join(HIDDEN);
    remove_hidden(&hidden)?;
    DirBuilder::new().mode(0o700).create(&hidden)?;
    let path = hidden.join("s");
    let listener = UnixListener::bind(&path)?;
    if group.is_some() {
        chown(&path, None, group)?;
    }
    std::fs::set_permissions(&path, Permissions::from_mode(mode))?;
    std::fs::rename(&path, socket)?;
    remove_hidden(&hidden)?;
    Ok(listener)
}

fn remove_hidden(hidden: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(hidden) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
