//! See `dayfly_doubles::fuzzing::greeting_door`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| dayfly_doubles::fuzzing::greeting_door(input));
