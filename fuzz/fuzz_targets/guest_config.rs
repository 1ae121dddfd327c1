//! See `dayfly_doubles::fuzzing::guest_config`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| dayfly_doubles::fuzzing::guest_config(input));
