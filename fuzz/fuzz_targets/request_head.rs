//! See `dayfly_doubles::fuzzing::request_head`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| dayfly_doubles::fuzzing::request_head(input));
