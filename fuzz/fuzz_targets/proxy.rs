//! See `dayfly::fuzzing::proxy`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| dayfly::fuzzing::proxy(input));
