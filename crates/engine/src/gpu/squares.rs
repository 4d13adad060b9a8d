//! The form of tiles that matrix units compute, and what a card must have for it.

/// Rows and columns of a workgroup's tile. Of the forms that were tried on an H200 this is the fastest: larger tiles leave
/// room for fewer workgroups at a time, and it is other workgroups that work while one waits.
pub(super) const TILE: (usize, usize) = (128, 128);
/// Squares of 16 down and across that 32 threads compute.
pub(super) const SQUARES: (usize, usize) = (4, 4);
/// Groups of 32 threads across a tile.
pub(super) const WARPS: usize = TILE.1 / (16 * SQUARES.1);
/// Threads of a workgroup.
pub(super) const THREADS: usize = TILE.0 / (16 * SQUARES.0) * WARPS * 32;
// Where lines lie across k a thread has 4 x 4 of a tile's 16 steps.
const _: () = assert!(TILE.0 == THREADS && TILE.1 == THREADS);
/// Vec4s of a line of 16 elements in workgroup memory.
pub(super) const LINE: usize = 4;
/// Vec4s of the tiles of both operands.
pub(super) const ROOM: usize = (TILE.0 + TILE.1) * LINE;
/// Bytes of workgroup memory that the kernel takes.
const MEMORY: u32 = (2 * ROOM * 8 + THREADS / 32 * 1024) as u32;
/// Steps of k, and columns, from which on units are used.
pub(super) const LEAST: usize = 64;

/// What a device must be opened with so that its matrix units can be used.
pub(super) const FEATURES: wgpu::Features =
    wgpu::Features::SHADER_F16.union(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX);

/// Why an adapter's matrix units cannot compute our products, if they cannot.
pub(super) fn lacking(adapter: &wgpu::Adapter) -> Option<&'static str> {
    let info = adapter.get_info();
    let squares = adapter.cooperative_matrix_properties().into_iter().any(|own| {
        (own.m_size, own.n_size, own.k_size) == (16, 16, 16)
            && own.ab_type == wgpu::CooperativeScalarType::F16
            && own.cr_type == wgpu::CooperativeScalarType::F32
    });
    if !adapter.features().contains(FEATURES) || !squares {
        Some("it has no matrix units for squares of 16 float16 with sums in float32")
    } else if (info.subgroup_min_size, info.subgroup_max_size) != (32, 32) {
        Some("its threads do not run together in groups of 32")
    } else if adapter.limits().max_compute_workgroup_storage_size < MEMORY {
        Some("its workgroups share too little memory")
    } else {
        None
    }
}
