//! Elementwise sum: one pass, in place where it can be.

use super::PIECE;
use super::isa::{Simd, simd_entry};
use crate::backend::{Impl, levels, no_implementation, pick};
use crate::base::par;
use crate::error::Result;
use crate::tensor::{BLOCK, Isa};

type Run = fn(Isa, Option<&[f32]>, &[f32], &mut [f32]);

pub(crate) static ADD: [Impl<(), Run>; 3] = levels(run);

/// `out = a + b`, or `out += b` when `a` is `None`. All of one length, whole blocks.
pub(crate) fn forward(isa: Isa, name: Option<&str>, a: Option<&[f32]>, b: &[f32], out: &mut [f32]) -> Result<()> {
    let i = pick(&ADD, isa, &(), name).ok_or_else(|| no_implementation("add", name))?;
    (i.run)(i.isa, a, b, out);
    Ok(())
}

fn run(isa: Isa, a: Option<&[f32]>, b: &[f32], out: &mut [f32]) {
    par::chunks_mut(out, PIECE, |i, out| {
        let range = i * PIECE..i * PIECE + out.len();
        piece::on(isa, a.map(|a| &a[range.clone()]), &b[range], out);
    });
}

simd_entry!(piece = add_piece(a: Option<&[f32]>, b: &[f32], out: &mut [f32]));

#[inline(always)]
fn add_piece<S: Simd>(s: S, a: Option<&[f32]>, b: &[f32], out: &mut [f32]) {
    let (out, _) = out.as_chunks_mut::<BLOCK>();
    let (b, _) = b.as_chunks::<BLOCK>();
    match a {
        Some(a) => {
            for ((o, a), b) in out.iter_mut().zip(a.as_chunks::<BLOCK>().0).zip(b) {
                s.store(s.add(s.load(a), s.load(b)), o);
            }
        }
        None => {
            for (o, b) in out.iter_mut().zip(b) {
                s.store(s.add(s.load(o), s.load(b)), o);
            }
        }
    }
}
