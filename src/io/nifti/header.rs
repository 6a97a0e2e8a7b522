//! The 348 bytes of a NIfTI-1 header, checked field by field before anything believes them.

use std::path::Path;

use ::nifti::{Endianness, NiftiHeader, NiftiType};

use super::affine;
use crate::error::{Error, Result};
use crate::io::image::Geometry;

/// Bytes of a NIfTI-1 header.
pub(super) const HEADER_LEN: usize = 348;
/// Most voxels of one file, all channels together: 16 GiB as f32.
const MAX_VOXELS: u64 = 1 << 32;
/// Most bytes of extensions before the voxels.
const MAX_EXTENSIONS: u64 = 64 << 20;

/// Where the numbers of the header lie: (first byte, bytes of one number, how many).
const NUMBERS: [(usize, usize, usize); 13] = [
    (0, 4, 1),    // sizeof_hdr
    (32, 4, 1),   // extents
    (36, 2, 1),   // session_error
    (40, 2, 8),   // dim
    (56, 4, 3),   // intent_p1..3
    (68, 2, 4),   // intent_code, datatype, bitpix, slice_start
    (76, 4, 8),   // pixdim
    (108, 4, 3),  // vox_offset, scl_slope, scl_inter
    (120, 2, 1),  // slice_end
    (124, 4, 4),  // cal_max, cal_min, slice_duration, toffset
    (140, 4, 2),  // glmax, glmin
    (252, 2, 2),  // qform_code, sform_code
    (256, 4, 18), // quatern_b..d, qoffset_x..z, srow_x, srow_y, srow_z
];

/// What the header says, checked.
pub(super) struct Header {
    /// The header as the `nifti` crate gets it: four dimensions (x, y, z, channel), `bitpix` of the data type, no
    /// scaling, the byte order of the voxels.
    pub(super) inner: NiftiHeader,
    pub(super) datatype: NiftiType,
    pub(super) geometry: Geometry,
    pub(super) channels: usize,
    /// Position of the first voxel in its file.
    pub(super) vox_offset: u64,
    /// `value * slope + intercept`, if the voxels are scaled.
    pub(super) scale: Option<(f64, f64)>,
    /// The voxels lie in a second file (.img).
    pub(super) pair: bool,
    /// Oddities that do not make the file unusable.
    pub(super) warnings: Vec<String>,
}

impl Header {
    /// Checks the header of the file `path`.
    ///
    /// # Errors
    /// [`Error::Image`] naming the field.
    pub(super) fn parse(path: &Path, bytes: &[u8; HEADER_LEN]) -> Result<Self> {
        let wrong = |field: &str, what: String| Error::image(path, field, what);
        let mut raw = *bytes;
        let big_endian = byte_order(path, bytes)?;
        if big_endian {
            swap_numbers(&mut raw);
        }
        let magic = [raw[344], raw[345], raw[346], raw[347]];
        let pair = match &magic {
            b"n+1\0" => false,
            b"ni1\0" => true,
            _ => {
                let found = magic.escape_ascii();
                return Err(wrong("magic", format!("\"{found}\", expected \"n+1\" or \"ni1\" (NIfTI-1)")));
            }
        };
        let (grid, channels, rank) = dimensions(path, &raw)?;
        let mut inner = NiftiHeader::from_reader(&raw[..]).map_err(|e| wrong("header", e.to_string()))?;
        let mut warnings = Vec::new();

        let datatype = inner.data_type().ok().filter(|&t| is_scalar(t)).ok_or_else(|| {
            let what = format!("{}, expected an integer of 8 to 64 bits or float32/float64", inner.datatype);
            wrong("datatype", what)
        })?;
        let bits = (datatype.size_of() * 8) as i16;
        if inner.bitpix != bits {
            warnings.push(format!("bitpix is {}, {bits} belong to datatype {}", inner.bitpix, inner.datatype));
        }

        let least = if pair { 0.0 } else { 352.0 };
        let offset = f64::from(inner.vox_offset);
        if !(offset >= least && offset.fract() == 0.0 && offset <= MAX_EXTENSIONS as f64) {
            let what = format!("{}, expected a whole number of bytes from {least} to {MAX_EXTENSIONS}", offset);
            return Err(wrong("vox_offset", what));
        }

        let (slope, inter) = (f64::from(inner.scl_slope), f64::from(inner.scl_inter));
        let scale = match slope.is_finite() && slope != 0.0 {
            false => None,
            true if !inter.is_finite() => {
                return Err(wrong("scl_inter", format!("{inter}, expected a finite number")));
            }
            true => (slope != 1.0 || inter != 0.0).then_some((slope, inter)),
        };

        let geometry = affine::geometry(path, &inner, &raw, grid, rank, &mut warnings)?;

        inner.dim = [4, grid[2] as u16, grid[1] as u16, grid[0] as u16, channels as u16, 1, 1, 1];
        inner.bitpix = bits;
        (inner.scl_slope, inner.scl_inter) = (1.0, 0.0);
        inner.endianness = if big_endian { Endianness::Big } else { Endianness::Little };
        Ok(Self { inner, datatype, geometry, channels, vox_offset: offset as u64, scale, pair, warnings })
    }

    /// Bytes of all voxels.
    pub(super) fn data_len(&self) -> u64 {
        // At most MAX_VOXELS * 8.
        (self.geometry.len() * self.channels * self.datatype.size_of()) as u64
    }
}

/// True for big-endian numbers.
fn byte_order(path: &Path, raw: &[u8; HEADER_LEN]) -> Result<bool> {
    let size = [raw[0], raw[1], raw[2], raw[3]];
    match (i32::from_le_bytes(size), i32::from_be_bytes(size)) {
        (348, _) => Ok(false),
        (_, 348) => Ok(true),
        (540, _) | (_, 540) => {
            Err(Error::image(path, "sizeof_hdr", "540, a NIfTI-2 file; expected NIfTI-1 (348), convert it first"))
        }
        (found, _) if &raw[128..132] == b"DICM" => {
            Err(Error::image(path, "sizeof_hdr", format!("{found}, a DICOM file; expected NIfTI-1 (348)")))
        }
        (found, _) => Err(Error::image(path, "sizeof_hdr", format!("{found}, expected 348; not a NIfTI-1 file"))),
    }
}

/// Turns every number of the header to the other byte order.
fn swap_numbers(raw: &mut [u8; HEADER_LEN]) {
    for (at, width, n) in NUMBERS {
        raw[at..at + width * n].chunks_exact_mut(width).for_each(<[u8]>::reverse);
    }
}

/// Voxels along (z, y, x), channels, and `dim[0]` without trailing ones beyond the third.
///
/// ITK, which nnU-Net reads with, drops trailing axes of length one; a fourth axis is the channels, and so is a fifth
/// (a vector per voxel) where the fourth is one.
fn dimensions(path: &Path, raw: &[u8; HEADER_LEN]) -> Result<([usize; 3], usize, usize)> {
    let dim: [i16; 8] = std::array::from_fn(|i| i16::from_le_bytes([raw[40 + 2 * i], raw[41 + 2 * i]]));
    let rank = match usize::try_from(dim[0]) {
        Ok(n @ 2..=7) => n,
        _ => return Err(Error::image(path, "dim[0]", format!("{}, expected 2 to 7 dimensions", dim[0]))),
    };
    let mut n = [1_usize; 8];
    for i in 1..=rank {
        n[i] = usize::try_from(dim[i])
            .ok()
            .filter(|&d| d > 0)
            .ok_or_else(|| Error::image(path, format!("dim[{i}]"), format!("{}, expected at least 1", dim[i])))?;
    }
    let rank = (4..=rank).rev().find(|&i| n[i] > 1).unwrap_or(rank.min(3));
    let channels = match rank {
        ..=4 => n[4],
        5 if n[4] == 1 => n[5],
        _ => {
            let what = format!("{:?}, expected x, y, z and channels", &dim[1..=rank]);
            return Err(Error::image(path, "dim", what));
        }
    };
    let voxels = [n[1], n[2], n[3], channels].iter().try_fold(1_u64, |a, &d| a.checked_mul(d as u64));
    // Sizes in bytes, 8 per voxel at most, have to fit the machine's words.
    if voxels.is_none_or(|v| v > MAX_VOXELS || usize::try_from(v * 8).is_err()) {
        let what = format!("{} x {} x {} x {channels} voxels, at most {MAX_VOXELS} can be read", n[1], n[2], n[3]);
        return Err(Error::image(path, "dim", what));
    }
    Ok(([n[3], n[2], n[1]], channels, rank))
}

fn is_scalar(t: NiftiType) -> bool {
    use NiftiType::{Float32, Float64, Int8, Int16, Int32, Int64, Uint8, Uint16, Uint32, Uint64};
    matches!(t, Uint8 | Int8 | Uint16 | Int16 | Uint32 | Int32 | Uint64 | Int64 | Float32 | Float64)
}
