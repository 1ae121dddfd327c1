//! See `dayfly_doubles::fuzzing::egress_policy`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| dayfly_doubles::fuzzing::egress_policy(input));
