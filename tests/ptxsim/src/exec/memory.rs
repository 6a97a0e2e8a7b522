//! Loads, stores and atomics, with the traffic they cause.

use crate::cta::Cta;
use crate::decode::{LOCAL, PARAM, SHARED};
use crate::error::Fault;
use crate::ins::{Access, Atom, AtomOp, Reg, Space, Ty, V64};
use crate::parse::{CONST, GLOBALS};
use crate::shared::Kind;
use crate::warp::lanes;

/// Size of the windows of generic addresses.
const WINDOW: u64 = 1 << 36;

/// The state space of an address, and the address there.
#[inline]
fn resolve(space: Space, address: u64) -> (Space, u64) {
    let inside = |base: u64| address.wrapping_sub(base) < WINDOW;
    match space {
        Space::Generic | Space::Global => match address {
            a if inside(SHARED) && space == Space::Generic => (Space::Shared, a - SHARED),
            a if inside(LOCAL) && space == Space::Generic => (Space::Local, a - LOCAL),
            a if inside(PARAM) => (Space::Param, a - PARAM),
            a if inside(CONST) => (Space::Const, a - CONST),
            a => (Space::Global, a),
        },
        // An address may come as a window's offset or whole.
        _ => (space, address & (WINDOW - 1)),
    }
}

fn slice<'a>(data: &'a [u8], what: &str, at: u64, bytes: usize) -> Result<&'a [u8], Fault> {
    let found = usize::try_from(at).ok().and_then(|i| data.get(i..i.checked_add(bytes)?));
    found.ok_or_else(|| Fault::OutOfBounds { what: what.into(), offset: at, bytes, len: data.len() as u64 })
}

#[inline]
fn aligned(address: u64, bytes: usize) -> Result<(), Fault> {
    if !address.is_multiple_of(bytes as u64) { Err(Fault::Misaligned { address, bytes }) } else { Ok(()) }
}

#[inline]
fn number(bytes: &[u8]) -> u64 {
    match bytes {
        [a] => u64::from(*a),
        [a, b] => u64::from(u16::from_le_bytes([*a, *b])),
        [a, b, c, d] => u64::from(u32::from_le_bytes([*a, *b, *c, *d])),
        _ => bytes.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b)),
    }
}

/// A value as its register holds it: signed types are extended to the register.
#[inline]
fn widen(v: u64, ty: Ty) -> u64 {
    match ty {
        Ty::S8 => v as i8 as u64,
        Ty::S16 => v as i16 as u64,
        Ty::S32 => v as i32 as u64,
        _ => v,
    }
}

/// Neighbouring lanes whose addresses are one range of bytes, or all the same.
struct Run {
    first: usize,
    end: usize,
    same: bool,
}

impl Run {
    fn bytes(&self, total: usize) -> usize {
        if self.same { total } else { (self.end - self.first) * total }
    }
}

/// The accesses of a warp, as few ranges as neighbouring lanes make.
#[inline]
fn runs(addresses: &V64, total: usize, m: u32) -> impl Iterator<Item = Run> {
    let mut left = m;
    std::iter::from_fn(move || {
        if left == 0 {
            return None;
        }
        let first = left.trailing_zeros() as usize;
        let limit = first + (!(left >> first)).trailing_zeros().min(32 - first as u32) as usize;
        let step = if first + 1 < limit { addresses[first + 1].wrapping_sub(addresses[first]) } else { total as u64 };
        let mut end = first + 1;
        if step == 0 || step == total as u64 {
            while end < limit && addresses[end].wrapping_sub(addresses[end - 1]) == step {
                end += 1;
            }
        }
        left &= !((((1u64 << end) - 1) & !((1 << first) - 1)) as u32);
        Some(Run { first, end, same: step == 0 && end > first + 1 })
    })
}

impl Cta<'_> {
    /// Reads `out` for lane `l` of warp `w`.
    #[inline]
    fn fetch(&mut self, w: usize, l: usize, space: Space, address: u64, out: &mut [u8]) -> Result<(), Fault> {
        let (space, at) = resolve(space, address);
        let n = out.len();
        match space {
            Space::Shared => {
                let at = self.worker.shared.access(w, &self.warps[w].clock, at, n, Kind::Read)?;
                out.copy_from_slice(&self.worker.shared.data[at..at + n]);
            }
            Space::Local => {
                let at = self.local(l, at, n)?;
                let warp = &self.warps[w];
                if let Some(i) = warp.local_init[at..at + n].iter().position(|b| !b) {
                    return Err(Fault::Unwritten { what: "local memory".into(), offset: (at + i) as u64 });
                }
                out.copy_from_slice(&warp.local[at..at + n]);
            }
            Space::Param => out.copy_from_slice(slice(self.launch.params, "the parameters", at, n)?),
            Space::Const => out.copy_from_slice(slice(&self.launch.module.constants, "constant memory", at, n)?),
            _ if at.wrapping_sub(GLOBALS) < WINDOW => {
                out.copy_from_slice(slice(&self.launch.module.globals, "the module's variables", at - GLOBALS, n)?);
            }
            _ => self.launch.machine.global.read(at, out, self.me)?,
        }
        Ok(())
    }

    #[inline]
    fn fetch_run(&mut self, w: usize, run: &Run, space: Space, at: &V64, out: &mut [u8]) -> Result<(), Fault> {
        let Err(fault) = self.fetch(w, run.first, space, at[run.first], out) else { return Ok(()) };
        // Of the first lane that is wrong by itself, where there is one.
        let total = out.len() / if run.same { 1 } else { run.end - run.first };
        for (l, out) in (run.first..run.end).zip(out.chunks_exact_mut(total)) {
            self.fetch(w, l, space, at[l], out)?;
        }
        Err(fault)
    }

    /// `runs`, but of one lane each in local memory, where equal addresses are different bytes.
    #[inline]
    fn runs_in(&self, space: Space, addresses: &V64, total: usize, m: u32) -> impl Iterator<Item = Run> + use<> {
        let lane = |m: u32| resolve(space, addresses[m.trailing_zeros() as usize & 31]).0 == Space::Local;
        let single = m != 0 && lane(m);
        let addresses = *addresses;
        let mut singles = if single { m } else { 0 };
        let mut left = if single { 0 } else { m };
        std::iter::from_fn(move || {
            if singles != 0 {
                let first = singles.trailing_zeros() as usize;
                singles &= singles - 1;
                return Some(Run { first, end: first + 1, same: false });
            }
            let run = runs(&addresses, total, left).next()?;
            left &= !((((1u64 << run.end) - 1) & !((1 << run.first) - 1)) as u32);
            Some(run)
        })
    }

    /// Where local memory of a lane lies in its warp's.
    fn local(&self, l: usize, at: u64, n: usize) -> Result<usize, Fault> {
        let size = self.k.local as u64;
        if at.saturating_add(n as u64) > size {
            return Err(Fault::OutOfBounds { what: "local memory".into(), offset: at, bytes: n, len: size });
        }
        Ok(l * self.k.local + at as usize)
    }

    #[inline]
    fn put(&mut self, w: usize, l: usize, space: Space, address: u64, data: &[u8]) -> Result<(), Fault> {
        let (space, at) = resolve(space, address);
        let n = data.len();
        match space {
            Space::Shared => {
                let at = self.worker.shared.access(w, &self.warps[w].clock, at, n, Kind::Write)?;
                self.worker.shared.data[at..at + n].copy_from_slice(data);
            }
            Space::Local => {
                let at = self.local(l, at, n)?;
                self.warps[w].local[at..at + n].copy_from_slice(data);
                self.warps[w].local_init[at..at + n].fill(true);
            }
            Space::Param | Space::Const => return Err(Fault::ReadOnly),
            _ if at.wrapping_sub(GLOBALS) < WINDOW => return Err(Fault::ReadOnly),
            _ => self.launch.machine.global.write(at, data, self.me)?,
        }
        Ok(())
    }

    pub(super) fn load(&mut self, w: usize, pc: u32, a: &Access, m: u32) -> Result<(), Fault> {
        let addresses = self.warps[w].addresses(self.k, &a.addr);
        let n = a.ty.bytes();
        let total = n * a.regs.len();
        self.count(pc, a.space, &addresses, total, m);
        let mut bytes = [0; 1024];
        if let ([Reg::Narrow(r)], 4) = (&a.regs[..], n) {
            let mut v = [0; 32];
            for run in self.runs_in(a.space, &addresses, total, m) {
                aligned(addresses[run.first], total)?;
                let bytes = &mut bytes[..run.bytes(total)];
                self.fetch_run(w, &run, a.space, &addresses, bytes)?;
                let words = bytes.as_chunks::<4>().0;
                if run.same {
                    v[run.first..run.end].fill(u32::from_le_bytes(words[0]));
                } else {
                    v[run.first..run.end].iter_mut().zip(words).for_each(|(v, b)| *v = u32::from_le_bytes(*b));
                }
            }
            self.warps[w].set_r(*r, &v, m);
            return Ok(());
        }
        let mut v = [[0; 32]; 8];
        for run in self.runs_in(a.space, &addresses, total, m) {
            aligned(addresses[run.first], total)?;
            let bytes = &mut bytes[..run.bytes(total)];
            self.fetch_run(w, &run, a.space, &addresses, bytes)?;
            for l in run.first..run.end {
                let own = if run.same { &bytes[..] } else { &bytes[(l - run.first) * total..][..total] };
                for (v, piece) in v.iter_mut().zip(own.chunks_exact(n)) {
                    v[l] = widen(number(piece), a.ty);
                }
            }
        }
        for (r, v) in a.regs.iter().zip(&v) {
            self.warps[w].set_any(*r, v, m);
        }
        Ok(())
    }

    pub(super) fn store(&mut self, w: usize, pc: u32, a: &Access, m: u32) -> Result<(), Fault> {
        let addresses = self.warps[w].addresses(self.k, &a.addr);
        let n = a.ty.bytes();
        let total = n * a.regs.len();
        self.count(pc, a.space, &addresses, total, m);
        self.events += 1;
        let mut bytes = [0; 1024];
        for (j, r) in a.regs.iter().enumerate() {
            match (r, n) {
                (Reg::Narrow(r), 4) => {
                    let v = self.warps[w].r(self.k, *r);
                    for (own, v) in bytes.chunks_exact_mut(total).zip(v) {
                        own[4 * j..4 * j + 4].copy_from_slice(&v.to_le_bytes());
                    }
                }
                _ => {
                    let v = self.warps[w].any(self.k, *r);
                    for (own, v) in bytes.chunks_exact_mut(total).zip(&v) {
                        own[n * j..][..n].copy_from_slice(&v.to_le_bytes()[..n]);
                    }
                }
            }
        }
        for run in self.runs_in(a.space, &addresses, total, m) {
            aligned(addresses[run.first], total)?;
            // Of several lanes that write one place, the last one is seen.
            let first = if run.same { run.end - 1 } else { run.first };
            let bytes = &bytes[first * total..run.end * total];
            if let Err(fault) = self.put(w, run.first, a.space, addresses[run.first], bytes) {
                // Of the first lane that is wrong by itself, where there is one.
                for (l, bytes) in (run.first..run.end).zip(bytes.chunks_exact(total)) {
                    self.put(w, l, a.space, addresses[l], bytes)?;
                }
                return Err(fault);
            }
        }
        Ok(())
    }

    pub(super) fn atom(&mut self, w: usize, pc: u32, a: &Atom, m: u32) -> Result<(), Fault> {
        let warp = &self.warps[w];
        let addresses = warp.addresses(self.k, &a.addr);
        let value = warp.any(self.k, a.value);
        let swap = a.swap.map_or([0; 32], |s| warp.any(self.k, s));
        let n = a.ty.bytes();
        self.count(pc, a.space, &addresses, n, m);
        self.events += 1;
        let mut old = [0; 32];
        for l in lanes(m) {
            aligned(addresses[l], n)?;
            let change = |o: u64| apply(a.op, a.ty, o, value[l], swap[l]);
            let (space, at) = resolve(a.space, addresses[l]);
            old[l] = match space {
                Space::Shared => {
                    let at = self.worker.shared.access(w, &self.warps[w].clock, at, n, Kind::Atomic)?;
                    let bytes = &mut self.worker.shared.data[at..at + n];
                    let old = number(bytes);
                    bytes.copy_from_slice(&change(old).to_le_bytes()[..n]);
                    old
                }
                Space::Local | Space::Param | Space::Const => return Err(Fault::ReadOnly),
                _ => self.launch.machine.global.atomic(at, n, change)?,
            };
        }
        if let Some(to) = a.to {
            self.warps[w].set_any(to, &old, m);
        }
        Ok(())
    }

    /// Adds the traffic of one request to its instruction.
    #[inline]
    pub(super) fn count(&mut self, pc: u32, space: Space, addresses: &V64, bytes: usize, m: u32) {
        if m == 0 || matches!(space, Space::Param | Space::Const | Space::Local) {
            return;
        }
        let first = addresses[m.trailing_zeros() as usize];
        let (space, _) = resolve(space, first);
        let mut all = runs(addresses, bytes, m);
        let whole = all.next().filter(|_| all.next().is_none());
        let site = &mut self.worker.sites[pc as usize];
        site.requests += 1;
        site.lanes += u64::from(m.count_ones());
        if space == Space::Shared {
            let (wavefronts, ideal) = match &whole {
                Some(run) => (run.bytes(bytes).div_ceil(128) as u64, run.bytes(bytes).div_ceil(128) as u64),
                None => wavefronts(addresses, bytes, m),
            };
            site.wavefronts += wavefronts;
            site.ideal_wavefronts += ideal;
        } else {
            site.sectors += match &whole {
                Some(run) => (first + run.bytes(bytes) as u64).div_ceil(32) - first / 32,
                None => sectors(addresses, bytes, m),
            };
            site.ideal_sectors += (m.count_ones() as u64 * bytes as u64).div_ceil(32);
        }
    }
}

/// Passes through shared memory, and how many there would be without conflicts. Wide accesses go in parts of the warp.
fn wavefronts(addresses: &V64, bytes: usize, m: u32) -> (u64, u64) {
    let (lanes_per_part, words) = (if bytes <= 4 { 32 } else { (128 / bytes).max(1) }, bytes.div_ceil(4));
    let (mut total, mut parts) = (0, 0);
    let mut seen = [0u64; 128];
    for part in 0..32 / lanes_per_part {
        let mut per_bank = [0u8; 32];
        let mut n = 0;
        for l in lanes(m).filter(|l| l / lanes_per_part == part) {
            for j in 0..words as u64 {
                let word = addresses[l] / 4 + j;
                let bank = (word % 32) as usize;
                // Lanes that read the same word share its pass.
                if per_bank[bank] > 0 && seen[..n].contains(&word) {
                    continue;
                }
                seen[n] = word;
                n += 1;
                per_bank[bank] += 1;
            }
        }
        if n > 0 {
            total += u64::from(per_bank.into_iter().max().unwrap_or(0));
            parts += 1;
        }
    }
    (total, parts)
}

/// Different 32-byte sectors of a request.
fn sectors(addresses: &V64, bytes: usize, m: u32) -> u64 {
    let mut list = [0; 64];
    let mut n = 0;
    let mut sorted = true;
    for l in lanes(m) {
        for s in addresses[l] / 32..=(addresses[l] + bytes as u64 - 1) / 32 {
            if n > 0 && list[n - 1] == s {
                continue;
            }
            sorted &= n == 0 || list[n - 1] < s;
            list[n] = s;
            n += 1;
        }
    }
    if sorted {
        return n as u64;
    }
    list[..n].sort_unstable();
    1 + list[..n].windows(2).filter(|p| p[0] != p[1]).count() as u64
}

/// What an atomic leaves in memory.
pub(super) fn apply(op: AtomOp, ty: Ty, old: u64, value: u64, swap: u64) -> u64 {
    let wide = ty.bytes() == 8;
    let signed = |v: u64| if wide { v as i64 } else { i64::from(v as i32) };
    let low = |v: u64| if wide { v } else { v & 0xffff_ffff };
    let (old, value) = (low(old), low(value));
    low(match op {
        AtomOp::Add => old.wrapping_add(value),
        AtomOp::Min if ty.signed() => signed(old).min(signed(value)) as u64,
        AtomOp::Min => old.min(value),
        AtomOp::Max if ty.signed() => signed(old).max(signed(value)) as u64,
        AtomOp::Max => old.max(value),
        AtomOp::And => old & value,
        AtomOp::Or => old | value,
        AtomOp::Xor => old ^ value,
        AtomOp::Exch => value,
        AtomOp::Cas => {
            if old == value {
                swap
            } else {
                old
            }
        }
        AtomOp::Inc => {
            if old >= value {
                0
            } else {
                old + 1
            }
        }
        AtomOp::Dec => {
            if old == 0 || old > value {
                value
            } else {
                old - 1
            }
        }
    })
}
