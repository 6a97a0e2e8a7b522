//! One block: its warps take turns until all have ended, or nothing can go on.

use std::collections::HashMap;

use crate::error::{Error, Fault, Place, Result};
use crate::exec::asynchronous::{Flight, MBar};
use crate::exec::matrix::ReadGroup;
use crate::machine::Launch;
use crate::parse::{Kernel, LaneMask, Special};
use crate::report::Site;
use crate::shared::{Clock, Shared, join};
use crate::warp::{State, Warp};

/// What a thread keeps from block to block.
pub(crate) struct Worker {
    pub(crate) counts: Vec<u64>,
    pub(crate) lanes: u64,
    pub(crate) sites: Vec<Site>,
    pub(crate) shared: Shared,
    last_clock: u32,
}

impl Worker {
    pub(crate) fn new(k: &Kernel) -> Worker {
        Worker {
            counts: vec![0; k.code.len()],
            lanes: 0,
            sites: vec![Site::default(); k.code.len()],
            shared: Shared::default(),
            last_clock: 0,
        }
    }
}

/// A numbered barrier while warps arrive.
#[derive(Default)]
struct Bar {
    arrived: u32,
    /// Threads that it waits for; none for the whole block.
    expected: Option<u32>,
    waiting: Vec<usize>,
    clock: Clock,
}

pub(crate) struct Cta<'a> {
    pub(crate) launch: &'a Launch<'a>,
    pub(crate) k: &'a Kernel,
    pub(crate) worker: &'a mut Worker,
    pub(crate) warps: Vec<Warp>,
    pub(crate) mbars: HashMap<u64, MBar>,
    pub(crate) flights: Vec<Flight>,
    /// By warpgroup and number of the group.
    pub(crate) read_groups: HashMap<(usize, u64), ReadGroup>,
    /// Counts whatever may let another warp go on.
    pub(crate) events: u64,
    /// The instruction that started what failed, where that is an earlier one.
    pub(crate) blame: Option<u32>,
    /// Number in the grid plus one.
    pub(crate) me: u64,
    index: [u32; 3],
    bars: [Bar; 16],
    exited: Clock,
    rng: u64,
}

/// How a warp's turn ended.
#[derive(PartialEq, Eq)]
enum Turn {
    Ran,
    Waits,
}

impl<'a> Cta<'a> {
    pub(crate) fn new(launch: &'a Launch<'a>, worker: &'a mut Worker, number: usize) -> Cta<'a> {
        let k = launch.kernel;
        let [x, y, _] = launch.grid;
        let n = number as u32;
        let index = [n % x, n / x % y, n / x / y];
        let threads: u32 = launch.block.iter().product();
        let warps = threads.div_ceil(32) as usize;
        // Dynamic memory begins behind the static part in the alignment of its declaration, which may leave a gap.
        let bytes = k.static_shared.next_multiple_of(k.dynamic_align) + launch.dynamic;
        worker.shared.begin(bytes, warps, worker.last_clock);
        let alive = |w: usize| match threads - w as u32 * 32 {
            32.. => !0,
            n => (1 << n) - 1,
        };
        let mut rng = (launch.options.seed ^ (number as u64) << 32).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        for _ in 0..4 {
            step(&mut rng);
        }
        let mut cta = Cta {
            launch,
            k,
            warps: (0..warps).map(|w| Warp::new(k, alive(w), worker.shared.first_clock(w))).collect(),
            worker,
            mbars: HashMap::new(),
            flights: Vec::new(),
            read_groups: HashMap::new(),
            events: 0,
            blame: None,
            me: number as u64 + 1,
            index,
            bars: Default::default(),
            exited: Vec::new(),
            rng,
        };
        (0..warps).for_each(|w| cta.set_specials(w));
        cta
    }

    fn set_specials(&mut self, w: usize) {
        let (block, grid) = (self.launch.block, self.launch.grid);
        for (special, row) in &self.k.specials {
            let value = |l: usize| {
                let t = (w * 32 + l) as u32;
                let tid = [t % block[0], t / block[0] % block[1], t / block[0] / block[1]];
                match special {
                    Special::Tid(i) => tid[*i],
                    Special::Ntid(i) => block[*i],
                    Special::Ctaid(i) => self.index[*i],
                    Special::Nctaid(i) => grid[*i],
                    Special::Lane => l as u32,
                    Special::Warp => w as u32,
                    Special::Warps => self.warps.len() as u32,
                    Special::Zero => 0,
                    Special::One => 1,
                    Special::LaneMask(LaneMask::Eq) => 1 << l,
                    Special::LaneMask(LaneMask::Lt) => (1 << l) - 1,
                    Special::LaneMask(LaneMask::Le) => (2u64 << l).wrapping_sub(1) as u32,
                    Special::LaneMask(LaneMask::Gt) => !(2u64 << l).wrapping_sub(1) as u32,
                    Special::LaneMask(LaneMask::Ge) => !((1u64 << l) - 1) as u32,
                    Special::DynamicShared => self.launch.dynamic as u32,
                    Special::TotalShared => self.worker.shared.data.len() as u32,
                }
            };
            let values = std::array::from_fn(value);
            self.warps[w].r[*row as usize] = values;
        }
    }

    pub(crate) fn random(&mut self) -> u64 {
        step(&mut self.rng)
    }

    /// Runs the block to its end.
    pub(crate) fn run(mut self) -> Result<()> {
        let seed = self.launch.options.seed;
        let mut idle = 0;
        loop {
            let before = self.events;
            let first = if seed == 0 { 0 } else { self.random() as usize % self.warps.len() };
            let (mut all_wait, mut done) = (true, true);
            for j in 0..self.warps.len() {
                let w = (first + j) % self.warps.len();
                if self.warps[w].alive == 0 {
                    continue;
                }
                done = false;
                let quantum = if seed == 0 { 50_000 } else { 1 + self.random() % 400 };
                all_wait &= self.turn(w, quantum)? == Turn::Waits;
            }
            if done {
                break;
            }
            // Copies in flight land when nothing else can move, and with every third seed at any time.
            let stuck = all_wait && self.events == before;
            if stuck || seed % 3 == 2 {
                let landed = self.land_one(seed).map_err(|(w, pc, f)| self.error(w, pc, f))?;
                idle = if landed || !stuck { 0 } else { idle + 1 };
            }
            if idle > 64 {
                let (w, pc) = self.first_stuck();
                return Err(self.error(w, pc, Fault::Deadlock(self.standing())));
            }
        }
        while !self.flights.is_empty() {
            self.land_one(0).map_err(|(w, pc, f)| self.error(w, pc, f))?;
        }
        let clocks = self.warps.iter().enumerate().map(|(w, warp)| warp.clock[w]);
        self.worker.last_clock = clocks.max().unwrap_or(0) + 1;
        Ok(())
    }

    fn first_stuck(&self) -> (usize, u32) {
        let stuck = self.warps.iter().enumerate().find(|(_, w)| w.alive != 0);
        stuck.map_or((0, 0), |(i, w)| (i, w.groups.first().map_or(0, |g| g.pc)))
    }

    /// Where all warps stand.
    fn standing(&self) -> String {
        let mut out = Vec::new();
        for (w, warp) in self.warps.iter().enumerate() {
            for g in &warp.groups {
                // Lanes at a barrier are already counted as behind it.
                let pc = if g.state == State::Barrier { g.pc - 1 } else { g.pc };
                let ins = &self.k.code[(pc as usize).min(self.k.code.len() - 1)];
                out.push(format!("warp {w} at line {} `{}`", ins.line, ins.text));
            }
        }
        out.join("; ")
    }

    pub(crate) fn error(&self, warp: usize, pc: u32, fault: Fault) -> Error {
        let pc = self.blame.unwrap_or(pc);
        let ins = self.k.code.get(pc as usize);
        let place = Place {
            kernel: self.k.name.clone(),
            line: ins.map_or(0, |i| i.line),
            text: ins.map_or_else(String::new, |i| i.text.to_string()),
            cta: self.index,
            warp,
        };
        Error::Fault { place: Box::new(place), fault }
    }

    /// Lets one warp run until it waits, ends, or has had its share.
    fn turn(&mut self, w: usize, quantum: u64) -> Result<Turn> {
        for g in &mut self.warps[w].groups {
            if g.state == State::Yielded {
                g.state = State::Run;
            }
        }
        for _ in 0..quantum {
            let Some(at) = self.warps[w].pick().map_err(|(pc, f)| self.error(w, pc, f))? else {
                return Ok(Turn::Waits);
            };
            let pc = self.warps[w].groups[at].pc;
            self.step(w, at).map_err(|f| self.error(w, pc, f))?;
            if self.warps[w].alive == 0 {
                return Ok(Turn::Ran);
            }
        }
        self.warps[w].instructions += quantum;
        if self.warps[w].instructions > self.launch.options.limit {
            let (_, pc) = self.first_stuck();
            return Err(self.error(w, pc, Fault::TooLong));
        }
        Ok(Turn::Ran)
    }

    /// A warp arrives at a numbered barrier, and waits there if it says so.
    pub(crate) fn arrive(&mut self, w: usize, id: u32, count: Option<u32>, waits: bool) -> Result<(), Fault> {
        let wrong = |what: String| Err(Fault::Barrier(what));
        let Some(bar) = self.bars.get_mut(id as usize) else { return wrong(format!("no barrier has number {id}")) };
        if let Some(n) = count
            && (n == 0 || n % 32 != 0)
        {
            return wrong(format!("barrier {id} cannot wait for {n} threads"));
        }
        if bar.arrived > 0 && bar.expected != count {
            return wrong(format!("warps do not agree on the threads of barrier {id}"));
        }
        bar.expected = count;
        bar.arrived += 32;
        if count.is_some_and(|n| bar.arrived > n) {
            return wrong(format!("more threads arrive at barrier {id} than it waits for"));
        }
        join(&mut bar.clock, &self.warps[w].clock);
        self.warps[w].clock[w] += 1;
        if waits {
            bar.waiting.push(w);
        }
        self.events += 1;
        self.complete(id as usize);
        Ok(())
    }

    fn complete(&mut self, id: usize) {
        let alive = 32 * self.warps.iter().filter(|w| w.alive != 0).count() as u32;
        let bar = &mut self.bars[id];
        if bar.arrived == 0 || bar.arrived < bar.expected.unwrap_or(alive) {
            return;
        }
        let whole = bar.waiting.len() as u32 * 32 == alive;
        let bar = std::mem::take(bar);
        for w in &bar.waiting {
            let warp = &mut self.warps[*w];
            join(&mut warp.clock, &bar.clock);
            join(&mut warp.clock, &self.exited);
            warp.groups.iter_mut().for_each(|g| g.state = State::Run);
        }
        if whole {
            self.worker.shared.next_epoch();
        }
        self.events += 1;
    }

    /// Lanes of a warp end.
    pub(crate) fn exit(&mut self, w: usize, lanes: u32) -> Result<(), Fault> {
        let warp = &mut self.warps[w];
        warp.alive &= !lanes;
        self.events += 1;
        if warp.alive != 0 {
            return Ok(());
        }
        if !warp.copies.is_empty() || warp.copy_groups.iter().any(|g| !g.is_empty()) {
            return Err(Fault::Barrier("the warp ends while copies are under way".into()));
        }
        if !warp.wgmma.is_empty() || !warp.wgmma_groups.is_empty() {
            return Err(Fault::Barrier("the warp ends while wgmma is under way".into()));
        }
        let clock = warp.clock.clone();
        join(&mut self.exited, &clock);
        (0..16)
            .filter(|id| self.bars[*id].expected.is_none())
            .collect::<Vec<_>>()
            .into_iter()
            .for_each(|id| self.complete(id));
        Ok(())
    }
}

/// Xorshift.
fn step(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}
