//! See `dayfly::fuzzing::journal`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| dayfly::fuzzing::journal(input));
