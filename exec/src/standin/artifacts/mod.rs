//! Artifacts: what comes up, what goes down, where the bytes are meanwhile.

mod content;
mod dotenv;
mod download;
mod expiry;
mod multipart;
mod upload;

pub use content::ArtifactContent;
pub(super) use content::FileBody;
pub(super) use download::{download, from_storage, ranged};
pub(super) use upload::{authorize, upload};
