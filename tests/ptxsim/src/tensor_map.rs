//! Tensor maps: what the driver's `cuTensorMapEncodeTiled` and `cuTensorMapEncodeIm2col` take.

/// How rows of a box are spread over the banks of shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Swizzle {
    /// Not at all.
    #[default]
    None,
    /// 16-byte pieces within 32 bytes.
    B32,
    /// 16-byte pieces within 64 bytes.
    B64,
    /// 16-byte pieces within 128 bytes.
    B128,
}

impl Swizzle {
    /// Where the byte at `address` of shared memory really is.
    #[inline]
    pub(crate) fn apply(self, address: usize) -> usize {
        match self {
            Swizzle::None => address,
            Swizzle::B32 => address ^ (address >> 7 & 1) << 4,
            Swizzle::B64 => address ^ (address >> 7 & 3) << 4,
            Swizzle::B128 => address ^ (address >> 7 & 7) << 4,
        }
    }

    /// Bytes of a row.
    pub(crate) fn span(self) -> usize {
        match self {
            Swizzle::None => 16,
            Swizzle::B32 => 32,
            Swizzle::B64 => 64,
            Swizzle::B128 => 128,
        }
    }
}

/// Corners of the window that an im2col map walks, and its tile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Im2col {
    /// First corner of each spatial dimension, innermost first.
    pub lower: Vec<i64>,
    /// Last corner, relative to the end.
    pub upper: Vec<i64>,
    /// Channels of a tile.
    pub channels: usize,
    /// Pixels of a tile.
    pub pixels: usize,
}

/// A tensor in global memory and the box that a copy takes of it. Dimensions go from the innermost to the outermost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMap {
    /// Device address.
    pub base: u64,
    /// Bytes of an element.
    pub element: usize,
    /// Sizes.
    pub dims: Vec<u64>,
    /// Bytes between neighbours, from the second dimension on.
    pub strides: Vec<u64>,
    /// Elements of a box (tiled maps only).
    pub tile: Vec<usize>,
    /// Steps between the elements of a box.
    pub element_strides: Vec<usize>,
    /// Placement in shared memory.
    pub swizzle: Swizzle,
    /// Set for im2col maps.
    pub im2col: Option<Im2col>,
}

const MAGIC: u64 = 0x7074_7873_696d_746d;

impl TensorMap {
    pub(crate) fn handle(index: usize) -> [u8; 128] {
        let mut out = [0; 128];
        out[..8].copy_from_slice(&MAGIC.to_le_bytes());
        out[8..16].copy_from_slice(&(index as u64).to_le_bytes());
        out
    }

    pub(crate) fn index(handle: &[u8]) -> Option<usize> {
        let word = |at: usize| Some(u64::from_le_bytes(handle.get(at..at + 8)?.try_into().ok()?));
        (word(0)? == MAGIC).then_some(word(8)? as usize)
    }

    /// What the driver refuses.
    pub(crate) fn check(&self) -> Result<(), String> {
        let rank = self.dims.len();
        let fail = |what: &str| Err(format!("tensor map: {what}"));
        if !(1..=5).contains(&rank) || (self.im2col.is_some() && rank < 3) {
            return fail("rank");
        }
        if self.strides.len() != rank - 1 || self.element_strides.len() != rank {
            return fail("number of strides");
        }
        if !self.base.is_multiple_of(16) || self.strides.iter().any(|s| s % 16 != 0 || *s >= 1 << 40) {
            return fail("address and strides must be multiples of 16 bytes");
        }
        if ![1, 2, 4, 8].contains(&self.element) || self.dims.iter().any(|d| *d == 0 || *d > 1 << 32) {
            return fail("sizes");
        }
        if self.element_strides.iter().any(|s| !(1..=8).contains(s)) {
            return fail("element strides");
        }
        let inner = match &self.im2col {
            Some(i) => {
                if i.lower.len() != rank - 2 || i.upper.len() != rank - 2 {
                    return fail("corners");
                }
                if i.channels == 0 || i.channels > 256 || i.pixels == 0 || i.pixels > 1024 {
                    return fail("tile of im2col");
                }
                i.channels
            }
            None => {
                if self.tile.len() != rank || self.tile.iter().any(|t| !(1..=256).contains(t)) {
                    return fail("box");
                }
                self.tile[0].div_ceil(self.element_strides[0])
            }
        } * self.element;
        if !inner.is_multiple_of(16) {
            return fail("rows of a box must be multiples of 16 bytes");
        }
        if self.swizzle != Swizzle::None && inner > self.swizzle.span() {
            return fail("rows of a box are longer than the swizzle");
        }
        Ok(())
    }

    /// Bytes that one copy brings.
    pub(crate) fn bytes(&self) -> usize {
        let elements = match &self.im2col {
            Some(i) => i.channels * i.pixels,
            None => self.tile.iter().zip(&self.element_strides).map(|(t, s)| t.div_ceil(*s)).product(),
        };
        elements * self.element
    }

    /// Address of an element, or `None` outside of the tensor.
    fn address(&self, c: &[i64]) -> Option<u64> {
        let inside = c.iter().zip(&self.dims).all(|(c, d)| *c >= 0 && (*c as u64) < *d);
        let outer = || c[1..].iter().zip(&self.strides).map(|(c, s)| *c as u64 * s).sum::<u64>();
        inside.then(|| self.base + c[0] as u64 * self.element as u64 + outer())
    }

    /// One row of `count` elements from coordinates `c`, in pieces of 16 bytes where they are all inside or all outside.
    fn row(&self, c: &mut [i64], count: usize, at: usize, pieces: &mut Vec<Piece>) {
        let (first, step) = (c[0], self.element_strides[0] as i64);
        let per = 16 / self.element;
        for i in (0..count).step_by(per) {
            c[0] = first + i as i64 * step;
            let inside = c[0] >= 0 && c[0] as u64 + per as u64 <= self.dims[0];
            let outside = c[0] >= self.dims[0] as i64 || c[0] + per as i64 <= 0;
            let offset = at + i * self.element;
            if i + per <= count && step == 1 && (inside || outside) {
                pieces.push(Piece { at: offset, from: self.address(c), size: 16 });
                continue;
            }
            for j in i..(i + per).min(count) {
                c[0] = first + j as i64 * step;
                pieces.push(Piece { at: at + j * self.element, from: self.address(c), size: self.element });
            }
        }
        c[0] = first;
    }

    /// The box at `start`, in the order of shared memory.
    pub(crate) fn tiled(&self, start: &[i64]) -> Vec<Piece> {
        let counts: Vec<usize> = self.tile.iter().zip(&self.element_strides).map(|(t, s)| t.div_ceil(*s)).collect();
        let rows: usize = counts[1..].iter().product();
        let mut pieces = Vec::new();
        let mut c = start.to_vec();
        for row in 0..rows {
            let mut rest = row;
            for j in 1..c.len() {
                c[j] = start[j] + (rest % counts[j] * self.element_strides[j]) as i64;
                rest /= counts[j];
            }
            self.row(&mut c, counts[0], row * counts[0] * self.element, &mut pieces);
        }
        pieces
    }

    /// An im2col tile: `start` is channel, spatial corner, image; `offsets` the position in the filter.
    pub(crate) fn columns(&self, i: &Im2col, start: &[i64], offsets: &[i64]) -> Vec<Piece> {
        let spatial = self.dims.len() - 2;
        let mut pieces = Vec::new();
        let mut at = start[1..].to_vec();
        let mut c = vec![start[0]; self.dims.len()];
        for pixel in 0..i.pixels {
            for j in 0..spatial {
                c[j + 1] = at[j] + offsets[j];
            }
            c[spatial + 1] = at[spatial];
            self.row(&mut c, i.channels, pixel * i.channels * self.element, &mut pieces);
            for j in 0..=spatial {
                if j == spatial {
                    at[j] += 1;
                    break;
                }
                at[j] += self.element_strides[j + 1] as i64;
                if at[j] < self.dims[j + 1] as i64 + i.upper[j] {
                    break;
                }
                at[j] = i.lower[j];
            }
        }
        pieces
    }
}

/// Bytes that a copy moves together.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    /// In shared memory.
    pub(crate) at: usize,
    /// In global memory; nothing stands for zeros, and is not written by stores.
    pub(crate) from: Option<u64>,
    pub(crate) size: usize,
}
