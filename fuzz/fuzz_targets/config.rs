//! See `dayfly::fuzzing::config`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| dayfly::fuzzing::config(input));
