//! See `dayfly::fuzzing::image`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| dayfly::fuzzing::image(input));
