//! See `dayfly::fuzzing::route`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| dayfly::fuzzing::route(input));
