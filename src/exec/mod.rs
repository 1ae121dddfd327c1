//! What happens to one job without a GitLab?

pub mod archive;
pub mod instance;
mod payload;
pub mod pipeline;
pub mod repository;
mod terminal;
pub mod unpack;
