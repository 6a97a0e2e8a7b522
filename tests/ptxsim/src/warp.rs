//! A warp: registers, and the groups of lanes that stand at one instruction.

use std::collections::VecDeque;

use crate::error::Fault;
use crate::ins::{Addr, Base, CONSTANT, D, P, R, Reg, V32, V64, each};
use crate::parse::Kernel;
use crate::shared::Clock;

/// Why lanes do not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Run,
    /// Looked for something that is not there yet; others go first.
    Yielded,
    /// At an instruction that needs more lanes.
    Gather,
    /// At a barrier of the block.
    Barrier,
}

/// Lanes that stand at one instruction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Group {
    pub(crate) pc: u32,
    pub(crate) mask: u32,
    pub(crate) state: State,
}

/// A `cp.async` of one lane that is under way.
pub(crate) struct Copy {
    pub(crate) pc: u32,
    pub(crate) to: usize,
    pub(crate) from: u64,
    pub(crate) read: usize,
    pub(crate) size: usize,
}

pub(crate) struct Warp {
    pub(crate) r: Vec<V32>,
    pub(crate) d: Vec<V64>,
    pub(crate) p: Vec<u32>,
    pub(crate) groups: Vec<Group>,
    pub(crate) alive: u32,
    pub(crate) instructions: u64,
    /// Registers of a thread.
    pub(crate) registers: u32,
    pub(crate) local: Vec<u8>,
    pub(crate) local_init: Vec<bool>,
    pub(crate) clock: Clock,
    pub(crate) copies: Vec<Copy>,
    pub(crate) copy_groups: VecDeque<Vec<Copy>>,
    /// Instructions and scale of the `wgmma` that are under way.
    pub(crate) wgmma: Vec<Pending>,
    pub(crate) wgmma_groups: VecDeque<Vec<Pending>>,
    pub(crate) wgmma_committed: u64,
    pub(crate) bulk_open: u64,
    pub(crate) bulk_groups: VecDeque<u64>,
}

/// A `wgmma` that was issued: descriptors and predicate as they were then.
#[derive(Clone, Copy)]
pub(crate) struct Pending {
    pub(crate) pc: u32,
    pub(crate) a: u64,
    pub(crate) b: u64,
    pub(crate) keep: bool,
}

impl Warp {
    pub(crate) fn new(k: &Kernel, alive: u32, clock: Clock) -> Warp {
        Warp {
            // Registers hold nothing useful at first.
            r: vec![[0xdead_beef; 32]; k.narrow],
            d: vec![[0xdead_beef_dead_beef; 32]; k.wide],
            p: vec![0x5555_5555; k.preds],
            groups: vec![Group { pc: 0, mask: alive, state: State::Run }],
            alive,
            instructions: 0,
            registers: k.registers(),
            local: vec![0xcd; 32 * k.local],
            local_init: vec![false; 32 * k.local],
            clock,
            copies: Vec::new(),
            copy_groups: VecDeque::new(),
            wgmma: Vec::new(),
            wgmma_groups: VecDeque::new(),
            wgmma_committed: 0,
            bulk_open: 0,
            bulk_groups: VecDeque::new(),
        }
    }

    #[inline]
    pub(crate) fn r<'a>(&'a self, k: &'a Kernel, r: R) -> &'a V32 {
        if r.0 & CONSTANT == 0 { &self.r[r.0 as usize] } else { &k.consts[(r.0 & !CONSTANT) as usize] }
    }

    #[inline]
    pub(crate) fn d<'a>(&'a self, k: &'a Kernel, d: D) -> &'a V64 {
        if d.0 & CONSTANT == 0 { &self.d[d.0 as usize] } else { &k.wide_consts[(d.0 & !CONSTANT) as usize] }
    }

    /// Any register, widened.
    pub(crate) fn any(&self, k: &Kernel, r: Reg) -> V64 {
        match r {
            Reg::Narrow(r) => self.r(k, r).map(u64::from),
            Reg::Wide(d) => *self.d(k, d),
            Reg::Pred(p) => each(|l| u64::from(self.p[p.0 as usize] >> l & 1)),
        }
    }

    #[inline]
    pub(crate) fn set_r(&mut self, r: R, v: &V32, m: u32) {
        put(&mut self.r[r.0 as usize], v, m);
    }

    #[inline]
    pub(crate) fn set_d(&mut self, d: D, v: &V64, m: u32) {
        put(&mut self.d[d.0 as usize], v, m);
    }

    #[inline]
    pub(crate) fn set_p(&mut self, p: P, v: u32, m: u32) {
        let old = &mut self.p[p.0 as usize];
        *old = *old & !m | v & m;
    }

    pub(crate) fn set_any(&mut self, r: Reg, v: &V64, m: u32) {
        match r {
            Reg::Narrow(r) => self.set_r(r, &v.map(|v| v as u32), m),
            Reg::Wide(d) => self.set_d(d, v, m),
            Reg::Pred(p) => self.set_p(p, (0..32).fold(0, |s, l| s | ((v[l] & 1) as u32) << l), m),
        }
    }

    pub(crate) fn addresses(&self, k: &Kernel, a: &Addr) -> V64 {
        match a.base {
            Base::None => [a.offset; 32],
            Base::Narrow(r) => self.r(k, r).map(|v| u64::from(v.wrapping_add(a.offset as u32))),
            Base::Wide(d) => self.d(k, d).map(|v| v.wrapping_add(a.offset)),
        }
    }

    /// Joins groups that stand at the same instruction, and puts the one that is furthest behind first.
    pub(crate) fn regroup(&mut self) {
        let groups = &mut self.groups;
        let mut i = 0;
        while i < groups.len() {
            let mut j = i + 1;
            while j < groups.len() {
                if groups[i].pc == groups[j].pc
                    && groups[i].state != State::Barrier
                    && groups[j].state != State::Barrier
                {
                    groups[i].mask |= groups[j].mask;
                    groups[i].state = State::Run;
                    groups.swap_remove(j);
                } else {
                    j += 1;
                }
            }
            i += 1;
        }
        groups.sort_unstable_by_key(|g| g.pc);
    }

    /// The group to run next, or `None` when all of them wait.
    #[inline]
    pub(crate) fn pick(&mut self) -> Result<Option<usize>, (u32, Fault)> {
        if let [g] = &self.groups[..]
            && g.state == State::Run
        {
            return Ok(Some(0));
        }
        if let Some(i) = self.groups.iter().position(|g| g.state == State::Run) {
            return Ok(Some(i));
        }
        let waits = self.groups.iter().any(|g| matches!(g.state, State::Yielded | State::Barrier));
        match self.groups.iter().find(|g| g.state == State::Gather) {
            Some(g) if !waits => Err((g.pc, Fault::Divergent { here: g.mask, needed: self.alive })),
            _ => Ok(None),
        }
    }
}

#[inline]
fn put<T: std::marker::Copy>(to: &mut [T; 32], v: &[T; 32], m: u32) {
    if m == !0 {
        *to = *v;
    } else {
        for l in 0..32 {
            if m >> l & 1 == 1 {
                to[l] = v[l];
            }
        }
    }
}

/// Numbers of the lanes in a mask.
#[inline]
pub(crate) fn lanes(mut m: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        if m == 0 {
            return None;
        }
        let l = m.trailing_zeros() as usize;
        m &= m - 1;
        Some(l)
    })
}
