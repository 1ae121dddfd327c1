//! See `dayfly_doubles::fuzzing::wire_handshake`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| dayfly_doubles::fuzzing::wire_handshake(input));
