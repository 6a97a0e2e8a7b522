//! Memory of a tensor: 64-byte aligned, recycled, large pieces on huge pages where the system has them.
#![allow(unsafe_code, reason = "ranges of one region are handed out as slices")]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memmap2::{MmapMut, MmapRaw};

use super::pool::Pool;
use crate::error::{Error, Result};

/// Sixteen floats, so that a vector of lines is aligned for every SIMD load.
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
pub(super) struct Line([f32; 16]);

/// From this size on, memory is mapped by itself, so that huge pages can back it and it goes back when freed.
const MAP_FROM: usize = 1 << 20;

/// Memory that the system, not a limit of ours, refuses.
fn refused(what: String, asked: usize) -> Error {
    Error::OutOfMemory { what, asked, in_use: 0, limit: isize::MAX as usize }
}

/// Owned memory, zero when fresh.
pub(super) enum Memory {
    Small(Vec<Line>),
    Mapped(MmapMut),
    Range(Range),
}

/// Fresh zeros from the system.
fn map(bytes: usize) -> Result<MmapMut> {
    let map = MmapMut::map_anon(bytes).map_err(|e| refused(format!("a tensor ({e})"), bytes))?;
    // First touch by 4 KiB pages costs up to half of a memory-bound pass. Advice only: a refusal is harmless.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    Ok(map)
}

impl Memory {
    pub(super) fn new(bytes: usize) -> Result<Self> {
        if bytes < MAP_FROM {
            return Ok(Memory::Small(vec![Line([0.0; 16]); bytes.div_ceil(64)]));
        }
        map(bytes).map(Memory::Mapped)
    }

    /// Where it begins, which no other live memory does.
    pub(super) fn address(&self) -> usize {
        self.floats().as_ptr().addr()
    }

    pub(super) fn bytes(&self) -> usize {
        match self {
            Memory::Small(v) => v.len() * 64,
            Memory::Mapped(m) => m.len(),
            Memory::Range(r) => r.len,
        }
    }

    fn floats(&self) -> &[f32] {
        match self {
            Memory::Small(v) => bytemuck::cast_slice(v),
            Memory::Mapped(m) => bytemuck::cast_slice(m),
            Memory::Range(r) => r.floats(),
        }
    }

    fn floats_mut(&mut self) -> &mut [f32] {
        match self {
            Memory::Small(v) => bytemuck::cast_slice_mut(v),
            Memory::Mapped(m) => bytemuck::cast_slice_mut(m),
            Memory::Range(r) => r.floats_mut(),
        }
    }
}

/// One mapping that is handed out in ranges. Whoever asks, for whatever reason, no two live ranges share a byte: that
/// is kept here and nowhere else.
pub(super) struct Region {
    map: MmapRaw,
    /// Live ranges: first byte and the one after the last.
    live: Mutex<BTreeMap<usize, usize>>,
}

impl Region {
    pub(super) fn new(bytes: usize) -> Result<Arc<Self>> {
        Ok(Arc::new(Self { map: map(bytes)?.into(), live: Mutex::default() }))
    }

    pub(super) fn bytes(&self) -> usize {
        self.map.len()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<usize, usize>> {
        // Single insertions and removals: a panic elsewhere leaves nothing half done.
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The `len` bytes from `start`, unless they are not all inside, not made of whole lines, or a live range has some
    /// of them.
    pub(super) fn claim(self: &Arc<Self>, start: usize, len: usize) -> Option<Memory> {
        let end = start.checked_add(len).filter(|&end| end <= self.bytes())?;
        if len == 0 || !start.is_multiple_of(64) || !len.is_multiple_of(64) {
            return None;
        }
        let mut live = self.lock();
        // Live ranges are disjoint, so the last one that begins before `end` is also the last one to end.
        if live.range(..end).next_back().is_some_and(|(_, &e)| e > start) {
            return None;
        }
        live.insert(start, end);
        Some(Memory::Range(Range { region: self.clone(), start, len }))
    }
}

/// The only live range of its region that has these bytes. Keeps the region mapped.
pub(super) struct Range {
    region: Arc<Region>,
    start: usize,
    len: usize,
}

impl Range {
    fn floats(&self) -> &[f32] {
        // SAFETY: `claim` checked that the range lies inside the mapping, which `region` keeps, and begins at a
        // multiple of 64 from its page-aligned start. Anonymous memory is zero when fresh and only ever written as
        // plain numbers, all of whose bits make an f32. While this range lives, `claim` gives none of its bytes away, so who borrows it borrows them.
        unsafe { std::slice::from_raw_parts(self.region.map.as_ptr().add(self.start).cast(), self.len / 4) }
    }

    fn floats_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `floats`; the borrow of the range is exclusive, therefore that of its bytes is.
        unsafe { std::slice::from_raw_parts_mut(self.region.map.as_mut_ptr().add(self.start).cast(), self.len / 4) }
    }
}

impl Drop for Range {
    fn drop(&mut self) {
        self.region.lock().remove(&self.start);
    }
}

/// `len` floats of a pool's memory; dropping it gives the memory back to the pool.
pub(crate) struct Buffer {
    memory: Option<Memory>,
    len: usize,
    pool: Arc<Pool>,
}

impl Buffer {
    pub(super) fn new(len: usize, pool: &Arc<Pool>) -> Result<Self> {
        // No object is larger than isize::MAX bytes; the margin leaves room for rounding up.
        let bytes = len.saturating_mul(4);
        let memory =
            if bytes > isize::MAX as usize - 64 { Err(refused("a tensor".into(), bytes)) } else { pool.take(bytes) };
        let memory = memory.map_err(|e| match e {
            // Only the pool knows what is in use.
            Error::OutOfMemory { what, asked, in_use: 0, limit } => {
                Error::OutOfMemory { what, asked, in_use: pool.report().in_use, limit }
            }
            e => e,
        })?;
        Ok(Self { memory: Some(memory), len, pool: pool.clone() })
    }

    pub(crate) fn as_slice(&self) -> &[f32] {
        self.memory.as_ref().map_or(&[], |m| &m.floats()[..self.len])
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [f32] {
        self.memory.as_mut().map_or(&mut [], |m| &mut m.floats_mut()[..self.len])
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(m) = self.memory.take() {
            self.pool.give(m);
        }
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({} floats)", self.len)
    }
}
