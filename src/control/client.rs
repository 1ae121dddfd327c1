//! The operator's end of the control socket.

use super::{ANSWER_BYTES_MAX, Answer, EXCHANGE_DEADLINE, Request};
use std::io;
use std::path::{Path, PathBuf};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;

/// Why a daemon did not answer; for the operator.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nobody listens.
    #[error("reach a daemon at `{}`: none runs, or it has another `runtime_directory`", path.display())]
    NotRunning {
        /// The socket.
        path: PathBuf,
    },
    /// The socket is not for us.
    #[error("reach the daemon at `{}`: run this as its user, as root, or as a member of its `control.group`", path.display())]
    Denied {
        /// The socket.
        path: PathBuf,
    },
    /// The exchange broke.
    #[error("talk to the daemon at `{}`", path.display())]
    Broken {
        /// The socket.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// It took the connection and says nothing.
    #[error("get an answer from the daemon at `{}` within {} s", path.display(), 2 * EXCHANGE_DEADLINE.as_secs())]
    Silent {
        /// The socket.
        path: PathBuf,
    },
}

/// Sends one request and waits for its answer, for twice [`EXCHANGE_DEADLINE`] at most: another
/// client may come first.
///
/// # Errors
/// [`ControlError`].
///
/// # Cancel safety
/// The request may take effect all the same.
pub async fn call(socket: &Path, request: &Request) -> Result<Answer, ControlError> {
    let path = socket.to_owned();
    match tokio::time::timeout(2 * EXCHANGE_DEADLINE, exchange(socket, request)).await {
        Err(_) => Err(ControlError::Silent { path }),
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(source)) => Err(failed(path, source)),
    }
}

/// Sends a request behind whose answer the connection goes on.
///
/// # Errors
/// [`ControlError`].
///
/// # Cancel safety
/// As [`call`].
pub async fn open(socket: &Path, request: &Request) -> Result<(Answer, BufReader<UnixStream>), ControlError> {
    let path = socket.to_owned();
    let opening = async {
        let mut stream = BufReader::new(UnixStream::connect(socket).await?);
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        stream.write_all(&line).await?;
        let mut answer = Vec::new();
        (&mut stream).take(ANSWER_BYTES_MAX).read_until(b'\n', &mut answer).await?;
        Ok((serde_json::from_slice(&answer)?, stream))
    };
    match tokio::time::timeout(2 * EXCHANGE_DEADLINE, opening).await {
        Err(_) => Err(ControlError::Silent { path }),
        Ok(opened) => opened.map_err(|source| failed(path, source)),
    }
}

fn failed(path: PathBuf, source: io::Error) -> ControlError {
    match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ControlError::NotRunning { path },
        io::ErrorKind::PermissionDenied => ControlError::Denied { path },
        _ => ControlError::Broken { path, source },
    }
}

async fn exchange(socket: &Path, request: &Request) -> io::Result<Answer> {
    let mut stream = UnixStream::connect(socket).await?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line).await?;
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer).await?;
    if answer.is_empty() {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it closed the connection"));
    }
    Ok(serde_json::from_slice(&answer)?)
}
