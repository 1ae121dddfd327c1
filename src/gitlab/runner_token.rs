//! The runner token: where it comes from, and which part of it a guest may see.

use crate::secret::Secret;
use std::path::{Path, PathBuf};

/// A runner authentication token. Only `gitlab::runner_api` turns it into a request.
#[derive(Clone, Debug)]
pub struct RunnerToken(pub(super) Secret);

/// Why a token file cannot be used; for the operator.
#[derive(Debug, thiserror::Error)]
pub enum TokenFileError {
    /// It cannot be read.
    #[error("read token file `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// Others may read it.
    #[error("token file `{}` has mode {mode:o}; make it 0600", path.display())]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It holds no token.
    #[error("token file `{}` must hold one line with the token", path.display())]
    Content {
        /// The file.
        path: PathBuf,
    },
}

impl RunnerToken {
    /// Takes a token as typed.
    #[must_use]
    pub fn new(token: Secret) -> Self {
        Self(token)
    }

    /// Reads a token file: one line, mode without group and others.
    ///
    /// # Errors
    /// [`TokenFileError`], naming the file and never its content.
    pub fn from_file(path: &Path) -> Result<Self, TokenFileError> {
        let _ = path;
        unimplemented!()
    }

    /// The token for config.toml in a guest: this one's whole prefix, its next 9 characters, and
    /// `random` (design D9). It only has to look right; it is no secret of GitLab's.
    #[must_use]
    pub fn guest_token(&self, random: &str) -> String {
        let _ = random;
        unimplemented!()
    }
}
