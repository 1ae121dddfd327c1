//! See `dayfly_doubles::fuzzing::gitlab_answers`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| dayfly_doubles::fuzzing::gitlab_answers(input));
