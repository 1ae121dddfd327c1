//! See `dayfly_doubles::fuzzing::domain_xml`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| dayfly_doubles::fuzzing::domain_xml(input));
