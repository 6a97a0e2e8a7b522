//! Matrices: between shared memory and registers, and their products.

use super::Next;
use crate::cta::Cta;
use crate::error::Fault;
use crate::float::{bf16_to_f32, f16_to_f32, f32_to_f16, tf32};
use crate::ins::{Addr, Mma, MmaKind, Op, R, Space, V32, V64, WgA, Wgmma, each};
use crate::shared::{Clock, Kind, join};
use crate::tensor_map::Swizzle;
use crate::warp::Pending;

/// Offset of an address in shared memory.
fn offset(address: u64) -> u64 {
    address & ((1 << 36) - 1)
}

/// Two numbers of 16 bits in a register.
#[inline]
fn two(kind: MmaKind, x: u32) -> [f32; 2] {
    match kind {
        MmaKind::F16 => [f16_to_f32(x as u16), f16_to_f32((x >> 16) as u16)],
        _ => [f32::from_bits(x << 16), f32::from_bits(x & 0xffff_0000)],
    }
}

impl Cta<'_> {
    /// Addresses of the rows of matrix `q`, checked, with the traffic of reading them.
    fn rows(&mut self, pc: u32, addresses: &V64, q: usize) -> Result<[u64; 8], Fault> {
        let rows: [u64; 8] = std::array::from_fn(|row| offset(addresses[q * 8 + row]));
        if let Some(address) = rows.iter().find(|r| *r % 16 != 0) {
            return Err(Fault::Misaligned { address: *address, bytes: 16 });
        }
        let mut first = [0; 32];
        first[..8].copy_from_slice(&rows);
        let requests = self.worker.sites[pc as usize].requests;
        self.count(pc, Space::Shared, &first, 16, 0xff);
        // The matrices of one instruction are one request.
        self.worker.sites[pc as usize].requests = requests + u64::from(q == 0);
        Ok(rows)
    }

    pub(super) fn ldmatrix(&mut self, w: usize, pc: u32, d: &[R], a: &Addr, trans: bool) -> Result<(), Fault> {
        let addresses = self.warps[w].addresses(self.k, a);
        for (q, d) in d.iter().enumerate() {
            let mut cells = [[0u16; 8]; 8];
            for (row, at) in self.rows(pc, &addresses, q)?.into_iter().enumerate() {
                let at = self.worker.shared.access(w, &self.warps[w].clock, at, 16, Kind::Read)?;
                for (cell, b) in cells[row].iter_mut().zip(self.worker.shared.data[at..at + 16].chunks_exact(2)) {
                    *cell = u16::from_le_bytes([b[0], b[1]]);
                }
            }
            let pair = |l: usize| {
                let (row, col) = (l / 4, l % 4 * 2);
                let at = |c: usize| u32::from(if trans { cells[c][row] } else { cells[row][c] });
                at(col) | at(col + 1) << 16
            };
            self.warps[w].set_r(*d, &each(pair), !0);
        }
        Ok(())
    }

    pub(super) fn stmatrix(&mut self, w: usize, pc: u32, d: &[R], a: &Addr, trans: bool) -> Result<(), Fault> {
        let addresses = self.warps[w].addresses(self.k, a);
        self.events += 1;
        for (q, d) in d.iter().enumerate() {
            let v = *self.warps[w].r(self.k, *d);
            for (row, at) in self.rows(pc, &addresses, q)?.into_iter().enumerate() {
                let at = self.worker.shared.access(w, &self.warps[w].clock, at, 16, Kind::Write)?;
                for col in 0..8 {
                    let (r, c) = if trans { (col, row) } else { (row, col) };
                    let half = (v[r * 4 + c / 2] >> (16 * (c % 2))) as u16;
                    self.worker.shared.data[at + 2 * col..][..2].copy_from_slice(&half.to_le_bytes());
                }
            }
        }
        Ok(())
    }

    pub(super) fn movmatrix(&mut self, w: usize, d: R, a: R) {
        let v = *self.warps[w].r(self.k, a);
        let cell = |row: usize, col: usize| v[row * 4 + col / 2] >> (16 * (col % 2)) & 0xffff;
        let out = each(|l| cell(l % 4 * 2, l / 4) | cell(l % 4 * 2 + 1, l / 4) << 16);
        self.warps[w].set_r(d, &out, !0);
    }

    /// Lane `l` holds, of every 8x8 part, row `l / 4` and the pair of columns `l % 4` (tf32: one column of four).
    pub(super) fn mma(&mut self, w: usize, x: &Mma) {
        let warp = &self.warps[w];
        let (mut a, mut b) = ([[0f32; 16]; 16], [[0f32; 8]; 16]);
        if x.kind == MmaKind::Tf32 {
            for (q, r) in x.a.iter().enumerate() {
                let v = warp.r(self.k, *r);
                (0..32).for_each(|l| a[l / 4 + q % 2 * 8][l % 4 + q / 2 * 4] = tf32(v[l]));
            }
            for (q, r) in x.b.iter().enumerate() {
                let v = warp.r(self.k, *r);
                (0..32).for_each(|l| b[l % 4 + q * 4][l / 4] = tf32(v[l]));
            }
        } else {
            for (q, r) in x.a.iter().enumerate() {
                let v = warp.r(self.k, *r);
                for l in 0..32 {
                    let at = l % 4 * 2 + q / 2 * 8;
                    a[l / 4 + q % 2 * 8][at..at + 2].copy_from_slice(&two(x.kind, v[l]));
                }
            }
            for (q, r) in x.b.iter().enumerate() {
                let v = warp.r(self.k, *r);
                for l in 0..32 {
                    let [low, high] = two(x.kind, v[l]);
                    let at = l % 4 * 2 + q * 8;
                    (b[at][l / 4], b[at + 1][l / 4]) = (low, high);
                }
            }
        }
        let mut c = [[0f32; 8]; 16];
        for (q, r) in x.c.iter().enumerate() {
            let v = warp.r(self.k, *r);
            for l in 0..32 {
                let col = l % 4 * 2;
                if x.wide {
                    c[l / 4 + q / 2 * 8][col + q % 2] = f32::from_bits(v[l]);
                } else {
                    c[l / 4 + q * 8][col..col + 2].copy_from_slice(&two(MmaKind::F16, v[l]));
                }
            }
        }
        for (row, sums) in a.iter().zip(&mut c) {
            add_products(&row[..x.k], &b, sums);
        }
        for (q, r) in x.d.iter().enumerate() {
            let v: V32 = each(|l| {
                let col = l % 4 * 2;
                if x.wide {
                    c[l / 4 + q / 2 * 8][col + q % 2].to_bits()
                } else {
                    let [low, high] = [0, 1].map(|j| u32::from(f32_to_f16(c[l / 4 + q * 8][col + j])));
                    low | high << 16
                }
            });
            self.warps[w].set_r(*r, &v, !0);
        }
    }

    pub(super) fn wgmma_issue(&mut self, w: usize, pc: u32, x: &Wgmma) -> Result<(), Fault> {
        let first = w / 4 * 4;
        if first + 4 > self.warps.len() {
            return Err(Fault::Descriptor("wgmma needs a whole warpgroup".into()));
        }
        let warp = &mut self.warps[w];
        let a = match &x.a {
            WgA::Descriptor(d) => warp.d(self.k, *d)[0],
            WgA::Registers(_) => 0,
        };
        let b = warp.d(self.k, x.b)[0];
        let keep = match x.keep {
            Ok(p) => warp.p[p.0 as usize] & 1 == 1,
            Err(keep) => keep,
        };
        warp.wgmma.push(Pending { pc, a, b, keep });
        Ok(())
    }

    pub(super) fn wgmma_commit(&mut self, w: usize) {
        let warp = &mut self.warps[w];
        let open = std::mem::take(&mut warp.wgmma);
        warp.wgmma_groups.push_back(open);
        warp.wgmma_committed += 1;
        self.events += 1;
    }

    /// A wgmma is the work of four warps: it is done only when all of them have issued it, and then for all of them. The
    /// first of them that waits reads the operands, so that any of the four may give shared memory free afterwards.
    pub(super) fn wgmma_wait(&mut self, w: usize, keep: usize) -> Result<Next, Fault> {
        let needed = self.warps[w].wgmma_committed.saturating_sub(keep as u64);
        let four = w / 4 * 4..(w / 4 * 4 + 4).min(self.warps.len());
        if self.warps[four].iter().any(|x| x.wgmma_committed < needed) {
            return Ok(Next::Retry);
        }
        while self.warps[w].wgmma_groups.len() > keep {
            let Some(group) = self.warps[w].wgmma_groups.pop_front() else { break };
            let key = (w / 4, self.warps[w].wgmma_committed - self.warps[w].wgmma_groups.len() as u64);
            let mut read = match self.read_groups.remove(&key) {
                Some(read) => read,
                None => self.read_group(w, &group)?,
            };
            for (pending, operands) in group.iter().zip(&read.operands) {
                if (pending.pc, pending.a, pending.b) != operands.of {
                    self.blame = Some(pending.pc);
                    return Err(Fault::Descriptor("warps of a warpgroup do not agree on a wgmma".into()));
                }
                self.multiply(w, *pending, operands);
            }
            join(&mut self.warps[w].clock, &read.clock);
            read.users += 1;
            if read.users < 4 {
                self.read_groups.insert(key, read);
            }
        }
        Ok(Next::Go)
    }

    fn read_group(&mut self, w: usize, group: &[Pending]) -> Result<ReadGroup, Fault> {
        let k = self.k;
        let mut operands = Vec::new();
        for pending in group {
            let Op::Wgmma(x) = &k.code[pending.pc as usize].op else { continue };
            self.blame = Some(pending.pc);
            let mut a = Vec::new();
            if let WgA::Descriptor(_) = &x.a {
                a = vec![[0f32; 16]; 64];
                let layout = Layout::new(pending.a, x.trans_a)?;
                self.operand(w, x.kind, &layout, 64, x.k, |row, depth, v| a[row][depth] = v)?;
            }
            let mut b = vec![vec![0f32; x.n]; x.k];
            let layout = Layout::new(pending.b, x.trans_b)?;
            self.operand(w, x.kind, &layout, x.n, x.k, |col, depth, v| b[depth][col] = v)?;
            self.blame = None;
            operands.push(Operands { of: (pending.pc, pending.a, pending.b), a, b });
        }
        let clock = self.warps[w].clock.clone();
        // What this warp does from now on is not what the others hear of.
        self.warps[w].clock[w] += 1;
        Ok(ReadGroup { operands, clock, users: 0 })
    }

    fn multiply(&mut self, w: usize, pending: Pending, operands: &Operands) {
        let k = self.k;
        let Op::Wgmma(x) = &k.code[pending.pc as usize].op else { return };
        // Each warp of the four has 16 of the 64 rows.
        let mut a = [[0f32; 16]; 16];
        match &x.a {
            WgA::Descriptor(_) => a.copy_from_slice(&operands.a[w % 4 * 16..][..16]),
            WgA::Registers(regs) => {
                for (q, r) in regs.iter().enumerate() {
                    let v = self.warps[w].r(k, *r);
                    for l in 0..32 {
                        let row = l / 4 + q % 2 * 8;
                        if x.kind == MmaKind::Tf32 {
                            a[row][l % 4 + q / 2 * 4] = tf32(v[l]);
                        } else {
                            let at = l % 4 * 2 + q / 2 * 8;
                            a[row][at..at + 2].copy_from_slice(&two(x.kind, v[l]));
                        }
                    }
                }
            }
        }
        let scale = x.scale_a * x.scale_b;
        let mut sums = vec![0f32; x.n];
        for row in 0..16 {
            // Register 4j + 2h + i of a lane: row h * 8 + lane / 4, column 8j + 2 (lane % 4) + i.
            let (half, lane) = (row / 8, row % 8 * 4);
            let place = |col: usize| (x.d[col / 8 * 4 + half * 2 + col % 2].0 as usize, lane + col % 8 / 2);
            for (col, sum) in sums.iter_mut().enumerate() {
                let (r, l) = place(col);
                *sum = if pending.keep { f32::from_bits(self.warps[w].r[r][l]) } else { 0.0 };
            }
            for (depth, b) in operands.b.iter().enumerate() {
                let factor = a[row][depth] * scale;
                sums.iter_mut().zip(b).for_each(|(s, b)| *s += factor * b);
            }
            for (col, sum) in sums.iter().enumerate() {
                let (r, l) = place(col);
                self.warps[w].r[r][l] = sum.to_bits();
            }
        }
    }

    /// Reads an operand from shared memory in pieces of 16 bytes; `each` gets row (or column), depth and value.
    fn operand(
        &mut self,
        w: usize,
        kind: MmaKind,
        layout: &Layout,
        count: usize,
        depth: usize,
        mut each: impl FnMut(usize, usize, f32),
    ) -> Result<(), Fault> {
        let size = if kind == MmaKind::Tf32 { 4 } else { 2 };
        let per = 16 / size;
        // A piece runs along the depth, or along the rows.
        let (outer, inner) = if layout.transposed { (depth, count / per) } else { (count, depth / per) };
        for o in 0..outer {
            for i in 0..inner {
                let at = if layout.transposed {
                    layout.mn_major(i * per, o, size)
                } else {
                    layout.k_major(o, i * per, size)
                };
                let at = self.worker.shared.access(w, &self.warps[w].clock, at as u64, 16, Kind::Read)?;
                self.worker.shared.by_proxy(at, 16)?;
                let bytes = &self.worker.shared.data[at..at + 16];
                for (j, b) in bytes.chunks_exact(size).enumerate() {
                    let v = match kind {
                        MmaKind::F16 => f16_to_f32(u16::from_le_bytes([b[0], b[1]])),
                        MmaKind::Bf16 => bf16_to_f32(u16::from_le_bytes([b[0], b[1]])),
                        MmaKind::Tf32 => tf32(u32::from_le_bytes([b[0], b[1], b[2], b[3]])),
                    };
                    if layout.transposed { each(i * per + j, o, v) } else { each(o, i * per + j, v) }
                }
            }
        }
        Ok(())
    }
}

/// Adds one row of A times all of B. Products of these formats are exact in f32.
#[inline]
fn add_products(row: &[f32], b: &[[f32; 8]; 16], sums: &mut [f32; 8]) {
    for (factor, b) in row.iter().zip(b) {
        for (sum, b) in sums.iter_mut().zip(b) {
            *sum += factor * b;
        }
    }
}

/// Operands of one wgmma as they were read for a whole warpgroup.
struct Operands {
    /// The instruction and its descriptors.
    of: (u32, u64, u64),
    a: Vec<[f32; 16]>,
    b: Vec<Vec<f32>>,
}

/// A group of wgmma that is done, for those warps of the four that have yet to wait for it.
pub(crate) struct ReadGroup {
    operands: Vec<Operands>,
    clock: Clock,
    users: usize,
}

/// A matrix descriptor of wgmma.
struct Layout {
    start: usize,
    /// Bytes between core matrices along the leading dimension.
    leading: usize,
    /// Bytes between core matrices along the other one.
    stride: usize,
    swizzle: Swizzle,
    transposed: bool,
}

impl Layout {
    fn new(descriptor: u64, transposed: bool) -> Result<Layout, Fault> {
        let field = |at: u32| ((descriptor >> at & 0x3fff) << 4) as usize;
        if descriptor >> 49 & 7 != 0 {
            return Err(Fault::Descriptor("wgmma descriptors with a base offset are not supported".into()));
        }
        let swizzle = match descriptor >> 62 {
            0 => Swizzle::None,
            1 => Swizzle::B128,
            2 => Swizzle::B64,
            _ => Swizzle::B32,
        };
        Ok(Layout { start: field(0), leading: field(16), stride: field(32), swizzle, transposed })
    }

    /// Rows of 8 with the depth contiguous: a core matrix is 8 rows of the swizzle's span.
    fn k_major(&self, row: usize, depth: usize, size: usize) -> usize {
        let along = depth * size;
        self.swizzle.apply(match self.swizzle {
            Swizzle::None => self.start + row / 8 * self.stride + row % 8 * 16 + along / 16 * self.leading + along % 16,
            s => self.start + row / 8 * self.stride + row % 8 * s.span() + along,
        })
    }

    /// Rows contiguous: a core matrix is the swizzle's span of rows by a depth of 8.
    fn mn_major(&self, row: usize, depth: usize, size: usize) -> usize {
        let (along, span) = (row * size, self.swizzle.span());
        let (next, deeper) = match self.swizzle {
            Swizzle::None => (self.stride, self.leading),
            _ => (self.leading, self.stride),
        };
        self.swizzle.apply(self.start + along % span + along / span * next + depth % 8 * span + depth / 8 * deeper)
    }
}
