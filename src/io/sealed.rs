//! Safetensors files that hold texts beside the tensors, and the SHA-256 of all their bytes.
//!
//! The digest stands in the header's metadata, at a place that is the same in every file, and is taken with zeros there.

use std::collections::HashMap;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use sha2::{Digest, Sha256};

use super::atomic::write_keeping;
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
    let head = header(path, texts, entries)?;
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
        let digest = hex(&hash.finalize());
        file.seek(SeekFrom::Start(DIGEST as u64)).map_err(io)?;
        file.write_all(digest.as_bytes()).map_err(io)
    })
}

/// Length and header, with zeros for the digest.
fn header(path: &Path, texts: &[(&str, String)], entries: &[Entry<'_>]) -> Result<Vec<u8>> {
    let bad = |e: String| Error::model(path, "header", e);
    let json = |s: &str| serde_json::to_string(s).map_err(|e| bad(e.to_string()));
    let mut at = 0;
    let mut table = Vec::new();
    for e in entries {
        let bytes = 4 * e.shape.iter().product::<usize>();
        let info = TensorInfo { dtype: Dtype::F32, shape: e.shape.clone(), data_offsets: (at, at + bytes) };
        table.push((e.name.clone(), info));
        at += bytes;
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
    let weights = Weights::open(path)?;
    let file = weights.file();
    let begins = file.get(8..DIGEST).is_some_and(|b| b == BEGINNING.as_bytes());
    let Some(stated) = file.get(DIGEST..DIGEST + ZEROS.len()).filter(|_| begins) else {
        return Err(Error::model(path, "header", "holds no SHA-256 at its place: not a checkpoint of this project"));
    };
    let mut hash = Sha256::new();
    hash.update(&file[..DIGEST]);
    hash.update(ZEROS);
    hash.update(&file[DIGEST + ZEROS.len()..]);
    if hex(&hash.finalize()).as_bytes() != stated {
        return Err(Error::model(path, "sha256", "not that of its contents: the file was changed or damaged"));
    }
    let texts = weights.texts()?;
    Ok((weights, texts))
}
