//! Nearest upsampling by whole factors: each voxel is repeated along every axis.

use super::isa::{Simd, simd_entry};
use crate::backend::{Impl, levels, no_implementation, pick};
use crate::base::par;
use crate::error::Result;
use crate::tensor::{BLOCK, Isa};

/// Sizes of the input, blocked, and how often each voxel is repeated.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Problem {
    /// (D, H, W) of the input.
    pub(crate) space: [usize; 3],
    /// Repetitions per axis.
    pub(crate) factor: [usize; 3],
}

type Run = fn(Isa, &Problem, &[f32], &mut [f32]);

pub(crate) static UPSAMPLE_NEAREST: [Impl<Problem, Run>; 3] = levels(run);

/// Writes the upsampled `x` to `out`; both blocked.
pub(crate) fn forward(isa: Isa, name: Option<&str>, p: &Problem, x: &[f32], out: &mut [f32]) -> Result<()> {
    let i = pick(&UPSAMPLE_NEAREST, isa, p, name).ok_or_else(|| no_implementation("upsample_nearest", name))?;
    (i.run)(i.isa, p, x, out);
    Ok(())
}

/// A piece is one slice (z) of the output of one channel block.
fn run(isa: Isa, p: &Problem, x: &[f32], out: &mut [f32]) {
    let ([d, h, w], [fd, fh, fw]) = (p.space, p.factor);
    par::chunks_mut(out, h * fh * w * fw * BLOCK, |i, out| {
        let (block, z) = (i / (d * fd), i % (d * fd) / fd);
        let x = &x[(block * d + z) * h * w * BLOCK..][..h * w * BLOCK];
        slice::on(isa, w, fh, fw, x, out);
    });
}

/// Writes to every voxel of `dx` the sum of `dy` over the voxels that repeat it, in their order; both blocked.
pub(crate) fn backward(isa: Isa, p: &Problem, dy: &[f32], dx: &mut [f32]) {
    let ([d, h, w], [fd, fh, fw]) = (p.space, p.factor);
    let slice = h * fh * w * fw * BLOCK;
    par::chunks_mut(dx, h * w * BLOCK, |i, dx| {
        let (block, z) = (i / d, i % d);
        let dy = &dy[(block * d + z) * fd * slice..][..fd * slice];
        back::on(isa, p, dy, dx);
    });
}

simd_entry!(slice = upsample_slice(w: usize, fh: usize, fw: usize, x: &[f32], out: &mut [f32]));

#[inline(always)]
fn upsample_slice<S: Simd>(s: S, w: usize, fh: usize, fw: usize, x: &[f32], out: &mut [f32]) {
    let (x, _) = x.as_chunks::<BLOCK>();
    let (out, _) = out.as_chunks_mut::<BLOCK>();
    for (x, rows) in x.chunks_exact(w).zip(out.chunks_exact_mut(w * fw * fh)) {
        for row in rows.chunks_exact_mut(w * fw) {
            for (x, o) in x.iter().zip(row.chunks_exact_mut(fw)) {
                let v = s.load(x);
                for o in o {
                    s.store(v, o);
                }
            }
        }
    }
}

simd_entry!(back = sum_slice(p: &Problem, dy: &[f32], dx: &mut [f32]));

#[inline(always)]
fn sum_slice<S: Simd>(s: S, p: &Problem, dy: &[f32], dx: &mut [f32]) {
    let ([_, h, w], [fd, fh, fw]) = (p.space, p.factor);
    let (dy, _) = dy.as_chunks::<BLOCK>();
    let (dx, _) = dx.as_chunks_mut::<BLOCK>();
    for (i, dx) in dx.iter_mut().enumerate() {
        let (y, x) = (i / w, i % w);
        let mut sum = s.splat(0.0);
        for z in 0..fd {
            for row in 0..fh {
                for v in &dy[((z * h * fh + y * fh + row) * w + x) * fw..][..fw] {
                    sum = s.add(sum, s.load(v));
                }
            }
        }
        s.store(sum, dx);
    }
}
