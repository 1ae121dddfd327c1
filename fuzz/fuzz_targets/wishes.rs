//! See `dayfly_doubles::fuzzing::wishes`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| dayfly_doubles::fuzzing::wishes(input));
