// Sums and the largest over a workgroup of LANES threads, as a binary tree; every thread gets them. A kernel says how
// many threads it has: const LANES.

var<workgroup> lanes: array<f32, LANES>;

fn total(own: u32, value: f32) -> f32 {
    workgroupBarrier();
    lanes[own] = value;
    for (var width = LANES / 2u; width > 0u; width /= 2u) {
        workgroupBarrier();
        if (own < width) {
            lanes[own] += lanes[own + width];
        }
    }
    workgroupBarrier();
    return lanes[0];
}

fn largest(own: u32, value: f32) -> f32 {
    workgroupBarrier();
    lanes[own] = value;
    for (var width = LANES / 2u; width > 0u; width /= 2u) {
        workgroupBarrier();
        if (own < width) {
            lanes[own] = select(lanes[own], lanes[own + width], lanes[own + width] > lanes[own]);
        }
    }
    workgroupBarrier();
    return lanes[0];
}
