//! Shared memory of one block: data, which bytes hold any, and what orders the accesses of its warps.
//!
//! Every warp has a vector clock; an access to a word is remembered as the clock of the warp that made it. Two accesses of
//! different warps are ordered when the later warp has heard of the earlier one's clock, through a barrier or an mbarrier.
//! Barriers of the whole block order everything before them, so words that were last touched before one need no look.

use std::ops::Range;

use crate::error::Fault;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Atomic,
}

/// What a warp, or an mbarrier, has heard of: clocks of all warps, then phases of all mbarriers.
pub(crate) type Clock = Vec<u32>;

/// Joins what `from` has heard of into `into`.
pub(crate) fn join(into: &mut Clock, from: &[u32]) {
    if into.len() < from.len() {
        into.resize(from.len(), 0);
    }
    for (a, b) in into.iter_mut().zip(from) {
        *a = (*a).max(*b);
    }
}

const ATOMIC: u32 = 16;
const CLOCK_BITS: u32 = 27;

#[derive(Default)]
pub(crate) struct Shared {
    pub(crate) data: Vec<u8>,
    /// Bytes of every word that hold data.
    init: Vec<u8>,
    warps: usize,
    /// For every warp and word: clock of its last write, whether it was atomic, and its bytes.
    writes: Vec<u32>,
    reads: Vec<u32>,
    /// Interval between barriers of the whole block in which a word was last written, and last read.
    write_epoch: Vec<u32>,
    read_epoch: Vec<u32>,
    epoch: u32,
    /// Clock of every warp at its last `fence.proxy.async`.
    fenced: Vec<u32>,
    /// Words that a warp wrote itself since a bulk copy last brought them.
    own: Vec<bool>,
    /// Bytes that an asynchronous copy brought: the clock entry and value that say that it has been waited for.
    copies: Vec<u32>,
    /// Clock at which this block began; all earlier ones belong to other blocks.
    base: u32,
}

impl Shared {
    /// Memory of a new block. Clocks go on from the last one, so that its accesses need not be erased.
    pub(crate) fn begin(&mut self, bytes: usize, warps: usize, last: u32) {
        let words = bytes.div_ceil(4);
        if self.init.len() != words || self.warps != warps || last >= 1 << (CLOCK_BITS - 2) {
            *self = Shared {
                data: vec![0xcd; words * 4],
                init: vec![0; words],
                warps,
                writes: vec![0; words * warps],
                reads: vec![0; words * warps],
                write_epoch: vec![0; words],
                read_epoch: vec![0; words],
                epoch: 1,
                fenced: vec![0; warps],
                own: vec![false; words],
                copies: vec![0; words],
                base: 0,
            };
        } else {
            self.data.fill(0xcd);
            self.init.fill(0);
            self.copies.fill(0);
            self.fenced.fill(last);
            self.own.fill(false);
            self.base = last;
            self.epoch += 1;
        }
    }

    /// The clock with which a warp of this block begins.
    pub(crate) fn first_clock(&self, warp: usize) -> Clock {
        let mut clock = vec![self.base; self.warps];
        clock[warp] += 1;
        clock
    }

    /// Everything so far is before everything that follows.
    pub(crate) fn next_epoch(&mut self) {
        self.epoch += 1;
    }

    pub(crate) fn bounds(&self, at: u64, bytes: usize) -> Result<usize, Fault> {
        if at.saturating_add(bytes as u64) > self.data.len() as u64 {
            let what = "shared memory".to_string();
            return Err(Fault::OutOfBounds { what, offset: at, bytes, len: self.data.len() as u64 });
        }
        Ok(at as usize)
    }

    /// Checks and remembers one access of warp `w`, whose clock is `clock`; returns its first byte.
    #[inline]
    pub(crate) fn access(
        &mut self,
        w: usize,
        clock: &Clock,
        at: u64,
        bytes: usize,
        kind: Kind,
    ) -> Result<usize, Fault> {
        let at = self.bounds(at, bytes)?;
        if at % 4 == 0 && bytes.is_multiple_of(4) {
            let words = at / 4..(at + bytes) / 4;
            if kind != Kind::Write && self.init[words.clone()].iter().any(|i| *i != 15) {
                return Err(self.unwritten(at, bytes));
            }
            self.order(w, clock, words.clone(), 15, kind)?;
            self.remember(w, clock, words, 15, kind);
            return Ok(at);
        }
        for word in at / 4..(at + bytes).div_ceil(4) {
            let (low, high) = (at.max(word * 4) - word * 4, (at + bytes).min(word * 4 + 4) - word * 4);
            let mask = ((1u32 << high) - 1) & !((1 << low) - 1);
            if kind != Kind::Write && mask & !u32::from(self.init[word]) != 0 {
                return Err(self.unwritten(at, bytes));
            }
            self.order(w, clock, word..word + 1, mask, kind)?;
            self.remember(w, clock, word..word + 1, mask, kind);
        }
        Ok(at)
    }

    #[cold]
    fn unwritten(&self, at: usize, bytes: usize) -> Fault {
        let missing = (at..at + bytes).find(|i| self.init[i / 4] >> (i % 4) & 1 == 0);
        Fault::Unwritten { what: "shared memory".into(), offset: missing.unwrap_or(at) as u64 }
    }

    /// Whether all accesses of others that this one must not meet are known to warp `w`.
    #[inline]
    fn order(&self, w: usize, clock: &[u32], words: Range<usize>, mask: u32, kind: Kind) -> Result<(), Fault> {
        for word in words.clone() {
            let copy = self.copies[word];
            if copy & mask != 0 {
                let (entry, phase) = ((copy >> 4 & 0xff) as usize, copy >> 12);
                if clock.get(entry).is_none_or(|seen| *seen < phase) {
                    let with = "an asynchronous copy that was not waited for".to_string();
                    return Err(Fault::SharedRace { offset: word as u64 * 4, with });
                }
            }
        }
        if self.write_epoch[words.clone()].contains(&self.epoch) {
            self.against(&self.writes, "wrote", w, clock, words.clone(), mask, kind)?;
        }
        if kind != Kind::Read && self.read_epoch[words.clone()].contains(&self.epoch) {
            self.against(&self.reads, "read", w, clock, words, mask, kind)?;
        }
        Ok(())
    }

    fn against(
        &self,
        table: &[u32],
        did: &str,
        w: usize,
        clock: &[u32],
        words: Range<usize>,
        mask: u32,
        kind: Kind,
    ) -> Result<(), Fault> {
        for u in (0..self.warps).filter(|u| *u != w) {
            // Entries below this are of clocks that warp `w` has heard of.
            let known = (clock[u] + 1) << 5;
            let entries = &table[u * self.init.len()..][words.clone()];
            if entries.iter().all(|e| *e < known) {
                continue;
            }
            for (word, entry) in words.clone().zip(entries) {
                let both_atomic = kind == Kind::Atomic && entry & ATOMIC != 0;
                if *entry >= known && entry & mask != 0 && !both_atomic {
                    let with = format!("warp {u}, which {did} it with nothing to order the two");
                    let byte = (entry & mask).trailing_zeros();
                    return Err(Fault::SharedRace { offset: word as u64 * 4 + u64::from(byte), with });
                }
            }
        }
        Ok(())
    }

    #[inline]
    fn remember(&mut self, w: usize, clock: &[u32], words: Range<usize>, mask: u32, kind: Kind) {
        let table = if kind == Kind::Read { &mut self.reads } else { &mut self.writes };
        let entries = &mut table[w * self.init.len()..][words.clone()];
        if mask == 15 && kind != Kind::Atomic {
            entries.fill(clock[w] << 5 | 15);
        } else {
            for entry in entries {
                // Bytes of one clock are collected; a plain write among atomic ones is the stronger claim.
                let same = *entry >> 5 == clock[w] && *entry & 15 != 0;
                let (bytes, atomic) = if same { (*entry & 15, *entry & ATOMIC) } else { (0, ATOMIC) };
                let atomic = if kind == Kind::Atomic { atomic } else { 0 };
                *entry = clock[w] << 5 | atomic | bytes | mask;
            }
        }
        if kind == Kind::Read {
            self.read_epoch[words].fill(self.epoch);
        } else {
            self.write_epoch[words.clone()].fill(self.epoch);
            self.own[words.clone()].fill(true);
            self.init[words.clone()].iter_mut().for_each(|i| *i |= mask as u8);
            self.copies[words].iter_mut().for_each(|c| *c &= !mask);
        }
    }

    /// Warp `w`, whose clock is `clock`, has made what it wrote so far known to the asynchronous proxy.
    pub(crate) fn fence_proxy(&mut self, w: usize, clock: &mut Clock) {
        self.fenced[w] = clock[w];
        // What it writes from now on is later than that.
        clock[w] += 1;
    }

    /// Checks that bulk copies and wgmma may touch bytes: who wrote them last by itself has fenced since.
    pub(crate) fn by_proxy(&self, at: usize, bytes: usize) -> Result<(), Fault> {
        for word in (at / 4..(at + bytes).div_ceil(4)).filter(|word| self.own[*word]) {
            for (warp, fenced) in self.fenced.iter().enumerate() {
                if self.writes[warp * self.init.len() + word] >> 5 > *fenced {
                    return Err(Fault::ProxyFence { offset: word as u64 * 4, warp });
                }
            }
        }
        Ok(())
    }

    /// Marks bytes as holding nothing until a copy that was just started brings them.
    pub(crate) fn in_flight(&mut self, at: usize, bytes: usize) {
        if at.is_multiple_of(4) && bytes.is_multiple_of(4) {
            self.init[at / 4..(at + bytes) / 4].fill(0);
            return;
        }
        for i in at..at + bytes {
            self.init[i / 4] &= !(1 << (i % 4));
        }
    }

    /// Checks that a bulk copy started with `clock` may read or overwrite bytes.
    pub(crate) fn check_copy(&self, clock: &[u32], at: usize, bytes: usize, kind: Kind) -> Result<(), Fault> {
        // No warp's own accesses are exempt but those that it made before it started the copy.
        self.order(usize::MAX, clock, at / 4..(at + bytes).div_ceil(4), 15, kind)?;
        self.by_proxy(at, bytes)
    }

    /// Bytes of an asynchronous copy arrive; `entry` of a clock reaching `phase` says that it was waited for.
    pub(crate) fn deliver(&mut self, at: usize, data: &[u8], entry: usize, phase: u32) {
        self.own[at / 4..(at + data.len()).div_ceil(4)].fill(false);
        self.data[at..at + data.len()].copy_from_slice(data);
        if at.is_multiple_of(4) && data.len().is_multiple_of(4) {
            self.init[at / 4..(at + data.len()) / 4].fill(15);
            self.copies[at / 4..(at + data.len()) / 4].fill(phase << 12 | (entry as u32) << 4 | 15);
            return;
        }
        for i in at..at + data.len() {
            self.init[i / 4] |= 1 << (i % 4);
            let mask = 1 << (i % 4) | self.copies[i / 4] & 15;
            self.copies[i / 4] = phase << 12 | (entry as u32) << 4 | mask;
        }
    }
}
