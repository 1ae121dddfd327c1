//! See `dayfly_doubles::fuzzing::content_range`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| dayfly_doubles::fuzzing::content_range(input));
