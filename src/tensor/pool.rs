//! Recycling allocator with byte accounting and a limit.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::buffer::Memory;
use super::device::MemoryReport;
use crate::error::{Error, Result};

/// Freed memory is kept by size and handed out again, so that a second pass takes no page faults.
#[derive(Default)]
pub(super) struct Pool {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Idle pieces by size, each with the time it was given back, oldest first.
    free: BTreeMap<usize, VecDeque<(u64, Memory)>>,
    clock: u64,
    in_use: usize,
    idle: usize,
    peak: usize,
    /// Largest `in_use` ever, which idle memory may fill up to.
    high: usize,
    limit: Option<usize>,
}

impl State {
    fn note_use(&mut self) {
        self.peak = self.peak.max(self.in_use);
        self.high = self.high.max(self.in_use);
    }

    /// Frees the piece that has been idle longest; false when there is none.
    fn evict_oldest(&mut self) -> bool {
        let oldest = self.free.iter().filter_map(|(k, l)| Some((l.front()?.0, *k))).min();
        let Some((_, size)) = oldest else { return false };
        if let Some(list) = self.free.get_mut(&size) {
            list.pop_front();
            if list.is_empty() {
                self.free.remove(&size);
            }
            self.idle -= size;
        }
        true
    }
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is plain numbers and memory: a panic elsewhere leaves nothing half done in it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Memory of at least `bytes` bytes, initialised but with unspecified values.
    pub(super) fn take(&self, bytes: usize) -> Result<Memory> {
        let size = bytes.max(1).next_multiple_of(64);
        let mut s = self.lock();
        // A piece up to a quarter too large is good enough; anything larger would hide memory from other sizes.
        let found = s.free.range(size..=size + size / 4).next().map(|(k, _)| *k);
        if let Some(k) = found.filter(|k| s.limit.is_none_or(|limit| s.in_use + k <= limit))
            && let Some(list) = s.free.get_mut(&k)
            && let Some((_, m)) = list.pop_back()
        {
            if list.is_empty() {
                s.free.remove(&k);
            }
            s.idle -= k;
            s.in_use += k;
            s.note_use();
            return Ok(m);
        }
        if let Some(limit) = s.limit
            && s.in_use + size > limit
        {
            return Err(Error::OutOfMemory { what: "a tensor".into(), asked: size, in_use: s.in_use, limit });
        }
        // Idle pieces must not push the process above its own peak: those that lay longest go first, and no more than
        // needed, since whatever goes is paid for again in page faults.
        let most = s.high.max(s.in_use + size);
        while s.in_use + s.idle + size > most && s.evict_oldest() {}
        let m = Memory::new(size)?;
        s.in_use += m.bytes();
        s.note_use();
        Ok(m)
    }

    pub(super) fn give(&self, m: Memory) {
        let mut s = self.lock();
        let n = m.bytes();
        s.in_use -= n;
        s.idle += n;
        s.clock += 1;
        let now = s.clock;
        s.free.entry(n).or_default().push_back((now, m));
    }

    /// Starts the peak over from what is in use.
    pub(super) fn reset_peak(&self) {
        let mut s = self.lock();
        s.peak = s.in_use;
    }

    pub(super) fn set_limit(&self, limit: Option<usize>) {
        self.lock().limit = limit;
    }

    /// Gives idle memory back to the system.
    pub(super) fn trim(&self) {
        let mut s = self.lock();
        s.free.clear();
        s.idle = 0;
    }

    pub(super) fn report(&self) -> MemoryReport {
        let s = self.lock();
        MemoryReport { in_use: s.in_use, reserved: s.in_use + s.idle, peak: s.peak, limit: s.limit }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.report().fmt(f)
    }
}
