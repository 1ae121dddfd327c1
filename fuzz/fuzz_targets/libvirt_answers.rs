//! See `dayfly::fuzzing::libvirt_answers`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| dayfly::fuzzing::libvirt_answers(input));
