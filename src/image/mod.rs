//! Which disk does the VM start from?
//!
//! An image is a directory: `image.toml`, a qcow2 disk, and for direct boot kernel and initrd.

pub mod boot_test;
pub mod build;
pub mod manifest;
pub mod store;
