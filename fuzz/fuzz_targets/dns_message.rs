//! See `dayfly_doubles::fuzzing::dns_message`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| dayfly_doubles::fuzzing::dns_message(input));
