//! Bytes of voxels to f32.

use ::nifti::{Endianness, NiftiType};

use super::header::Header;

/// How the voxels of one file become f32.
pub(super) struct Decoder {
    datatype: NiftiType,
    big_endian: bool,
    scale: Option<(f64, f64)>,
}

/// Appends the numbers of type `$t` in `$raw` to `$out`.
macro_rules! append {
    ($decoder:expr, $raw:expr, $out:expr, $t:ty) => {{
        const N: usize = size_of::<$t>();
        let (numbers, _) = $raw.as_chunks::<N>();
        // One loop per case, so that the common ones (native order, no scaling) become plain vector code.
        match ($decoder.big_endian, $decoder.scale) {
            (false, None) => $out.extend(numbers.iter().map(|&b| <$t>::from_le_bytes(b) as f32)),
            (true, None) => $out.extend(numbers.iter().map(|&b| <$t>::from_be_bytes(b) as f32)),
            (false, Some((slope, inter))) => {
                $out.extend(numbers.iter().map(|&b| (<$t>::from_le_bytes(b) as f64 * slope + inter) as f32));
            }
            (true, Some((slope, inter))) => {
                $out.extend(numbers.iter().map(|&b| (<$t>::from_be_bytes(b) as f64 * slope + inter) as f32));
            }
        }
    }};
}

impl Decoder {
    pub(super) fn new(header: &Header) -> Self {
        let big_endian = header.inner.endianness == Endianness::Big;
        Self { datatype: header.datatype, big_endian, scale: header.scale }
    }

    /// Appends the voxels in `raw`, a whole number of them.
    pub(super) fn append(&self, raw: &[u8], out: &mut Vec<f32>) {
        match self.datatype {
            NiftiType::Uint8 => append!(self, raw, out, u8),
            NiftiType::Int8 => append!(self, raw, out, i8),
            NiftiType::Uint16 => append!(self, raw, out, u16),
            NiftiType::Int16 => append!(self, raw, out, i16),
            NiftiType::Uint32 => append!(self, raw, out, u32),
            NiftiType::Int32 => append!(self, raw, out, i32),
            NiftiType::Uint64 => append!(self, raw, out, u64),
            NiftiType::Int64 => append!(self, raw, out, i64),
            NiftiType::Float32 => append!(self, raw, out, f32),
            NiftiType::Float64 => append!(self, raw, out, f64),
            // Refused when the header was checked.
            _ => {}
        }
    }
}
