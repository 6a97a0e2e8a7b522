//! PyTorch checkpoints, read without running anything: both containers of `torch.save`, and plain pickles.

mod legacy;
mod numpy;
mod pickle;
mod text;
mod value;
pub(crate) mod write;
mod zip;

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use crate::error::{Error, Result};
use crate::tensor::DType;

pub(crate) use value::{Pickle, View};

use value::Callable;

const MAX_RANK: usize = 8;

/// 1 % of 3 x 10^9 labelled voxels, more than any case has.
const MAX_CASE_PICKLE_BYTES: usize = 1 << 30;

/// Where a tensor's elements lie in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TensorPlace {
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    /// Steps between neighbours along each axis, in elements.
    pub(crate) strides: Vec<usize>,
    /// Byte offset of the first element.
    pub(crate) start: usize,
    /// Number of elements. All of them lie within the file.
    pub(crate) len: usize,
}

/// An open checkpoint: its object graph and where its storages lie.
#[derive(Debug)]
pub(crate) struct TorchFile {
    pub(crate) object: Pickle,
    pub(crate) storages: Storages,
}

/// The raw data of a checkpoint's tensors, by key, with the checksum that is still to be checked.
#[derive(Debug)]
pub(crate) struct Storages(HashMap<String, (Range<usize>, Option<u32>)>);

/// Reads a pickle that is a whole file, such as nnU-Net v1's `plans.pkl`.
pub(crate) fn read_pickle(path: &Path) -> Result<Pickle> {
    read_up_to(path, pickle::MAX_PICKLE_BYTES)
}

/// Reads the pickle of a preprocessed case: nnU-Net lists 32 bytes for 1 % of the voxels of every class in it.
pub(crate) fn read_case_pickle(path: &Path) -> Result<Pickle> {
    read_up_to(path, MAX_CASE_PICKLE_BYTES)
}

fn read_up_to(path: &Path, limit: usize) -> Result<Pickle> {
    let io = |e| Error::io("read", path, e);
    let meta = std::fs::metadata(path).map_err(io)?;
    let size = meta.len();
    if !meta.is_file() {
        return Err(Error::model(path, "file", "not a regular file"));
    }
    if size > limit as u64 {
        let what = format!("{size} bytes, expected a pickle of at most {limit}");
        return Err(Error::model(path, "file size", what));
    }
    named(path, "pickle", pickle::parse_all(&std::fs::read(path).map_err(io)?))
}

fn parse(path: &Path, part: &str, bytes: &[u8]) -> Result<Pickle> {
    named(path, part, pickle::parse(bytes))
}

fn named(path: &Path, part: &str, parsed: Result<(Pickle, usize), pickle::Fault>) -> Result<Pickle> {
    match parsed {
        Ok((pickle, _)) => Ok(pickle),
        Err(fault) => Err(Error::model(path, format!("{part} byte {}", fault.at), fault.what)),
    }
}

/// Part of a file at fault, and what is wrong with it.
type Fault = (String, String);

/// True when the file looks like one of `torch.save`'s containers. The length that a safetensors file begins with may have
/// any bytes, but a brace follows it, which stands there in neither container.
pub(crate) fn is_torch(file: &[u8]) -> bool {
    // The length that a safetensors file begins with may have the same first bytes; no container of `torch.save` has a
    // length that its file could hold there.
    let header = file.first_chunk().map_or(u64::MAX, |n| u64::from_le_bytes(*n));
    let safetensors = header < file.len() as u64 && file.get(8) == Some(&b'{');
    !safetensors && (file.starts_with(b"PK") || file.first() == Some(&0x80))
}

impl TorchFile {
    /// Reads the object graph of a checkpoint; `file` is the whole file.
    pub(crate) fn open(path: &Path, file: &[u8]) -> Result<TorchFile> {
        let model = |(field, what): Fault| Error::model(path, field, what);
        if file.starts_with(b"PK") {
            let zip::Container { pickle: range, storages } = zip::open(file).map_err(model)?;
            if range.len() > pickle::MAX_PICKLE_BYTES {
                return Err(Error::model(path, "data.pkl", format!("{} bytes, too large", range.len())));
            }
            let storages = storages.into_iter().map(|(key, (range, crc))| (key, (range, Some(crc)))).collect();
            return Ok(TorchFile { object: parse(path, "data.pkl", &file[range])?, storages: Storages(storages) });
        }
        if legacy::is_legacy(file) {
            let (object, storages) = legacy::open(file).map_err(model)?;
            let storages = storages.into_iter().map(|(key, range)| (key, (range, None))).collect();
            return Ok(TorchFile { object, storages: Storages(storages) });
        }
        // A bare pickle: no checkpoint, but a hostile one is better named by what it tries.
        parse(path, "pickle", file)?;
        Err(Error::model(path, "container", "a plain pickle, expected a checkpoint of torch.save"))
    }
}

impl Storages {
    /// Where a tensor lies, with every bound checked against the storage's real bytes and the storage against its
    /// checksum; `file` is the whole file.
    pub(crate) fn tensor(&mut self, file: &[u8], v: View<'_>) -> Result<TensorPlace, String> {
        let (callable, args, _) = v.call().ok_or_else(|| format!("{}, expected a tensor", v.kind()))?;
        match callable {
            Callable::RebuildTensor => self.place(file, &args),
            // A parameter wraps exactly one tensor; parameters of parameters do not exist.
            Callable::RebuildParameter => match args.first().and_then(|t| t.call()) {
                Some((Callable::RebuildTensor, args, _)) => self.place(file, &args),
                _ => Err("a parameter without a tensor".into()),
            },
            _ => Err(format!("{}, expected a tensor", v.kind())),
        }
    }

    fn place(&mut self, file: &[u8], args: &[View<'_>]) -> Result<TensorPlace, String> {
        let [id, offset, shape, strides, ..] = args else { return Err("a tensor with too few arguments".into()) };
        let id = id.persistent_id().ok_or("a tensor without a storage")?;
        let Storage { key, dtype, len: storage_len } = storage(id)?;
        let (bytes, crc) = self.0.get_mut(key).ok_or_else(|| format!("its storage {key:?} is not in the file"))?;
        // Once per storage: several tensors may share one.
        if crc.take().is_some_and(|crc| zip::crc32(&file[bytes.clone()]) != crc) {
            return Err(format!("storage {key:?}: {}", zip::DAMAGED));
        }
        let needed = storage_len.checked_mul(dtype.size()).filter(|&n| n <= bytes.len());
        if needed.is_none() {
            let have = bytes.len();
            return Err(format!("its storage {key:?} has {have} bytes, too few for {storage_len} elements"));
        }
        let offset = offset.int().and_then(|o| usize::try_from(o).ok()).ok_or("a negative or missing offset")?;
        let shape = shape.sizes(MAX_RANK).ok_or("sizes that are no short list of non-negative integers")?;
        let strides = strides.sizes(MAX_RANK).ok_or("strides that are no short list of non-negative integers")?;
        if shape.len() != strides.len() {
            return Err(format!("{} sizes but {} strides", shape.len(), strides.len()));
        }
        let len = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).ok_or("sizes that overflow")?;
        // Elements needed up to the last one; a tensor that repeats elements (stride 0) would let a small file ask for
        // unlimited memory and is no parameter.
        let end = if len == 0 {
            Some(offset)
        } else {
            let last =
                shape.iter().zip(&strides).try_fold(offset, |at, (&d, &s)| at.checked_add((d - 1).checked_mul(s)?));
            last.and_then(|l| l.checked_add(1))
        };
        if end.is_none_or(|e| e > storage_len) || len > storage_len {
            return Err(format!(
                "sizes {shape:?}, strides {strides:?}, offset {offset} reach beyond the {storage_len} elements of its storage"
            ));
        }
        Ok(TensorPlace { dtype, shape, strides, start: bytes.start + offset * dtype.size(), len })
    }
}

struct Storage<'a> {
    key: &'a str,
    dtype: DType,
    /// Elements.
    len: usize,
}

/// `('storage', torch.FloatStorage, key, location, elements)`, in the legacy container with a sixth item.
fn storage(id: View<'_>) -> Result<Storage<'_>, String> {
    let items = id.items(6).ok_or("a storage that is no short tuple")?;
    let [tag, class, key, _location, len, view @ ..] = &items[..] else {
        return Err("a storage of too few items".into());
    };
    if tag.str() != Some("storage") {
        return Err("an outside reference that is no storage".into());
    }
    if view.iter().any(|v| v.kind() != "None") {
        return Err("a view of another storage, which PyTorch has not written since 0.4".into());
    }
    let (module, class) = class.global().ok_or("a storage without a class")?;
    let dtype = match (module, class) {
        ("torch" | "torch.cuda", "FloatStorage") => DType::F32,
        ("torch" | "torch.cuda", "DoubleStorage") => DType::F64,
        ("torch" | "torch.cuda", "HalfStorage") => DType::F16,
        ("torch" | "torch.cuda", "BFloat16Storage") => DType::Bf16,
        ("torch" | "torch.cuda", "LongStorage") => DType::I64,
        ("torch" | "torch.cuda", "IntStorage") => DType::I32,
        ("torch" | "torch.cuda", "ShortStorage") => DType::I16,
        ("torch" | "torch.cuda", "CharStorage") => DType::I8,
        ("torch" | "torch.cuda", "ByteStorage") => DType::U8,
        ("torch" | "torch.cuda", "BoolStorage") => DType::Bool,
        _ => return Err(format!("a storage of class {module}.{class}, which is not supported")),
    };
    let key = key.str().ok_or("a storage without a key")?;
    let len = len.int().and_then(|n| usize::try_from(n).ok()).ok_or("a storage of negative or missing size")?;
    Ok(Storage { key, dtype, len })
}
