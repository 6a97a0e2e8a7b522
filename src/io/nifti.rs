//! NIfTI-1 files behind a guard around the `nifti` crate: nothing in a file is believed before it is checked, and a
//! truncated or damaged file is an error, never an image with zeros in it.
//!
//! The crate parses the header and streams the voxels; byte order, gzip (with its checksums), sizes, scaling, affine
//! and writing are done here.

mod affine;
mod decode;
mod gzip;
mod header;
mod source;
mod write;

use std::ffi::OsStr;
use std::io::Read;
use std::path::{Path, PathBuf};

use ::nifti::{NiftiError, StreamedNiftiVolume};

use self::decode::Decoder;
use self::header::{HEADER_LEN, Header};
use self::source::{Source, read_error};
use super::image::{Geometry, Image, LabelData, Segmentation};
use crate::base::par;
use crate::error::{Error, Result};
pub use write::{write_image, write_nifti};

/// Most bytes of a gzip stream behind the voxels: they have to be unpacked to reach the checksum, and a small file can
/// hold gigabytes of them.
const MAX_TRAILING: u64 = 64 << 20;
/// Voxels are streamed by planes up to this size, else by rows.
const PLANE: usize = 4 << 20;

/// Limits of reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReadOptions {
    /// Most bytes that the voxels of one file may take in memory, as f32 and all channels together. Compared with the
    /// header before any memory is taken. 8 GiB by default.
    pub max_bytes: u64,
}

impl Default for ReadOptions {
    fn default() -> Self {
        Self { max_bytes: 8 << 30 }
    }
}

impl ReadOptions {
    /// With this limit in bytes.
    #[must_use]
    pub fn max_bytes(mut self, max_bytes: u64) -> Self {
        self.max_bytes = max_bytes;
        self
    }
}

/// Reads an image of one or more channels: one file per channel in order, or a 4-D file (or a 5-D file of vectors) with
/// all of them. `.nii`, `.nii.gz` and `.hdr` with its `.img` are told apart by their content; a 2-D file gets one slice.
///
/// Voxels become f32 after `scl_slope` and `scl_inter` (a slope of 0, NaN or infinity means none, as the standard says;
/// applied in f64). NaN and infinities are kept: see [`Image::non_finite`]. Spacing and geometry are those of the first
/// file. Spacing is what nnU-Net reads through SimpleITK: `|pixdim|` in mm, and for a 2-D file 999 times the larger one
/// along z; see [`Geometry`] for the affine.
///
/// As in nnU-Net's `SimpleITKIO.read_images`, files of different shape or spacing (relative 1e-5) are an error, another
/// origin or direction is a warning.
///
/// # Errors
/// [`Error::Image`] naming file and field when a file is truncated, damaged, too large (see [`ReadOptions`]), not
/// NIfTI-1 or does not match the first; [`Error::Io`]; [`Error::Usage`] without a file.
pub fn read_nifti(paths: &[impl AsRef<Path>]) -> Result<Image> {
    read_nifti_with(paths, &ReadOptions::default())
}

/// As [`read_nifti`], within other limits.
///
/// # Errors
/// Those of [`read_nifti`].
pub fn read_nifti_with(paths: &[impl AsRef<Path>], options: &ReadOptions) -> Result<Image> {
    let Some((first, others)) = paths.split_first() else {
        return Err(Error::usage("no image file given, expected one per channel"));
    };
    let (mut channels, geometry) = read_file(first.as_ref(), options)?;
    let per_file = channels.len();
    for path in others {
        let path = path.as_ref();
        // The header first: a file that does not match is refused before its voxels are read.
        let (_, header) = open(path)?;
        matches(path, &header, first.as_ref(), &geometry, per_file)?;
        channels.extend(read_file(path, options)?.0);
    }
    Image::new(channels, geometry)
}

/// Reads the grid of an image and none of its voxels.
///
/// # Errors
/// Those of [`read_nifti`] that can be seen in a header; a file without gzip must also be long enough.
pub fn read_nifti_header(path: impl AsRef<Path>) -> Result<Geometry> {
    let path = path.as_ref();
    let (source, header) = open(path)?;
    warn(path, &header);
    check_length(path, &header, &source)?;
    Ok(header.geometry)
}

/// Reads a label map: a file of one channel whose values are whole numbers from 0 to 65535, whatever their type. Names
/// are empty.
///
/// # Errors
/// Those of [`read_nifti`], and [`Error::Image`] naming the first voxel that is no label.
pub fn read_segmentation(path: impl AsRef<Path>) -> Result<Segmentation> {
    let path = path.as_ref();
    let (channels, geometry) = read_file(path, &ReadOptions::default())?;
    let [voxels] = channels.as_slice() else {
        let what = format!("{} channels, expected 1 for a label map", channels.len());
        return Err(Error::image(path, "dim", what));
    };
    labels_of(path, voxels, geometry)
}

/// The labels that `voxels` of `path` are.
pub(crate) fn labels_of(path: &Path, voxels: &[f32], geometry: Geometry) -> Result<Segmentation> {
    let max = f32::from(u16::MAX);
    if let Some(i) = voxels.iter().position(|&v| !(v >= 0.0 && v <= max && v.fract() == 0.0)) {
        let [_, ny, nx] = geometry.shape;
        let (x, y, z) = (i % nx, i / nx % ny, i / nx / ny);
        let what = format!("{} at ({x}, {y}, {z}), expected labels: whole numbers from 0 to {max}", voxels[i]);
        return Err(Error::image(path, "voxels", what));
    }
    // Exact: every value is a whole number in the range of the type.
    let labels = if voxels.iter().all(|&v| v < 256.0) {
        LabelData::U8(voxels.iter().map(|&v| v as u8).collect())
    } else {
        LabelData::U16(voxels.iter().map(|&v| v as u16).collect())
    };
    Segmentation::new(labels, geometry, Vec::new())
}

/// Opens a file and checks its header.
fn open(path: &Path) -> Result<(Source, Header)> {
    let mut source = Source::open(path)?;
    let mut bytes = [0; HEADER_LEN];
    let mut found = 0;
    while found < HEADER_LEN {
        match source.read(&mut bytes[found..]) {
            Ok(0) => {
                let what = format!("{found} bytes, expected at least {HEADER_LEN}; not a NIfTI-1 file");
                return Err(Error::image(path, "header", what));
            }
            Ok(n) => found += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(read_error(path, source.is_gzip(), e)),
        }
    }
    let header = Header::parse(path, &bytes)?;
    Ok((source, header))
}

fn warn(path: &Path, header: &Header) {
    for w in &header.warnings {
        tracing::warn!("{}: {w}", path.display());
    }
}

/// Refuses sizes that the bytes of the file cannot hold, before memory is asked for.
fn check_length(path: &Path, header: &Header, source: &Source) -> Result<()> {
    let expected = header.vox_offset + header.data_len();
    if header.pair || source.capacity() >= expected {
        return Ok(());
    }
    Err(too_short(path, header, source, expected))
}

fn too_short(path: &Path, header: &Header, source: &Source, expected: u64) -> Error {
    let [z, y, x] = header.geometry.shape;
    let (c, len) = (header.channels, source.file_len);
    let found = if source.is_gzip() { format!("{len} packed bytes") } else { format!("{len} bytes") };
    let what = format!("{found}, expected {expected} bytes of header and {x} x {y} x {z} x {c} voxels");
    Error::image(path, "file", format!("{what}; it is truncated or its dim is wrong"))
}

/// All channels of one file.
fn read_file(path: &Path, options: &ReadOptions) -> Result<(Vec<Vec<f32>>, Geometry)> {
    let (source, header) = open(path)?;
    let bytes = (header.geometry.len() as u64).saturating_mul(4 * header.channels as u64);
    if bytes > options.max_bytes {
        let [z, y, x] = header.geometry.shape;
        let (c, limit) = (header.channels, options.max_bytes);
        let what = format!("{x} x {y} x {z} x {c} voxels are {bytes} bytes as f32, the limit is {limit} (max_bytes)");
        return Err(Error::image(path, "dim", what));
    }
    warn(path, &header);
    if !header.pair {
        let channels = read_voxels(path, source, &header, HEADER_LEN as u64)?;
        return Ok((channels, header.geometry));
    }
    // The rest of the header file is extensions; a damaged one is refused all the same.
    let mut rest = source;
    rest.drain(path, MAX_TRAILING)?;
    let img = image_of_pair(path)?;
    let channels = read_voxels(&img, Source::open(&img)?, &header, 0)?;
    Ok((channels, header.geometry))
}

/// The .img of a .hdr, packed or not.
fn image_of_pair(hdr: &Path) -> Result<PathBuf> {
    let name = hdr.file_name().and_then(OsStr::to_str).unwrap_or_default();
    let stem = name.strip_suffix(".gz").unwrap_or(name);
    let Some(stem) = stem.strip_suffix(".hdr") else {
        let what = "\"ni1\", the header of a pair of files; expected the name to end in .hdr";
        return Err(Error::image(hdr, "magic", what));
    };
    [format!("{stem}.img"), format!("{stem}.img.gz")]
        .map(|n| hdr.with_file_name(n))
        .into_iter()
        .find(|p| p.exists())
        .ok_or_else(|| Error::image(hdr, "file", format!("no voxels: expected {stem}.img or {stem}.img.gz beside it")))
}

/// Streams the voxels of `source`, which stands at byte `position`.
fn read_voxels(path: &Path, mut source: Source, header: &Header, position: u64) -> Result<Vec<Vec<f32>>> {
    let gzip = source.is_gzip();
    let expected = header.vox_offset + header.data_len();
    if source.capacity() < expected {
        return Err(too_short(path, header, &source, expected));
    }
    let skip = header.vox_offset - position.min(header.vox_offset);
    if source.drain(path, skip)? < skip {
        return Err(too_short(path, header, &source, expected));
    }

    let n = header.geometry.len();
    let decoder = Decoder::new(header);
    let mut channels = Vec::with_capacity(header.channels);
    let [_, ny, nx] = header.geometry.shape;
    // A plane of a hostile header may have gigabytes; a row has at most 256 KiB.
    let size = header.datatype.size_of();
    let rank = if nx * ny * size <= PLANE { 2 } else { 1 };
    let failed = |e| match e {
        NiftiError::Io(e) => read_error(path, gzip, e),
        e => Error::image(path, "voxels", e.to_string()),
    };
    let mut volume = StreamedNiftiVolume::from_reader_rank(&mut source, &header.inner, rank).map_err(failed)?;
    let mut read = |buffer| match volume.next_inline(buffer) {
        Some(next) => Ok(next.map_err(failed)?.into_raw_data()),
        None => Err(Error::image(path, "voxels", "fewer than dim says")),
    };
    let (mut slice, mut spare) = (Vec::new(), Vec::new());
    for _ in 0..header.channels {
        let mut voxels = Vec::new();
        voxels.try_reserve_exact(n).map_err(|_| Error::io("read", path, std::io::ErrorKind::OutOfMemory.into()))?;
        slice = read(slice)?;
        // A slice is unpacked while the one before it is converted.
        while voxels.len() + slice.len() / size < n {
            let next;
            (next, ()) = par::join(|| read(spare), || decoder.append(&slice, &mut voxels));
            spare = std::mem::replace(&mut slice, next?);
        }
        decoder.append(&slice, &mut voxels);
        channels.push(voxels);
    }
    finish(path, source, expected)?;
    Ok(channels)
}

/// Looks at what follows the voxels: in a gzip file the checksum, elsewhere nothing is expected.
fn finish(path: &Path, mut source: Source, expected: u64) -> Result<()> {
    let extra = if source.is_gzip() {
        let extra = source.drain(path, MAX_TRAILING + 1)?;
        if extra > MAX_TRAILING {
            let what = format!("more than {MAX_TRAILING} bytes follow the {expected} that the header announces");
            return Err(Error::image(path, "gzip stream", what));
        }
        if source.has_trailing_garbage() {
            tracing::warn!("{}: bytes that are not gzip follow the image; they are ignored", path.display());
        }
        extra
    } else {
        source.file_len.saturating_sub(expected)
    };
    if extra > 0 {
        tracing::warn!("{}: {extra} bytes follow the voxels; they are ignored", path.display());
    }
    Ok(())
}

/// Compares a further file of an image with the first.
fn matches(path: &Path, header: &Header, first_path: &Path, first: &Geometry, per_file: usize) -> Result<()> {
    let g = &header.geometry;
    let first_name = first_path.display();
    if g.shape != first.shape || header.channels != per_file {
        let [z, y, x] = g.shape;
        let [ez, ey, ex] = first.shape;
        let found = format!("{x} x {y} x {z} voxels in {} channels", header.channels);
        let what = format!("{found}, expected {ex} x {ey} x {ez} in {per_file} as in {first_name}");
        return Err(Error::image(path, "dim", what));
    }
    // numpy.allclose, which nnU-Net compares with.
    let close = |a: f64, b: f64| (a - b).abs() <= 1e-8 + 1e-5 * b.abs();
    if !g.spacing_mm.iter().zip(first.spacing_mm).all(|(&a, b)| close(a, b)) {
        let what =
            format!("spacing {:?} mm (z, y, x), expected {:?} as in {first_name}", g.spacing_mm, first.spacing_mm);
        return Err(Error::image(path, "pixdim", what));
    }
    let [z, y, x] = first.spacing_mm;
    if !affine::same(&g.affine, &first.affine, [x, y, z]) {
        let path = path.display();
        tracing::warn!("{path}: origin or direction differ from {first_name}; those of the first file are used");
    }
    Ok(())
}
