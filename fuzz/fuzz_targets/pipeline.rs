//! See `dayfly::fuzzing::pipeline`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| dayfly::fuzzing::pipeline(input));
