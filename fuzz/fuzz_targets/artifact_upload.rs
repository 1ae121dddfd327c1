//! See `dayfly_doubles::fuzzing::artifact_upload`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| dayfly_doubles::fuzzing::artifact_upload(input));
