//! Leaky ReLU: one pass, in place where it can be.

use super::PIECE;
use super::isa::{Simd, simd_entry};
use crate::backend::{Impl, levels, no_implementation, pick};
use crate::base::par;
use crate::error::Result;
use crate::tensor::{BLOCK, Isa};

type Run = fn(Isa, Option<&[f32]>, f32, &mut [f32]);

pub(crate) static LEAKY_RELU: [Impl<(), Run>; 3] = levels(run);

/// `out = leaky_relu(x)`, or in place when `x` is `None`. Lengths are whole blocks.
pub(crate) fn forward(isa: Isa, name: Option<&str>, x: Option<&[f32]>, slope: f32, out: &mut [f32]) -> Result<()> {
    let i = pick(&LEAKY_RELU, isa, &(), name).ok_or_else(|| no_implementation("leaky_relu", name))?;
    (i.run)(i.isa, x, slope, out);
    Ok(())
}

fn run(isa: Isa, x: Option<&[f32]>, slope: f32, out: &mut [f32]) {
    par::chunks_mut(out, PIECE, |i, out| {
        let x = x.map(|x| &x[i * PIECE..][..out.len()]);
        piece::on(isa, x, slope, out);
    });
}

/// `dx = dy` where `y > 0`, else `slope * dy`, or in place of `dy` when that is `None`. `y` is the input, or the result for
/// a slope that keeps the sign.
pub(crate) fn backward(isa: Isa, y: &[f32], slope: f32, dy: Option<&[f32]>, dx: &mut [f32]) {
    par::chunks_mut(dx, PIECE, |i, dx| {
        let range = i * PIECE..i * PIECE + dx.len();
        back::on(isa, &y[range.clone()], slope, dy.map(|dy| &dy[range]), dx);
    });
}

simd_entry!(piece = leaky_relu_piece(x: Option<&[f32]>, slope: f32, out: &mut [f32]));

#[inline(always)]
fn leaky_relu_piece<S: Simd>(s: S, x: Option<&[f32]>, slope: f32, out: &mut [f32]) {
    let slope = s.splat(slope);
    let (out, _) = out.as_chunks_mut::<BLOCK>();
    match x {
        Some(x) => {
            for (o, x) in out.iter_mut().zip(x.as_chunks::<BLOCK>().0) {
                s.store(s.leaky_relu(s.load(x), slope), o);
            }
        }
        None => {
            for o in out {
                s.store(s.leaky_relu(s.load(o), slope), o);
            }
        }
    }
}

simd_entry!(back = leaky_relu_back(y: &[f32], slope: f32, dy: Option<&[f32]>, dx: &mut [f32]));

#[inline(always)]
fn leaky_relu_back<S: Simd>(s: S, y: &[f32], slope: f32, dy: Option<&[f32]>, dx: &mut [f32]) {
    let slope = s.splat(slope);
    let dy = dy.map(|dy| dy.as_chunks::<BLOCK>().0);
    for (i, (y, dx)) in y.as_chunks::<BLOCK>().0.iter().zip(dx.as_chunks_mut::<BLOCK>().0).enumerate() {
        let g = s.load(dy.map_or(&*dx, |dy| &dy[i]));
        s.store(s.leaky_relu_grad(s.load(y), slope, g), dx);
    }
}
