//! Global memory that blocks on several threads share, with exact bounds and the blocks that touched every byte.
//!
//! A word of memory has a word of history: which of its bytes hold data, and which block wrote and read which of its bytes
//! in this launch. One owner for each is nearly always enough; a word whose bytes belong to different blocks moves to a
//! table with an entry a byte.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};

use crate::error::Fault;

/// Bytes of address space for each buffer: a wrong offset does not reach the next one.
const WINDOW: u32 = 36;
const FIELD: u64 = (1 << 26) - 1;
/// Readers are several blocks.
const MANY: u64 = FIELD;
/// All accesses so far are atomic, by any block.
const ATOMIC: u64 = FIELD - 1;
/// The word's history is in the table.
const SPLIT: u64 = FIELD - 2;
/// Blocks of a launch that can be told apart.
pub(crate) const MAX_CTAS: u64 = FIELD - 3;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Atomic,
}

#[derive(Clone, Copy, Default)]
struct Owners {
    writer: u64,
    reader: u64,
}

struct Buffer {
    len: usize,
    words: Vec<AtomicU32>,
    history: Vec<AtomicU64>,
    split: Mutex<HashMap<usize, [Owners; 4]>>,
    touched: AtomicBool,
}

/// A word's history, unpacked.
#[derive(Clone, Copy)]
struct History {
    init: u64,
    wmask: u64,
    rmask: u64,
    writer: u64,
    reader: u64,
}

impl History {
    fn unpack(v: u64) -> History {
        History {
            init: v & 15,
            wmask: v >> 4 & 15,
            rmask: v >> 8 & 15,
            writer: v >> 12 & FIELD,
            reader: v >> 38 & FIELD,
        }
    }

    fn pack(self) -> u64 {
        self.init | self.wmask << 4 | self.rmask << 8 | self.writer << 12 | self.reader << 38
    }
}

/// All buffers.
#[derive(Default)]
pub(crate) struct Global {
    buffers: Vec<Option<Buffer>>,
}

impl Global {
    pub(crate) fn alloc(&mut self, len: usize) -> u64 {
        let words = len.div_ceil(4);
        self.buffers.push(Some(Buffer {
            len,
            words: (0..words).map(|_| AtomicU32::new(0xcdcd_cdcd)).collect(),
            history: (0..words).map(|_| AtomicU64::new(0)).collect(),
            split: Mutex::default(),
            touched: AtomicBool::new(false),
        }));
        (self.buffers.len() as u64) << WINDOW
    }

    pub(crate) fn free(&mut self, address: u64) -> bool {
        let slot = (address >> WINDOW).checked_sub(1).and_then(|i| self.buffers.get_mut(i as usize));
        slot.is_some_and(|s| s.take().is_some())
    }

    fn find(&self, address: u64) -> Result<(&Buffer, usize), Fault> {
        let slot = (address >> WINDOW).checked_sub(1).and_then(|i| self.buffers.get(i as usize));
        let buffer = slot.and_then(|s| s.as_ref()).ok_or(Fault::WildAddress(address))?;
        Ok((buffer, (address & ((1 << WINDOW) - 1)) as usize))
    }

    fn bounds(&self, address: u64, bytes: usize) -> Result<(&Buffer, usize), Fault> {
        let (buffer, at) = self.find(address)?;
        if at + bytes > buffer.len {
            let what = format!("the buffer at {:#x}", address >> WINDOW << WINDOW);
            return Err(Fault::OutOfBounds { what, offset: at as u64, bytes, len: buffer.len as u64 });
        }
        Ok((buffer, at))
    }

    /// Bytes from the host's side.
    pub(crate) fn upload(&self, address: u64, data: &[u8]) -> Result<(), Fault> {
        let (buffer, at) = self.bounds(address, data.len())?;
        for (i, byte) in data.iter().enumerate() {
            let (word, shift) = ((at + i) / 4, 8 * ((at + i) % 4));
            let old = buffer.words[word].load(Relaxed);
            buffer.words[word].store(old & !(0xff << shift) | u32::from(*byte) << shift, Relaxed);
            buffer.history[word].fetch_or(1 << ((at + i) % 4), Relaxed);
        }
        Ok(())
    }

    /// Bytes to the host's side, whatever they are.
    pub(crate) fn download(&self, address: u64, bytes: usize) -> Result<Vec<u8>, Fault> {
        let (buffer, at) = self.bounds(address, bytes)?;
        let byte = |i: usize| (buffer.words[i / 4].load(Relaxed) >> (8 * (i % 4))) as u8;
        Ok((at..at + bytes).map(byte).collect())
    }

    pub(crate) fn len(&self, address: u64) -> Result<usize, Fault> {
        Ok(self.find(address)?.0.len)
    }

    /// Offset of the first byte that holds no data.
    pub(crate) fn unwritten(&self, address: u64) -> Result<Option<usize>, Fault> {
        let (buffer, _) = self.find(address)?;
        let holds = |i: &usize| buffer.history[i / 4].load(Relaxed) >> (i % 4) & 1 == 0;
        Ok((0..buffer.len).find(holds))
    }

    /// Makes all bytes of a buffer count as never written.
    pub(crate) fn forget(&self, address: u64) -> Result<(), Fault> {
        let (buffer, _) = self.find(address)?;
        for (word, history) in buffer.words.iter().zip(&buffer.history) {
            word.store(0xcdcd_cdcd, Relaxed);
            history.store(0, Relaxed);
        }
        Ok(())
    }

    /// Blocks of the next launch are others than those of the last one.
    pub(crate) fn end_launch(&mut self) {
        for buffer in self.buffers.iter_mut().flatten() {
            if std::mem::take(buffer.touched.get_mut()) {
                buffer.history.iter_mut().for_each(|h| *h.get_mut() &= 15);
                buffer.split.get_mut().unwrap_or_else(|e| e.into_inner()).clear();
            }
        }
    }

    /// Reads up to 16 bytes; `me` is the number of the block plus one.
    pub(crate) fn read(&self, address: u64, out: &mut [u8], me: u64) -> Result<(), Fault> {
        let (buffer, at) = self.bounds(address, out.len())?;
        buffer.touch();
        if at % 4 == 0 && out.len() % 4 == 0 {
            for (i, chunk) in out.chunks_exact_mut(4).enumerate() {
                let word = at / 4 + i;
                buffer.access(word, 15, Kind::Read, me)?;
                chunk.copy_from_slice(&buffer.words[word].load(Relaxed).to_le_bytes());
            }
            return Ok(());
        }
        for (word, mask, from) in pieces(at, out.len()) {
            buffer.access(word, mask, Kind::Read, me)?;
            let bytes = buffer.words[word].load(Relaxed).to_le_bytes();
            for j in 0..4 {
                if mask >> j & 1 == 1 {
                    out[word * 4 + j - from] = bytes[j];
                }
            }
        }
        Ok(())
    }

    /// Writes up to 16 bytes.
    pub(crate) fn write(&self, address: u64, data: &[u8], me: u64) -> Result<(), Fault> {
        let (buffer, at) = self.bounds(address, data.len())?;
        buffer.touch();
        if at % 4 == 0 && data.len() % 4 == 0 {
            for (i, chunk) in data.as_chunks::<4>().0.iter().enumerate() {
                let word = at / 4 + i;
                buffer.access(word, 15, Kind::Write, me)?;
                buffer.words[word].store(u32::from_le_bytes(*chunk), Relaxed);
            }
            return Ok(());
        }
        for (word, mask, from) in pieces(at, data.len()) {
            buffer.access(word, mask, Kind::Write, me)?;
            let (mut keep, mut new) = (u32::MAX, 0);
            for j in 0..4 {
                if mask >> j & 1 == 1 {
                    keep &= !(0xff << (8 * j));
                    new |= u32::from(data[word * 4 + j - from]) << (8 * j);
                }
            }
            let _ = buffer.words[word].fetch_update(Relaxed, Relaxed, |old| Some(old & keep | new));
        }
        Ok(())
    }

    /// Replaces a value by a function of it, and returns the old one.
    pub(crate) fn atomic(&self, address: u64, bytes: usize, f: impl Fn(u64) -> u64) -> Result<u64, Fault> {
        let (buffer, at) = self.bounds(address, bytes)?;
        buffer.touch();
        let word = at / 4;
        for i in 0..bytes / 4 {
            buffer.access(word + i, 15, Kind::Atomic, ATOMIC)?;
        }
        if bytes == 4 {
            let old = buffer.words[word].fetch_update(Relaxed, Relaxed, |old| Some(f(u64::from(old)) as u32));
            return Ok(u64::from(old.unwrap_or_else(|o| o)));
        }
        let _both_words = buffer.split.lock().unwrap_or_else(|e| e.into_inner());
        let half = |i: usize| u64::from(buffer.words[word + i].load(Relaxed));
        let old = half(0) | half(1) << 32;
        let new = f(old);
        buffer.words[word].store(new as u32, Relaxed);
        buffer.words[word + 1].store((new >> 32) as u32, Relaxed);
        Ok(old)
    }
}

/// The words that `bytes` bytes from `at` touch: number, mask of their bytes, `at` again.
fn pieces(at: usize, bytes: usize) -> impl Iterator<Item = (usize, u64, usize)> {
    let end = at + bytes;
    (at / 4..end.div_ceil(4)).map(move |word| {
        let (low, high) = (at.max(word * 4) - word * 4, end.min(word * 4 + 4) - word * 4);
        (word, ((1u64 << high) - 1) & !((1 << low) - 1), at)
    })
}

impl Buffer {
    fn touch(&self) {
        if !self.touched.load(Relaxed) {
            self.touched.store(true, Relaxed);
        }
    }

    fn race(&self, word: usize, mask: u64, other: u64) -> Fault {
        let with = match other {
            MANY => "several blocks that read it".to_string(),
            ATOMIC => "an atomic operation".to_string(),
            n => format!("block number {}", n - 1),
        };
        Fault::GlobalRace { offset: word as u64 * 4 + u64::from(mask.trailing_zeros()), with }
    }

    /// Checks one access of one block to bytes of one word, and remembers it.
    #[inline]
    fn access(&self, word: usize, mask: u64, kind: Kind, me: u64) -> Result<(), Fault> {
        loop {
            let seen = self.history[word].load(Relaxed);
            let h = History::unpack(seen);
            if kind != Kind::Write && h.init & mask != mask {
                let missing = (mask & !h.init).trailing_zeros();
                let offset = word as u64 * 4 + u64::from(missing);
                return Err(Fault::Unwritten { what: "a buffer".into(), offset });
            }
            if h.writer == SPLIT {
                return self.access_bytes(word, mask, kind, me);
            }
            let (wrote, read) = (h.writer != 0 && h.writer != me, h.reader != 0 && h.reader != me);
            if wrote && h.wmask & mask != 0 {
                return Err(self.race(word, h.wmask & mask, h.writer));
            }
            let mut new = h;
            match kind {
                Kind::Read => {
                    // Others wrote other bytes of the word, or read other bytes of it: one owner a word is too few.
                    if wrote || (read && h.rmask != mask && !(h.reader == MANY && h.rmask & mask == mask)) {
                        self.split(word);
                        continue;
                    }
                    new.reader = if read { MANY } else { me };
                    new.rmask |= mask;
                }
                Kind::Write | Kind::Atomic => {
                    if read && h.rmask & mask != 0 {
                        return Err(self.race(word, h.rmask & mask, h.reader));
                    }
                    if wrote || read {
                        self.split(word);
                        continue;
                    }
                    new.writer = me;
                    new.wmask |= mask;
                    new.init |= mask;
                }
            }
            let packed = new.pack();
            if packed == seen || self.history[word].compare_exchange_weak(seen, packed, Relaxed, Relaxed).is_ok() {
                return Ok(());
            }
        }
    }

    /// Moves a word's history to the table of bytes.
    fn split(&self, word: usize) {
        let mut table = self.split.lock().unwrap_or_else(|e| e.into_inner());
        loop {
            let seen = self.history[word].load(Relaxed);
            let h = History::unpack(seen);
            if h.writer == SPLIT {
                return;
            }
            let mut bytes = [Owners::default(); 4];
            for (j, b) in bytes.iter_mut().enumerate() {
                b.writer = if h.wmask >> j & 1 == 1 { h.writer } else { 0 };
                b.reader = if h.rmask >> j & 1 == 1 { h.reader } else { 0 };
            }
            let moved = History { init: h.init, wmask: 0, rmask: 0, writer: SPLIT, reader: 0 }.pack();
            // The table is locked: whoever sees the mark waits for the entry.
            table.insert(word, bytes);
            if self.history[word].compare_exchange(seen, moved, Relaxed, Relaxed).is_ok() {
                return;
            }
        }
    }

    fn access_bytes(&self, word: usize, mask: u64, kind: Kind, me: u64) -> Result<(), Fault> {
        let mut table = self.split.lock().unwrap_or_else(|e| e.into_inner());
        let bytes = table.entry(word).or_default();
        for (j, b) in bytes.iter_mut().enumerate().filter(|(j, _)| mask >> j & 1 == 1) {
            if b.writer != 0 && b.writer != me {
                return Err(self.race(word, 1 << j, b.writer));
            }
            if kind == Kind::Read {
                b.reader = if b.reader == 0 || b.reader == me { me } else { MANY };
            } else {
                if b.reader != 0 && b.reader != me {
                    return Err(self.race(word, 1 << j, b.reader));
                }
                b.writer = me;
            }
        }
        if kind != Kind::Read {
            self.history[word].fetch_or(mask, Relaxed);
        }
        Ok(())
    }
}
