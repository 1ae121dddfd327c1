//! See `dayfly_doubles::fuzzing::wire_session`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| dayfly_doubles::fuzzing::wire_session(input));
