//! Stored values to floats and back, with the instructions of the device.

use super::isa::{Simd, simd_entry};
use super::{PIECE, Shared};
use crate::base::par;
use crate::tensor::{Isa, Stored, StoredMut, narrowed, widened};

impl<'a> Stored<'a> {
    /// Floats that [`Stored::floats`] asks for.
    pub(crate) fn room(self) -> usize {
        match self {
            Stored::F32(_) => 0,
            Stored::Bf16(v) => v.len(),
        }
    }

    /// Writes the values from place `at` on to `to`.
    pub(crate) fn widen(self, isa: Isa, at: usize, to: &mut [f32]) {
        match self {
            Stored::F32(v) => to.copy_from_slice(&v[at..][..to.len()]),
            Stored::Bf16(v) => widen::on(isa, &v[at..][..to.len()], to),
        }
    }

    /// All values, in `work` of [`Stored::room`] floats if they are not stored as such.
    pub(crate) fn floats<'w>(self, isa: Isa, work: &'w mut [f32]) -> &'w [f32]
    where
        'a: 'w,
    {
        match self {
            Stored::F32(v) => v,
            Stored::Bf16(v) => {
                let to = &mut work[..v.len()];
                widen_all(isa, self, to);
                to
            }
        }
    }
}

/// The start of an output that several threads write, as it is stored.
#[derive(Clone, Copy)]
pub(crate) enum SharedOut {
    F32(Shared),
    /// The upper halves of floats.
    Bf16(Shared<u16>),
}

impl SharedOut {
    pub(crate) fn new(out: StoredMut<'_>) -> Self {
        match out {
            StoredMut::F32(out) => SharedOut::F32(Shared::new(out)),
            StoredMut::Bf16(out) => SharedOut::Bf16(Shared::new(out)),
        }
    }
}

/// Writes `from` to the values of `to`, rounded where these are halves.
pub(crate) fn store(isa: Isa, from: &[f32], to: StoredMut<'_>) {
    match to {
        StoredMut::F32(to) => to.copy_from_slice(from),
        StoredMut::Bf16(to) => narrow::on(isa, from, to),
    }
}

/// All of `from` to floats.
pub(crate) fn widen_all(isa: Isa, from: Stored<'_>, to: &mut [f32]) {
    par::chunks_mut(to, PIECE, |i, to| from.widen(isa, i * PIECE, to));
}

simd_entry!(widen = widen_by(from: &[u16], to: &mut [f32]));
simd_entry!(narrow = narrow_by(from: &[f32], to: &mut [u16]));

#[inline(always)]
fn widen_by<S: Simd>(_: S, from: &[u16], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = widened(*from);
    }
}

#[inline(always)]
fn narrow_by<S: Simd>(_: S, from: &[f32], to: &mut [u16]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = narrowed(*from);
    }
}
