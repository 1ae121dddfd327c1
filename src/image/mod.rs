//! Which disk does the VM start from?
//!
//! An image is a directory: `image.toml` ([`manifest`]), a qcow2 disk, and for direct boot kernel and
//! initrd. [`store`] finds, checks and replaces images; [`build`] makes them.

pub mod alike;
pub mod build;
pub mod difference;
pub mod gpt;
pub mod manifest;
pub mod qcow2;
pub mod stamp;
pub mod store;
mod tar;
