//! Checkpoints that `torch.load` reads: the zip container of `torch.save` since PyTorch 1.6.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use serde_json::Value;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, DateTime, ZipWriter};

use crate::error::{Error, Result};
use crate::io::atomic::write_atomically;

/// Where `torch.save` puts the bytes of a storage, so that they can be mapped.
const ALIGNMENT: u16 = 64;

/// A Python object.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Py {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Str(String),
    Tuple(Vec<Py>),
    List(Vec<Py>),
    Dict(Vec<(Py, Py)>),
    /// `collections.OrderedDict`.
    OrderedDict(Vec<(Py, Py)>),
    /// A function or class by its module and name.
    Global(&'static str, &'static str),
    /// `torch.device` of this name.
    Device(&'static str),
    /// `numpy.ndarray` of int64 with rows of four.
    Rows(Vec<[i64; 4]>),
    /// A contiguous tensor of floats: the storage of this number, whole. Tensors of one storage share its memory.
    Tensor {
        storage: usize,
        shape: Vec<usize>,
    },
}

impl From<&Value> for Py {
    fn from(v: &Value) -> Self {
        match v {
            Value::Null => Py::None,
            Value::Bool(b) => Py::Bool(*b),
            Value::Number(n) => n.as_i64().map_or_else(|| Py::Float(n.as_f64().unwrap_or(f64::NAN)), Py::Int),
            Value::String(s) => Py::Str(s.clone()),
            Value::Array(items) => Py::List(items.iter().map(Py::from).collect()),
            Value::Object(map) => Py::Dict(map.iter().map(|(k, v)| (Py::Str(k.clone()), Py::from(v))).collect()),
        }
    }
}

/// Text keys with their values.
pub(crate) fn dict<const N: usize>(items: [(&str, Py); N]) -> Py {
    Py::Dict(items.into_iter().map(|(k, v)| (Py::Str(k.into()), v)).collect())
}

/// The floats of a storage, asked for when their turn comes.
pub(crate) type Storage<'a> = Box<dyn Fn() -> Result<Vec<f32>> + 'a>;

/// Writes `object`, whose tensors lie in `storages`, as `torch.save` does. Equal contents give equal files.
///
/// # Errors
/// Those of the storages, [`Error::Shape`] when a tensor is not the whole of its storage, [`Error::Io`].
pub(crate) fn write(path: &Path, object: &Py, storages: &[Storage<'_>]) -> Result<()> {
    // As torch.save names the archive's folder.
    let root = path.file_stem().map_or_else(|| "archive".into(), |s| s.to_string_lossy().into_owned());
    let mut lens = vec![None; storages.len()];
    let mut pickle = vec![0x80, 2];
    put(object, &mut pickle, &mut lens)?;
    pickle.push(b'.');
    write_atomically(path, |file| {
        let mut out = Archive { zip: Some(ZipWriter::new(file)), path, root };
        out.entry("data.pkl", &pickle)?;
        out.entry(".format_version", b"1")?;
        out.entry(".storage_alignment", b"64")?;
        out.entry("byteorder", b"little")?;
        let mut bytes = Vec::new();
        for (i, (storage, len)) in storages.iter().zip(&lens).enumerate() {
            let values = storage()?;
            if len.is_some_and(|n| n != values.len()) {
                return Err(Error::shape("checkpoint", format!("storage {i} of {} values, not {len:?}", values.len())));
            }
            bytes.clear();
            bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
            out.entry(&format!("data/{i}"), &bytes)?;
        }
        out.entry("version", b"3\n")?;
        out.finish()
    })
}

/// An archive being written.
struct Archive<'a> {
    zip: Option<ZipWriter<&'a mut BufWriter<File>>>,
    path: &'a Path,
    root: String,
}

impl Archive<'_> {
    fn entry(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Stored)
            .last_modified_time(DateTime::default())
            .with_alignment(ALIGNMENT)
            .large_file(bytes.len() as u64 >= 0xf000_0000);
        let name = format!("{}/{name}", self.root);
        let Some(zip) = &mut self.zip else { return Ok(()) };
        let written = zip.start_file(name, options).map_err(std::io::Error::from).and_then(|()| zip.write_all(bytes));
        written.map_err(|e| self.failed(e))
    }

    fn finish(mut self) -> Result<()> {
        let Some(zip) = self.zip.take() else { return Ok(()) };
        zip.finish().map(drop).map_err(|e| Error::io("write", self.path, e.into()))
    }

    /// A `ZipWriter` that is dropped unfinished tries to finish, and complains on stderr when it cannot: it is forgotten,
    /// and owns nothing but small lists.
    fn failed(&mut self, e: std::io::Error) -> Error {
        std::mem::forget(self.zip.take());
        Error::io("write", self.path, e)
    }
}

impl Drop for Archive<'_> {
    fn drop(&mut self) {
        std::mem::forget(self.zip.take());
    }
}

/// A pickle that is a file by itself, without tensors.
///
/// # Errors
/// [`Error::Shape`] when there are tensors in it.
pub(crate) fn pickled(object: &Py) -> Result<Vec<u8>> {
    // The first protocol that has bytes.
    let mut out = vec![0x80, 3];
    put(object, &mut out, &mut [])?;
    out.push(b'.');
    Ok(out)
}

/// Instructions of pickle's protocol 2, `torch.save`'s (3 for arrays), that leave `value` on the stack. `lens` learns the number of
/// values of each storage.
fn put(value: &Py, out: &mut Vec<u8>, lens: &mut [Option<usize>]) -> Result<()> {
    match value {
        Py::None => out.push(b'N'),
        Py::Bool(b) => out.push(if *b { 0x88 } else { 0x89 }),
        Py::Int(i) => int(*i, out),
        Py::Float(f) => {
            out.push(b'G');
            out.extend(f.to_be_bytes());
        }
        Py::Str(s) => text(s, out),
        Py::Tuple(items) => {
            out.push(b'(');
            items.iter().try_for_each(|i| put(i, out, lens))?;
            out.push(b't');
        }
        Py::List(items) => {
            out.extend(b"](");
            items.iter().try_for_each(|i| put(i, out, lens))?;
            out.push(b'e');
        }
        Py::Dict(items) => {
            out.push(b'}');
            entries(items, out, lens)?;
        }
        Py::OrderedDict(items) => {
            out.extend(b"ccollections\nOrderedDict\n)R");
            entries(items, out, lens)?;
        }
        Py::Global(module, name) => out.extend(format!("c{module}\n{name}\n").bytes()),
        Py::Device(name) => {
            out.extend(b"ctorch\ndevice\n");
            text(name, out);
            out.extend([0x85, b'R']);
        }
        Py::Rows(rows) => {
            // An array made empty, then its state: version, shape, type, order, bytes.
            out.extend(b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85C\x01btR(K\x01(");
            int(rows.len() as i64, out);
            int(4, out);
            out.extend(b"tcnumpy\ndtype\n(");
            text("i8", out);
            out.extend(b"\x89\x88tR(K\x03");
            text("<", out);
            out.extend(b"NNN");
            int(-1, out);
            int(-1, out);
            out.extend(b"K\0tb\x89B");
            let bytes = u32::try_from(rows.len() * 32).map_err(|_| Error::shape("pickle", "an array above 4 GiB"))?;
            out.extend(bytes.to_le_bytes());
            out.extend(rows.as_flattened().iter().flat_map(|v| v.to_le_bytes()));
            out.extend(b"tb");
        }
        Py::Tensor { storage, shape } => {
            let len = shape.iter().product();
            match lens.get_mut(*storage) {
                Some(known) if known.is_none_or(|n| n == len) => *known = Some(len),
                _ => return Err(Error::shape("checkpoint", format!("a tensor {shape:?} of storage {storage}"))),
            }
            out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
            text("storage", out);
            out.extend(b"ctorch\nFloatStorage\n");
            text(&storage.to_string(), out);
            text("cpu", out);
            int(len as i64, out);
            // The storage by its number, offset, sizes, strides, no gradient, no hooks.
            out.extend(b"tQK\0(");
            shape.iter().for_each(|d| int(*d as i64, out));
            out.extend(b"t(");
            (1..=shape.len()).for_each(|a| int(shape[a..].iter().product::<usize>() as i64, out));
            out.extend(b"t\x89ccollections\nOrderedDict\n)RtR");
        }
    }
    Ok(())
}

fn entries(items: &[(Py, Py)], out: &mut Vec<u8>, lens: &mut [Option<usize>]) -> Result<()> {
    out.push(b'(');
    for (k, v) in items {
        put(k, out, lens)?;
        put(v, out, lens)?;
    }
    out.push(b'u');
    Ok(())
}

fn text(s: &str, out: &mut Vec<u8>) {
    out.push(b'X');
    out.extend((s.len() as u32).to_le_bytes());
    out.extend(s.bytes());
}

fn int(i: i64, out: &mut Vec<u8>) {
    match (u8::try_from(i), i32::try_from(i)) {
        (Ok(i), _) => out.extend([b'K', i]),
        (_, Ok(i)) => {
            out.push(b'J');
            out.extend(i.to_le_bytes());
        }
        _ => {
            out.extend([0x8a, 8]);
            out.extend(i.to_le_bytes());
        }
    }
}
