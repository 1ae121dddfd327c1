//! See `dayfly_doubles::fuzzing::update_body`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| dayfly_doubles::fuzzing::update_body(input));
