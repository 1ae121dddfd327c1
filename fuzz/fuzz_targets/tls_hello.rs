//! See `dayfly_doubles::fuzzing::tls_hello`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| dayfly_doubles::fuzzing::tls_hello(input));
