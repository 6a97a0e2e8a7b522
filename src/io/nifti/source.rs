//! The bytes of a file, unpacked where its content says gzip. The name of a file is never asked what is in it.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::path::Path;

use flate2::bufread::GzDecoder;

use crate::error::{Error, Result};

const BUFFER: usize = 256 << 10;
/// No DEFLATE stream expands more than 1032 times; a header that asks for more cannot be honest.
const MAX_EXPANSION: u64 = 1100;

/// A file open for reading.
pub(super) struct Source {
    bytes: Bytes,
    /// Bytes in the file system.
    pub(super) file_len: u64,
}

enum Bytes {
    Plain(BufReader<File>),
    Gzip(Box<BufReader<Members>>),
}

impl Source {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let failed = |e| Error::io("read", path, e);
        // Asked before opening, which would wait for a writer at a named pipe.
        let meta = std::fs::metadata(path).map_err(failed)?;
        if !meta.is_file() {
            return Err(Error::image(path, "file", "not a regular file, expected a NIfTI image"));
        }
        let mut file = BufReader::with_capacity(BUFFER, File::open(path).map_err(failed)?);
        let gzip = file.fill_buf().map_err(failed)?.starts_with(&[0x1f, 0x8b]);
        let bytes = if gzip {
            let members = Members { decoder: Some(GzDecoder::new(file)), trailing: false };
            Bytes::Gzip(Box::new(BufReader::with_capacity(BUFFER, members)))
        } else {
            Bytes::Plain(file)
        };
        Ok(Self { bytes, file_len: meta.len() })
    }

    pub(super) fn is_gzip(&self) -> bool {
        matches!(self.bytes, Bytes::Gzip(_))
    }

    /// The most bytes that can come out of this file.
    pub(super) fn capacity(&self) -> u64 {
        if self.is_gzip() { self.file_len.saturating_mul(MAX_EXPANSION) } else { self.file_len }
    }

    /// True when bytes that are not gzip follow the last complete gzip member.
    pub(super) fn has_trailing_garbage(&self) -> bool {
        match &self.bytes {
            Bytes::Plain(_) => false,
            Bytes::Gzip(r) => r.get_ref().trailing,
        }
    }

    /// Reads up to the end, at most `limit` bytes, and says how many there were. The end of a gzip stream is where its
    /// checksum and length are verified.
    pub(super) fn drain(&mut self, path: &Path, limit: u64) -> Result<u64> {
        let gzip = self.is_gzip();
        std::io::copy(&mut self.take(limit), &mut std::io::sink()).map_err(|e| read_error(path, gzip, e))
    }
}

impl Read for Source {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        match &mut self.bytes {
            Bytes::Plain(r) => r.read(buf),
            Bytes::Gzip(r) => r.read(buf),
        }
    }
}

/// Damage is the image's fault, anything else the system's.
pub(super) fn read_error(path: &Path, gzip: bool, e: std::io::Error) -> Error {
    match e.kind() {
        ErrorKind::UnexpectedEof if gzip => Error::image(path, "gzip stream", "ends too early, the file is truncated"),
        ErrorKind::UnexpectedEof => Error::image(path, "file", "ends too early, the file is truncated"),
        ErrorKind::InvalidInput | ErrorKind::InvalidData if gzip => {
            Error::image(path, "gzip stream", format!("{e}; the file is damaged"))
        }
        _ => Error::io("read", path, e),
    }
}

/// The members of a gzip file one after another, as parallel writers make them. Unlike `MultiGzDecoder` it tells bytes
/// behind the last member (padding of a tape or a download) from a damaged member.
struct Members {
    decoder: Option<GzDecoder<BufReader<File>>>,
    trailing: bool,
}

impl Read for Members {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        loop {
            let Some(decoder) = &mut self.decoder else { return Ok(0) };
            let n = decoder.read(buf)?;
            if n > 0 || buf.is_empty() {
                return Ok(n);
            }
            // This member's checksum and length are verified.
            let Some(mut file) = self.decoder.take().map(GzDecoder::into_inner) else { return Ok(0) };
            match file.fill_buf()?.first() {
                None => return Ok(0),
                Some(0x1f) => self.decoder = Some(GzDecoder::new(file)),
                Some(_) => {
                    self.trailing = true;
                    return Ok(0);
                }
            }
        }
    }
}
