//! Dimensions, inline.

use std::fmt;

/// Up to five sizes: `[N, C, D, H, W]` for an activation, `[O, I, kD, kH, kW]` for a filter, `[C]` for a vector.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Dims {
    size: [usize; 5],
    rank: u8,
}

impl Dims {
    /// The sizes.
    #[must_use]
    pub fn as_slice(&self) -> &[usize] {
        &self.size[..usize::from(self.rank)]
    }

    /// Number of elements; `usize::MAX`, which no memory has, where that is more.
    #[must_use]
    pub fn len(&self) -> usize {
        product(self.as_slice())
    }

    /// True when some size is zero.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Five sizes; a shorter tensor is padded with ones at the end.
    #[must_use]
    #[inline]
    pub fn five(&self) -> [usize; 5] {
        self.size
    }

    /// Spatial sizes (D, H, W) of a five-dimensional tensor.
    #[must_use]
    pub fn space(&self) -> [usize; 3] {
        [self.size[2], self.size[3], self.size[4]]
    }
}

/// Product of sizes, saturating. One size of zero makes it zero, wherever it stands.
pub(super) fn product(sizes: &[usize]) -> usize {
    if sizes.contains(&0) { 0 } else { sizes.iter().fold(1, |n: usize, &s| n.saturating_mul(s)) }
}

impl<const N: usize> From<[usize; N]> for Dims {
    /// # Panics
    /// When `N` is greater than 5 (at compile time in practice: `N` is a constant of the calling code).
    fn from(v: [usize; N]) -> Self {
        const { assert!(N <= 5, "at most five dimensions") };
        let mut size = [1; 5];
        size[..N].copy_from_slice(&v);
        Self { size, rank: N as u8 }
    }
}

impl fmt::Debug for Dims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.as_slice())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::{Device, Layout, Tensor};

    #[test]
    fn a_product_that_overflows_is_never_small() {
        let dims = Dims::from([1, 16, 1 << 62, 4, 1]);
        assert_eq!((dims.len(), Layout::BLOCKED.len(&dims)), (usize::MAX, usize::MAX));
        assert_eq!(Dims::from([usize::MAX, usize::MAX, 0]).len(), 0);
        assert_eq!(Layout::BLOCKED.padded(usize::MAX), usize::MAX);
        assert!(Tensor::from_host(&[], dims, &Device::cpu()).is_err());
        for dims in [dims, Dims::from([1, 1, 1 << 61, 1, 1])] {
            let e = Tensor::empty(dims, Layout::PLAIN, &Device::cpu()).unwrap_err();
            assert!(matches!(e, crate::Error::OutOfMemory { .. }), "{e}");
        }
    }
}
