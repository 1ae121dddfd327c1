//! See `dayfly::fuzzing::greeting_relay`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| dayfly::fuzzing::greeting_relay(input));
