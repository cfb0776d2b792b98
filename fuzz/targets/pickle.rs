#![no_main]

libfuzzer_sys::fuzz_target!(init: nbn::fuzz::let_panics_unwind(), |data: &[u8]| nbn::fuzz::pickle(data));
