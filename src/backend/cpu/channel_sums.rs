//! Sums of channels over samples and voxels: the gradient of a bias. Pieces in f32, put together in f64 in a fixed order.

use super::PIECE;
use super::isa::{Simd, simd_entry};
use crate::base::par;
use crate::tensor::{BLOCK, Isa};

/// Voxels that are added up in f32.
const VOXELS: usize = 256;

/// Writes the sums of the channels of the blocked `x` of `space` voxels to `out`, one for each padded channel.
pub(crate) fn channel_sums(isa: Isa, space: usize, x: &[f32], out: &mut [f32]) {
    let (len, channels) = (space * BLOCK, out.len());
    let per_block = len.div_ceil(PIECE);
    let parts = par::map(x.len() / len * per_block, |i| {
        let (block, first) = (i / per_block * len, i % per_block * PIECE);
        piece::on(isa, &x[block + first..block + len.min(first + PIECE)])
    });
    let mut sums = vec![0f64; channels];
    for (i, part) in parts.iter().enumerate() {
        let first = i / per_block * BLOCK % channels;
        sums[first..first + BLOCK].iter_mut().zip(part).for_each(|(s, v)| *s += v);
    }
    out.iter_mut().zip(sums).for_each(|(o, s)| *o = s as f32);
}

simd_entry!(piece = sum_piece(x: &[f32]) -> [f64; BLOCK]);

#[inline(always)]
fn sum_piece<S: Simd>(s: S, x: &[f32]) -> [f64; BLOCK] {
    let mut all = [0.0; BLOCK];
    for part in x.as_chunks::<BLOCK>().0.chunks(VOXELS) {
        // Four sums, to hide the latency of the addition.
        let mut sum = [s.splat(0.0); 4];
        for (i, v) in part.iter().enumerate() {
            sum[i % 4] = s.add(sum[i % 4], s.load(v));
        }
        let mut total = [0.0; BLOCK];
        s.store(s.add(s.add(sum[0], sum[1]), s.add(sum[2], sum[3])), &mut total);
        all.iter_mut().zip(total).for_each(|(a, t)| *a += f64::from(t));
    }
    all
}
