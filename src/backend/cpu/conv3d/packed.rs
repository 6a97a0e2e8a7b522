//! The packed filter as it is stored: f32, or bf16 that becomes f32 where it is read.

use std::borrow::Cow;
use std::ops::Range;

use half::bf16;

use crate::backend::cpu::PIECE;
use crate::backend::cpu::isa::{Simd, simd_entry};
use crate::base::par;
use crate::tensor::{BLOCK, Isa};

/// Values in the order of [`pack_filter`].
#[derive(Debug, Clone, Copy)]
pub(crate) enum Packed<'a> {
    F32(&'a [f32]),
    /// The upper halves of floats.
    Bf16(&'a [u16]),
}

impl<'a> Packed<'a> {
    pub(crate) fn len(self) -> usize {
        match self {
            Packed::F32(v) => v.len(),
            Packed::Bf16(v) => v.len(),
        }
    }

    /// Floats that [`Packed::floats`] asks for.
    pub(super) fn room(self) -> usize {
        match self {
            Packed::F32(_) => 0,
            Packed::Bf16(v) => v.len(),
        }
    }

    /// Writes the values from place `at` on to `to`.
    pub(super) fn read(self, isa: Isa, at: usize, to: &mut [f32]) {
        match self {
            Packed::F32(v) => to.copy_from_slice(&v[at..][..to.len()]),
            Packed::Bf16(v) => widen::on(isa, &v[at..][..to.len()], to),
        }
    }

    /// All values, in `work` of [`Packed::room`] floats if they are not stored as such.
    pub(super) fn floats<'w>(self, isa: Isa, work: &'w mut [f32]) -> &'w [f32]
    where
        'a: 'w,
    {
        match self {
            Packed::F32(v) => v,
            Packed::Bf16(v) => {
                let to = &mut work[..v.len()];
                par::chunks_mut(to, PIECE, |i, to| self.read(isa, i * PIECE, to));
                to
            }
        }
    }

    /// Some of the values.
    pub(super) fn part(self, isa: Isa, range: Range<usize>) -> Cow<'a, [f32]> {
        match self {
            Packed::F32(v) => Cow::Borrowed(&v[range]),
            Packed::Bf16(_) => {
                let mut out = vec![0.0; range.len()];
                self.read(isa, range.start, &mut out);
                Cow::Owned(out)
            }
        }
    }
}

simd_entry!(widen = widen_by(from: &[u16], to: &mut [f32]));

#[inline(always)]
fn widen_by<S: Simd>(_: S, from: &[u16], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = f32::from_bits(u32::from(*from) << 16);
    }
}

/// Packs `values` in `[O, I, kD, kH, kW]` order into `out` of [`super::packed_len`] floats. Lanes past O become zero.
pub(crate) fn pack_filter(_: Isa, values: &[f32], dims: [usize; 5], out: &mut [f32]) {
    pack(values, dims, out, |v| v);
}

/// As [`pack_filter`], each value rounded to the nearest bf16, of two equally near to the even one.
pub(crate) fn pack_filter_bf16(_: Isa, values: &[f32], dims: [usize; 5], out: &mut [u16]) {
    pack(values, dims, out, |v| bf16::from_f32(v).to_bits());
}

fn pack<T: Copy + Default + Send>(
    values: &[f32],
    [o, i, kd, kh, kw]: [usize; 5],
    out: &mut [T],
    stored: impl Fn(f32) -> T + Sync + Send,
) {
    let taps = kd * kh * kw;
    par::chunks_mut(out, 2 * BLOCK * i * taps, |group, out| {
        let width = out.len() / (i * taps).max(1);
        out.fill(T::default());
        let first = group * 2 * BLOCK;
        for c in 0..i {
            for lane in 0..width.min(o - first) {
                let from = &values[((first + lane) * i + c) * taps..][..taps];
                for (t, v) in from.iter().enumerate() {
                    out[(t * i + c) * width + lane] = stored(*v);
                }
            }
        }
    });
}
