//! What is a package of dayfly made with, beside its programs? Nothing of this is in a program of its.
//!
//! `manual` writes pages and completions from the command line's own definition, `sbom` what the programs are made of.
//! `scripts/package` calls both.

pub mod manual;
pub mod sbom;
