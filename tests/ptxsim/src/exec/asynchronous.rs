//! Copies that run on their own, and mbarriers. What was started happens as late as it may.

use super::Next;
use crate::cta::Cta;
use crate::error::Fault;
use crate::ins::{Bulk, CpAsync, MBarrier, Space};
use crate::shared::{Clock, Kind, join};
use crate::tensor_map::{Piece, TensorMap};
use crate::warp::{Copy, lanes};

/// An mbarrier in shared memory.
pub(crate) struct MBar {
    /// Its place in vector clocks, behind those of the warps.
    entry: usize,
    count: i64,
    pending: i64,
    bytes: i64,
    /// Phases that are complete.
    phase: u32,
    /// What arrivals of this phase have heard of.
    arriving: Clock,
    /// What a wait for the last complete phase learns.
    complete: Clock,
}

impl MBar {
    fn flip(&mut self) -> bool {
        if self.pending != 0 || self.bytes != 0 {
            return false;
        }
        self.phase += 1;
        self.pending = self.count;
        let entry = self.entry;
        if self.arriving.len() <= entry {
            self.arriving.resize(entry + 1, 0);
        }
        self.arriving[entry] = self.phase;
        self.complete = self.arriving.clone();
        true
    }
}

/// Where a bulk copy goes.
enum To {
    /// Shared memory; the mbarrier that counts its bytes.
    Shared(u64),
    /// Global memory.
    Global,
    /// Nowhere: a `cp.async` tells an mbarrier that it is done.
    Arrival(u64),
}

/// A bulk copy that is under way.
pub(crate) struct Flight {
    warp: usize,
    pc: u32,
    to: To,
    pieces: Vec<Piece>,
    bytes: usize,
    /// What its warp had heard of when it started the copy.
    clock: Clock,
    copies: Vec<Copy>,
}

fn offset(address: u64) -> u64 {
    address & ((1 << 36) - 1)
}

impl Cta<'_> {
    pub(super) fn cp_async(&mut self, w: usize, pc: u32, c: &CpAsync, m: u32) -> Result<(), Fault> {
        let warp = &self.warps[w];
        let (to, from) = (warp.addresses(self.k, &c.to), warp.addresses(self.k, &c.from));
        let read = c.read.map_or([c.size as u32; 32], |r| *warp.r(self.k, r));
        let ignored = c.ignore.map_or(0, |p| warp.p[p.0 as usize]);
        self.count(pc, Space::Global, &from, c.size, m & !ignored);
        for l in lanes(m) {
            for address in [to[l], from[l]] {
                if address % c.size as u64 != 0 {
                    return Err(Fault::Misaligned { address, bytes: c.size });
                }
            }
            let read = if ignored >> l & 1 == 1 { 0 } else { read[l] as usize };
            if read > c.size {
                return Err(Fault::Descriptor(format!("cp.async reads {read} of {} bytes", c.size)));
            }
            let at = self.worker.shared.access(w, &self.warps[w].clock, offset(to[l]), c.size, Kind::Write)?;
            self.worker.shared.in_flight(at, c.size);
            self.warps[w].copies.push(Copy { pc, to: at, from: from[l], read, size: c.size });
        }
        Ok(())
    }

    pub(super) fn cp_wait(&mut self, w: usize, keep: usize) -> Result<(), Fault> {
        let clock = self.warps[w].clock.clone();
        while self.warps[w].copy_groups.len() > keep {
            for copy in self.warps[w].copy_groups.pop_front().into_iter().flatten() {
                self.finish(w, &copy, &clock)?;
            }
        }
        Ok(())
    }

    /// The bytes of a copy arrive, as a write of a warp that has heard of `clock`.
    fn finish(&mut self, w: usize, copy: &Copy, clock: &Clock) -> Result<(), Fault> {
        self.blame = Some(copy.pc);
        let mut data = [0; 16];
        if copy.read > 0 {
            self.launch.machine.global.read(copy.from, &mut data[..copy.read], self.me)?;
        }
        self.worker.shared.access(w, clock, copy.to as u64, copy.size, Kind::Write)?;
        self.worker.shared.data[copy.to..copy.to + copy.size].copy_from_slice(&data[..copy.size]);
        self.blame = None;
        Ok(())
    }

    pub(super) fn bulk(&mut self, w: usize, pc: u32, b: &Bulk, m: u32) -> Result<(), Fault> {
        // Every lane that comes here starts a copy of its own.
        for l in lanes(m) {
            let warp = &self.warps[w];
            let shared = offset(warp.addresses(self.k, &b.shared)[l]);
            let global = warp.addresses(self.k, &b.global)[l];
            let barrier = b.barrier.as_ref().map(|a| offset(warp.addresses(self.k, a)[l]));
            let clock = warp.clock.clone();
            let (pieces, bytes) = if b.tensor {
                self.tensor_pieces(w, l, b, shared, global)?
            } else {
                let bytes = b.size.map_or(0, |r| warp.r(self.k, r)[l]) as usize;
                if !bytes.is_multiple_of(16) || !shared.is_multiple_of(16) || !global.is_multiple_of(16) {
                    return Err(Fault::Misaligned { address: global | shared | bytes as u64, bytes: 16 });
                }
                let piece = |i| Piece { at: shared as usize + i, from: Some(global + i as u64), size: 16 };
                ((0..bytes).step_by(16).map(piece).collect(), bytes)
            };
            if let (Some(first), Some(end)) =
                (pieces.iter().map(|p| p.at).min(), pieces.iter().map(|p| p.at + p.size).max())
            {
                self.worker.shared.bounds(first as u64, end - first)?;
            }
            let to = match barrier {
                Some(at) => {
                    for p in &pieces {
                        self.worker.shared.check_copy(&clock, p.at, p.size, Kind::Write)?;
                        self.worker.shared.in_flight(p.at, p.size);
                    }
                    To::Shared(at)
                }
                None => {
                    for p in &pieces {
                        self.worker.shared.check_copy(&clock, p.at, p.size, Kind::Read)?;
                    }
                    self.warps[w].bulk_open += 1;
                    To::Global
                }
            };
            self.flights.push(Flight { warp: w, pc, to, pieces, bytes, clock, copies: Vec::new() });
        }
        Ok(())
    }

    /// The pieces of the box that a tensor map and coordinates name, and the bytes of the whole box.
    fn tensor_pieces(
        &self,
        w: usize,
        l: usize,
        b: &Bulk,
        shared: u64,
        map_at: u64,
    ) -> Result<(Vec<Piece>, usize), Fault> {
        if !offset(map_at).is_multiple_of(64) {
            return Err(Fault::Misaligned { address: map_at, bytes: 64 });
        }
        let refuse = |what: &str| Err(Fault::Descriptor(what.into()));
        let handle = usize::try_from(offset(map_at)).ok().and_then(|at| self.launch.params.get(at..at + 16));
        let map = handle.and_then(TensorMap::index).and_then(|i| self.launch.machine.maps.get(i));
        let Some(map) = map else { return refuse("no tensor map at this address of the parameters") };
        if !shared.is_multiple_of(128) {
            return Err(Fault::Misaligned { address: shared, bytes: 128 });
        }
        let number = |r| self.warps[w].r(self.k, r)[l];
        let start: Vec<i64> = b.coordinates.iter().map(|r| i64::from(number(*r) as i32)).collect();
        if start.len() != map.dims.len() || b.im2col != map.im2col.is_some() {
            return refuse("the copy and its tensor map are not of one kind");
        }
        let mut pieces = match &map.im2col {
            Some(i) => {
                let offsets: Vec<i64> = b.offsets.iter().map(|r| i64::from(number(*r) as u16)).collect();
                if offsets.len() != map.dims.len() - 2 {
                    return refuse("the copy has a wrong number of im2col offsets");
                }
                map.columns(i, &start, &offsets)
            }
            None => map.tiled(&start),
        };
        pieces.iter_mut().for_each(|p| p.at = map.swizzle.apply(shared as usize + p.at));
        Ok((pieces, map.bytes()))
    }

    pub(super) fn bulk_wait(&mut self, w: usize, keep: usize) -> Result<Next, Fault> {
        // Stores leave together: which group one belongs to does not matter as long as all before it are done.
        let kept: u64 = self.warps[w].bulk_groups.iter().rev().take(keep).sum::<u64>() + self.warps[w].bulk_open;
        let mine = |f: &Flight| f.warp == w && matches!(f.to, To::Global);
        let mut open = self.flights.iter().filter(|f| mine(f)).count() as u64;
        while open > kept {
            if let Some(at) = self.flights.iter().position(mine) {
                let flight = self.flights.remove(at);
                self.land(flight).map_err(|(_, pc, f)| {
                    self.blame = Some(pc);
                    f
                })?;
            }
            open -= 1;
        }
        while self.warps[w].bulk_groups.len() > keep {
            self.warps[w].bulk_groups.pop_front();
        }
        Ok(Next::Go)
    }

    /// Lets one copy that is under way arrive: the oldest one, or any with a seed. False when there is none.
    pub(crate) fn land_one(&mut self, seed: u64) -> Result<bool, (usize, u32, Fault)> {
        if self.flights.is_empty() {
            return Ok(false);
        }
        let at = if seed == 0 { 0 } else { self.random() as usize % self.flights.len() };
        let flight = self.flights.remove(at);
        self.land(flight)?;
        Ok(true)
    }

    fn land(&mut self, f: Flight) -> Result<(), (usize, u32, Fault)> {
        self.events += 1;
        let (warp, pc) = (f.warp, f.pc);
        self.land_pieces(f).map_err(|fault| (warp, pc, fault))
    }

    fn land_pieces(&mut self, f: Flight) -> Result<(), Fault> {
        let mut data = [0; 16];
        let global = &self.launch.machine.global;
        match f.to {
            To::Arrival(at) => {
                for copy in &f.copies {
                    self.finish(f.warp, copy, &f.clock)?;
                }
                self.arrive_at(f.warp, at, 1, 0, &f.clock)?;
            }
            To::Global => {
                for p in &f.pieces {
                    let Some(address) = p.from else { continue };
                    self.worker.shared.access(f.warp, &f.clock, p.at as u64, p.size, Kind::Read)?;
                    global.write(address, &self.worker.shared.data[p.at..p.at + p.size], self.me)?;
                }
            }
            To::Shared(barrier) => {
                let unknown = || Fault::Barrier("the copy reports to an mbarrier that nobody initialised".into());
                let bar = self.mbars.get_mut(&barrier).ok_or_else(unknown)?;
                for p in &f.pieces {
                    self.worker.shared.check_copy(&f.clock, p.at, p.size, Kind::Write)?;
                }
                for p in &f.pieces {
                    let piece = &mut data[..p.size];
                    match p.from {
                        Some(address) => global.read(address, piece, self.me)?,
                        None => piece.fill(0),
                    }
                    self.worker.shared.deliver(p.at, piece, bar.entry, bar.phase + 1);
                }
                bar.bytes -= f.bytes as i64;
                bar.flip();
            }
        }
        Ok(())
    }

    /// Arrivals, and bytes to expect, of one warp.
    fn arrive_at(&mut self, w: usize, at: u64, count: i64, expect: i64, clock: &[u32]) -> Result<u32, Fault> {
        let unknown = || Fault::Barrier("arrives at an mbarrier that nobody initialised".into());
        let bar = self.mbars.get_mut(&at).ok_or_else(unknown)?;
        let phase = bar.phase;
        bar.bytes += expect;
        bar.pending -= count;
        if bar.pending < 0 {
            return Err(Fault::Barrier("more arrivals than the mbarrier counts".into()));
        }
        join(&mut bar.arriving, clock);
        bar.flip();
        // What this warp does from now on is not what it has just told.
        self.warps[w].clock[w] += 1;
        self.events += 1;
        Ok(phase)
    }

    pub(super) fn mbarrier(&mut self, w: usize, pc: u32, b: &MBarrier, m: u32) -> Result<Next, Fault> {
        let k = self.k;
        let addr = match b {
            MBarrier::Init { addr, .. } | MBarrier::Inval { addr } | MBarrier::Arrive { addr, .. } => addr,
            MBarrier::ExpectTx { addr, .. } | MBarrier::CompleteTx { addr, .. } => addr,
            MBarrier::TestParity { addr, .. } | MBarrier::TestState { addr, .. } => addr,
            MBarrier::CopyArrive { addr, .. } => addr,
        };
        let at = self.warps[w].addresses(k, addr).map(offset);
        if let Some(l) = lanes(m).find(|l| at[*l] % 8 != 0) {
            return Err(Fault::Misaligned { address: at[l], bytes: 8 });
        }
        match b {
            MBarrier::Init { count, .. } => {
                let count = *self.warps[w].r(k, *count);
                for l in lanes(m) {
                    self.worker.shared.bounds(at[l], 8)?;
                    let entry = self.warps.len() + self.mbars.len();
                    if entry > 255 || count[l] == 0 {
                        return Err(Fault::Barrier("too many mbarriers, or one that waits for nobody".into()));
                    }
                    let n = i64::from(count[l]);
                    let (arriving, complete) = (Vec::new(), Vec::new());
                    let bar = MBar { entry, count: n, pending: n, bytes: 0, phase: 0, arriving, complete };
                    self.mbars.insert(at[l], bar);
                }
                self.events += 1;
            }
            // Its place in clocks stays taken.
            MBarrier::Inval { .. } => {}
            MBarrier::Arrive { count, expect, drop, to, .. } => {
                let ones = [1; 32];
                let count = count.map_or(ones, |r| *self.warps[w].r(k, r));
                let expect = expect.map_or([0; 32], |r| *self.warps[w].r(k, r));
                let clock = self.warps[w].clock.clone();
                let mut state = [0; 32];
                for l in lanes(m) {
                    if *drop && let Some(bar) = self.mbars.get_mut(&at[l]) {
                        bar.count -= i64::from(count[l]);
                    }
                    let phase = self.arrive_at(w, at[l], i64::from(count[l]), i64::from(expect[l]), &clock)?;
                    state[l] = u64::from(phase);
                }
                if let Some(to) = to {
                    self.warps[w].set_d(*to, &state, m);
                }
            }
            MBarrier::ExpectTx { bytes, .. } | MBarrier::CompleteTx { bytes, .. } => {
                let sign = if matches!(b, MBarrier::ExpectTx { .. }) { 1 } else { -1 };
                let bytes = *self.warps[w].r(k, *bytes);
                for l in lanes(m) {
                    let unknown = || Fault::Barrier("counts bytes at an mbarrier that nobody initialised".into());
                    let bar = self.mbars.get_mut(&at[l]).ok_or_else(unknown)?;
                    bar.bytes += sign * i64::from(bytes[l]);
                    if sign < 0 {
                        bar.flip();
                    }
                }
                self.events += 1;
            }
            MBarrier::TestParity { to, .. } | MBarrier::TestState { to, .. } => {
                let (mut done, to) = (0, *to);
                for l in lanes(m) {
                    let unknown = || Fault::Barrier("waits for an mbarrier that nobody initialised".into());
                    let bar = self.mbars.get(&at[l]).ok_or_else(unknown)?;
                    let complete = match b {
                        MBarrier::TestParity { parity, .. } => bar.phase & 1 != self.warps[w].r(k, *parity)[l] & 1,
                        MBarrier::TestState { state, .. } => u64::from(bar.phase) > self.warps[w].d(k, *state)[l],
                        _ => false,
                    };
                    if complete {
                        done |= 1 << l;
                        join(&mut self.warps[w].clock, &bar.complete);
                    }
                }
                self.warps[w].set_p(to, done, m);
                return Ok(if done == m { Next::Go } else { Next::Yield });
            }
            MBarrier::CopyArrive { noinc, .. } => {
                let mut copies: Vec<Copy> = std::mem::take(&mut self.warps[w].copies);
                copies.extend(self.warps[w].copy_groups.drain(..).flatten());
                for l in lanes(m) {
                    if !noinc {
                        // The barrier waits for one more, so that this arrival does not count among the expected ones.
                        if let Some(bar) = self.mbars.get_mut(&at[l]) {
                            bar.pending += 1;
                        }
                    }
                    let clock = self.warps[w].clock.clone();
                    let copies = std::mem::take(&mut copies);
                    let (to, pieces) = (To::Arrival(at[l]), Vec::new());
                    self.flights.push(Flight { warp: w, pc, to, pieces, bytes: 0, clock, copies });
                }
            }
        }
        Ok(Next::Go)
    }
}
