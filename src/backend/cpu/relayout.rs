//! From the plain to the blocked layout: the only code that knows both.

use crate::base::par;
use crate::tensor::{BLOCK, Isa};

/// `x` in plain order `[n, c, space]` to blocks of 16 channels in `out`, pad lanes zero.
pub(crate) fn to_blocked(_: Isa, channels: usize, space: usize, x: &[f32], out: &mut [f32]) {
    /// Voxels per piece: 64 KiB of output.
    const VOXELS: usize = 1024;
    let blocks = channels.div_ceil(BLOCK);
    par::chunks_mut(out, space * BLOCK, |i, out| {
        let (n, block) = (i / blocks, i % blocks);
        let real = BLOCK.min(channels - block * BLOCK);
        for (j, out) in out.chunks_mut(VOXELS * BLOCK).enumerate() {
            if real < BLOCK {
                out.fill(0.0);
            }
            let voxels = out.len() / BLOCK;
            for lane in 0..real {
                let x = &x[(n * channels + block * BLOCK + lane) * space + j * VOXELS..][..voxels];
                for (x, o) in x.iter().zip(out.iter_mut().skip(lane).step_by(BLOCK)) {
                    *o = *x;
                }
            }
        }
    });
}
