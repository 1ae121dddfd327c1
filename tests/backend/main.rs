//! Ring "backend": one contract for all hypervisors, and what only real ones can show.
//!
//! The contract runs on the fake, on libvirt's `test:///default` as far as that goes (it has no
//! guests), and on real QEMU under TCG at the libvirtd that `DAYFLY_TEST_LIBVIRT_URI` names.
//! `scripts/test backend` sets it, and runs this binary as an unprivileged user: at
//! `qemu:///session` as `dayfly-test`, at `qemu:///system` as a member of group `libvirt`. Without
//! it the tests of [`real`] are skipped, and say so past the harness's capture.
//!
//! `DAYFLY_TEST_BACKEND=qemu` runs the contract, and [`qemu`], on plain QEMU, which needs no libvirtd and no root.
//!
//! `DAYFLY_TEST_LIBVIRTD_PID` names the pid file of a libvirtd that belongs to the tests: it will
//! be stopped and killed. `DAYFLY_TEST_DIRECTORY`: where files go (default: the system's).

#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs, reason = "tests")]

mod bench;
mod contract;
mod qemu;
mod real;
mod sector;
