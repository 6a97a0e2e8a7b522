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

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.as_slice().iter().product()
    }

    /// True when some size is zero.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Five sizes; a shorter tensor is padded with ones at the end.
    #[must_use]
    pub fn five(&self) -> [usize; 5] {
        self.size
    }

    /// Spatial sizes (D, H, W) of a five-dimensional tensor.
    #[must_use]
    pub fn space(&self) -> [usize; 3] {
        [self.size[2], self.size[3], self.size[4]]
    }
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
