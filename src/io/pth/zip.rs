//! The zip container of `torch.save` since PyTorch 1.6: one folder with `data.pkl` and one raw little-endian file per
//! storage, all stored without compression, so that tensors are read where they lie in the mapped file.

use std::collections::HashMap;
use std::io::Cursor;
use std::ops::Range;

use zip::CompressionMethod;
use zip::read::{ArchiveOffset, Config, ZipArchive};

use super::Fault;

/// STU-Net-H has 306 storages, with optimizer state twice as many.
const MAX_ENTRIES: usize = 100_000;

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
    if let Some(n) = claimed_entries(file).filter(|&n| n > MAX_ENTRIES as u64) {
        return Err(("zip directory".into(), format!("{n} entries, expected at most {MAX_ENTRIES}")));
    }
    let config = Config { archive_offset: ArchiveOffset::Known(0) };
    let mut archive = ZipArchive::with_config(config, Cursor::new(file)).map_err(broken)?;
    if archive.len() > MAX_ENTRIES {
        return Err(("zip directory".into(), format!("{} entries, expected at most {MAX_ENTRIES}", archive.len())));
    }
    if archive.has_duplicate_names() {
        return Err(("zip directory".into(), "two entries have the same name".into()));
    }
    let mut entries: HashMap<String, (Range<usize>, u32)> = HashMap::with_capacity(archive.len());
    let mut root = None;
    for i in 0..archive.len() {
        let entry = archive.by_index_raw(i).map_err(broken)?;
        let name = entry.name().map_err(broken)?.into_owned();
        if !is_plain(&name) {
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

/// The largest number of entries that a zip64 end record claims. The reader takes memory in proportion, and a file of
/// gigabytes may claim a hundred million; without such a record the format ends at 65535.
fn claimed_entries(file: &[u8]) -> Option<u64> {
    // Where the end of the directory may be: before a comment of up to 64 KiB, with the locator of 20 bytes before it.
    let tail = &file[file.len().saturating_sub((1 << 16) + 64)..];
    let u64_at = |bytes: &[u8], at: usize| Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
    let locators = tail.windows(4).enumerate().filter(|(_, w)| w == b"PK\x06\x07");
    locators
        .filter_map(|(at, _)| {
            let record = file.get(usize::try_from(u64_at(tail, at + 8)?).ok()?..)?;
            if record.starts_with(b"PK\x06\x06") { u64_at(record, 32) } else { None }
        })
        .max()
}

/// A relative name without steps upwards. Nothing is ever unpacked; a file that tries is hostile all the same.
fn is_plain(name: &str) -> bool {
    !name.is_empty()
        && !name.contains(['\\', ':'])
        && !name.chars().any(char::is_control)
        && name.trim_end_matches('/').split('/').all(|part| !matches!(part, "" | "." | ".."))
}

fn one_line(s: &str) -> String {
    s.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_of_a_zip64_record_are_seen_before_memory_is_taken() {
        let mut file = vec![0; 100];
        file.extend(b"PK\x06\x06");
        file.extend(44u64.to_le_bytes());
        file.extend([45, 0, 45, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        file.extend((1u64 << 40).to_le_bytes());
        file.extend((1u64 << 40).to_le_bytes());
        file.extend([0; 16]);
        file.extend(b"PK\x06\x07\0\0\0\0");
        file.extend(100u64.to_le_bytes());
        file.extend(1u32.to_le_bytes());
        file.extend(b"PK\x05\x06\0\0\0\0");
        file.extend([0xff; 12]);
        file.extend([0, 0]);
        assert_eq!(claimed_entries(&file), Some(1 << 40));
        assert!(open(&file).unwrap_err().1.contains("at most"));
        assert_eq!(claimed_entries(&file[..60]), None);
    }

    #[test]
    fn names_that_leave_the_archive() {
        for name in ["a/data.pkl", "archive/data/0", ".data/serialization_id", "a/", "archive/.format_version"] {
            assert!(is_plain(name), "{name}");
        }
        for name in ["", "/a", "../a", "a/../b", "a//b", "a\\b", "C:a", "a\n", "./a", "a/."] {
            assert!(!is_plain(name), "{name}");
        }
    }
}
