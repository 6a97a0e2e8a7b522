//! Safetensors files that hold texts beside the tensors, and the SHA-256 of all their bytes.
//!
//! The digest stands in the header's metadata, at a place that is the same in every file, and is taken with zeros there.

use std::collections::HashMap;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use sha2::{Digest, Sha256};

use super::atomic::{write_atomically, write_keeping};
use super::weights::{Weights, hex};
use crate::error::{Error, Result};

/// How the header begins, after its length in 8 bytes; the digest follows.
const BEGINNING: &str = "{\"__metadata__\":{\"sha256\":\"";
const DIGEST: usize = 8 + BEGINNING.len();
const ZEROS: [u8; 64] = [b'0'; 64];

/// A tensor to be written, whose values are asked for when their turn comes.
pub(crate) struct Entry<'a> {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    /// In row-major order.
    pub(crate) values: Box<dyn Fn() -> Result<Vec<f32>> + 'a>,
}

/// Writes a whole file at once; what had its name before is `previous` then.
///
/// # Errors
/// Those of the values, [`Error::Shape`] when their number is not that of the shape, [`Error::Io`].
pub(crate) fn write(path: &Path, previous: &Path, texts: &[(&str, String)], entries: &[Entry<'_>]) -> Result<()> {
    let head = header(path, texts, entries.iter().map(|e| (&*e.name, Dtype::F32, &*e.shape)))?;
    let io = |e| Error::io("write", path, e);
    write_keeping(path, previous, |file| {
        let mut hash = Sha256::new();
        hash.update(&head);
        file.write_all(&head).map_err(io)?;
        let mut bytes = Vec::new();
        for e in entries {
            let values = (e.values)()?;
            if values.len() != e.shape.iter().product::<usize>() {
                return Err(Error::shape(
                    "checkpoint",
                    format!("{} values for {} {:?}", values.len(), e.name, e.shape),
                ));
            }
            bytes.clear();
            bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
            hash.update(&bytes);
            file.write_all(&bytes).map_err(io)?;
        }
        seal(file, hash).map_err(io)
    })
}

/// A tensor to be written from memory.
pub(crate) struct Held<'a> {
    pub(crate) name: &'a str,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// In row-major order, little-endian.
    pub(crate) bytes: &'a [u8],
}

/// Writes a whole file of tensors of any type, or none.
///
/// # Errors
/// [`Error::Shape`] when a tensor has not the bytes of its shape, [`Error::Io`].
pub(crate) fn write_held(path: &Path, texts: &[(&str, String)], tensors: &[Held<'_>]) -> Result<()> {
    let head = header(path, texts, tensors.iter().map(|t| (t.name, t.dtype, &*t.shape)))?;
    let io = |e| Error::io("write", path, e);
    write_atomically(path, |file| {
        let mut hash = Sha256::new();
        hash.update(&head);
        file.write_all(&head).map_err(io)?;
        for t in tensors {
            if t.bytes.len() != bytes_of(t.dtype, &t.shape) {
                return Err(Error::shape(
                    "safetensors",
                    format!("{} bytes for {} {:?}", t.bytes.len(), t.name, t.shape),
                ));
            }
            hash.update(t.bytes);
            file.write_all(t.bytes).map_err(io)?;
        }
        seal(file, hash).map_err(io)
    })
}

fn bytes_of(dtype: Dtype, shape: &[usize]) -> usize {
    shape.iter().product::<usize>() * dtype.bitsize() / 8
}

/// Writes the digest to its place.
fn seal(file: &mut (impl Write + Seek), hash: Sha256) -> std::io::Result<()> {
    let digest = hex(&hash.finalize());
    file.seek(SeekFrom::Start(DIGEST as u64))?;
    file.write_all(digest.as_bytes())
}

/// Length and header, with zeros for the digest.
fn header<'a>(
    path: &Path,
    texts: &[(&str, String)],
    tensors: impl Iterator<Item = (&'a str, Dtype, &'a [usize])>,
) -> Result<Vec<u8>> {
    let bad = |e: String| Error::model(path, "header", e);
    let json = |s: &str| serde_json::to_string(s).map_err(|e| bad(e.to_string()));
    let mut at = 0;
    let mut table = Vec::new();
    for (name, dtype, shape) in tensors {
        let end = at + bytes_of(dtype, shape);
        table.push((name.to_string(), TensorInfo { dtype, shape: shape.to_vec(), data_offsets: (at, end) }));
        at = end;
    }
    // Checks names and offsets; its own text would hold the metadata in no order.
    Metadata::new(None, table.clone()).map_err(|e| bad(e.to_string()))?;
    let mut text = format!("{BEGINNING}{}\"", "0".repeat(64));
    for (key, value) in texts {
        text += &format!(",{}:{}", json(key)?, json(value)?);
    }
    text.push('}');
    for (name, info) in &table {
        let info = serde_json::to_string(info).map_err(|e| bad(e.to_string()))?;
        text += &format!(",{}:{info}", json(name)?);
    }
    text.push('}');
    // Aligned for reading in place.
    let padded = (8 + text.len()).next_multiple_of(64) - 8;
    text.extend(std::iter::repeat_n(' ', padded - text.len()));
    let mut out = (text.len() as u64).to_le_bytes().to_vec();
    out.extend(text.into_bytes());
    Ok(out)
}

/// Opens a file, its bytes checked against the digest, with its texts.
///
/// # Errors
/// [`Error::Io`], [`Error::Model`] when it is damaged or no such file.
pub(crate) fn open(path: &Path) -> Result<(Weights, HashMap<String, String>)> {
    let (weights, texts) = open_unread(path)?;
    let file = weights.as_ref();
    let mut hash = Sha256::new();
    hash.update(&file[..DIGEST]);
    hash.update(ZEROS);
    hash.update(&file[DIGEST + ZEROS.len()..]);
    if hex(&hash.finalize()).as_bytes() != &file[DIGEST..DIGEST + ZEROS.len()] {
        return Err(Error::model(path, "sha256", "not that of its contents: the file was changed or damaged"));
    }
    Ok((weights, texts))
}

/// As [`open`], but for the digest: only the header is read.
///
/// # Errors
/// As [`open`].
pub(crate) fn open_unread(path: &Path) -> Result<(Weights, HashMap<String, String>)> {
    let weights = Weights::open(path)?;
    let file = weights.as_ref();
    let begins = file.get(8..DIGEST).is_some_and(|b| b == BEGINNING.as_bytes());
    if !begins || file.len() < DIGEST + ZEROS.len() {
        return Err(Error::model(path, "header", "holds no SHA-256 at its place: not a file of this project"));
    }
    let texts = weights.texts()?;
    Ok((weights, texts))
}
