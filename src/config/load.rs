//! Puts defaults, file and environment together and judges the result.

use super::Config;
use std::path::{Path, PathBuf};

/// A configuration and where it came from.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The values.
    pub config: Config,
    /// The file, if one was read.
    pub file: Option<PathBuf>,
}

/// Why the configuration cannot be used. Exit code 78.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// To be split into its cases.
    #[error("{0}")]
    Invalid(String),
}

impl Config {
    /// Reads defaults, `file` and the environment, and validates.
    ///
    /// # Errors
    /// [`ConfigError`], naming key and source.
    pub fn load(file: &Path) -> Result<Loaded, ConfigError> {
        let _ = file;
        unimplemented!()
    }
}
