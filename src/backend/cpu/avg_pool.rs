//! Average pooling by blocks that touch and do not overlap, and its way back.

use super::isa::{Simd, simd_entry};
use crate::backend::{Impl, levels, no_implementation, pick};
use crate::base::par;
use crate::error::Result;
use crate::tensor::{BLOCK, Isa};

/// Sizes, of blocked tensors; nothing is zero, no kernel larger than the input.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Problem {
    /// (D, H, W) of the input.
    pub(crate) space: [usize; 3],
    /// Voxels of a mean, per axis.
    pub(crate) kernel: [usize; 3],
}

impl Problem {
    /// (D, H, W) of the output.
    pub(crate) fn output(&self) -> [usize; 3] {
        [0, 1, 2].map(|a| self.space[a] / self.kernel[a])
    }
}

type Run = fn(Isa, &Problem, &[f32], &mut [f32]);

/// One algorithm per instruction set: forward, and the gradient by the input.
pub(crate) static AVG_POOL: [Impl<(), [Run; 2]>; 3] = levels([run, run_back]);

/// Writes the means of `x` to `out`.
pub(crate) fn forward(isa: Isa, name: Option<&str>, p: &Problem, x: &[f32], out: &mut [f32]) -> Result<()> {
    let i = pick(&AVG_POOL, isa, &(), name).ok_or_else(|| no_implementation("avg_pool", name))?;
    (i.run[0])(i.isa, p, x, out);
    Ok(())
}

/// Writes the gradient by the input to `dx`, from that of the output.
pub(crate) fn input_gradient(isa: Isa, name: Option<&str>, p: &Problem, dy: &[f32], dx: &mut [f32]) -> Result<()> {
    let i = pick(&AVG_POOL, isa, &(), name).ok_or_else(|| no_implementation("avg_pool", name))?;
    (i.run[1])(i.isa, p, dy, dx);
    Ok(())
}

/// A piece is one slice (z) of the output of one channel block.
fn run(isa: Isa, p: &Problem, x: &[f32], out: &mut [f32]) {
    let ([d, h, w], [od, oh, ow]) = (p.space, p.output());
    par::chunks_mut(out, oh * ow * BLOCK, |i, out| {
        let first = i / od * d + i % od * p.kernel[0];
        slice::on(isa, p, &x[first * h * w * BLOCK..][..p.kernel[0] * h * w * BLOCK], out);
    });
}

/// A piece is one slice (z) of the input of one channel block.
fn run_back(isa: Isa, p: &Problem, dy: &[f32], dx: &mut [f32]) {
    let ([d, h, w], [od, oh, ow]) = (p.space, p.output());
    par::chunks_mut(dx, h * w * BLOCK, |i, dx| {
        let (block, z) = (i / d, i % d / p.kernel[0]);
        match z < od {
            true => slice_back::on(isa, p, &dy[(block * od + z) * oh * ow * BLOCK..][..oh * ow * BLOCK], dx),
            false => dx.fill(0.0),
        }
    });
}

simd_entry!(slice = pool_slice(p: &Problem, x: &[f32], out: &mut [f32]));
simd_entry!(slice_back = spread_slice(p: &Problem, dy: &[f32], dx: &mut [f32]));

/// `x` are the slices of one row of blocks.
#[inline(always)]
fn pool_slice<S: Simd>(s: S, p: &Problem, x: &[f32], out: &mut [f32]) {
    let ([_, h, w], [kd, kh, kw], [_, _, ow]) = (p.space, p.kernel, p.output());
    let (x, _) = x.as_chunks::<BLOCK>();
    let (out, _) = out.as_chunks_mut::<BLOCK>();
    let count = s.splat((kd * kh * kw) as f32);
    for (y, row) in out.chunks_exact_mut(ow).enumerate() {
        for (i, o) in row.iter_mut().enumerate() {
            let mut sum = s.splat(0.0);
            for z in 0..kd {
                for y in y * kh..(y + 1) * kh {
                    for v in &x[(z * h + y) * w + i * kw..][..kw] {
                        sum = s.add(sum, s.load(v));
                    }
                }
            }
            s.store(s.div(sum, count), o);
        }
    }
}

/// `dy` is the slice that the slice `dx` of the input has a part in.
#[inline(always)]
fn spread_slice<S: Simd>(s: S, p: &Problem, dy: &[f32], dx: &mut [f32]) {
    let ([_, _, w], [kd, kh, kw], [_, oh, ow]) = (p.space, p.kernel, p.output());
    let (dy, _) = dy.as_chunks::<BLOCK>();
    let (dx, _) = dx.as_chunks_mut::<BLOCK>();
    let (count, zero) = (s.splat((kd * kh * kw) as f32), s.splat(0.0));
    for (y, row) in dx.chunks_exact_mut(w).enumerate() {
        let from = if y / kh < oh { &dy[y / kh * ow..][..ow] } else { &[] };
        let (inner, rest) = row.split_at_mut(from.len() * kw);
        for (g, block) in from.iter().zip(inner.chunks_exact_mut(kw)) {
            let share = s.div(s.load(g), count);
            for o in block {
                s.store(share, o);
            }
        }
        for o in rest {
            s.store(zero, o);
        }
    }
}
