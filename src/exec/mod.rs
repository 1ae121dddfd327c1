//! What happens to one job without a GitLab?

pub mod pipeline;
