//! Global memory that blocks on several threads share, with exact bounds and the blocks that touched every byte.
//!
//! History is as coarse as the accesses: a sector of 32 bytes that is only touched as a whole has one entry, with the blocks
//! that wrote and read it in this launch. A sector that is touched in part has an entry a word, which also says which bytes
//! hold data and which of them were touched; and a word whose bytes belong to different blocks has an entry a byte.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{
    AtomicBool, AtomicU32, AtomicU64,
    Ordering::{AcqRel, Acquire, Relaxed},
};

use crate::error::Fault;

/// Bytes of address space for each buffer: a wrong offset does not reach the next one.
const WINDOW: u32 = 36;
/// Bytes with one entry of history while they are touched together.
const SECTOR: usize = 32;
/// A sector's entry when its words have entries of their own.
const DIVIDED: u64 = u64::MAX;
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
    /// Of sectors: bit 0 whether it holds data, then writer and reader as in the words' entries.
    sectors: Vec<AtomicU64>,
    /// Of words, where the sector is divided.
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
            sectors: (0..len.div_ceil(SECTOR)).map(|_| AtomicU64::new(0)).collect(),
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
        buffer.store(at, data);
        for (sector, from, to) in sectors(at, data.len()) {
            if buffer.whole(sector, from, to) && buffer.sectors[sector].load(Relaxed) != DIVIDED {
                buffer.sectors[sector].fetch_or(1, Relaxed);
                continue;
            }
            buffer.divide(sector);
            for i in from..to {
                buffer.history[i / 4].fetch_or(1 << (i % 4), Relaxed);
            }
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
        let holds = |i: &usize| match buffer.sectors[i / SECTOR].load(Relaxed) {
            DIVIDED => buffer.history[i / 4].load(Relaxed) >> (i % 4) & 1 == 1,
            entry => entry & 1 == 1,
        };
        Ok((0..buffer.len).find(|i| !holds(i)))
    }

    /// Makes all bytes of a buffer count as never written.
    pub(crate) fn forget(&self, address: u64) -> Result<(), Fault> {
        let (buffer, _) = self.find(address)?;
        for (word, history) in buffer.words.iter().zip(&buffer.history) {
            word.store(0xcdcd_cdcd, Relaxed);
            history.store(0, Relaxed);
        }
        buffer.sectors.iter().for_each(|s| s.store(0, Relaxed));
        Ok(())
    }

    /// Blocks of the next launch are others than those of the last one.
    pub(crate) fn end_launch(&mut self) {
        for buffer in self.buffers.iter_mut().flatten() {
            if std::mem::take(buffer.touched.get_mut()) {
                let history = &mut buffer.history;
                for (i, sector) in buffer.sectors.iter_mut().enumerate() {
                    let sector = sector.get_mut();
                    if *sector != DIVIDED {
                        *sector &= 1;
                        continue;
                    }
                    let words = i * 8..(i * 8 + 8).min(history.len());
                    history[words].iter_mut().for_each(|h| *h.get_mut() &= 15);
                }
                buffer.split.get_mut().unwrap_or_else(|e| e.into_inner()).clear();
            }
        }
    }

    /// Reads bytes; `me` is the number of the block plus one.
    pub(crate) fn read(&self, address: u64, out: &mut [u8], me: u64) -> Result<(), Fault> {
        let (buffer, at) = self.bounds(address, out.len())?;
        buffer.touch(at, out.len(), Kind::Read, me)?;
        if at % 4 == 0 && out.len().is_multiple_of(4) {
            let words = &buffer.words[at / 4..][..out.len() / 4];
            for (word, chunk) in words.iter().zip(out.as_chunks_mut::<4>().0) {
                *chunk = word.load(Relaxed).to_le_bytes();
            }
            return Ok(());
        }
        for (i, byte) in (at..).zip(out) {
            *byte = (buffer.words[i / 4].load(Relaxed) >> (8 * (i % 4))) as u8;
        }
        Ok(())
    }

    /// Writes bytes.
    pub(crate) fn write(&self, address: u64, data: &[u8], me: u64) -> Result<(), Fault> {
        let (buffer, at) = self.bounds(address, data.len())?;
        buffer.touch(at, data.len(), Kind::Write, me)?;
        buffer.store(at, data);
        Ok(())
    }

    /// Replaces a value by a function of it, and returns the old one.
    pub(crate) fn atomic(&self, address: u64, bytes: usize, f: impl Fn(u64) -> u64) -> Result<u64, Fault> {
        let (buffer, at) = self.bounds(address, bytes)?;
        let word = at / 4;
        buffer.touch(at, bytes, Kind::Atomic, ATOMIC)?;
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

/// The sectors that `bytes` bytes from `at` touch: number, first byte, end.
#[inline]
fn sectors(at: usize, bytes: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    let end = at + bytes;
    (at / SECTOR..end.div_ceil(SECTOR)).map(move |s| (s, at.max(s * SECTOR), end.min(s * SECTOR + SECTOR)))
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
    fn store(&self, at: usize, data: &[u8]) {
        if at.is_multiple_of(4) && data.len().is_multiple_of(4) {
            let words = &self.words[at / 4..][..data.len() / 4];
            for (word, chunk) in words.iter().zip(data.as_chunks::<4>().0) {
                word.store(u32::from_le_bytes(*chunk), Relaxed);
            }
            return;
        }
        for (word, mask, from) in pieces(at, data.len()) {
            let (mut keep, mut new) = (u32::MAX, 0);
            for j in 0..4 {
                if mask >> j & 1 == 1 {
                    keep &= !(0xff << (8 * j));
                    new |= u32::from(data[word * 4 + j - from]) << (8 * j);
                }
            }
            // Another block may write the other bytes of the word.
            let _ = self.words[word].fetch_update(Relaxed, Relaxed, |old| Some(old & keep | new));
        }
    }

    /// Checks and remembers an access to a range of bytes.
    fn touch(&self, at: usize, bytes: usize, kind: Kind, me: u64) -> Result<(), Fault> {
        if !self.touched.load(Relaxed) {
            self.touched.store(true, Relaxed);
        }
        for (sector, from, to) in sectors(at, bytes) {
            if !self.whole(sector, from, to) {
                self.divide(sector);
            } else if self.access_sector(sector, kind, me)? {
                continue;
            }
            for (word, mask, _) in pieces(from, to - from) {
                self.access(word, mask, kind, me)?;
            }
        }
        Ok(())
    }

    /// Whether a range is all of its sector, of which the last one may be short.
    #[inline]
    fn whole(&self, sector: usize, from: usize, to: usize) -> bool {
        from == sector * SECTOR && (to == from + SECTOR || to == self.len)
    }

    /// An access to a whole sector; false where its words have to be looked at.
    #[inline]
    fn access_sector(&self, sector: usize, kind: Kind, me: u64) -> Result<bool, Fault> {
        loop {
            let seen = self.sectors[sector].load(Acquire);
            if seen == DIVIDED {
                return Ok(false);
            }
            if kind != Kind::Write && seen & 1 == 0 {
                return Err(Fault::Unwritten { what: "a buffer".into(), offset: (sector * SECTOR) as u64 });
            }
            let (writer, reader) = (seen >> 12 & FIELD, seen >> 38 & FIELD);
            if writer != 0 && writer != me {
                return Err(self.race(sector * 8, 1, writer));
            }
            let new = if kind == Kind::Read {
                let reader = if reader == 0 || reader == me { me } else { MANY };
                seen & !(FIELD << 38) | reader << 38
            } else {
                if reader != 0 && reader != me {
                    return Err(self.race(sector * 8, 1, reader));
                }
                seen | 1 | me << 12
            };
            if new == seen || self.sectors[sector].compare_exchange_weak(seen, new, AcqRel, Relaxed).is_ok() {
                return Ok(true);
            }
        }
    }

    /// Gives the words of a sector entries of their own.
    fn divide(&self, sector: usize) {
        if self.sectors[sector].load(Acquire) == DIVIDED {
            return;
        }
        let _one_at_a_time = self.split.lock().unwrap_or_else(|e| e.into_inner());
        loop {
            let seen = self.sectors[sector].load(Acquire);
            if seen == DIVIDED {
                return;
            }
            let (writer, reader) = (seen >> 12 & FIELD, seen >> 38 & FIELD);
            let all = |set: bool| if set { 15 } else { 0 };
            let init = all(seen & 1 == 1);
            let entry = History { init, wmask: all(writer != 0), rmask: all(reader != 0), writer, reader };
            for word in sector * 8..(sector * 8 + 8).min(self.history.len()) {
                self.history[word].store(entry.pack(), Relaxed);
            }
            if self.sectors[sector].compare_exchange(seen, DIVIDED, AcqRel, Relaxed).is_ok() {
                return;
            }
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
