//! See `dayfly::fuzzing::request_head`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| dayfly::fuzzing::request_head(input));
