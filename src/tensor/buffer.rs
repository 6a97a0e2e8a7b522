//! Memory of a tensor: 64-byte aligned, recycled, large pieces on huge pages where the system has them.

use std::sync::Arc;

use memmap2::MmapMut;

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
}

impl Memory {
    pub(super) fn new(bytes: usize) -> Result<Self> {
        if bytes < MAP_FROM {
            return Ok(Memory::Small(vec![Line([0.0; 16]); bytes.div_ceil(64)]));
        }
        let map = MmapMut::map_anon(bytes).map_err(|e| refused(format!("a tensor ({e})"), bytes))?;
        // First touch by 4 KiB pages costs up to half of a memory-bound pass. Advice only: a refusal is harmless.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Memory::Mapped(map))
    }

    pub(super) fn bytes(&self) -> usize {
        match self {
            Memory::Small(v) => v.len() * 64,
            Memory::Mapped(m) => m.len(),
        }
    }

    fn floats(&self) -> &[f32] {
        match self {
            Memory::Small(v) => bytemuck::cast_slice(v),
            Memory::Mapped(m) => bytemuck::cast_slice(m),
        }
    }

    fn floats_mut(&mut self) -> &mut [f32] {
        match self {
            Memory::Small(v) => bytemuck::cast_slice_mut(v),
            Memory::Mapped(m) => bytemuck::cast_slice_mut(m),
        }
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
