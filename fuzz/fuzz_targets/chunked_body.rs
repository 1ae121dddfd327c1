//! See `dayfly_doubles::fuzzing::chunked_body`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| dayfly_doubles::fuzzing::chunked_body(input));
