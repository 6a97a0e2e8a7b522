//! A part of a source as a convolution sees it, in memory: normalised, repeated, as floats.

use super::transform::{Affine, ForwardZ, From, forward_z};
use crate::backend::cpu::conv3d::{Source, winograd::axis::Kind};
use crate::tensor::{BLOCK, Isa, Stored};

impl Source<'_> {
    /// The normalisation of channel block `vector` of `[sample][block]`.
    pub(super) fn affine(&self, vector: usize) -> Option<Affine> {
        self.norm.map(|n| Affine {
            mean: n.mean[vector * BLOCK..].as_ptr(),
            scale: n.scale[vector * BLOCK..].as_ptr(),
            shift: n.shift[vector * BLOCK..].as_ptr(),
            slope: n.slope,
        })
    }

    /// The stored values; halves with `room` for a row of floats of every slice of a tile.
    pub(super) fn from(&self, room: *mut f32) -> From {
        match self.data {
            Stored::F32(v) => From::F32(v.as_ptr()),
            Stored::Bf16(v) => From::Bf16(v.as_ptr(), room),
        }
    }

    /// Writes whole rows of channel block `vector` of `[sample][block]` of a blocked source of `size` voxels to `to`:
    /// `count` slices and rows, beginning with slice and row `first`, as `[slice][row][voxel][BLOCK]`.
    ///
    /// # Safety
    /// The source has so many voxels, the rows exist, `to` has room for all of them and `room` for one; both are ours.
    pub(in crate::backend::cpu) unsafe fn read_rows(
        &self,
        isa: Isa,
        size: [usize; 3],
        vector: usize,
        first: [usize; 2],
        count: [usize; 2],
        room: *mut f32,
        to: *mut f32,
    ) {
        let [d, h, w] = [0, 1, 2].map(|a| size[a] / self.factor[a]);
        let slice = count[1] * size[2] * BLOCK;
        for z in 0..count[0] {
            let a = ForwardZ {
                kind: Kind::One,
                spread: false,
                from: self.from(room).at(vector * d * h * w * BLOCK),
                row: w * BLOCK,
                slice: h * w * BLOCK,
                size,
                factor: self.factor,
                first: [(first[0] + z) as isize, first[1] as isize, 0],
                rows: count[1],
                columns: size[2],
                to: to.wrapping_add(z * slice),
                plane: slice,
                norm: self.affine(vector),
            };
            // SAFETY: this function's own contract.
            unsafe { forward_z::on(isa, &a) }
        }
    }
}
