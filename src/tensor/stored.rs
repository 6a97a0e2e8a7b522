//! The values of a tensor as they are stored: f32, or bf16 that becomes f32 where it is read.

use std::borrow::Cow;
use std::ops::Range;

use super::Precision;

/// Values to read.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Stored<'t> {
    F32(&'t [f32]),
    /// The upper halves of floats.
    Bf16(&'t [u16]),
}

/// Values to write.
#[derive(Debug)]
pub(crate) enum StoredMut<'t> {
    F32(&'t mut [f32]),
    /// The upper halves of floats.
    Bf16(&'t mut [u16]),
}

impl<'t> Stored<'t> {
    /// Some of the values as floats.
    pub(crate) fn part(self, range: Range<usize>) -> Cow<'t, [f32]> {
        match self {
            Stored::F32(v) => Cow::Borrowed(&v[range]),
            Stored::Bf16(v) => Cow::Owned(v[range].iter().map(|h| widened(*h)).collect()),
        }
    }

    /// Number of values.
    pub(crate) fn len(self) -> usize {
        match self {
            Stored::F32(v) => v.len(),
            Stored::Bf16(v) => v.len(),
        }
    }

    /// How they are stored.
    pub(crate) fn precision(self) -> Precision {
        match self {
            Stored::F32(_) => Precision::F32,
            Stored::Bf16(_) => Precision::Bf16,
        }
    }

    /// One value.
    #[inline]
    pub(crate) fn get(self, at: usize) -> f32 {
        match self {
            Stored::F32(v) => v[at],
            Stored::Bf16(v) => widened(v[at]),
        }
    }

    /// Writes the values from place `at` on to `to`.
    pub(crate) fn read(self, at: usize, to: &mut [f32]) {
        match self {
            Stored::F32(v) => to.copy_from_slice(&v[at..][..to.len()]),
            Stored::Bf16(v) => {
                let from = &v[at..][..to.len()];
                to.iter_mut().zip(from).for_each(|(to, v)| *to = widened(*v));
            }
        }
    }
}

impl StoredMut<'_> {
    /// Number of values.
    pub(crate) fn len(&self) -> usize {
        self.stored().len()
    }

    /// To read.
    pub(crate) fn stored(&self) -> Stored<'_> {
        match self {
            StoredMut::F32(v) => Stored::F32(v),
            StoredMut::Bf16(v) => Stored::Bf16(v),
        }
    }
}

/// A value as it comes back from storage in half of its bits.
#[inline(always)]
pub(crate) fn widened(half: u16) -> f32 {
    f32::from_bits(u32::from(half) << 16)
}

/// The nearest bf16, of two equally near the even one; a NaN stays one. Without a branch, so that loops over it become
/// vectors.
#[inline(always)]
pub(crate) fn narrowed(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
    if value.is_nan() { 0x7fc0 } else { rounded }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_round_as_bf16_does() {
        let mut bits = 1u32;
        let edges = [0, 0x8000_0000, 0x7f80_0000, 0xff80_0000, 0x7f7f_ffff, 0x0000_8000, 0x0001_8000, 0x3f80_8000];
        for i in 0..200_000u32 {
            bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223 + i);
            let value = f32::from_bits(edges.get(i as usize).copied().unwrap_or(bits));
            let (ours, theirs) = (narrowed(value), half::bf16::from_f32(value));
            assert!(ours == theirs.to_bits() || (value.is_nan() && widened(ours).is_nan()), "{value:e}");
            assert!(widened(ours).to_bits() == half::bf16::from_bits(ours).to_f32().to_bits());
        }
    }
}
