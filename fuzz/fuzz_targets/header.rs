//! Any bytes as a safetensors file: no panic, and what is accepted lies within the file without overlap.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mlx_format::checkpoint::{HeaderTensor, parse_header};

fuzz_target!(|bytes: &[u8]| {
    // Also as a header of the right length, so that the JSON behind it is reached.
    let mut framed = (bytes.len() as u64).to_le_bytes().to_vec();
    framed.extend_from_slice(bytes);
    framed.extend_from_slice(&[0; 64]);
    for file in [bytes, &framed] {
        if let Ok(tensors) = parse_header(file) {
            let mut end = 0;
            for HeaderTensor { dtype, shape, range, .. } in tensors {
                assert!(range.start >= end && range.end <= file.len());
                assert_eq!(range.len() * 8, shape.iter().product::<usize>() * dtype.bitsize());
                end = range.end;
            }
        }
    }
});
