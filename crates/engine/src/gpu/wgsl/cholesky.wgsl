// The Cholesky factor L of a block on the diagonal of a matrix, and its inverse: one workgroup for each of some matrices,
// whose blocks and inverses lie `apart` and `inverse_apart` elements from the next one's.
//
// The block is [n, n], n at most 64, and what lies beyond it counts as the unit matrix. Its lower triangle is read from
// `matrix`, the inverse of L goes to `inverse`, with zeros above the diagonal; lines are `line` and `inverse_line`
// elements apart. A matrix' status becomes 1 where a pivot is not positive or no number. Sums: an element loses its products one step at a time, in order; the inverse by forward substitution.

struct Parameters {
    matrix_at: u32,
    inverse_at: u32,
    status_at: u32,
    n: u32,
    line: u32,
    inverse_line: u32,
    apart: u32,
    inverse_apart: u32,
}

@group(0) @binding(0) var<storage, read> matrix: array<f32>;
@group(0) @binding(1) var<storage, read_write> inverse: array<f32>;
@group(0) @binding(2) var<storage, read_write> status: array<f32>;
var<immediate> p: Parameters;
var<workgroup> t: array<f32, 4096>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) own: u32) {
    let matrix_at = p.matrix_at + group.x * p.apart;
    let inverse_at = p.inverse_at + group.x * p.inverse_apart;
    for (var at = own; at < 4096u; at += 256u) {
        let i = at / 64u;
        let j = at % 64u;
        var x = select(0.0, 1.0, i == j);
        if (i < p.n && j <= i) {
            x = matrix[matrix_at + i * p.line + j];
        }
        t[at] = x;
    }
    workgroupBarrier();
    for (var c = 0u; c < p.n; c += 1u) {
        var pivot = t[c * 65u];
        let fine = pivot > 0.0 && pivot < 3.0e38;
        if (!fine && own == 0u) {
            status[p.status_at + group.x] = 1.0;
        }
        pivot = sqrt(select(1.0, pivot, fine));
        workgroupBarrier();
        if (own == c) {
            t[c * 65u] = pivot;
        } else if (own > c && own < p.n) {
            t[own * 64u + c] = t[own * 64u + c] / pivot;
        }
        workgroupBarrier();
        // Threads in 4 columns of 64 rows.
        let i = own % 64u;
        if (i > c && i < p.n) {
            let factor = t[i * 64u + c];
            for (var j = c + 1u + own / 64u; j <= i; j += 4u) {
                t[i * 64u + j] = fma(-factor, t[j * 64u + c], t[i * 64u + j]);
            }
        }
        workgroupBarrier();
    }
    // Column `own` of the inverse, downwards.
    if (own >= p.n) {
        return;
    }
    let at = inverse_at + own;
    for (var i = 0u; i < own; i += 1u) {
        inverse[at + i * p.inverse_line] = 0.0;
    }
    for (var i = own; i < p.n; i += 1u) {
        var rest = select(0.0, 1.0, i == own);
        for (var k = own; k < i; k += 1u) {
            rest = fma(-t[i * 64u + k], inverse[at + k * p.inverse_line], rest);
        }
        inverse[at + i * p.inverse_line] = rest / t[i * 65u];
    }
}
