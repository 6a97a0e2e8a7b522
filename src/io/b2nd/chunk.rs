//! A chunk of Blosc2: a header of 32 bytes, where each block begins, and the blocks, each packed by itself.

use super::codec::{unbitshuffle, unpack, unshuffle};

const HEADER: usize = 32;

/// Flags of the header.
const MEMCPYED: u8 = 0x2;
const EXTENDED: u8 = 0x5;
const NOT_SPLIT: u8 = 0x10;
/// Flags of its last byte.
const DICTIONARY: u8 = 0x1;
const BIG_ENDIAN: u8 = 0x2;

/// What all elements of a chunk may be without being written.
const ZEROS: u8 = 1;
const NANS: u8 = 2;
const ONE_VALUE: u8 = 3;
const ANYTHING: u8 = 4;

/// How a chunk's elements are written.
enum Body<'a> {
    /// All elements are this one.
    Filled(Vec<u8>),
    /// Not packed.
    Plain(&'a [u8]),
    /// Where each block begins.
    Packed(&'a [u8]),
}

/// A chunk, its header read.
pub(super) struct Chunk<'a> {
    bytes: &'a [u8],
    body: Body<'a>,
    codec: u8,
    split: bool,
    type_size: usize,
    /// Bytes unpacked.
    pub(super) len: usize,
    /// Bytes of a block unpacked; the last one may have fewer.
    pub(super) block: usize,
    filters: [u8; 6],
}

/// Those of nnU-Net have 128 KiB.
const MAX_BLOCK: usize = 64 << 20;

/// Memory that blocks are unpacked in.
#[derive(Default)]
pub(super) struct Scratch(Vec<u8>, Vec<u8>);

impl<'a> Chunk<'a> {
    /// Reads the header of the chunk at the beginning of `file`.
    pub(super) fn open(file: &'a [u8]) -> Result<Self, String> {
        let head: &[u8; HEADER] = file.first_chunk().ok_or("a chunk beyond the end of the file")?;
        let number = |at: usize| i32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let size = |at: usize| usize::try_from(number(at)).map_err(|_| "a chunk of negative size".to_string());
        let (flags, type_size, special) = (head[2], usize::from(head[3]), head[31] >> 4 & 7);
        let (len, block, packed) = (size(4)?, size(8)?, size(12)?);
        if flags & EXTENDED != EXTENDED {
            return Err("a chunk of Blosc 1".into());
        }
        if head[31] & (DICTIONARY | BIG_ENDIAN) != 0 {
            return Err("a chunk with a dictionary or in big-endian order".into());
        }
        let bytes = file.get(..packed).filter(|b| b.len() >= HEADER).ok_or("a chunk beyond the end of the file")?;
        if type_size == 0 || block == 0 && len > 0 {
            return Err("a chunk of elements or blocks without size".into());
        }
        if block.min(len) > MAX_BLOCK {
            return Err(format!("blocks of {block} bytes, expected at most {MAX_BLOCK}"));
        }
        let blocks = len.div_ceil(block.max(1));
        let body = match special {
            0 if flags & MEMCPYED != 0 => Body::Plain(bytes.get(HEADER..HEADER + len).ok_or("a chunk cut short")?),
            0 => Body::Packed(bytes.get(HEADER..HEADER + 4 * blocks).ok_or("a chunk cut short")?),
            ONE_VALUE => Body::Filled(bytes.get(HEADER..HEADER + type_size).ok_or("a chunk cut short")?.into()),
            other => Body::Filled(filled(other, type_size)?),
        };
        let filters = [head[16], head[17], head[18], head[19], head[20], head[21]];
        let split = flags & NOT_SPLIT == 0;
        Ok(Self { bytes, body, codec: flags >> 5, split, type_size, len, block, filters })
    }

    /// A chunk that is not written at all, all its elements being of the kind `special`.
    pub(super) fn unwritten(special: u8, type_size: usize, len: usize, block: usize) -> Result<Self, String> {
        let body = Body::Filled(filled(special, type_size)?);
        Ok(Self { bytes: &[], body, codec: 0, split: false, type_size, len, block, filters: [0; 6] })
    }

    /// Unpacks block `index`.
    pub(super) fn block<'s>(&self, index: usize, scratch: &'s mut Scratch) -> Result<&'s [u8], String> {
        let begin = index * self.block;
        let n = self.block.min(self.len.saturating_sub(begin));
        let Scratch(out, other) = scratch;
        out.resize(n, 0);
        match &self.body {
            Body::Filled(value) => {
                out.chunks_mut(value.len()).for_each(|o| o.copy_from_slice(&value[..o.len()]));
                return Ok(out);
            }
            Body::Plain(bytes) => {
                out.copy_from_slice(&bytes[begin..begin + n]);
                return Ok(out);
            }
            Body::Packed(starts) => {
                let start = starts.as_chunks::<4>().0.get(index).map(|b| i32::from_le_bytes(*b));
                let start = start.and_then(|s| usize::try_from(s).ok()).ok_or("a block of negative place")?;
                let bytes = self.bytes.get(start..).ok_or("a block beyond the end of its chunk")?;
                self.streams(bytes, n == self.block, out)?;
            }
        }
        other.resize(n, 0);
        for filter in self.filters.iter().rev() {
            match filter {
                // Numbers cut to fewer digits stay so.
                0 | 4 => continue,
                1 => unshuffle(self.type_size, out, other),
                2 => unbitshuffle(self.type_size, out, other),
                f => return Err(format!("filter {f}; none, shuffle, bitshuffle and truncation are read")),
            }
            std::mem::swap(out, other);
        }
        Ok(out)
    }

    /// Unpacks the parts of a block: one, or one for each byte of an element.
    fn streams(&self, mut bytes: &[u8], whole: bool, out: &mut [u8]) -> Result<(), String> {
        let parts = if self.split && whole && out.len().is_multiple_of(self.type_size) { self.type_size } else { 1 };
        let each = out.len() / parts;
        for part in out.chunks_mut(each.max(1)) {
            let (size, rest) = bytes.split_first_chunk::<4>().ok_or("a block cut short")?;
            let size = i32::from_le_bytes(*size);
            bytes = rest;
            if size < 0 {
                // A run of one byte: its value, and a token that says so.
                let (token, rest) = bytes.split_first().ok_or("a block cut short")?;
                let value = u8::try_from(size.unsigned_abs()).ok().filter(|_| token & 1 == 1);
                part.fill(value.ok_or("a block of unknown form")?);
                bytes = rest;
                continue;
            }
            let (packed, rest) = bytes.split_at_checked(size as usize).ok_or("a block cut short")?;
            bytes = rest;
            match packed.len() {
                0 => part.fill(0),
                n if n == part.len() => part.copy_from_slice(packed),
                _ => unpack(self.codec, packed, part)?,
            }
        }
        Ok(())
    }
}

/// The element of which a chunk of kind `special` is full.
fn filled(special: u8, type_size: usize) -> Result<Vec<u8>, String> {
    match (special, type_size) {
        (ZEROS | ANYTHING, _) => Ok(vec![0; type_size]),
        (NANS, 4) => Ok(f32::NAN.to_le_bytes().into()),
        (NANS, 8) => Ok(f64::NAN.to_le_bytes().into()),
        _ => Err(format!("a chunk of special kind {special} with elements of {type_size} bytes")),
    }
}
