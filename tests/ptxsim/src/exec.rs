//! One instruction of one warp.

pub(crate) mod asynchronous;
mod collective;
pub(crate) mod matrix;
mod memory;

use crate::cta::Cta;
use crate::error::Fault;
use crate::ins::{Op, R, Reg, V32, each};
use crate::warp::{Group, State, lanes};

/// What becomes of the lanes that ran an instruction.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// On to the next one.
    Go,
    /// On to the next one, after others.
    Yield,
    /// This one again, after others.
    Retry,
    /// This one again, when more lanes have come to it.
    Gather,
    /// On to the next one, when the barrier opens.
    Barrier,
}

impl Cta<'_> {
    /// Runs the instruction at which group `at` of warp `w` stands.
    #[inline]
    pub(crate) fn step(&mut self, w: usize, at: usize) -> Result<(), Fault> {
        let k = self.k;
        let Group { pc, mask, .. } = self.warps[w].groups[at];
        let Some(ins) = k.code.get(pc as usize) else { return Err(Fault::Trap) };
        self.worker.counts[pc as usize] += 1;
        self.worker.lanes += u64::from(mask.count_ones());
        let warp = &mut self.warps[w];
        let mut m = mask;
        if let Some((p, negated)) = ins.guard {
            let p = warp.p[p.0 as usize];
            m &= if negated { !p } else { p };
        }
        let next = match &ins.op {
            Op::A1(f, d, a) => {
                let v = f(warp.r(k, *a));
                warp.set_r(*d, &v, m);
                Next::Go
            }
            Op::A2(f, d, a, b) => {
                let v = f(warp.r(k, *a), warp.r(k, *b));
                warp.set_r(*d, &v, m);
                Next::Go
            }
            Op::A3(f, d, a, b, c) => {
                let v = f(warp.r(k, *a), warp.r(k, *b), warp.r(k, *c));
                warp.set_r(*d, &v, m);
                Next::Go
            }
            Op::A4(f, d, [a, b, c, e]) => {
                let v = f(warp.r(k, *a), warp.r(k, *b), warp.r(k, *c), warp.r(k, *e));
                warp.set_r(*d, &v, m);
                Next::Go
            }
            Op::W1(f, d, a) => {
                let v = f(warp.d(k, *a));
                warp.set_d(*d, &v, m);
                Next::Go
            }
            Op::W2(f, d, a, b) => {
                let v = f(warp.d(k, *a), warp.d(k, *b));
                warp.set_d(*d, &v, m);
                Next::Go
            }
            Op::W3(f, d, a, b, c) => {
                let v = f(warp.d(k, *a), warp.d(k, *b), warp.d(k, *c));
                warp.set_d(*d, &v, m);
                Next::Go
            }
            Op::Narrow(f, d, a) => {
                let v = f(warp.d(k, *a));
                warp.set_r(*d, &v, m);
                Next::Go
            }
            Op::Widen(f, d, a) => {
                let v = f(warp.r(k, *a));
                warp.set_d(*d, &v, m);
                Next::Go
            }
            Op::MulWide(f, d, a, b) => {
                let v = f(warp.r(k, *a), warp.r(k, *b));
                warp.set_d(*d, &v, m);
                Next::Go
            }
            Op::MadWide(f, d, a, b, c) => {
                let v = f(warp.r(k, *a), warp.r(k, *b), warp.d(k, *c));
                warp.set_d(*d, &v, m);
                Next::Go
            }
            Op::ShiftWide(f, d, a, b) => {
                let v = f(warp.d(k, *a), warp.r(k, *b));
                warp.set_d(*d, &v, m);
                Next::Go
            }
            Op::Compare(f, a, b, set) => {
                let v = f(warp.r(k, *a), warp.r(k, *b));
                self.set_predicates(w, set, v, m);
                Next::Go
            }
            Op::CompareWide(f, a, b, set) => {
                let v = f(warp.d(k, *a), warp.d(k, *b));
                self.set_predicates(w, set, v, m);
                Next::Go
            }
            Op::Select(d, a, b, p) => {
                let p = warp.p[p.0 as usize];
                let (a, b) = (warp.r(k, *a), warp.r(k, *b));
                let v = each(|l| if p >> l & 1 == 1 { a[l] } else { b[l] });
                warp.set_r(*d, &v, m);
                Next::Go
            }
            Op::SelectWide(d, a, b, p) => {
                let p = warp.p[p.0 as usize];
                let (a, b) = (warp.d(k, *a), warp.d(k, *b));
                let v = each(|l| if p >> l & 1 == 1 { a[l] } else { b[l] });
                warp.set_d(*d, &v, m);
                Next::Go
            }
            Op::Logic(logic, d, a, b) => {
                let v = logic.of(warp.p[a.0 as usize], warp.p[b.0 as usize]);
                warp.set_p(*d, v, m);
                Next::Go
            }
            Op::Not(d, a) => {
                let v = !warp.p[a.0 as usize];
                warp.set_p(*d, v, m);
                Next::Go
            }
            Op::Branch(target) => {
                self.branch(w, at, m, *target);
                return Ok(());
            }
            Op::Load(a) => {
                self.load(w, pc, a, m)?;
                Next::Go
            }
            Op::Store(a) => {
                self.store(w, pc, a, m)?;
                Next::Go
            }
            op => {
                if let Some(next) = self.rare(w, at, pc, mask, m, op)? {
                    next
                } else {
                    return Ok(());
                }
            }
        };
        let warp = &mut self.warps[w];
        let group = &mut warp.groups[at];
        match next {
            // A barrier may have opened at once; if not, the lanes stay where they will go on.
            Next::Go | Next::Barrier => group.pc += 1,
            Next::Yield => (group.pc, group.state) = (pc + 1, State::Yielded),
            Next::Retry => group.state = State::Yielded,
            Next::Gather => group.state = State::Gather,
        }
        if warp.groups.len() > 1 {
            warp.regroup();
        }
        Ok(())
    }

    fn set_predicates(&mut self, w: usize, set: &crate::ins::SetP, v: u32, m: u32) {
        let warp = &mut self.warps[w];
        let (v, other) = match set.with {
            None => (v, !v),
            Some((logic, p, negated)) => {
                let p = warp.p[p.0 as usize];
                let p = if negated { !p } else { p };
                (logic.of(v, p), logic.of(!v, p))
            }
        };
        warp.set_p(set.to, v, m);
        if let Some(q) = set.other {
            warp.set_p(q, other, m);
        }
    }

    fn branch(&mut self, w: usize, at: usize, taken: u32, target: u32) {
        let groups = &mut self.warps[w].groups;
        let group = &mut groups[at];
        let rest = group.mask & !taken;
        if rest == 0 {
            group.pc = target;
        } else {
            group.pc += 1;
            if taken != 0 {
                group.mask = rest;
                groups.push(Group { pc: target, mask: taken, state: State::Run });
            }
        }
        if groups.len() > 1 {
            self.warps[w].regroup();
        }
    }

    /// Everything that is not frequent; `None` where the groups of lanes have already been moved on.
    fn rare(&mut self, w: usize, at: usize, pc: u32, mask: u32, m: u32, op: &Op) -> Result<Option<Next>, Fault> {
        let k = self.k;
        if let Some(needed) = self.needed(w, m, op) {
            // An instruction for whole warps waits for the lanes that have to take part.
            if needed & !m != 0 {
                if needed & !mask == 0 && m == 0 {
                    return Ok(Some(Next::Go));
                }
                if needed & !self.warps[w].alive != 0 || needed & !mask == 0 {
                    return Err(Fault::Divergent { here: m, needed });
                }
                return Ok(Some(Next::Gather));
            }
        }
        let warp = &mut self.warps[w];
        match op {
            Op::Div(f, d, a, b) => {
                let divisor = warp.r(k, *b);
                if let Some(lane) = lanes(m).find(|l| divisor[*l] == 0) {
                    return Err(Fault::DivisionByZero { lane });
                }
                let v = f(warp.r(k, *a), divisor);
                warp.set_r(*d, &v, m);
            }
            Op::DivWide(f, d, a, b) => {
                let divisor = warp.d(k, *b);
                if let Some(lane) = lanes(m).find(|l| divisor[*l] == 0) {
                    return Err(Fault::DivisionByZero { lane });
                }
                let v = f(warp.d(k, *a), divisor);
                warp.set_d(*d, &v, m);
            }
            Op::Convert(convert, d, a) => {
                let v = warp.any(k, *a).map(|x| convert.one(x));
                warp.set_any(*d, &v, m);
            }
            Op::Set(f, d, a, b, ones) => {
                let held = f(warp.r(k, *a), warp.r(k, *b));
                let v = each(|l| if held >> l & 1 == 1 { *ones } else { 0 });
                warp.set_r(*d, &v, m);
            }
            Op::SetTrue(d) => warp.set_p(*d, !0, m),
            Op::Pack(d, parts) => {
                let bits = if matches!(d, Reg::Wide(_)) { 64 } else { 32 } / parts.len();
                let mut v = [0; 32];
                for (j, part) in parts.iter().enumerate() {
                    let part = warp.r(k, *part);
                    (0..32).for_each(|l| v[l] |= u64::from(part[l]) << (j * bits));
                }
                warp.set_any(*d, &v, m);
            }
            Op::Unpack(parts, a) => {
                let bits = if matches!(a, Reg::Wide(_)) { 64 } else { 32 } / parts.len();
                let v = warp.any(k, *a);
                for (j, part) in parts.iter().enumerate() {
                    let piece: V32 = v.map(|v| (v >> (j * bits) & ((1 << bits) - 1)) as u32);
                    warp.set_r(*part, &piece, m);
                }
            }
            Op::Atom(a) => self.atom(w, pc, a, m)?,
            Op::FloatAtomic if m != 0 => return Err(Fault::FloatAtomic),
            Op::BranchIndexed(index, targets) => {
                self.branch_indexed(w, at, m, *index, targets)?;
                return Ok(None);
            }
            Op::Exit => {
                let group = &mut warp.groups[at];
                group.mask &= !m;
                group.pc += 1;
                if group.mask == 0 {
                    warp.groups.remove(at);
                }
                warp.regroup();
                self.exit(w, m)?;
                return Ok(None);
            }
            Op::Trap if m != 0 => return Err(Fault::Trap),
            Op::Barrier(id, count, waits) if m != 0 => {
                let lane = m.trailing_zeros() as usize;
                let (id, count) = (warp.r(k, *id)[lane], count.map(|c| warp.r(k, c)[lane]));
                // Waits before it arrives, as the last to arrive opens the barrier for itself too.
                if *waits {
                    warp.groups[at].state = State::Barrier;
                }
                self.arrive(w, id, count, *waits)?;
                return Ok(Some(Next::Barrier));
            }
            Op::Shfl(s) => self.shfl(w, s, m)?,
            Op::Vote(vote, p, negated, members) => self.vote(w, *vote, *p, *negated, *members, m)?,
            Op::MatchAny(d, a, members) => self.match_any(w, *d, *a, *members, m)?,
            Op::MatchAll(d, p, a, members) => self.match_all(w, *d, *p, *a, *members, m)?,
            Op::Redux(op, signed, d, a, members) => self.redux(w, *op, *signed, *d, *a, *members, m)?,
            Op::ActiveMask(d) => warp.set_r(*d, &[m; 32], m),
            Op::ElectSync(d, p, _) => {
                let leader = m.trailing_zeros();
                warp.set_r(*d, &[leader; 32], m);
                warp.set_p(*p, if m == 0 { 0 } else { 1 << leader }, m);
            }
            Op::LdMatrix(d, a, trans) => self.ldmatrix(w, pc, d, a, *trans)?,
            Op::StMatrix(d, a, trans) => self.stmatrix(w, pc, d, a, *trans)?,
            Op::MovMatrix(d, a) => self.movmatrix(w, *d, *a),
            Op::Mma(mma) => self.mma(w, mma),
            Op::Wgmma(g) => self.wgmma_issue(w, pc, g)?,
            Op::WgmmaCommit => self.wgmma_commit(w),
            Op::WgmmaWait(keep) => return self.wgmma_wait(w, *keep as usize).map(Some),
            Op::CpAsync(c) => self.cp_async(w, pc, c, m)?,
            Op::CpCommit if m != 0 => {
                let copies = std::mem::take(&mut warp.copies);
                warp.copy_groups.push_back(copies);
            }
            Op::CpWait(keep) if m != 0 => self.cp_wait(w, *keep as usize)?,
            Op::Bulk(b) => self.bulk(w, pc, b, m)?,
            Op::BulkCommit if m != 0 => {
                let open = std::mem::take(&mut warp.bulk_open);
                warp.bulk_groups.push_back(open);
            }
            Op::BulkWait(keep) if m != 0 => return self.bulk_wait(w, *keep as usize).map(Some),
            Op::MBarrier(b) => return self.mbarrier(w, pc, b, m).map(Some),
            Op::Registers(more, n) if m != 0 => return self.set_registers(w, *more, *n).map(Some),
            Op::ProxyFence if m != 0 => self.worker.shared.fence_proxy(w, &mut warp.clock),
            Op::Yield => return Ok(Some(Next::Yield)),
            _ => {}
        }
        Ok(Some(Next::Go))
    }

    /// Lanes that have to take part in an instruction together, if it is such a one.
    fn needed(&self, w: usize, m: u32, op: &Op) -> Option<u32> {
        let warp = &self.warps[w];
        let members = |r: R| {
            let lane = if m == 0 { 0 } else { m.trailing_zeros() as usize };
            Some(warp.r(self.k, r)[lane] & warp.alive)
        };
        match op {
            Op::LdMatrix(..) | Op::StMatrix(..) | Op::MovMatrix(..) | Op::Mma(_) | Op::Wgmma(_) => Some(!0),
            Op::WgmmaCommit | Op::WgmmaWait(_) | Op::Registers(..) | Op::AlignedNothing => Some(!0),
            Op::Barrier(..) => Some(warp.alive),
            Op::SyncWarp(r) | Op::ElectSync(_, _, r) | Op::Vote(_, _, _, r) => members(*r),
            Op::MatchAny(_, _, r) | Op::MatchAll(_, _, _, r) | Op::Redux(_, _, _, _, r) => members(*r),
            Op::Shfl(s) => members(s.members),
            _ => None,
        }
    }

    /// More registers come from what other warps of the block gave up: there are as many as at its start.
    fn set_registers(&mut self, w: usize, more: bool, n: u32) -> Result<Next, Fault> {
        if !(24..=256).contains(&n) || !n.is_multiple_of(8) {
            return Err(Fault::Barrier(format!("a thread cannot have {n} registers")));
        }
        let others: u32 = self.warps.iter().enumerate().map(|(i, x)| if i == w { 0 } else { x.registers }).sum();
        if more && others + n > self.warps.len() as u32 * self.k.registers() {
            return Ok(Next::Retry);
        }
        self.warps[w].registers = n;
        self.events += 1;
        Ok(Next::Go)
    }

    fn branch_indexed(&mut self, w: usize, at: usize, m: u32, index: R, targets: &[u32]) -> Result<(), Fault> {
        let index = *self.warps[w].r(self.k, index);
        let groups = &mut self.warps[w].groups;
        let mut old = groups.remove(at);
        for l in lanes(m) {
            let pc = *targets.get(index[l] as usize).ok_or(Fault::Trap)?;
            groups.push(Group { pc, mask: 1 << l, state: State::Run });
        }
        old.mask &= !m;
        old.pc += 1;
        if old.mask != 0 {
            groups.push(old);
        }
        self.warps[w].regroup();
        Ok(())
    }
}
