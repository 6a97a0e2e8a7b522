//! Arrays in files of which boxes are read, whatever holds them: mapped memory, a decompressed entry, compressed chunks.

use std::sync::Arc;

use half::{bf16, f16};

use crate::error::Result;
use crate::tensor::DType;

/// An array (channel, z, y, x) of a file.
pub(crate) trait Boxes: Send + Sync {
    /// Type of its elements.
    fn dtype(&self) -> DType;

    /// Elements along (channel, z, y, x).
    fn shape(&self) -> [usize; 4];

    /// Hands over the box from `from` up to but not including `to` of a channel, in pieces of rows and in any order: the (z,
    /// y, x) at which a piece begins, and its elements in little-endian order. The box must lie within the array.
    ///
    /// # Errors
    /// [`Error::Model`](crate::Error::Model) naming the file when it is damaged there.
    fn pieces(
        &self,
        channel: usize,
        from: [usize; 3],
        to: [usize; 3],
        give: &mut dyn FnMut([usize; 3], &[u8]),
    ) -> Result<()>;
}

/// An array whose elements lie one after the other, x fastest.
pub(crate) struct Flat {
    bytes: Arc<dyn AsRef<[u8]> + Send + Sync>,
    start: usize,
    dtype: DType,
    shape: [usize; 4],
}

impl Flat {
    /// The array that begins at byte `start`; `None` where that reaches beyond the end.
    pub(crate) fn new(
        bytes: Arc<dyn AsRef<[u8]> + Send + Sync>,
        start: usize,
        dtype: DType,
        shape: [usize; 4],
    ) -> Option<Self> {
        let end = shape.iter().try_fold(dtype.size(), |n, &d| n.checked_mul(d))?.checked_add(start)?;
        (end <= (*bytes).as_ref().len()).then_some(Self { bytes, start, dtype, shape })
    }
}

impl Boxes for Flat {
    fn dtype(&self) -> DType {
        self.dtype
    }

    fn shape(&self) -> [usize; 4] {
        self.shape
    }

    fn pieces(
        &self,
        channel: usize,
        from: [usize; 3],
        to: [usize; 3],
        give: &mut dyn FnMut([usize; 3], &[u8]),
    ) -> Result<()> {
        let ([_, nz, ny, nx], size) = (self.shape, self.dtype.size());
        let bytes = (*self.bytes).as_ref();
        for z in from[0]..to[0] {
            for y in from[1]..to[1] {
                let at = self.start + size * (((channel * nz + z) * ny + y) * nx + from[2]);
                give([z, y, from[2]], &bytes[at..at + size * (to[2] - from[2])]);
            }
        }
        Ok(())
    }
}

/// Little-endian elements as another type.
fn each<const N: usize, T>(bytes: &[u8], out: &mut [T], f: impl Fn([u8; N]) -> T) {
    out.iter_mut().zip(bytes.as_chunks::<N>().0).for_each(|(o, b)| *o = f(*b));
}

/// Elements as f32.
pub(crate) fn to_f32(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        DType::F32 => each(bytes, out, f32::from_le_bytes),
        DType::F64 => each(bytes, out, |b| f64::from_le_bytes(b) as f32),
        DType::F16 => each(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
        DType::Bf16 => each(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
        DType::I64 => each(bytes, out, |b| i64::from_le_bytes(b) as f32),
        DType::I32 => each(bytes, out, |b| i32::from_le_bytes(b) as f32),
        DType::I16 => each(bytes, out, |b| f32::from(i16::from_le_bytes(b))),
        DType::I8 => each(bytes, out, |b| f32::from(i8::from_le_bytes(b))),
        DType::U8 | DType::Bool => each(bytes, out, |[b]| f32::from(b)),
    }
}

/// Elements as labels. Wide types are cast: a label beyond i16 becomes the nearest there is.
pub(crate) fn to_i16(dtype: DType, bytes: &[u8], out: &mut [i16]) {
    let clamp = |v: i64| v.clamp(i64::from(i16::MIN), i64::from(i16::MAX)) as i16;
    match dtype {
        DType::F32 => each(bytes, out, |b| f32::from_le_bytes(b) as i16),
        DType::F64 => each(bytes, out, |b| f64::from_le_bytes(b) as i16),
        DType::F16 => each(bytes, out, |b| f16::from_le_bytes(b).to_f32() as i16),
        DType::Bf16 => each(bytes, out, |b| bf16::from_le_bytes(b).to_f32() as i16),
        DType::I64 => each(bytes, out, |b| clamp(i64::from_le_bytes(b))),
        DType::I32 => each(bytes, out, |b| clamp(i64::from(i32::from_le_bytes(b)))),
        DType::I16 => each(bytes, out, i16::from_le_bytes),
        DType::I8 => each(bytes, out, |b| i16::from(i8::from_le_bytes(b))),
        DType::U8 | DType::Bool => each(bytes, out, |[b]| i16::from(b)),
    }
}
