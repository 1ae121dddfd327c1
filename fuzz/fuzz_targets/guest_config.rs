//! See `dayfly::fuzzing::guest_config`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| dayfly::fuzzing::guest_config(input));
