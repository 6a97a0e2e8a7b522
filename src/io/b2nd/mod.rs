//! Blosc2's arrays (`.b2nd`), in which nnU-Net keeps preprocessed cases since 2.6: a contiguous frame of chunks, each of
//! blocks, with an array's shape in the metalayer `b2nd`. Only the blocks that a box touches are unpacked.
//!
//! Source: c-blosc2's README_CFRAME_FORMAT, README_CHUNK_FORMAT, README_B2ND_METALAYER.

mod chunk;
mod codec;

use std::path::{Path, PathBuf};

use memmap2::Mmap;

use self::chunk::{Chunk, Scratch};
use super::boxes::Boxes;
use super::npy::element;
use super::weights::map_file;
use crate::error::{Error, Result};
use crate::tensor::DType;

/// Fixed places in the head of a frame, whose numbers are big-endian, each after a byte that tells its type.
const MAGIC: (usize, &[u8; 9]) = (1, b"\xa8b2frame\0");
const HEADER_LEN: usize = 11;
const FRAME_LEN: usize = 16;
const CBYTES: usize = 39;
const METALAYERS: usize = 91;

/// More chunks or larger blocks than any image has.
const MAX_CHUNKS: usize = 1 << 24;
const MAX_BYTES: usize = 1 << 30;

/// An array of four axes in a mapped file; one of three is a single channel.
pub(crate) struct B2nd {
    path: PathBuf,
    map: Mmap,
    dtype: DType,
    shape: [usize; 4],
    chunk: [usize; 4],
    block: [usize; 4],
    /// Chunks along each axis of the array, and blocks along each axis of a chunk.
    chunks: [usize; 4],
    blocks: [usize; 4],
    /// Where the chunks' offsets are counted from.
    origin: usize,
    /// Negative for chunks that are not written.
    offsets: Vec<i64>,
}

impl B2nd {
    /// Opens a file.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Model`] when it is damaged or no array of three or four axes.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let map = map_file(path)?;
        Self::read(path, map).map_err(|what| Error::model(path, "b2nd", what))
    }

    fn read(path: &Path, map: Mmap) -> Result<Self, String> {
        let (at, magic) = MAGIC;
        if map.get(at..at + magic.len()) != Some(magic) {
            return Err("not a contiguous frame of Blosc2".into());
        }
        let header = big::<4>(&map, HEADER_LEN).map(i32::from_be_bytes);
        let frame = big::<8>(&map, FRAME_LEN).map(i64::from_be_bytes);
        let packed = big::<8>(&map, CBYTES).map(i64::from_be_bytes);
        let size = |n: Option<i64>| n.and_then(|n| usize::try_from(n).ok());
        let (Some(header), Some(frame), Some(packed)) = (size(header.map(i64::from)), size(frame), size(packed)) else {
            return Err("a frame without sizes".into());
        };
        if frame > map.len() || header > frame {
            return Err(format!("{} bytes, its frame says {frame}: cut short", map.len()));
        }
        let Meta { shape, chunk, block, dtype } = meta(&map[..header])?;
        let bytes = |s: &[usize; 4]| s.iter().try_fold(dtype.size(), |n, &d| n.checked_mul(d));
        let valid = (0..4).all(|k| shape[k] > 0 && block[k] > 0 && block[k] <= chunk[k]);
        if !valid || bytes(&shape).is_none() {
            return Err(format!("an array of {shape:?} in chunks of {chunk:?} and blocks of {block:?}"));
        }
        let chunks: [usize; 4] = std::array::from_fn(|k| shape[k].div_ceil(chunk[k]));
        let blocks: [usize; 4] = std::array::from_fn(|k| chunk[k].div_ceil(block[k]));
        let padded = std::array::from_fn(|k| blocks[k].saturating_mul(block[k]));
        let count = chunks.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).filter(|n| *n <= MAX_CHUNKS);
        let (Some(count), true) = (count, bytes(&padded).is_some_and(|n| n <= MAX_BYTES)) else {
            return Err(format!("an array of {shape:?} in chunks of {chunk:?} and blocks of {block:?}"));
        };
        let index = header.checked_add(packed).filter(|i| *i < frame).ok_or("its index lies beyond its end")?;
        let index = Chunk::open(&map[index..frame])?;
        if index.len != 8 * count {
            return Err(format!("an index of {} bytes for {count} chunks", index.len));
        }
        let mut offsets = Vec::with_capacity(count);
        let mut scratch = Scratch::default();
        for b in 0..index.len.div_ceil(index.block.max(1)) {
            offsets.extend(index.block(b, &mut scratch)?.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)));
        }
        if offsets.len() != count {
            return Err("an index of odd blocks".into());
        }
        Ok(Self { path: path.into(), dtype, shape, chunk, block, chunks, blocks, origin: header, offsets, map })
    }

    fn chunk_at(&self, index: [usize; 4]) -> Result<Chunk<'_>, String> {
        let number = index.iter().zip(self.chunks).fold(0, |n, (&i, d)| n * d + i);
        let block = self.dtype.size() * self.block.iter().product::<usize>();
        let len = block * self.blocks.iter().product::<usize>();
        let offset = self.offsets[number];
        let Ok(from) = usize::try_from(offset) else {
            return Chunk::unwritten((offset >> 56) as u8 & 0x7f, self.dtype.size(), len, block);
        };
        let bytes = from.checked_add(self.origin).and_then(|at| self.map.get(at..));
        let chunk = Chunk::open(bytes.ok_or("a chunk beyond the end of the file")?)?;
        if chunk.len != len || chunk.block != block {
            let what =
                format!("a chunk of {} bytes in blocks of {}, expected {len} and {block}", chunk.len, chunk.block);
            return Err(what);
        }
        Ok(chunk)
    }

    /// As [`Boxes::pieces`], the axes all alike.
    fn each(&self, from: [usize; 4], to: [usize; 4], give: &mut dyn FnMut([usize; 3], &[u8])) -> Result<(), String> {
        let size = self.dtype.size();
        let mut scratch = Scratch::default();
        grid(std::array::from_fn(|k| [from[k] / self.chunk[k], (to[k] - 1) / self.chunk[k] + 1]), |index| {
            let chunk = self.chunk_at(index)?;
            let base: [usize; 4] = std::array::from_fn(|k| index[k] * self.chunk[k]);
            // The part of the box in this chunk; chunks end before their last blocks do.
            let lo: [usize; 4] = std::array::from_fn(|k| from[k].max(base[k]) - base[k]);
            let hi: [usize; 4] = std::array::from_fn(|k| to[k].min(base[k] + self.chunk[k]) - base[k]);
            grid(std::array::from_fn(|k| [lo[k] / self.block[k], (hi[k] - 1) / self.block[k] + 1]), |b| {
                let number = b.iter().zip(self.blocks).fold(0, |n, (&i, d)| n * d + i);
                let bytes = chunk.block(number, &mut scratch)?;
                let begin: [usize; 4] = std::array::from_fn(|k| b[k] * self.block[k]);
                let lo: [usize; 4] = std::array::from_fn(|k| lo[k].max(begin[k]));
                let hi: [usize; 4] = std::array::from_fn(|k| hi[k].min(begin[k] + self.block[k]));
                let rows = [[lo[0], hi[0]], [lo[1], hi[1]], [lo[2], hi[2]], [lo[3], lo[3] + 1]];
                grid(rows, |at| {
                    let place = (0..4).fold(0, |n, k| n * self.block[k] + at[k] - begin[k]);
                    let row = &bytes[place * size..][..(hi[3] - lo[3]) * size];
                    give([base[1] + at[1], base[2] + at[2], base[3] + at[3]], row);
                    Ok(())
                })
            })
        })
    }
}

/// Calls `f` for every place of a box.
fn grid(ranges: [[usize; 2]; 4], mut f: impl FnMut([usize; 4]) -> Result<(), String>) -> Result<(), String> {
    let [c, z, y, x] = ranges.map(|[lo, hi]| lo..hi);
    for c in c {
        for z in z.clone() {
            for y in y.clone() {
                for x in x.clone() {
                    f([c, z, y, x])?;
                }
            }
        }
    }
    Ok(())
}

impl Boxes for B2nd {
    fn dtype(&self) -> DType {
        self.dtype
    }

    fn shape(&self) -> [usize; 4] {
        self.shape
    }

    fn pieces(
        &self,
        channel: usize,
        from: [usize; 3],
        to: [usize; 3],
        give: &mut dyn FnMut([usize; 3], &[u8]),
    ) -> Result<()> {
        if from.iter().zip(to).any(|(f, t)| *f >= t) {
            return Ok(());
        }
        let ([z, y, x], [z1, y1, x1]) = (from, to);
        self.each([channel, z, y, x], [channel + 1, z1, y1, x1], give)
            .map_err(|what| Error::model(&self.path, "b2nd", what))
    }
}

/// What the metalayer `b2nd` says.
struct Meta {
    shape: [usize; 4],
    chunk: [usize; 4],
    block: [usize; 4],
    dtype: DType,
}

/// Finds and reads the metalayer in the head of a frame.
fn meta(head: &[u8]) -> Result<Meta, String> {
    let short = "metalayers cut short";
    let mut list = Packed(head.get(METALAYERS..).ok_or(short)?);
    let count = list.map_len().ok_or(short)?;
    for _ in 0..count {
        let name = list.text().ok_or(short)?;
        let at = list.integer().and_then(|n| usize::try_from(n).ok()).ok_or(short)?;
        if name != "b2nd" {
            continue;
        }
        let mut content = Packed(head.get(at..).ok_or(short)?);
        let content = content.binary().ok_or(short)?;
        return array(Packed(content)).ok_or("a metalayer b2nd that is not one of an array of three or four axes")?;
    }
    Err("no metalayer b2nd: not an array".into())
}

/// The content of the metalayer; `None` where it is of another form.
fn array(mut m: Packed<'_>) -> Option<Result<Meta, String>> {
    let items = m.list_len()?;
    let _version = m.integer()?;
    let axes = m.integer()?;
    if items < 5 || !matches!(axes, 3 | 4) {
        return None;
    }
    let mut four = || -> Option<[usize; 4]> {
        (m.list_len()? == axes as usize).then_some(())?;
        let mut next = || usize::try_from(m.integer()?).ok();
        Some([if axes == 3 { 1 } else { next()? }, next()?, next()?, next()?])
    };
    let (shape, chunk, block) = (four()?, four()?, four()?);
    // Files before Blosc2 2.8 do not tell the type.
    if items < 7 || m.integer()? != 0 {
        return Some(Err("no element type of NumPy's".into()));
    }
    let name = m.text()?;
    Some(element(name).map(|dtype| Meta { shape, chunk, block, dtype }))
}

/// A reader of MessagePack, as far as frames use it.
struct Packed<'a>(&'a [u8]);

impl<'a> Packed<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(taken)
    }

    fn number<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn length(&mut self) -> Option<usize> {
        usize::try_from(u32::from_be_bytes(self.number()?)).ok()
    }

    fn integer(&mut self) -> Option<i64> {
        match self.byte()? {
            n @ 0..=0x7f => Some(i64::from(n)),
            0xcd => Some(i64::from(u16::from_be_bytes(self.number()?))),
            0xd2 => Some(i64::from(i32::from_be_bytes(self.number()?))),
            0xd3 => Some(i64::from_be_bytes(self.number()?)),
            _ => None,
        }
    }

    fn list_len(&mut self) -> Option<usize> {
        match self.byte()? {
            n @ 0x90..=0x9f => Some(usize::from(n & 15)),
            0xdc => Some(usize::from(u16::from_be_bytes(self.number()?))),
            _ => None,
        }
    }

    fn map_len(&mut self) -> Option<usize> {
        match self.byte()? {
            n @ 0x80..=0x8f => Some(usize::from(n & 15)),
            0xde => Some(usize::from(u16::from_be_bytes(self.number()?))),
            _ => None,
        }
    }

    fn text(&mut self) -> Option<&'a str> {
        let n = match self.byte()? {
            n @ 0xa0..=0xbf => usize::from(n & 31),
            0xdb => self.length()?,
            _ => return None,
        };
        std::str::from_utf8(self.take(n)?).ok()
    }

    fn binary(&mut self) -> Option<&'a [u8]> {
        let n = if self.byte()? == 0xc6 { self.length()? } else { return None };
        self.take(n)
    }
}

fn big<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}
