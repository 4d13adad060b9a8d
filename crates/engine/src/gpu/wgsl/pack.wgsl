// Codes, which are numbers, as bytes: four in a word, the first in the lowest byte. One thread a word.

struct Parameters {
    codes_at: u32,
    words_at: u32,
    count: u32,
}

@group(0) @binding(0) var<storage, read> codes: array<f32>;
@group(0) @binding(1) var<storage, read_write> words: array<u32>;
var<immediate> p: Parameters;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) own: u32) {
    let at = thread_of(group, groups, own, 256u);
    if (at >= p.count) {
        return;
    }
    let first = p.codes_at + 4u * at;
    words[p.words_at + at] = u32(codes[first]) | (u32(codes[first + 1u]) << 8u) | (u32(codes[first + 2u]) << 16u)
        | (u32(codes[first + 3u]) << 24u);
}
