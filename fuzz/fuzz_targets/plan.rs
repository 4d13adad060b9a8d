#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mlx_quant_fuzz_bodies::attempt(
    mlx_quant_fuzz_bodies::plan,
    bytes
));
