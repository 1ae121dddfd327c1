//! See `dayfly::fuzzing::requests`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| dayfly::fuzzing::requests(input));
