//! See `dayfly::fuzzing::greeting_door`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| dayfly::fuzzing::greeting_door(input));
