//! Memory of a tensor: 64-byte aligned, recycled, large pieces on huge pages where the system has them.
#![allow(unsafe_code, reason = "ranges of one region are handed out as slices")]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memmap2::{MmapMut, MmapRaw};

#[cfg(feature = "cuda")]
use super::cuda;
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

/// Where a pool's memory comes from.
#[derive(Debug, Clone, Default)]
pub(super) enum Origin {
    #[default]
    Host,
    #[cfg(feature = "cuda")]
    Cuda(Arc<dyn cuda::Driver>),
}

/// Owned memory: of the host zero when fresh, of a card whatever was there.
pub(super) enum Memory {
    Small(Vec<Line>),
    Mapped(MmapMut),
    Range(Range),
    #[cfg(feature = "cuda")]
    Cuda(CudaMemory),
}

/// Memory of a card.
#[cfg(feature = "cuda")]
pub(super) struct CudaMemory {
    memory: cuda::Memory,
    driver: Arc<dyn cuda::Driver>,
}

#[cfg(feature = "cuda")]
impl CudaMemory {
    fn new(driver: &Arc<dyn cuda::Driver>, bytes: usize) -> Result<Self> {
        Ok(Self { memory: driver.alloc(bytes)?, driver: driver.clone() })
    }
}

#[cfg(feature = "cuda")]
impl Drop for CudaMemory {
    fn drop(&mut self) {
        // A card that has failed says so at the next call that can hand the error to someone.
        let _ = self.driver.free(self.memory);
    }
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
    pub(super) fn new(origin: &Origin, bytes: usize) -> Result<Self> {
        match origin {
            Origin::Host if bytes < MAP_FROM => Ok(Memory::Small(vec![Line([0.0; 16]); bytes.div_ceil(64)])),
            Origin::Host => map(bytes).map(Memory::Mapped),
            #[cfg(feature = "cuda")]
            Origin::Cuda(driver) => CudaMemory::new(driver, bytes).map(Memory::Cuda),
        }
    }

    /// Where it begins, which no other live memory does.
    pub(super) fn address(&self) -> usize {
        #[cfg(feature = "cuda")]
        if let Some(m) = self.cuda() {
            return m.address as usize;
        }
        self.floats().as_ptr().addr()
    }

    /// As a card's kernels see it, if it is a card's.
    #[cfg(feature = "cuda")]
    fn cuda(&self) -> Option<cuda::Memory> {
        match self {
            Memory::Cuda(m) => Some(m.memory),
            Memory::Range(Range { region, start, len }) => match &region.map {
                Map::Cuda(m) => Some(cuda::Memory { address: m.memory.address + *start as u64, bytes: *len }),
                Map::Host(_) => None,
            },
            Memory::Small(_) | Memory::Mapped(_) => None,
        }
    }

    pub(super) fn bytes(&self) -> usize {
        match self {
            Memory::Small(v) => v.len() * 64,
            Memory::Mapped(m) => m.len(),
            Memory::Range(r) => r.len,
            #[cfg(feature = "cuda")]
            Memory::Cuda(m) => m.memory.bytes,
        }
    }

    fn floats(&self) -> &[f32] {
        match self {
            Memory::Small(v) => bytemuck::cast_slice(v),
            Memory::Mapped(m) => bytemuck::cast_slice(m),
            Memory::Range(r) => r.floats(),
            #[cfg(feature = "cuda")]
            Memory::Cuda(_) => unreachable!("memory of a card is read through its driver"),
        }
    }

    fn floats_mut(&mut self) -> &mut [f32] {
        match self {
            Memory::Small(v) => bytemuck::cast_slice_mut(v),
            Memory::Mapped(m) => bytemuck::cast_slice_mut(m),
            Memory::Range(r) => r.floats_mut(),
            #[cfg(feature = "cuda")]
            Memory::Cuda(_) => unreachable!("memory of a card is written through its driver"),
        }
    }
}

/// What a region lies in.
enum Map {
    Host(MmapRaw),
    #[cfg(feature = "cuda")]
    Cuda(CudaMemory),
}

/// One mapping that is handed out in ranges. Whoever asks, for whatever reason, no two live ranges share a byte: that
/// is kept here and nowhere else.
pub(super) struct Region {
    map: Map,
    /// Live ranges: first byte and the one after the last.
    live: Mutex<BTreeMap<usize, usize>>,
}

impl Region {
    pub(super) fn new(origin: &Origin, bytes: usize) -> Result<Arc<Self>> {
        let map = match origin {
            Origin::Host => Map::Host(map(bytes)?.into()),
            #[cfg(feature = "cuda")]
            Origin::Cuda(driver) => Map::Cuda(CudaMemory::new(driver, bytes)?),
        };
        Ok(Arc::new(Self { map, live: Mutex::default() }))
    }

    pub(super) fn bytes(&self) -> usize {
        match &self.map {
            Map::Host(m) => m.len(),
            #[cfg(feature = "cuda")]
            Map::Cuda(m) => m.memory.bytes,
        }
    }

    /// Its first byte, of the host's memory.
    fn start(&self) -> *mut u8 {
        match &self.map {
            Map::Host(m) => m.as_mut_ptr(),
            #[cfg(feature = "cuda")]
            Map::Cuda(_) => unreachable!("memory of a card is used through its driver"),
        }
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
        // plain numbers, all of whose bits make an f32. While this range lives, `claim` gives none of its bytes away, so
        // who borrows it borrows them.
        unsafe { std::slice::from_raw_parts(self.region.start().add(self.start).cast(), self.len / 4) }
    }

    fn floats_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `floats`; the borrow of the range is exclusive, therefore that of its bytes is.
        unsafe { std::slice::from_raw_parts_mut(self.region.start().add(self.start).cast(), self.len / 4) }
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

    /// As a card's kernels see it: only the bytes of the values.
    #[cfg(feature = "cuda")]
    pub(crate) fn cuda(&self) -> Option<cuda::Memory> {
        let m = self.memory.as_ref()?.cuda()?;
        Some(cuda::Memory { bytes: m.bytes.min(self.len * 4), ..m })
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
