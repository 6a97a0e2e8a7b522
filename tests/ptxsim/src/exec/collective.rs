//! Instructions by which lanes of a warp speak to each other.

use super::memory::apply;
use crate::cta::Cta;
use crate::error::Fault;
use crate::ins::{AtomOp, P, R, Reg, Shfl, ShflMode, Ty, Vote, each};
use crate::warp::lanes;

impl Cta<'_> {
    /// Lanes that run an instruction must be among those that it names.
    fn members(&self, w: usize, members: R, m: u32) -> Result<u32, Fault> {
        let named = *self.warps[w].r(self.k, members);
        for l in lanes(m) {
            if named[l] >> l & 1 == 0 || named[l] != named[m.trailing_zeros() as usize] {
                return Err(Fault::Divergent { here: m, needed: named[l] });
            }
        }
        Ok(m)
    }

    pub(super) fn shfl(&mut self, w: usize, s: &Shfl, m: u32) -> Result<(), Fault> {
        self.members(w, s.members, m)?;
        let warp = &self.warps[w];
        let (value, lane, clamp) = (warp.r(self.k, s.value), warp.r(self.k, s.lane), warp.r(self.k, s.clamp));
        let (mut out, mut valid) = ([0; 32], 0);
        for l in lanes(m) {
            // The segment keeps the upper bits of a lane's number.
            let (segment, bound) = (clamp[l] as usize >> 8 & 31, clamp[l] as usize & 31);
            let by = lane[l] as usize & 31;
            let low = l & segment;
            let high = low | bound & !segment & 31;
            let (from, inside) = match s.mode {
                ShflMode::Bfly => (l ^ by, l ^ by <= high),
                ShflMode::Down => (l + by, l + by <= high),
                // For `up` the bound is the lowest lane.
                ShflMode::Up => (l.wrapping_sub(by), l >= by && l - by >= high),
                ShflMode::Idx => {
                    let from = low | by & !segment & 31;
                    (from, from <= high)
                }
            };
            let from = if inside { from } else { l };
            if m >> from & 1 == 0 {
                return Err(Fault::InactiveLane(from));
            }
            out[l] = value[from];
            valid |= u32::from(inside) << l;
        }
        self.warps[w].set_r(s.to, &out, m);
        if let Some(p) = s.valid {
            self.warps[w].set_p(p, valid, m);
        }
        Ok(())
    }

    pub(super) fn vote(&mut self, w: usize, vote: Vote, p: P, negated: bool, members: R, m: u32) -> Result<(), Fault> {
        self.members(w, members, m)?;
        let warp = &mut self.warps[w];
        let p = warp.p[p.0 as usize];
        let ballot = if negated { !p } else { p } & m;
        let all = |held: bool| if held { !0 } else { 0 };
        match vote {
            Vote::Ballot(d) => warp.set_r(d, &[ballot; 32], m),
            Vote::All(d) => warp.set_p(d, all(ballot == m), m),
            Vote::Any(d) => warp.set_p(d, all(ballot != 0), m),
            Vote::Uni(d) => warp.set_p(d, all(ballot == m || ballot == 0), m),
        }
        Ok(())
    }

    pub(super) fn match_any(&mut self, w: usize, d: R, a: Reg, members: R, m: u32) -> Result<(), Fault> {
        self.members(w, members, m)?;
        let v = self.warps[w].any(self.k, a);
        let same = |l: usize| lanes(m).filter(|j| v[*j] == v[l]).fold(0, |s, j| s | 1 << j);
        self.warps[w].set_r(d, &each(same), m);
        Ok(())
    }

    pub(super) fn match_all(&mut self, w: usize, d: R, p: Option<P>, a: Reg, members: R, m: u32) -> Result<(), Fault> {
        self.members(w, members, m)?;
        let v = self.warps[w].any(self.k, a);
        let same = lanes(m).all(|l| v[l] == v[m.trailing_zeros() as usize]);
        self.warps[w].set_r(d, &[if same { m } else { 0 }; 32], m);
        if let Some(p) = p {
            self.warps[w].set_p(p, if same { !0 } else { 0 }, m);
        }
        Ok(())
    }

    pub(super) fn redux(
        &mut self,
        w: usize,
        op: AtomOp,
        signed: bool,
        d: R,
        a: R,
        members: R,
        m: u32,
    ) -> Result<(), Fault> {
        self.members(w, members, m)?;
        let v = *self.warps[w].r(self.k, a);
        let ty = if signed { Ty::S32 } else { Ty::U32 };
        let sum = lanes(m).map(|l| u64::from(v[l])).reduce(|s, v| apply(op, ty, s, v, 0)).unwrap_or(0);
        self.warps[w].set_r(d, &[sum as u32; 32], m);
        Ok(())
    }
}
