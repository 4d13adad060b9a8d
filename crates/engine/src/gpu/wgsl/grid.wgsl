// What the kernels of rounding share: codes, stored numbers, and grids (scale and bias of a group). As in the
// processor's search (src/rounding/grid.rs), in the same order of operations. This text is put in front of theirs.

fn stored(x: f32) -> f32 {
    return $STORED;
}

// 1 / scale; float16 may have rounded the scale of a group of equal values to zero.
fn inverse_of(scale: f32) -> f32 {
    return select(1.0 / scale, 0.0, scale == 0.0);
}

// The code of a value, as a number.
fn code_of(value: f32, inverse: f32, bias: f32, most: f32) -> f32 {
    var code = (value - bias) * inverse;
    code = select(0.0, code, code > 0.0);
    code = select(most, code, code < most);
    return round(code);
}

// What a code stands for: a product that is rounded, then a sum, as whoever reads the file has it.
fn decoded(code: f32, scale: f32, bias: f32, zero: u32) -> f32 {
    return opaque(code * scale, zero) + bias;
}
