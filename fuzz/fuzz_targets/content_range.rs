//! See `dayfly::fuzzing::content_range`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| dayfly::fuzzing::content_range(input));
