//! NumPy's `.npy` files and the entries of `.npz` archives, read.

use std::io::{Cursor, Read};
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;
use zip::ZipArchive;

use super::boxes::{Flat, to_f32};
use super::weights::{map_file, printable};
use super::zipped;
use crate::error::{Error, Result};
use crate::tensor::DType;

/// NumPy's headers have some hundred bytes.
const MAX_HEADER: usize = 64 << 10;

/// Deflate makes at most this many bytes of one.
const MAX_RATIO: usize = 1032;

/// Opens a `.npy` file of four axes, or of three as a single channel, mapped.
///
/// # Errors
/// [`Error::Io`]; [`Error::Model`] when it is damaged, of another type or of another number of axes.
pub(crate) fn open_npy(path: &Path) -> Result<Flat> {
    let map = map_file(path)?;
    let header = Header::read(&map).map_err(|what| Error::model(path, "npy header", what))?;
    header.flat(path, Arc::new(map))
}

/// Reads the array `name` of an `.npz` archive into memory; `None` where it holds no such array.
///
/// # Errors
/// As [`open_npy`].
pub(crate) fn read_npz(path: &Path, name: &str) -> Result<Option<Flat>> {
    let map = map_file(path)?;
    let bad = |e: String| Error::model(path, printable(name), printable(&e));
    let mut archive = zipped::open(Cursor::new(&map[..])).map_err(|what| Error::model(path, "zip", what))?;
    let entry = format!("{name}.npy");
    if !archive.file_names().any(|n| n.is_ok_and(|n| n == entry)) {
        return Ok(None);
    }
    let entry = archive.by_name(&entry).map_err(|e| bad(e.to_string()))?;
    // What the compressed bytes of this file can hold, whatever the sizes in it say.
    let packed = usize::try_from(entry.compressed_size()).unwrap_or(usize::MAX).min(map.len());
    let most = packed.saturating_mul(MAX_RATIO).saturating_add(MAX_HEADER);
    let mut bytes = Vec::new();
    let stated = usize::try_from(entry.size()).unwrap_or(usize::MAX).min(most);
    bytes.try_reserve_exact(stated).map_err(|_| out_of_memory(stated))?;
    entry.take(most as u64).read_to_end(&mut bytes).map_err(|e| bad(e.to_string()))?;
    let header = Header::read(&bytes).map_err(bad)?;
    header.flat(path, Arc::new(bytes)).map(Some)
}

/// Shape of the array `name` of an `.npz` archive, of which only the beginning is unpacked.
///
/// # Errors
/// As [`open_npy`]; [`Error::Model`] where it holds no such array.
pub(crate) fn npz_shape(path: &Path, name: &str) -> Result<[usize; 4]> {
    let mut archive = Archive::open(path)?;
    let (_, header) = archive.begin(name)?;
    header.axes(path)
}

/// An `.npz` archive, mapped, whose arrays are read a channel at a time.
pub(crate) struct Archive<'a> {
    path: &'a Path,
    zip: ZipArchive<Cursor<Mmap>>,
}

impl<'a> Archive<'a> {
    /// # Errors
    /// [`Error::Io`]; [`Error::Model`] when it is no archive.
    pub(crate) fn open(path: &'a Path) -> Result<Self> {
        let zip = zipped::open(Cursor::new(map_file(path)?)).map_err(|what| Error::model(path, "zip", what))?;
        Ok(Self { path, zip })
    }

    /// The array `name` of four axes and a type of floats, from its beginning.
    ///
    /// # Errors
    /// [`Error::Model`] when it is missing, damaged, of another type or of another number of axes.
    pub(crate) fn stream(&mut self, name: &str) -> Result<Stream<'_>> {
        let path = self.path;
        let (entry, header) = self.begin(name)?;
        if !matches!(header.dtype, DType::F16 | DType::F32 | DType::F64) {
            return Err(Error::model(path, printable(name), "no floating-point numbers"));
        }
        let shape = header.axes(path)?;
        let bytes = shape.iter().try_fold(header.dtype.size(), |n, &d| n.checked_mul(d));
        if bytes.is_none_or(|n| isize::try_from(n).is_err()) {
            return Err(Error::model(path, "shape", format!("{shape:?}, more than any memory holds")));
        }
        Ok(Stream { path, entry, dtype: header.dtype, shape, bytes: Vec::new() })
    }

    /// The array `name` behind its header.
    fn begin(&mut self, name: &str) -> Result<(Box<dyn Read + '_>, Header)> {
        let path = self.path;
        let bad = |e: String| Error::model(path, printable(name), printable(&e));
        let entry = self.zip.by_name(&format!("{name}.npy")).map_err(|e| bad(e.to_string()))?;
        let mut entry: Box<dyn Read + '_> = Box::new(entry);
        // Magic and version, then the length of the rest in two or in four bytes.
        let mut head = Vec::new();
        let mut more = |n: usize, head: &mut Vec<u8>| {
            let from = head.len();
            head.resize(from + n, 0);
            entry.read_exact(&mut head[from..]).map_err(|e| bad(e.to_string()))
        };
        more(8, &mut head)?;
        let wide = head[6] != 1;
        more(if wide { 4 } else { 2 }, &mut head)?;
        let len = head[8..].iter().rev().fold(0usize, |n, b| n << 8 | usize::from(*b));
        more(len.min(MAX_HEADER), &mut head)?;
        let header = Header::read(&head).map_err(bad)?;
        Ok((entry, header))
    }
}

/// An array of an archive on its way through.
pub(crate) struct Stream<'a> {
    path: &'a Path,
    entry: Box<dyn Read + 'a>,
    dtype: DType,
    shape: [usize; 4],
    bytes: Vec<u8>,
}

impl Stream<'_> {
    /// Channels and (z, y, x).
    pub(crate) fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// The next numbers, as many as `out` has room for.
    ///
    /// # Errors
    /// [`Error::Model`] when they are not there.
    pub(crate) fn read(&mut self, out: &mut [f32]) -> Result<()> {
        for out in out.chunks_mut(1 << 16) {
            self.bytes.resize(out.len() * self.dtype.size(), 0);
            self.entry.read_exact(&mut self.bytes).map_err(|e| Error::model(self.path, "array", e.to_string()))?;
            to_f32(self.dtype, &self.bytes, out);
        }
        Ok(())
    }

    /// After the last number: the archive's checksum is compared at its end.
    ///
    /// # Errors
    /// [`Error::Model`] when it is another one, or when there are more numbers.
    pub(crate) fn finish(&mut self) -> Result<()> {
        let bad = |e: String| Error::model(self.path, "array", e);
        match self.entry.read(&mut [0]).map_err(|e| bad(e.to_string()))? {
            0 => Ok(()),
            _ => Err(bad("more numbers than its shape has".into())),
        }
    }
}

fn out_of_memory(asked: usize) -> Error {
    Error::OutOfMemory { what: "an array of an npz file".into(), asked, in_use: 0, limit: isize::MAX as usize }
}

/// A type of elements by NumPy's name for it.
pub(super) fn element(name: &str) -> Result<DType, String> {
    Ok(match name {
        "<f4" => DType::F32,
        "<f8" => DType::F64,
        "<f2" => DType::F16,
        "<i8" => DType::I64,
        "<i4" => DType::I32,
        "<i2" => DType::I16,
        "|i1" => DType::I8,
        "|u1" => DType::U8,
        "|b1" => DType::Bool,
        other => return Err(format!("elements of type {:?}, expected f2 to f8, i1 to i8 or u1", printable(other))),
    })
}

/// What stands before the elements.
#[derive(Debug, PartialEq)]
struct Header {
    dtype: DType,
    shape: Vec<usize>,
    /// Where the elements begin.
    start: usize,
}

impl Header {
    fn read(file: &[u8]) -> Result<Self, String> {
        let short = || "cut short".to_string();
        let Some([b'\x93', b'N', b'U', b'M', b'P', b'Y', version, _]) = file.first_chunk() else {
            return Err("not a NumPy file".into());
        };
        let (len, head) = match version {
            1 => (file.get(8..10).map(|b| usize::from(u16::from_le_bytes([b[0], b[1]]))), 10),
            2 | 3 => (file.get(8..12).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize), 12),
            v => return Err(format!("version {v}, expected 1 to 3")),
        };
        let len = len.ok_or_else(short)?;
        if len > MAX_HEADER {
            return Err(format!("a header of {len} bytes"));
        }
        let text = file.get(head..head + len).ok_or_else(short)?;
        let text = std::str::from_utf8(text).map_err(|_| "not a text".to_string())?;
        let value = |key: &str| {
            let after = &text[text.find(&format!("'{key}'"))? + key.len() + 2..];
            after.trim_start().strip_prefix(':').map(str::trim_start)
        };
        let descr = value("descr").and_then(|v| v.strip_prefix('\'')?.split('\'').next());
        let dtype = element(descr.ok_or("no plain element type")?)?;
        if !value("fortran_order").is_some_and(|v| v.starts_with("False")) {
            return Err("in Fortran's order, expected C's".into());
        }
        let shape = value("shape").and_then(|v| v.strip_prefix('(')?.split(')').next()).ok_or("no shape")?;
        let axes = shape.split(',').map(str::trim).filter(|n| !n.is_empty());
        let shape = axes.map(|n| n.parse().map_err(|_| "a shape of other than numbers".to_string()));
        Ok(Self { dtype, shape: shape.collect::<Result<_, _>>()?, start: head + len })
    }

    /// Channel, z, y, x.
    fn axes(&self, path: &Path) -> Result<[usize; 4]> {
        match *self.shape.as_slice() {
            [z, y, x] => Ok([1, z, y, x]),
            [c, z, y, x] => Ok([c, z, y, x]),
            _ => {
                let what = format!("{} axes, expected (channel, z, y, x) or (z, y, x)", self.shape.len());
                Err(Error::model(path, "shape", what))
            }
        }
    }

    fn flat(self, path: &Path, bytes: Arc<dyn AsRef<[u8]> + Send + Sync>) -> Result<Flat> {
        let shape = self.axes(path)?;
        Flat::new(bytes, self.start, self.dtype, shape)
            .ok_or_else(|| Error::model(path, "shape", format!("{shape:?}, more elements than the file holds")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::boxes::{Boxes, to_i16};
    use crate::io::write_npz;

    fn npy(dict: &str, body: &[u8]) -> Vec<u8> {
        let mut out = b"\x93NUMPY\x01\0".to_vec();
        out.extend((dict.len() as u16).to_le_bytes());
        out.extend(dict.as_bytes());
        out.extend(body);
        out
    }

    fn message(dict: &str, body: usize) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.npy");
        std::fs::write(&path, npy(dict, &vec![0; body])).unwrap();
        open_npy(&path).map(|f| f.shape()).unwrap_err().to_string()
    }

    #[test]
    fn damaged_headers_are_refused() {
        let dict = |descr: &str, order: &str, shape: &str| {
            format!("{{'descr': '{descr}', 'fortran_order': {order}, 'shape': ({shape}), }}\n")
        };
        for (text, body, expected) in [
            (dict("<f4", "False", "1, 2, 3, 4"), 95, "more elements"),
            (dict("<f4", "False", "4294967296, 4294967296, 4294967296, 2"), 96, "more elements"),
            (dict("<f4", "True", "1, 2, 3, 4"), 96, "Fortran"),
            (dict(">f4", "False", "1, 2, 3, 4"), 96, "type"),
            (dict("<U4", "False", "1, 2, 3, 4"), 96, "type"),
            (dict("<f4", "False", "3, 4"), 48, "2 axes"),
            (dict("<f4", "False", "1, -2, 3, 4"), 96, "other than numbers"),
            ("{'descr': [('a', '<f4')]}".into(), 96, "no plain"),
        ] {
            let message = message(&text, body);
            assert!(message.contains(expected) && message.contains("x.npy"), "{message}");
        }
        assert!(Header::read(b"\x93NUMPY\x02\0\xff\xff\xff\xff").is_err());
        assert!(Header::read(b"\x93NUMPY\x01\0\xff\xff").is_err());
        assert!(Header::read(b"PK").is_err());
    }

    #[test]
    fn arrays_of_an_archive_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.npz");
        let data: Vec<f32> = (0..48).map(|i| i as f32 / 7.0).collect();
        let labels: Vec<i16> = (0..24).map(|i| i - 1).collect();
        write_npz(&path, |npz| {
            npz.array("data", &[2, 2, 3, 4], |a| a.push(&data))?;
            npz.array("seg", &[1, 2, 3, 4], |a| a.push(&labels))
        })
        .unwrap();
        let flat = read_npz(&path, "data").unwrap().unwrap();
        assert_eq!((flat.dtype(), flat.shape()), (DType::F32, [2, 2, 3, 4]));
        let mut found = vec![0.0; 2];
        flat.pieces(1, [1, 2, 1], [2, 3, 3], &mut |at, bytes| {
            assert_eq!(at, [1, 2, 1]);
            to_f32(DType::F32, bytes, &mut found);
        })
        .unwrap();
        assert_eq!(found, data[24 + 12 + 8 + 1..][..2]);
        let flat = read_npz(&path, "seg").unwrap().unwrap();
        let mut found = Vec::new();
        flat.pieces(0, [0; 3], [2, 3, 4], &mut |_, bytes| {
            let mut row = [0; 4];
            to_i16(flat.dtype(), bytes, &mut row);
            found.extend(row);
        })
        .unwrap();
        assert_eq!(found, labels);
        assert!(read_npz(&path, "other").unwrap().is_none());
        let bytes = std::fs::read(&path).unwrap();
        for n in (0..bytes.len()).step_by(7) {
            std::fs::write(&path, &bytes[..n]).unwrap();
            assert!(read_npz(&path, "data").is_err(), "{n}");
        }
    }
}
