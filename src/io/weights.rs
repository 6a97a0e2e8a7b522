//! Named tensors of one weight file, read where they lie in the mapped file.
//!
//! Opening reads only names, shapes and positions. Values are taken one tensor at a time, borrowed straight from the
//! file where they are contiguous, aligned f32, so a model is never in memory twice.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use sha2::{Digest, Sha256};

use super::pth::{self, Pickle, TensorPlace, TorchFile, View};
use crate::error::{Error, Result};
use crate::tensor::DType;

/// Prefixes that wrappers of a model (parallel training, `torch.compile`) put before every name.
const WRAPPERS: [&str; 2] = ["module.", "_orig_mod."];

/// The named tensors of a PyTorch checkpoint or a safetensors file.
///
/// The file stays mapped as long as the value lives. Replace a model by writing a new file and renaming it over the old
/// one: a file that is overwritten in place changes the values read later, and one that is cut short ends the process
/// with a bus error, as with any memory-mapped file.
#[derive(Debug)]
pub struct Weights {
    path: PathBuf,
    map: Mmap,
    names: Vec<String>,
    places: HashMap<String, TensorPlace>,
    globals: Vec<String>,
}

impl Weights {
    /// Opens a `.pth` or `.model` checkpoint (the state_dict is looked for under `network_weights`, `state_dict`, or is
    /// the file's object itself) or a `.safetensors` file, told apart by content. `module.` and `_orig_mod.` prefixes
    /// are dropped from the names.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read, [`Error::Model`] when it is damaged, hostile, or holds no tensors.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Ok(Self::open_checkpoint(path.as_ref())?.0)
    }

    /// As [`Weights::open`], with the rest of a PyTorch checkpoint.
    pub(crate) fn open_checkpoint(path: &Path) -> Result<(Self, Option<Pickle>)> {
        Self::open_with(path, |_| Ok(Vec::new()))
    }

    /// As [`Weights::open_checkpoint`], with the tensors that `more` finds in a PyTorch checkpoint beside its weights.
    pub(crate) fn open_with(
        path: &Path,
        more: impl FnOnce(View<'_>) -> Result<Vec<(String, View<'_>)>>,
    ) -> Result<(Self, Option<Pickle>)> {
        let map = map_file(path)?;
        let mut out = Self { path: path.into(), map, names: vec![], places: HashMap::new(), globals: vec![] };
        if pth::is_torch(&out.map) {
            let TorchFile { object, mut storages } = TorchFile::open(path, &out.map)?;
            let dict = state_dict(path, object.root())?;
            let mut tensors = Vec::new();
            for (name, tensor) in dict.entries().into_iter().flatten() {
                let name = name.str().ok_or_else(|| Error::model(path, "state_dict", "a tensor name is no text"))?;
                tensors.push((name.to_string(), tensor));
            }
            tensors.extend(more(object.root())?);
            for (name, tensor) in tensors {
                let place =
                    storages.tensor(&out.map, tensor).map_err(|what| Error::model(path, printable(&name), what))?;
                out.insert(&name, place)?;
            }
            out.globals.clone_from(&object.globals);
            out.check_any()?;
            return Ok((out, Some(object)));
        }
        out.read_safetensors()?;
        out.check_any()?;
        Ok((out, None))
    }

    fn read_safetensors(&mut self) -> Result<()> {
        let broken = |e: String| Error::model(&self.path, "safetensors header", printable(&e));
        let (header, metadata) = SafeTensors::read_metadata(&self.map).map_err(|e| broken(e.to_string()))?;
        let mut found = Vec::new();
        for name in metadata.offset_keys() {
            let Some(info) = metadata.info(&name) else { continue };
            let dtype = match info.dtype {
                Dtype::F32 => DType::F32,
                Dtype::F64 => DType::F64,
                Dtype::F16 => DType::F16,
                Dtype::BF16 => DType::Bf16,
                Dtype::I64 => DType::I64,
                Dtype::I32 => DType::I32,
                Dtype::I16 => DType::I16,
                Dtype::I8 => DType::I8,
                Dtype::U8 => DType::U8,
                Dtype::BOOL => DType::Bool,
                other => {
                    let what = format!("element type {other:?}, expected a float or integer type of NumPy or BF16");
                    return Err(Error::model(&self.path, printable(&name), what));
                }
            };
            let (from, to) = info.data_offsets;
            let len = info.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
            let start = header.checked_add(8).and_then(|h| h.checked_add(from));
            // The crate has validated all this; it is checked again because reads rely on it.
            let (Some(len), Some(start)) = (len, start) else { return Err(broken("sizes overflow".into())) };
            let bytes = to.checked_sub(from);
            if bytes.is_none() || bytes != len.checked_mul(dtype.size()) || start + (to - from) > self.map.len() {
                return Err(Error::model(&self.path, printable(&name), "its bytes do not fit its shape or the file"));
            }
            found.push((
                name,
                TensorPlace { dtype, strides: row_major(&info.shape), shape: info.shape.clone(), start, len },
            ));
        }
        found.into_iter().try_for_each(|(name, place)| self.insert(&name, place))
    }

    fn insert(&mut self, name: &str, place: TensorPlace) -> Result<()> {
        let mut short = name;
        while let Some(rest) = WRAPPERS.iter().find_map(|w| short.strip_prefix(w)) {
            short = rest;
        }
        if short.is_empty() || short.chars().any(char::is_control) {
            return Err(Error::model(&self.path, printable(name), "not a tensor name"));
        }
        if self.places.insert(short.to_string(), place).is_some() {
            return Err(Error::model(&self.path, printable(short), "a second tensor of this name"));
        }
        self.names.push(short.to_string());
        Ok(())
    }

    fn check_any(&self) -> Result<()> {
        if self.names.is_empty() { Err(Error::model(&self.path, "state_dict", "holds no tensor")) } else { Ok(()) }
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Tensor names without wrapper prefixes, in the file's order.
    #[must_use]
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Sizes of a tensor, or `None` when there is none of this name.
    #[must_use]
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.places.get(name).map(|p| &p.shape[..])
    }

    /// Element type of a tensor in the file.
    #[must_use]
    pub fn dtype(&self, name: &str) -> Option<DType> {
        self.places.get(name).map(|p| p.dtype)
    }

    /// Every Python name that the file's pickle mentions, sorted; empty for safetensors.
    #[must_use]
    pub fn globals(&self) -> &[String] {
        &self.globals
    }

    /// The texts in the header of a safetensors file.
    pub(super) fn texts(&self) -> Result<HashMap<String, String>> {
        let broken = |e: String| Error::model(&self.path, "safetensors header", printable(&e));
        let (_, metadata) = SafeTensors::read_metadata(&self.map).map_err(|e| broken(e.to_string()))?;
        Ok(metadata.metadata().clone().unwrap_or_default())
    }

    /// Size of the file in bytes.
    #[must_use]
    pub fn file_bytes(&self) -> usize {
        self.map.len()
    }

    /// SHA-256 of the whole file, in lower-case hexadecimal.
    #[must_use]
    pub fn sha256(&self) -> String {
        sha256(&self.map)
    }

    /// Values of a tensor as f32 in row-major order: borrowed from the file where possible.
    ///
    /// # Errors
    /// [`Error::Model`] when there is no such tensor or a value is NaN or infinite (as f32).
    pub fn values(&self, name: &str) -> Result<Cow<'_, [f32]>> {
        let place = self.place(name)?;
        let values = self.read(place);
        if let Some(i) = values.iter().position(|v| !v.is_finite()) {
            return Err(Error::model(
                &self.path,
                name,
                format!("value {} at position {i}, expected a number", values[i]),
            ));
        }
        Ok(values)
    }

    /// Raw elements of a tensor in row-major order, little-endian, in its own type.
    ///
    /// # Errors
    /// [`Error::Model`] when there is no such tensor.
    pub fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>> {
        let place = self.place(name)?;
        Ok(self.gather(place))
    }

    /// Where in the file's bytes a tensor begins, if its elements lie there one after the other.
    pub(crate) fn start(&self, name: &str) -> Option<usize> {
        self.places.get(name).filter(|p| is_row_major(&p.shape, &p.strides)).map(|p| p.start)
    }

    fn place(&self, name: &str) -> Result<&TensorPlace> {
        self.places.get(name).ok_or_else(|| Error::model(&self.path, name, "no such tensor"))
    }

    fn gather(&self, p: &TensorPlace) -> Cow<'_, [u8]> {
        let size = p.dtype.size();
        if is_row_major(&p.shape, &p.strides) {
            return Cow::Borrowed(&self.map[p.start..p.start + p.len * size]);
        }
        let mut out = Vec::with_capacity(p.len * size);
        let mut index = vec![0; p.shape.len()];
        for _ in 0..p.len {
            let at = p.start + size * index.iter().zip(&p.strides).map(|(i, s)| i * s).sum::<usize>();
            out.extend_from_slice(&self.map[at..at + size]);
            for axis in (0..index.len()).rev() {
                index[axis] += 1;
                if index[axis] < p.shape[axis] {
                    break;
                }
                index[axis] = 0;
            }
        }
        Cow::Owned(out)
    }

    fn read(&self, p: &TensorPlace) -> Cow<'_, [f32]> {
        fn each<const N: usize>(b: &[u8], f: impl Fn([u8; N]) -> f32) -> Cow<'static, [f32]> {
            Cow::Owned(b.as_chunks::<N>().0.iter().map(|&c| f(c)).collect())
        }
        let raw = self.gather(p);
        if p.dtype == DType::F32
            && cfg!(target_endian = "little")
            && let Cow::Borrowed(b) = raw
            && let Ok(values) = bytemuck::try_cast_slice(b)
        {
            return Cow::Borrowed(values);
        }
        match p.dtype {
            DType::F32 => each(&raw, f32::from_le_bytes),
            DType::F64 => each(&raw, |b| f64::from_le_bytes(b) as f32),
            DType::F16 => each(&raw, |b| f16::from_le_bytes(b).to_f32()),
            DType::Bf16 => each(&raw, |b| bf16::from_le_bytes(b).to_f32()),
            DType::I64 => each(&raw, |b| i64::from_le_bytes(b) as f32),
            DType::I32 => each(&raw, |b| i32::from_le_bytes(b) as f32),
            DType::I16 => each(&raw, |b| f32::from(i16::from_le_bytes(b))),
            DType::I8 => each(&raw, |b| f32::from(i8::from_le_bytes(b))),
            DType::U8 | DType::Bool => each(&raw, |[b]| f32::from(b)),
        }
    }
}

/// All bytes of the file.
impl AsRef<[u8]> for Weights {
    fn as_ref(&self) -> &[u8] {
        &self.map
    }
}

/// The dictionary of tensors in a checkpoint.
fn state_dict<'a>(path: &Path, root: View<'a>) -> Result<View<'a>> {
    let Some(entries) = root.entries() else {
        return Err(Error::model(path, "object", format!("{}, expected a dictionary", root.kind())));
    };
    for key in ["network_weights", "state_dict"] {
        if let Some(dict) = root.get(key) {
            if dict.entries().is_none() {
                return Err(Error::model(path, key, format!("{}, expected a dictionary of tensors", dict.kind())));
            }
            return Ok(dict);
        }
    }
    let mut other = BTreeSet::new();
    for (key, value) in entries {
        if !value.is_tensor() {
            other.insert(key.str().unwrap_or("?"));
        }
    }
    if other.is_empty() {
        return Ok(root);
    }
    let found: Vec<String> = other.into_iter().take(8).map(printable).collect();
    let what = format!("missing; expected \"network_weights\" (nnU-Net v2) or \"state_dict\" (v1), found {found:?}");
    Err(Error::model(path, "network_weights", what))
}

/// Maps a file for reading.
pub(crate) fn map_file(path: &Path) -> Result<Mmap> {
    let io = |e| Error::io("read", path, e);
    // Asked before opening, which would wait for ever on a pipe.
    if !std::fs::metadata(path).map_err(io)?.is_file() {
        return Err(Error::model(path, "file", "not a regular file"));
    }
    let file = File::open(path).map_err(io)?;
    if file.metadata().map_err(io)?.len() == 0 {
        return Err(Error::model(path, "file", "empty"));
    }
    #[allow(unsafe_code, reason = "mapping a file is unsafe by nature; this is the only place that does")]
    // SAFETY: the map is read-only and of a regular file that is not empty. The bytes are only ever read as plain
    // numbers, of which every bit pattern is valid, and every range is checked against the length of the map. Should
    // another process change the file meanwhile, values change with it; should it cut the file short, the system stops
    // this process with a signal. Neither can be excluded by any user of a map; `Weights` says so to its callers.
    unsafe { Mmap::map(&file) }.map_err(io)
}

/// SHA-256 in lower-case hexadecimal.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn row_major(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1usize; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i].saturating_mul(shape[i]);
    }
    strides
}

/// True when the elements lie one after the other; axes of size 1 may have any stride.
fn is_row_major(shape: &[usize], strides: &[usize]) -> bool {
    shape.contains(&0) || shape.iter().zip(strides).zip(row_major(shape)).all(|((&d, &s), r)| d == 1 || s == r)
}

/// Untrusted text for a one-line message.
pub(crate) fn printable(s: &str) -> String {
    let mut out: String = s.chars().take(120).map(|c| if c.is_control() { '?' } else { c }).collect();
    if s.chars().nth(120).is_some() {
        out.push_str("...");
    }
    out
}
