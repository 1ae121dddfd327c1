//! The seams of the daemon as a run sees them: each call is told to the story, and may go wrong.

pub(crate) mod disk;
pub(crate) mod gitlab;
pub(crate) mod host;
