//! NumPy archives, written piece by piece.

use std::io::Write;
use std::path::Path;

use bytemuck::Pod;
use half::f16;
use zip::write::{SimpleFileOptions, StreamWriter};
use zip::{CompressionMethod, DateTime, ZipWriter};

use super::atomic::write_atomically;
use super::zipped::Output;
use crate::error::{Error, Result};

/// Types of numbers in an archive.
pub trait Number: Pod + private::Sealed {
    /// NumPy's letter and size, such as `f4`.
    const KIND: &'static str;
}

mod private {
    #[expect(unnameable_types, reason = "closes the trait to other types")]
    pub trait Sealed {}
}

macro_rules! numbers {
    ($($t:ty: $kind:literal),*) => {$(
        impl private::Sealed for $t {}
        impl Number for $t {
            const KIND: &'static str = $kind;
        }
    )*};
}

numbers!(f16: "f2", f32: "f4", f64: "f8", u8: "u1", u16: "u2", i16: "i2", i32: "i4", i64: "i8");

/// Writes a compressed NumPy archive (`numpy.savez_compressed`); `fill` adds its arrays. The file appears under its
/// name only when it is complete, and equal arrays give equal files.
///
/// # Errors
/// [`Error::Io`] and those of `fill`.
pub fn write_npz(path: impl AsRef<Path>, fill: impl FnOnce(&mut NpzWriter<'_>) -> Result<()>) -> Result<()> {
    let path = path.as_ref();
    write_atomically(path, |file| {
        let mut npz = NpzWriter { zip: ZipWriter::new_stream(Output::new(file)), path };
        fill(&mut npz)?;
        npz.zip.finish().map_err(|e| zip_error(path, e))?;
        Ok(())
    })
}

/// An archive being written.
pub struct NpzWriter<'a> {
    zip: ZipWriter<StreamWriter<Output<'a>>>,
    path: &'a Path,
}

impl NpzWriter<'_> {
    /// Adds the array `name` of the given shape, C order (last axis fastest); `write` hands over its numbers in order,
    /// in pieces of any size.
    ///
    /// # Errors
    /// [`Error::Shape`] when more or fewer numbers come than the shape holds, [`Error::Io`], and those of `write`.
    pub fn array<T: Number>(
        &mut self,
        name: &str,
        shape: &[usize],
        write: impl FnOnce(&mut ArrayWriter<'_, T>) -> Result<()>,
    ) -> Result<()> {
        let bytes = shape.iter().try_fold(size_of::<T>(), |n, &d| n.checked_mul(d));
        let Some(bytes) = bytes else {
            return Err(Error::shape("npz", format!("array {name}: the shape {shape:?} is too large")));
        };
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Deflated)
            .last_modified_time(DateTime::default())
            // Deflate can make data a little larger; entries near 4 GiB need the long form.
            .large_file(bytes as u64 >= 0xf000_0000);
        self.zip.start_file(format!("{name}.npy"), options).map_err(|e| zip_error(self.path, e))?;
        self.zip.write_all(&npy_header(T::KIND, shape)).map_err(|e| Error::io("write", self.path, e))?;
        let count = bytes / size_of::<T>();
        let mut array =
            ArrayWriter { out: &mut self.zip, path: self.path, left: count, kind: std::marker::PhantomData };
        write(&mut array)?;
        if array.left > 0 {
            let what = format!("array {name}: {} numbers, expected {count} for {shape:?}", count - array.left);
            return Err(Error::shape("npz", what));
        }
        Ok(())
    }
}

/// One array of an archive being written.
pub struct ArrayWriter<'a, T> {
    out: &'a mut dyn Write,
    path: &'a Path,
    left: usize,
    kind: std::marker::PhantomData<T>,
}

impl<T: Number> ArrayWriter<'_, T> {
    /// Appends the next numbers.
    ///
    /// # Errors
    /// [`Error::Shape`] when the array is full, [`Error::Io`].
    pub fn push(&mut self, numbers: &[T]) -> Result<()> {
        self.left = self
            .left
            .checked_sub(numbers.len())
            .ok_or_else(|| Error::shape("npz", format!("{} numbers where {} were left", numbers.len(), self.left)))?;
        self.out.write_all(bytemuck::cast_slice(numbers)).map_err(|e| Error::io("write", self.path, e))
    }
}

/// The head of a .npy file, version 1.0: magic, version, length, and a Python dictionary padded to 64 bytes.
fn npy_header(kind: &str, shape: &[usize]) -> Vec<u8> {
    let order = if cfg!(target_endian = "big") { '>' } else { '<' };
    let order = if kind.ends_with('1') { '|' } else { order };
    let axes: String = shape.iter().map(|n| format!("{n}, ")).collect();
    let axes = if shape.len() == 1 { axes.trim_end() } else { axes.trim_end_matches(", ") };
    let mut dict = format!("{{'descr': '{order}{kind}', 'fortran_order': False, 'shape': ({axes}), }}");
    let head = 10;
    let padded = (head + dict.len() + 1).next_multiple_of(64);
    dict.extend(std::iter::repeat_n(' ', padded - head - dict.len() - 1));
    dict.push('\n');
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    // Shapes have a handful of axes, so the dictionary is far below 64 KiB.
    bytes.extend_from_slice(&(dict.len() as u16).to_le_bytes());
    bytes.extend_from_slice(dict.as_bytes());
    bytes
}

fn zip_error(path: &Path, e: zip::result::ZipError) -> Error {
    Error::io("write", path, std::io::Error::from(e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;

    fn read(path: &Path, entry: &str) -> Vec<u8> {
        let mut zip = zip::ZipArchive::new(File::open(path).unwrap()).unwrap();
        let mut bytes = Vec::new();
        zip.by_name(entry).unwrap().read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn header_is_numpys() {
        let h = npy_header("f2", &[3, 4, 5, 6]);
        assert_eq!(h.len() % 64, 0);
        assert_eq!(usize::from(u16::from_le_bytes([h[8], h[9]])), h.len() - 10);
        let text = std::str::from_utf8(&h[10..]).unwrap();
        assert!(text.starts_with("{'descr': '<f2', 'fortran_order': False, 'shape': (3, 4, 5, 6), } "), "{text}");
        assert!(text.ends_with(" \n"));
        assert!(
            String::from_utf8_lossy(&npy_header("u1", &[7])).contains("'|u1', 'fortran_order': False, 'shape': (7,)")
        );
        assert!(String::from_utf8_lossy(&npy_header("f4", &[])).contains("'shape': ()"));
    }

    #[test]
    fn pieces_make_an_array_and_the_same_bytes_each_time() {
        let dir = tempfile::tempdir().unwrap();
        let values: Vec<f16> = (0..24).map(|i| f16::from_f32(i as f32 / 8.0)).collect();
        let write = |name: &str, piece: usize| {
            let path = dir.path().join(name);
            write_npz(&path, |npz| {
                npz.array("probabilities", &[2, 3, 4], |a| values.chunks(piece).try_for_each(|p| a.push(p)))?;
                npz.array("shape", &[2], |a| a.push(&[5_i64, -1]))
            })
            .unwrap();
            path
        };
        let (a, b) = (write("a.npz", 5), write("b.npz", 5));
        assert_eq!(std::fs::read(&a).unwrap(), std::fs::read(b).unwrap());
        let entry = read(&a, "probabilities.npy");
        assert_eq!(&entry[entry.len() - 48..], bytemuck::cast_slice::<f16, u8>(&values));
        assert_eq!(read(&a, "shape.npy").len() % 64, 16);
    }

    #[test]
    fn too_few_or_too_many_numbers_leave_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.npz");
        for n in [3, 5] {
            let e = write_npz(&path, |npz| npz.array("a", &[4], |a| a.push(&vec![0_f32; n]))).unwrap_err();
            assert!(matches!(e, Error::Shape { .. }), "{e}");
        }
        let e = write_npz(&path, |npz| npz.array::<f32>("a", &[usize::MAX, 2], |_| Ok(()))).unwrap_err();
        assert!(e.to_string().contains("too large"), "{e}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
