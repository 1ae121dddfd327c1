//! dayfly's egress: what a job sends out of a VM that has no network card (decision D27).
pub mod policy;
