// Codes of positions as bytes: four in a word, the first in the lowest byte. One thread a word, no sums.

struct Parameters {
    positions_at: u32,
    words_at: u32,
    count: u32,
    most: f32,
}

@group(0) @binding(0) var<storage, read> positions: array<f32>;
@group(0) @binding(1) var<storage, read_write> words: array<u32>;
var<immediate> p: Parameters;

// What is no number has code 0.
fn code(at: u32) -> u32 {
    let code = code_at(positions[at], p.most);
    return u32(select(0.0, code, code > 0.0));
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) own: u32) {
    let at = thread_of(group, groups, own, 256u);
    if (at >= p.count) {
        return;
    }
    let first = p.positions_at + 4u * at;
    words[p.words_at + at] =
        code(first) | (code(first + 1u) << 8u) | (code(first + 2u) << 16u) | (code(first + 3u) << 24u);
}
