//! Zip containers that may be hostile: what is looked at before anything of them is believed.

use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};

use zip::read::{ArchiveOffset, Config, ZipArchive};

/// STU-Net-H has 306 storages, with optimizer state twice as many; a model with predictions of its validation some thousand.
const MAX_ENTRIES: usize = 100_000;
/// Where the end of the directory may be: before a comment of up to 64 KiB, with the locator of 20 bytes before it.
const TAIL: u64 = (1 << 16) + 64;

/// Reads the directory of an archive that begins where the file does.
///
/// # Errors
/// Says what is wrong: no zip file, too many entries, two of the same name.
pub(crate) fn open<R: Read + Seek>(mut file: R) -> Result<ZipArchive<R>, String> {
    let many = |n: u64| format!("{n} entries, expected at most {MAX_ENTRIES}");
    let broken = |e: &dyn std::fmt::Display| one_line(&e.to_string());
    if let Some(n) = claimed_entries(&mut file).map_err(|e| broken(&e))?.filter(|&n| n > MAX_ENTRIES as u64) {
        return Err(many(n));
    }
    let config = Config { archive_offset: ArchiveOffset::Known(0) };
    let archive = ZipArchive::with_config(config, file).map_err(|e| broken(&e))?;
    if archive.len() > MAX_ENTRIES {
        return Err(many(archive.len() as u64));
    }
    if archive.has_duplicate_names() {
        return Err("two entries have the same name".into());
    }
    Ok(archive)
}

/// The largest number of entries that a zip64 end record claims, of those that the reader finds: from the end of the file back to
/// where a comment can begin. The reader takes memory in proportion, and a file of gigabytes may claim a hundred million; without
/// such a record the format ends at 65535.
fn claimed_entries(file: &mut (impl Read + Seek)) -> std::io::Result<Option<u64>> {
    let length = file.seek(SeekFrom::End(0))?;
    let mut read = |at: u64, most: u64| -> std::io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(at))?;
        file.take(most).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let u64_at = |bytes: &[u8], at: usize| Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
    let tail = read(length.saturating_sub(TAIL), TAIL)?;
    let mut most = None;
    for (at, _) in tail.windows(4).enumerate().filter(|(_, w)| w == b"PK\x06\x07") {
        let Some(start) = u64_at(&tail, at + 8).filter(|&s| s < length) else { continue };
        let record = read(start, 56)?;
        if record.starts_with(b"PK\x06\x06") {
            most = most.max(u64_at(&record, 32));
        }
    }
    Ok(most)
}

/// A relative name without steps upwards, which means the same on every system.
pub(crate) fn is_plain(name: &str) -> bool {
    !name.is_empty()
        && !name.contains(['\\', ':'])
        && !name.chars().any(char::is_control)
        && name.strip_suffix('/').unwrap_or(name).split('/').all(|part| !matches!(part, "" | "." | ".."))
}

/// Without line breaks and other control characters.
pub(crate) fn one_line(s: &str) -> String {
    s.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Reports the first failure and swallows what comes after it: a `ZipWriter` that is dropped unfinished tries to finish,
/// and complains on stderr when it cannot.
pub(crate) struct Output<'a> {
    file: &'a mut BufWriter<File>,
    failed: bool,
}

impl<'a> Output<'a> {
    pub(crate) fn new(file: &'a mut BufWriter<File>) -> Self {
        Self { file, failed: false }
    }
}

impl Write for Output<'_> {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        if self.failed {
            return Ok(buf.len());
        }
        let written = self.file.write(buf);
        self.failed = written.is_err();
        written
    }

    fn flush(&mut self) -> std::io::Result<()> {
        if self.failed { Ok(()) } else { self.file.flush() }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

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
        let claimed = |file: &[u8]| claimed_entries(&mut Cursor::new(file)).unwrap();
        assert_eq!(claimed(&file), Some(1 << 40));
        assert!(open(Cursor::new(&file)).unwrap_err().contains("at most"));
        assert_eq!(claimed(&file[..60]), None);
        // Where the claim is not looked for, the reader finds no end either; as far back as it does, the claim is seen.
        let comment = (1 << 16) - 1;
        file.extend(vec![0; comment]);
        assert!(open(Cursor::new(&file)).unwrap_err().contains("at most"));
        file.extend(vec![0; 1 << 17]);
        assert_eq!(claimed(&file), None);
        assert!(open(Cursor::new(&file)).is_err());
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
