//! See `dayfly::fuzzing::payload`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| dayfly::fuzzing::payload(input));
