//! See `dayfly_doubles::fuzzing::connect_target`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| dayfly_doubles::fuzzing::connect_target(input));
