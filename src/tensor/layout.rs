//! The physical order of a tensor: one integer.

use super::Dims;
use super::dims::product;

/// Channels per block of the CPU's compute layout: one AVX-512 register, two AVX2 or four NEON ones.
pub const BLOCK: usize = 16;

/// Channels come in blocks of `block`; the lane inside a block is the innermost index. 1 is plain NCDHW, 16 is
/// NCdhw16c.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Layout {
    /// Channels per block.
    pub block: usize,
}

impl Layout {
    /// NCDHW: files, PyTorch, the network's input.
    pub const PLAIN: Layout = Layout { block: 1 };
    /// NCdhw16c: CPU compute.
    pub const BLOCKED: Layout = Layout { block: BLOCK };

    /// Channels rounded up to whole blocks.
    #[must_use]
    pub const fn padded(self, channels: usize) -> usize {
        channels.div_ceil(self.block).saturating_mul(self.block)
    }

    /// Elements of memory for `dims`, pad lanes included; `usize::MAX` where that is more.
    #[must_use]
    pub fn len(self, dims: &Dims) -> usize {
        let [n, c, d, h, w] = dims.five();
        product(&[n, self.padded(c), d, h, w])
    }

    /// Position in memory of element `[n, c, z, y, x]`.
    #[must_use]
    #[inline]
    pub fn offset(self, dims: &Dims, [n, c, z, y, x]: [usize; 5]) -> usize {
        let [_, cc, d, h, w] = dims.five();
        let b = self.block;
        ((((n * cc.div_ceil(b) + c / b) * d + z) * h + y) * w + x) * b + c % b
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offset_is_a_bijection_into_len() {
        let dims = Dims::from([2, 5, 3, 4, 6]);
        for block in [1, 2, 5, 8, 16] {
            let l = Layout { block };
            let mut seen = vec![false; l.len(&dims)];
            for i in 0..dims.len() {
                let at = [i / 360, i / 72 % 5, i / 24 % 3, i / 6 % 4, i % 6];
                let o = l.offset(&dims, at);
                assert!(!std::mem::replace(&mut seen[o], true));
            }
            assert_eq!(seen.iter().filter(|s| **s).count(), dims.len());
        }
        assert_eq!(Layout::PLAIN.offset(&dims, [1, 4, 2, 3, 5]), (((5 + 4) * 3 + 2) * 4 + 3) * 6 + 5);
    }
}
