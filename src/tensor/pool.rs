//! Recycling allocator with byte accounting and a limit.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use super::arena::Arena;
use super::buffer::{Memory, Origin, Region};
use super::device::MemoryReport;
use crate::error::{Error, Result};

/// Freed memory is kept by size and handed out again, so that a second pass takes no page faults.
#[derive(Default)]
pub(super) struct Pool {
    state: Mutex<State>,
    origin: Origin,
}

#[derive(Default)]
struct State {
    /// Idle pieces by size, each with the time it was given back, oldest first.
    free: BTreeMap<usize, VecDeque<(u64, Memory)>>,
    clock: u64,
    in_use: usize,
    idle: usize,
    peak: usize,
    /// Largest `held` ever, which idle memory may fill up to.
    high: usize,
    limit: Option<usize>,
    arena: Arena,
}

impl State {
    /// Bytes that are not the pool's to give back: live pieces outside of the arena, and all of the arena.
    fn held(&self) -> usize {
        self.in_use - self.arena.live() + self.arena.bytes()
    }

    fn note_use(&mut self) {
        self.peak = self.peak.max(self.in_use);
        self.high = self.high.max(self.held());
    }

    /// Frees idle pieces so that mapping `size` more bytes does not push the process above its own peak: those that
    /// lay longest go first, and no more than needed, since whatever goes is paid for again in page faults.
    fn make_room(&mut self, size: usize) {
        let after = self.held() + size;
        let most = self.high.min(self.limit.unwrap_or(usize::MAX)).max(after);
        while after + self.idle > most && self.evict_oldest() {}
    }

    /// What `make` makes; where the system or the card refuses, once more when all that is idle is given up.
    fn made<T>(&mut self, make: impl Fn() -> Result<T>) -> Result<T> {
        match make() {
            Err(Error::OutOfMemory { .. }) if self.give_up() => make(),
            result => result,
        }
    }

    /// Frees all that is idle, the arena too if nothing lives in it; false when there was nothing.
    fn give_up(&mut self) -> bool {
        let before = self.idle + self.arena.bytes();
        self.free.clear();
        self.idle = 0;
        self.arena.drop_region();
        before > self.arena.bytes()
    }

    /// An idle piece of at least `size` bytes.
    fn recycled(&mut self, size: usize) -> Option<Memory> {
        // A piece up to a quarter too large is good enough; anything larger would hide memory from other sizes.
        let k = *self.free.range(size..=size + size / 4).next()?.0;
        if self.limit.is_some_and(|limit| self.in_use + k > limit) {
            return None;
        }
        let list = self.free.get_mut(&k)?;
        let (_, m) = list.pop_back()?;
        if list.is_empty() {
            self.free.remove(&k);
        }
        self.idle -= k;
        Some(m)
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
    /// Of a card.
    #[cfg(feature = "cuda")]
    pub(super) fn of(driver: std::sync::Arc<dyn super::cuda::Driver>) -> Self {
        Self { origin: Origin::Cuda(driver), ..Self::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is plain numbers and memory: a panic elsewhere leaves nothing half done in it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Memory of at least `bytes` bytes, initialised but with unspecified values.
    pub(super) fn take(&self, bytes: usize) -> Result<Memory> {
        // Kernels want 256 bytes, as cards align.
        let size = bytes.max(1).next_multiple_of(if matches!(self.origin, Origin::Host) { 64 } else { 256 });
        let me = thread::current().id();
        let mut s = self.lock();
        if let Some(limit) = s.limit
            && s.in_use + size > limit
        {
            return Err(Error::OutOfMemory { what: "a tensor".into(), asked: size, in_use: s.in_use, limit });
        }
        if let Some(m) = s.arena.take(size, me) {
            s.in_use += size;
            s.note_use();
            return Ok(m);
        }
        let m = match s.recycled(size) {
            Some(m) => m,
            None => {
                if s.limit.is_some_and(|limit| s.held() + size > limit) {
                    // The limit counts live tensors; an arena without any is the last thing that can make room.
                    s.arena.drop_region();
                }
                s.make_room(size);
                s.made(|| Memory::new(&self.origin, size))?
            }
        };
        s.in_use += m.bytes();
        s.note_use();
        s.arena.taken(size, &m, me);
        Ok(m)
    }

    pub(super) fn give(&self, m: Memory) {
        let mut s = self.lock();
        let n = m.bytes();
        s.in_use -= n;
        let Some(m) = s.arena.given(m) else { return };
        s.idle += n;
        s.clock += 1;
        let now = s.clock;
        s.free.entry(n).or_default().push_back((now, m));
    }

    /// Begins a run of the computation `key` on this thread, which lasts until the result is dropped.
    pub(super) fn enter(&self, key: &[usize]) -> Scope<'_> {
        let mut s = self.lock();
        let (entered, wanted) = s.arena.enter(key, thread::current().id());
        if let Some(bytes) = wanted
            && s.arena.live() == 0
        {
            s.arena.drop_region();
            if s.limit.is_none_or(|limit| s.in_use + bytes <= limit) {
                s.make_room(bytes);
                // Where the system refuses, the pool goes on piece by piece.
                if let Ok(region) = s.made(|| Region::new(&self.origin, bytes)) {
                    s.arena.set_region(region);
                    s.high = s.high.max(s.held());
                }
            }
        }
        Scope { pool: entered.then_some(self) }
    }

    /// Pauses or resumes this thread's run, if there is one; returns whether it was paused.
    pub(super) fn pause(&self, on: bool) -> bool {
        self.lock().arena.pause(thread::current().id(), on)
    }

    /// Starts the peak over from what is in use.
    pub(super) fn reset_peak(&self) {
        let mut s = self.lock();
        s.peak = s.in_use;
    }

    pub(super) fn set_limit(&self, limit: Option<usize>) {
        self.lock().limit = limit;
    }

    /// Gives idle memory back to the system, the arena too if nothing lives in it.
    pub(super) fn trim(&self) {
        self.lock().give_up();
    }

    pub(super) fn report(&self) -> MemoryReport {
        let s = self.lock();
        MemoryReport {
            in_use: s.in_use,
            reserved: s.held() + s.idle,
            peak: s.peak,
            limit: s.limit,
            planned_hits: s.arena.hits,
            planned_misses: s.arena.misses,
        }
    }
}

/// A run of a planned computation; nothing when it was begun inside of another.
pub(super) struct Scope<'a> {
    pool: Option<&'a Pool>,
}

impl Drop for Scope<'_> {
    fn drop(&mut self) {
        if let Some(pool) = self.pool {
            pool.lock().arena.leave(!thread::panicking());
        }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.report().fmt(f)
    }
}
