//! The zip container of `torch.save` since PyTorch 1.6: one folder with `data.pkl` and one raw little-endian file per
//! storage, all stored without compression, so that tensors are read where they lie in the mapped file.

use std::collections::HashMap;
use std::io::Cursor;
use std::ops::Range;

use zip::CompressionMethod;

use super::Fault;
use crate::io::zipped;
use crate::io::zipped::one_line;

/// Where things lie in the file.
#[derive(Debug)]
pub(super) struct Container {
    pub(super) pickle: Range<usize>,
    /// Storages by key, with the CRC-32 that the directory states.
    pub(super) storages: HashMap<String, (Range<usize>, u32)>,
}

/// PyTorch itself does not look at the checksums of what it loads, so a damaged weight file segments wrongly there.
pub(super) const DAMAGED: &str =
    "its checksum (CRC-32) does not fit: the file is damaged, or was saved with PyTorch's checksums switched off";

pub(super) fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

pub(super) fn open(file: &[u8]) -> Result<Container, Fault> {
    let broken = |e: zip::result::ZipError| ("zip directory".to_string(), one_line(&e.to_string()));
    let mut archive = zipped::open(Cursor::new(file)).map_err(|what| ("zip directory".to_string(), what))?;
    let mut entries: HashMap<String, (Range<usize>, u32)> = HashMap::with_capacity(archive.len());
    let mut root = None;
    for i in 0..archive.len() {
        let entry = archive.by_index_raw(i).map_err(broken)?;
        let name = entry.name().map_err(broken)?.into_owned();
        if !zipped::is_plain(&name) {
            return Err((format!("zip entry {name:?}"), "a name that leaves the archive, refused".into()));
        }
        let fault = |what: String| (format!("zip entry {name}"), what);
        if entry.encrypted() || entry.is_symlink() {
            return Err(fault("encrypted or a link, which PyTorch never writes".into()));
        }
        // A compressed entry may be small in the file and huge unpacked; PyTorch stores all of them.
        if entry.compression() != CompressionMethod::Stored || entry.size() != entry.compressed_size() {
            return Err(fault("compressed, expected stored as PyTorch writes it".into()));
        }
        let start = entry.data_start().and_then(|s| usize::try_from(s).ok());
        let end = start.zip(usize::try_from(entry.size()).ok()).and_then(|(s, n)| s.checked_add(n));
        let (Some(start), Some(end)) = (start, end.filter(|&e| e <= file.len())) else {
            return Err(fault("reaches beyond the end of the file".into()));
        };
        if let Some(folder) = name.strip_suffix("/data.pkl").filter(|f| !f.contains('/'))
            && root.replace(folder.to_string()).is_some()
        {
            return Err(fault("a second data.pkl".into()));
        }
        entries.insert(name, (start..end, entry.crc32()));
    }
    if archive.has_overlapping_files().map_err(broken)? {
        return Err(("zip directory".into(), "entries overlap".into()));
    }
    let root =
        root.ok_or_else(|| ("data.pkl".to_string(), "missing: this zip file was not made by torch.save".into()))?;
    if let Some((order, _)) = entries.get(&format!("{root}/byteorder"))
        && &file[order.clone()] != b"little"
    {
        return Err(("byteorder".into(), "not \"little\": written on a big-endian machine".into()));
    }
    if entries.contains_key(&format!("{root}/constants.pkl")) {
        return Err(("constants.pkl".into(), "a TorchScript program, expected a checkpoint of torch.save".into()));
    }
    let (pickle, crc) = entries.get(&format!("{root}/data.pkl")).cloned().unwrap_or_default();
    if crc32(&file[pickle.clone()]) != crc {
        return Err(("data.pkl".into(), DAMAGED.into()));
    }
    let prefix = format!("{root}/data/");
    let storages = entries.into_iter().filter_map(|(name, r)| Some((name.strip_prefix(&prefix)?.to_string(), r)));
    Ok(Container { pickle, storages: storages.collect() })
}
