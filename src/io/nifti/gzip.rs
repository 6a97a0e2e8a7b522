//! Gzip written by several threads: blocks of fixed size are packed on their own and joined to one ordinary stream, as
//! pigz does. Which bytes come out depends on the bytes that go in alone.

use std::io::{Error, Result, Write};

use flate2::{Compress, Compression, Crc, FlushCompress, Status};

use crate::base::par;

/// Bytes that are packed on their own. The end of a block costs some five bytes and half of a Huffman table.
const BLOCK: usize = 512 << 10;
/// Blocks in memory.
const BATCH: usize = 16;
/// How far back DEFLATE refers: a block is packed with the end of the one before it as its dictionary.
const REACH: usize = 32 << 10;
/// Of the label maps of a CT level 6 leaves a quarter of what level 1 does, for twice the time.
const LEVEL: u32 = 6;

/// A gzip stream without name, time and system: equal contents are equal files.
pub(super) struct Packer<W: Write> {
    out: W,
    /// The end of what is packed already (`kept` bytes), and what is to come.
    waiting: Vec<u8>,
    kept: usize,
    crc: Crc,
}

impl<W: Write> Packer<W> {
    pub(super) fn new(mut out: W) -> Result<Self> {
        const MAGIC: [u8; 2] = [0x1f, 0x8b];
        const DEFLATE: u8 = 8;
        const NO_SYSTEM: u8 = 255;
        out.write_all(&[MAGIC[0], MAGIC[1], DEFLATE, 0, 0, 0, 0, 0, 0, NO_SYSTEM])?;
        Ok(Self { out, waiting: Vec::with_capacity(REACH + BATCH * BLOCK), kept: 0, crc: Crc::new() })
    }

    /// Packs what is left and writes the checksum.
    pub(super) fn finish(mut self) -> Result<()> {
        self.pack(true)?;
        // The length is kept modulo 2^32, as the format has it.
        self.out.write_all(&self.crc.sum().to_le_bytes())?;
        self.out.write_all(&self.crc.amount().to_le_bytes())
    }

    /// Packs all that waits; `last`: and ends the stream.
    fn pack(&mut self, last: bool) -> Result<()> {
        let (waiting, kept) = (&self.waiting, self.kept);
        // An empty last block is a block too.
        let blocks = (waiting.len() - kept).div_ceil(BLOCK).max(usize::from(last));
        let packed = par::map(blocks, |i| {
            let from = kept + i * BLOCK;
            let block = &waiting[from..waiting.len().min(from + BLOCK)];
            let mut crc = Crc::new();
            crc.update(block);
            deflate(&waiting[from.saturating_sub(REACH)..from], block, last && i + 1 == blocks).map(|p| (p, crc))
        });
        for block in packed {
            let (bytes, crc) = block?;
            self.out.write_all(&bytes)?;
            self.crc.combine(&crc);
        }
        let from = waiting.len().saturating_sub(REACH);
        self.waiting.drain(..from);
        self.kept = self.waiting.len();
        Ok(())
    }
}

impl<W: Write> Write for Packer<W> {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        let taken = bytes.len().min(self.kept + BATCH * BLOCK - self.waiting.len());
        self.waiting.extend_from_slice(&bytes[..taken]);
        if self.waiting.len() == self.kept + BATCH * BLOCK {
            self.pack(false)?;
        }
        Ok(taken)
    }

    /// Nothing: an early end of a block would change the bytes.
    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

/// `block` as a piece of a DEFLATE stream that ends on a whole byte; `last`: the end of the stream.
fn deflate(dictionary: &[u8], block: &[u8], last: bool) -> Result<Vec<u8>> {
    let mut packer = Compress::new(Compression::new(LEVEL), false);
    if !dictionary.is_empty() {
        packer.set_dictionary(dictionary).map_err(Error::other)?;
    }
    let flush = if last { FlushCompress::Finish } else { FlushCompress::Sync };
    let mut out = Vec::with_capacity(block.len() / 8 + 1024);
    loop {
        let rest = &block[packer.total_in() as usize..];
        let status = packer.compress_vec(rest, &mut out, flush).map_err(Error::other)?;
        // Room that is left over says that nothing is held back.
        let all = packer.total_in() as usize == block.len() && out.len() < out.capacity();
        if status == Status::StreamEnd || (!last && all) {
            return Ok(out);
        }
        out.reserve(out.capacity());
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::base::rng::Rng;

    fn packed(bytes: &[u8], piece: usize) -> Vec<u8> {
        let mut out = Vec::new();
        let mut packer = Packer::new(&mut out).unwrap();
        bytes.chunks(piece).for_each(|c| packer.write_all(c).unwrap());
        packer.finish().unwrap();
        out
    }

    /// One member that a reader of one member reads whole, for sizes around blocks and batches.
    #[test]
    fn any_size_comes_back() {
        let mut rng = Rng::new(8, 0);
        let all: Vec<u8> =
            (0..BATCH * BLOCK + 3 * BLOCK).map(|i| (i / 5000) as u8 ^ rng.uniform(0.0, 3.0) as u8).collect();
        for n in [0, 1, 1000, BLOCK - 1, BLOCK, BLOCK + 1, BATCH * BLOCK, BATCH * BLOCK + 1, all.len()] {
            let file = packed(&all[..n], 100_000);
            let mut reader = flate2::bufread::GzDecoder::new(&file[..]);
            let mut back = Vec::new();
            reader.read_to_end(&mut back).unwrap();
            assert!(back == all[..n], "{n}");
            assert!(reader.into_inner().is_empty(), "{n}: bytes behind the member");
        }
    }

    #[test]
    fn bytes_depend_on_the_content_alone() {
        let mut rng = Rng::new(8, 1);
        // Noise as well: a block that cannot be packed gets longer.
        let all: Vec<u8> = (0..4 * BLOCK).map(|i| if i < BLOCK { rng.uniform(0.0, 256.0) as u8 } else { 7 }).collect();
        let first = packed(&all, all.len());
        assert!(first == packed(&all, 999));
        let alone = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        assert!(alone.install(|| first == packed(&all, 77_777)));
    }
}
