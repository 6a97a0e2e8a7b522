//! What a repeated computation asks for, learnt once, and one region that holds it from then on.
//!
//! Only addresses are planned here. Whether a range may be handed out is checked when it is (`Region::claim`): a plan
//! that does not fit costs time, never soundness.

use std::collections::HashMap;
use std::sync::Arc;
use std::thread::ThreadId;

use super::buffer::{Memory, Region};

/// Traces longer than this are not planned: the planner looks at pairs.
const MAX_PIECES: usize = 4096;
/// Plans that are kept; the one that was used longest ago goes.
const MAX_PLANS: usize = 32;
/// How often a plan that did not fit is made anew before it is used as it is.
const MAX_RETRIES: u8 = 3;

/// A request in a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// Bytes, a multiple of 64.
    pub(super) size: usize,
    /// Event at which it came.
    pub(super) from: usize,
    /// Event at which it was given back; `None` when it outlived the trace.
    pub(super) until: Option<usize>,
}

/// Requests and returns in the order they came.
#[derive(Debug, Default)]
pub(super) struct Trace {
    events: usize,
    pieces: Vec<Piece>,
    /// Live pieces by address.
    open: HashMap<usize, usize>,
}

impl Trace {
    pub(super) fn taken(&mut self, size: usize, address: usize) {
        self.open.insert(address, self.pieces.len());
        self.pieces.push(Piece { size, from: self.events, until: None });
        self.events += 1;
    }

    pub(super) fn given(&mut self, address: usize) {
        // What is not open was taken before the trace began.
        if let Some(i) = self.open.remove(&address) {
            self.pieces[i].until = Some(self.events);
            self.events += 1;
        }
    }
}

/// Where each request of a trace goes.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// Bytes of the region.
    pub(super) bytes: usize,
    /// Offsets of the requests of one size, in the order they came; `None` is left to the pool, because a result that
    /// outlives the computation would lie in the next one's way.
    by_size: HashMap<usize, Vec<Option<usize>>>,
}

impl Plan {
    fn new(pieces: &[Piece]) -> Self {
        let (offsets, bytes) = place(pieces);
        let mut by_size: HashMap<_, Vec<_>> = HashMap::new();
        for (p, offset) in pieces.iter().zip(offsets) {
            by_size.entry(p.size).or_default().push(offset);
        }
        Self { bytes, by_size }
    }
}

/// Offsets such that no two pieces that live at the same time share a byte, and the bytes that takes: by decreasing
/// size into the smallest gap that is free during the piece's whole life. Large pieces leave gaps for small ones, not
/// the other way round.
pub(super) fn place(pieces: &[Piece]) -> (Vec<Option<usize>>, usize) {
    let mut offsets = vec![None; pieces.len()];
    let mut order: Vec<(usize, usize, usize)> =
        pieces.iter().enumerate().filter_map(|(i, p)| Some((i, p.from, p.until?))).collect();
    order.sort_by_key(|&(i, from, _)| (std::cmp::Reverse(pieces[i].size), from));
    // Placed pieces by rising offset: first byte, the one after the last, life.
    let mut placed: Vec<(usize, usize, usize, usize)> = Vec::with_capacity(order.len());
    let mut bytes = 0;
    for (i, from, until) in order {
        let size = pieces[i].size;
        let (mut end, mut best) = (0, None);
        for &(first, last, _, _) in placed.iter().filter(|p| p.2 < until && from < p.3) {
            let gap = first.saturating_sub(end);
            if gap >= size && best.is_none_or(|(g, _)| gap < g) {
                best = Some((gap, end));
            }
            end = end.max(last);
        }
        let at = best.map_or(end, |(_, at)| at);
        offsets[i] = Some(at);
        bytes = bytes.max(at + size);
        let rank = placed.partition_point(|p| p.0 <= at);
        placed.insert(rank, (at, at + size, from, until));
    }
    (offsets, bytes)
}

enum Mode {
    Record(Trace),
    Replay {
        plan: Arc<Plan>,
        /// Requests so far, by size.
        seen: HashMap<usize, usize>,
        /// Whether a request was not as planned.
        differs: bool,
    },
}

/// A computation under way.
struct Run {
    key: Vec<usize>,
    /// Requests of other threads are other people's.
    thread: ThreadId,
    /// What is asked for now is to outlive the run, or comes only once.
    paused: bool,
    mode: Mode,
}

struct Entry {
    key: Vec<usize>,
    plan: Arc<Plan>,
    retries: u8,
    /// Whether the next run with this key records again.
    stale: bool,
}

/// The plans of a device and the region that they share. A region as large as the largest of them serves all, so that
/// the folds of a model, which take turns, do not map and touch it anew each time.
#[derive(Default)]
pub(super) struct Arena {
    run: Option<Run>,
    /// Most recently used last.
    entries: Vec<Entry>,
    region: Option<Arc<Region>>,
    /// Bytes of the region's live ranges.
    live: usize,
    pub(super) hits: u64,
    pub(super) misses: u64,
}

impl Arena {
    /// Bytes of the region.
    pub(super) fn bytes(&self) -> usize {
        self.region.as_ref().map_or(0, |r| r.bytes())
    }

    /// Bytes of the region's live ranges.
    pub(super) fn live(&self) -> usize {
        self.live
    }

    /// Begins a run, unless one is under way: then false. `Some(bytes)` is the region that the plan wants beyond what
    /// there is.
    pub(super) fn enter(&mut self, key: &[usize], thread: ThreadId) -> (bool, Option<usize>) {
        if self.run.is_some() {
            return (false, None);
        }
        let known = self.entries.iter().position(|e| e.key == key).map(|at| {
            self.entries[at..].rotate_left(1);
            &self.entries[self.entries.len() - 1]
        });
        let plan = known.filter(|e| !e.stale).map(|e| e.plan.clone());
        let mode = match plan {
            Some(plan) => Mode::Replay { plan, seen: HashMap::new(), differs: false },
            None => Mode::Record(Trace::default()),
        };
        let wanted = match &mode {
            Mode::Replay { plan, .. } => (plan.bytes > self.bytes()).then_some(plan.bytes),
            Mode::Record(_) => {
                // The pool serves this run: the process must not hold both.
                self.drop_region();
                None
            }
        };
        self.run = Some(Run { key: key.to_vec(), thread, paused: false, mode });
        (true, wanted)
    }

    /// Ends the run; `whole` says whether it came to its own end.
    pub(super) fn leave(&mut self, whole: bool) {
        let Some(run) = self.run.take() else { return };
        let known = self.entries.iter_mut().find(|e| e.key == run.key);
        match (run.mode, known) {
            (Mode::Record(trace), known) if whole && trace.pieces.len() <= MAX_PIECES => {
                let plan = Arc::new(Plan::new(&trace.pieces));
                if let Some(e) = known {
                    (e.plan, e.stale) = (plan, false);
                    return;
                }
                if self.entries.len() >= MAX_PLANS {
                    self.entries.remove(0);
                }
                self.entries.push(Entry { key: run.key, plan, retries: 0, stale: false });
            }
            (Mode::Replay { differs: true, .. }, Some(e)) if whole && e.retries < MAX_RETRIES => {
                e.retries += 1;
                e.stale = true;
            }
            _ => {}
        }
    }

    /// Pauses or resumes the run of `thread`, if there is one; returns whether it was paused.
    pub(super) fn pause(&mut self, thread: ThreadId, on: bool) -> bool {
        let run = self.run.as_mut().filter(|r| r.thread == thread);
        run.is_some_and(|r| std::mem::replace(&mut r.paused, on))
    }

    /// The planned memory for this request, if `thread` has a run under way and the plan's range is free.
    pub(super) fn take(&mut self, size: usize, thread: ThreadId) -> Option<Memory> {
        let run = self.run.as_mut().filter(|r| r.thread == thread && !r.paused)?;
        let Mode::Replay { plan, seen, differs } = &mut run.mode else { return None };
        let k = seen.entry(size).or_default();
        let planned = plan.by_size.get(&size).and_then(|list| list.get(*k)).copied();
        *k += 1;
        let memory = match planned {
            Some(None) => return None,
            Some(Some(offset)) => self.region.as_ref().and_then(|r| r.claim(offset, size)),
            None => None,
        };
        if memory.is_some() {
            self.hits += 1;
            self.live += size;
        } else {
            self.misses += 1;
            // Without a region, for want of memory, a new trace would not help.
            *differs |= self.region.is_some();
        }
        memory
    }

    /// Tells a trace under way that the pool served `thread`.
    pub(super) fn taken(&mut self, size: usize, memory: &Memory, thread: ThreadId) {
        if let Some(Run { mode: Mode::Record(trace), .. }) =
            self.run.as_mut().filter(|r| r.thread == thread && !r.paused)
        {
            trace.taken(size, memory.address());
        }
    }

    /// Notes that `memory` comes back; ranges of the region end here, the rest is the pool's.
    pub(super) fn given(&mut self, memory: Memory) -> Option<Memory> {
        if let Memory::Range(_) = memory {
            self.live -= memory.bytes();
            return None;
        }
        if let Some(Run { mode: Mode::Record(trace), .. }) = &mut self.run {
            trace.given(memory.address());
        }
        Some(memory)
    }

    /// Unmaps the region if nothing lives in it.
    pub(super) fn drop_region(&mut self) {
        if self.live == 0 {
            self.region = None;
        }
    }

    /// Takes a region into use, in place of one in which nothing lives.
    pub(super) fn set_region(&mut self, region: Arc<Region>) {
        self.region = Some(region);
    }
}

#[cfg(test)]
mod tests;
