//! Images and label maps to NIfTI-1 files.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use super::gzip::Packer;
use super::header::{HEADER_LEN, Header};
use crate::error::{Error, Result};
use crate::io::atomic::write_atomically;
use crate::io::image::{Geometry, Image, LabelData, Segmentation};

/// The voxels start after the header and four bytes that say that there are no extensions.
const VOX_OFFSET: u16 = 352;
/// Numbers converted at a time.
const CHUNK: usize = 64 << 10;

/// Types that are written, with their NIfTI code.
#[derive(Clone, Copy)]
enum DataType {
    Uint8 = 2,
    Int16 = 4,
    Float32 = 16,
    Uint16 = 512,
}

impl DataType {
    fn bits(self) -> i16 {
        match self {
            DataType::Uint8 => 8,
            DataType::Int16 | DataType::Uint16 => 16,
            DataType::Float32 => 32,
        }
    }
}

/// Writes a label map as `.nii` or, packed, `.nii.gz`: uint8 or uint16, as its [`LabelData`] is.
///
/// The geometry is that of the input image bit for bit: dimensions, `pixdim`, qform, sform, their codes and the units
/// come from its header, in little-endian order. Equal label maps give equal files. The file appears under its name
/// only when it is complete and on the disk.
///
/// # Errors
/// [`Error::Usage`] when the name ends in neither `.nii` nor `.nii.gz` or an axis is longer than 32767 voxels,
/// [`Error::Shape`] when labels and grid differ in size, [`Error::Io`].
pub fn write_nifti(path: impl AsRef<Path>, segmentation: &Segmentation) -> Result<()> {
    let (path, geometry) = (path.as_ref(), &segmentation.geometry);
    check_len("segmentation", segmentation.labels.len(), geometry)?;
    let datatype = match segmentation.labels {
        LabelData::U8(_) => DataType::Uint8,
        LabelData::U16(_) => DataType::Uint16,
    };
    write_file(path, geometry, 1, datatype, |w| match &segmentation.labels {
        LabelData::U8(v) => w.write_all(v),
        LabelData::U16(v) => write_numbers(w, v, |l| l.to_le_bytes()),
    })
}

/// Writes an image as `.nii` or `.nii.gz`, several channels as the fourth dimension: int16 when every voxel is a whole
/// number of that range, as CT is, else float32. Geometry and file as in [`write_nifti`].
///
/// # Errors
/// Those of [`write_nifti`].
pub fn write_image(path: impl AsRef<Path>, image: &Image) -> Result<()> {
    let (path, geometry) = (path.as_ref(), &image.geometry);
    for channel in &image.channels {
        check_len("image", channel.len(), geometry)?;
    }
    let fits = |v: &f32| *v >= f32::from(i16::MIN) && *v <= f32::from(i16::MAX) && v.fract() == 0.0;
    let datatype = if image.channels.iter().flatten().all(fits) { DataType::Int16 } else { DataType::Float32 };
    write_file(path, geometry, image.channels.len(), datatype, |w| {
        image.channels.iter().try_for_each(|channel| match datatype {
            DataType::Int16 => write_numbers(w, channel, |v| (v as i16).to_le_bytes()),
            _ => write_numbers(w, channel, f32::to_le_bytes),
        })
    })
}

fn check_len(op: &'static str, n: usize, geometry: &Geometry) -> Result<()> {
    if n != geometry.len() || n == 0 {
        return Err(Error::shape(op, format!("{n} voxels, expected the grid's {} and at least 1", geometry.len())));
    }
    Ok(())
}

/// Numbers as little-endian bytes, a bounded piece at a time.
fn write_numbers<T: Copy, const N: usize>(
    w: &mut dyn Write,
    numbers: &[T],
    bytes: impl Fn(T) -> [u8; N],
) -> std::io::Result<()> {
    let mut buffer = Vec::with_capacity(CHUNK.min(numbers.len()) * N);
    for chunk in numbers.chunks(CHUNK) {
        buffer.clear();
        chunk.iter().for_each(|&v| buffer.extend_from_slice(&bytes(v)));
        w.write_all(&buffer)?;
    }
    Ok(())
}

fn write_file(
    path: &Path,
    geometry: &Geometry,
    channels: usize,
    datatype: DataType,
    voxels: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> Result<()> {
    let gzip = is_packed(path)?;
    let header = header_bytes(path, geometry, channels, datatype)?;
    let head_and_voxels = |w: &mut dyn Write| {
        w.write_all(&header)?;
        w.write_all(&[0; VOX_OFFSET as usize - HEADER_LEN])?;
        voxels(w)
    };
    write_atomically(path, |file: &mut BufWriter<File>| {
        let written = if gzip {
            Packer::new(file).and_then(|mut w| {
                head_and_voxels(&mut w)?;
                w.finish()
            })
        } else {
            head_and_voxels(file)
        };
        written.map_err(|e| Error::io("write", path, e))
    })
}

/// Whether the name asks for gzip.
fn is_packed(path: &Path) -> Result<bool> {
    let name = path.file_name().map(|n| n.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
    match () {
        () if name.ends_with(".nii.gz") => Ok(true),
        () if name.ends_with(".nii") => Ok(false),
        () => Err(Error::usage(format!("cannot write {}: expected a name ending in .nii.gz or .nii", path.display()))),
    }
}

/// The header of the file to write.
fn header_bytes(path: &Path, geometry: &Geometry, channels: usize, datatype: DataType) -> Result<[u8; HEADER_LEN]> {
    let axis = |n: usize| {
        i16::try_from(n).ok().filter(|&n| n > 0).ok_or_else(|| {
            let what = format!("cannot write {}: an axis of {n} voxels, expected 1 to 32767", path.display());
            Error::usage(what)
        })
    };
    let [z, y, x] = geometry.shape;
    let (x, y, z, c) = (axis(x)?, axis(y)?, axis(z)?, axis(channels)?);
    let mut h = original(path, geometry).unwrap_or_else(|| from_fields(geometry));
    let put = |h: &mut [u8; HEADER_LEN], at: usize, bytes: &[u8]| h[at..at + bytes.len()].copy_from_slice(bytes);
    let flat = i16::from_le_bytes([h[40], h[41]]) == 2 && z == 1;
    let rank = match (c, flat) {
        (1, true) => 2,
        (1, false) => 3,
        _ => 4,
    };
    for (i, n) in [rank, x, y, z, c, 1, 1, 1].into_iter().enumerate() {
        put(&mut h, 40 + 2 * i, &n.to_le_bytes());
    }
    // The meaning of the input's values (a statistic, a vector) is not that of the output's.
    put(&mut h, 56, &[0; 14]);
    put(&mut h, 328, &[0; 16]);
    put(&mut h, 70, &(datatype as i16).to_le_bytes());
    put(&mut h, 72, &datatype.bits().to_le_bytes());
    for (at, v) in [(108, f32::from(VOX_OFFSET)), (112, 1.0), (116, 0.0), (124, 0.0), (128, 0.0)] {
        put(&mut h, at, &v.to_le_bytes());
    }
    // glmax, glmin
    put(&mut h, 140, &[0; 8]);
    put(&mut h, 344, b"n+1\0");
    Ok(h)
}

/// The header that the geometry came from, if it still says what the geometry says.
fn original(path: &Path, geometry: &Geometry) -> Option<[u8; HEADER_LEN]> {
    let bytes: [u8; HEADER_LEN] = geometry.header.as_deref()?.try_into().ok()?;
    let parsed = Header::parse(path, &bytes).ok()?.geometry;
    // Compared as bits of the fields: whoever crops or moves a grid changes them and not the header.
    let same =
        parsed.shape == geometry.shape && parsed.spacing_mm == geometry.spacing_mm && parsed.affine == geometry.affine;
    same.then_some(bytes)
}

/// A new header: millimetres, the affine as sform.
fn from_fields(geometry: &Geometry) -> [u8; HEADER_LEN] {
    let mut h = [0; HEADER_LEN];
    let mut put = |at: usize, bytes: &[u8]| h[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &348_i32.to_le_bytes());
    // "regular", which old readers look for.
    put(38, b"r");
    let [z, y, x] = geometry.spacing_mm;
    for (i, v) in [1.0, x, y, z, 1.0, 1.0, 1.0, 1.0].into_iter().enumerate() {
        put(76 + 4 * i, &(v as f32).to_le_bytes());
    }
    const MILLIMETRES: u8 = 2;
    const SCANNER: i16 = 1;
    put(123, &[MILLIMETRES]);
    put(254, &SCANNER.to_le_bytes());
    for (i, v) in geometry.affine.iter().flatten().enumerate() {
        put(280 + 4 * i, &(*v as f32).to_le_bytes());
    }
    h
}
