//! Convolution from boxes of tensors, `kernels/conv3d_tma.cuh` and `kernels/conv3d_resident.cuh`.

use bytemuck::{Pod, Zeroable};

use super::super::launch::{Files, MAP, TensorMap, module};
use super::super::{BLOCK, Storage, padded};
use super::{OP, Problem, THREADS, slabs};
use crate::error::{Error, Result};

/// By stride: the driver assembles a file at its first use, and a network of planes has no use for the second.
static BF16: [Files; 2] =
    [Files::new(None, module!("conv3d_tma_bf16.sm90a.ptx")), Files::new(None, module!("conv3d_tma_s2_bf16.sm90a.ptx"))];
static F16: [Files; 2] =
    [Files::new(None, module!("conv3d_tma_f16.sm90a.ptx")), Files::new(None, module!("conv3d_tma_s2_f16.sm90a.ptx"))];

static RESIDENT_BF16: Files = Files::new(None, module!("conv3d_resident_bf16.sm90a.ptx"));
static RESIDENT_F16: Files = Files::new(None, module!("conv3d_resident_f16.sm90a.ptx"));

/// Those that multiply, one warp that loads, three that normalise.
pub(super) const BLOCK_THREADS: u32 = THREADS + 128;
/// Bytes of the mbarriers: three for each of two bricks, two for each of nine columns of taps.
const BARRIERS: usize = (3 * 2 + 2 * 9) * 8;
/// Bytes of a voxel's or a filter's 16 channels.
const ROW: usize = 2 * BLOCK;

/// What stands behind the three maps in `Conv3dTmaParams`, which is aligned to 64.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct Params {
    pub(super) params: super::Params,
    pub(super) unused: [u32; 14],
}

/// Bytes of `Conv3dTmaParams`.
pub(super) const PARAMS: usize = 3 * MAP + size_of::<Params>();

pub(super) fn files(storage: Storage, stride: usize) -> &'static Files {
    &(if storage == Storage::F16 { &F16 } else { &BF16 })[stride - 1]
}

pub(super) fn resident_files(storage: Storage) -> &'static Files {
    if storage == Storage::F16 { &RESIDENT_F16 } else { &RESIDENT_BF16 }
}

/// Dynamic shared memory of a block whose filters stay: two bricks and the results of each of two groups, the filters, and
/// barriers: three for each of the bricks, one for each slab.
pub(super) fn resident(planes: usize, slabs: usize, filters: usize) -> usize {
    let brick = ((planes + 2) * 100 * ROW).next_multiple_of(256);
    4 * brick + 2 * planes * 64 * filters * 2 + slabs * 27 * filters * ROW + (12 + slabs) * 8
}

/// Dynamic shared memory of a block with so many planes and filters: two bricks, the filters of a slab, and barriers.
pub(super) fn shared(planes: usize, stride: usize, filters: usize) -> usize {
    let (side, depth) = (7 * stride + 3, (planes - 1) * stride + 3);
    // A brick begins where the pattern of the swizzle does.
    let brick = (depth * side * side * ROW).next_multiple_of(256);
    (2 * brick + 27 * filters * ROW + BARRIERS).max(planes * 64 * filters * 2)
}

/// Of the first source, of the second or again the first, and of the filters.
///
/// # Errors
/// [`Error::Shape`] for an address that no box can begin at.
pub(super) fn maps(p: &Problem<'_>, planes: usize, filters: usize) -> Result<[TensorMap; 3]> {
    let source = |i: usize| {
        let s = p.sources.get(i).unwrap_or(&p.sources[0]);
        let [d, h, w] = s.space;
        // Of voxels that are read twice, half as many and one at each end.
        let [z, y, x] = [0, 1, 2].map(|a| {
            let voxels = [planes, 8, 8][a] as u32;
            if s.repeat[a] == 2 { voxels / 2 + 2 } else { (voxels - 1) * p.stride[a] as u32 + 3 }
        });
        TensorMap {
            address: s.data.address,
            sizes: [padded(s.channels), w, h, d, p.batch],
            tile: [BLOCK as u32, x, y, z, 1],
        }
    };
    let weight = TensorMap {
        address: p.weight.address,
        sizes: [BLOCK, padded(p.filters), 9, 3 * slabs(p), 1],
        tile: [BLOCK as u32, filters as u32, 1, 3, 1],
    };
    let maps = [source(0), source(1), weight];
    match maps.iter().find(|m| !m.address.is_multiple_of(16)) {
        Some(m) => Err(Error::shape(OP, format!("a tensor at {:#x}, expected a multiple of 16", m.address))),
        None => Ok(maps),
    }
}
