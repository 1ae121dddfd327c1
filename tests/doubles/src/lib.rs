//! What stands in for the world in dayfly's tests: no part of the product (decision D29).
//!
//! The seams' doubles, examples of what they hold, properties that hold for any bytes, and the daemon that the kill
//! harness runs (`dayfly-under-test`).

pub mod examples; // a record and a machine as they should be
pub mod failpoints; // where is the daemon killed?
pub mod fake; // machines as scripts, on paused time
pub mod files; // files in memory
pub mod frozen; // files that stand still
pub mod fuzzing; // what must hold for any bytes?
pub mod images; // an image on no disk
mod pieces; // how do bytes arrive, when a property is tried?
pub mod processes; // machines as processes
pub mod workshop; // git and disks of a world on paused time
