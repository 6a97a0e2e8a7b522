//! Masks of one bit per voxel, and their holes.

use std::collections::VecDeque;

use crate::base::par;

/// One bit per voxel, rows padded to whole words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mask {
    shape: [usize; 3],
    words: usize,
    bits: Vec<u64>,
}

impl Mask {
    /// Voxels that `inside` says, which fills a row (z, y).
    pub(crate) fn new(shape: [usize; 3], inside: impl Fn(usize, usize, &mut [bool]) + Sync + Send) -> Self {
        let words = shape[2].div_ceil(64);
        let mut bits = vec![0u64; shape[0] * shape[1] * words];
        par::chunks_mut(&mut bits, shape[1] * words, |z, plane| {
            let mut row = vec![false; shape[2]];
            for (y, packed) in plane.chunks_mut(words).enumerate() {
                inside(z, y, &mut row);
                for (word, voxels) in packed.iter_mut().zip(row.chunks(64)) {
                    *word = voxels.iter().rev().fold(0, |w, &v| w << 1 | u64::from(v));
                }
            }
        });
        Self { shape, words, bits }
    }

    /// Calls `f(x, inside)` along a row.
    pub(crate) fn row(&self, z: usize, y: usize, mut f: impl FnMut(usize, bool)) {
        let row = &self.bits[(z * self.shape[1] + y) * self.words..][..self.words];
        for x in 0..self.shape[2] {
            f(x, row[x / 64] >> (x % 64) & 1 == 1);
        }
    }

    /// One value per voxel.
    pub(crate) fn unpack(&self, out: &mut [bool]) {
        let [_, ny, nx] = self.shape;
        par::chunks_mut(out, ny * nx, |z, plane| {
            for (y, row) in plane.chunks_exact_mut(nx).enumerate() {
                self.row(z, y, |x, inside| row[x] = inside);
            }
        });
    }

    /// Voxels inside.
    pub(crate) fn count(&self) -> usize {
        self.bits.iter().map(|w| w.count_ones() as usize).sum()
    }

    /// Voxels along (z, y, x).
    pub(crate) fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// Fills every background region that does not reach the border through voxel faces (scipy `binary_fill_holes`).
    ///
    /// Rows are worked on whole, as bits: a row takes over what its four neighbours hold and spreads it along
    /// itself; a row that grew wakes its neighbours. Every waking adds a run of voxels, so even a maze ends soon.
    pub(crate) fn fill_holes(&mut self) {
        let ([nz, ny, nx], words) = (self.shape, self.words);
        let tail = if nx.is_multiple_of(64) { u64::MAX } else { (1 << (nx % 64)) - 1 };
        let free = |row: &[u64], w: usize| !row[w] & if w + 1 == words { tail } else { u64::MAX };
        let mut outside = vec![0u64; self.bits.len()];
        let mut waiting = vec![true; nz * ny];
        let mut queue: VecDeque<usize> = (0..nz * ny).collect();
        let mut grown = vec![0u64; words];
        while let Some(row) = queue.pop_front() {
            waiting[row] = false;
            let (z, y) = (row / ny, row % ny);
            let neighbours = [
                (z > 0).then(|| row - ny),
                (z + 1 < nz).then(|| row + ny),
                (y > 0).then(|| row - 1),
                (y + 1 < ny).then(|| row + 1),
            ];
            let solid = &self.bits[row * words..][..words];
            let at_border = neighbours.iter().any(Option::is_none);
            for w in 0..words {
                let mut seed = outside[row * words + w] | if at_border { u64::MAX } else { 0 };
                for n in neighbours.iter().flatten() {
                    seed |= outside[n * words + w];
                }
                seed |= u64::from(w == 0) | if w + 1 == words { 1 << ((nx - 1) % 64) } else { 0 };
                grown[w] = seed & free(solid, w);
            }
            spread(&mut grown, |w| free(solid, w));
            let before = &mut outside[row * words..][..words];
            if *before != grown[..] {
                before.copy_from_slice(&grown);
                for &n in neighbours.iter().flatten() {
                    if !waiting[n] {
                        waiting[n] = true;
                        queue.push_back(n);
                    }
                }
            }
        }
        for (row, solid) in self.bits.chunks_mut(words).enumerate() {
            for w in 0..words {
                let last = if w + 1 == words { tail } else { u64::MAX };
                solid[w] = !outside[row * words + w] & last;
            }
        }
    }
}

/// Spreads the set bits of a row through the `free` ones, both ways.
fn spread(row: &mut [u64], free: impl Fn(usize) -> u64) {
    let mut carry = 0;
    for (w, word) in row.iter_mut().enumerate() {
        *word = spread_up(*word | carry, free(w));
        carry = *word >> 63;
    }
    carry = 0;
    for (w, word) in row.iter_mut().enumerate().rev() {
        *word = spread_up(word.reverse_bits() | carry, free(w).reverse_bits()).reverse_bits();
        carry = *word & 1;
    }
}

/// The free bits that a seed reaches upwards without leaving the free ones, by doubling steps (Kogge-Stone).
fn spread_up(seed: u64, free: u64) -> u64 {
    let (mut reached, mut through) = (seed & free, free);
    for step in [1, 2, 4, 8, 16, 32] {
        reached |= through & (reached << step);
        through &= through << step;
    }
    reached
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::rng::Rng;

    /// The definition: background that cannot be reached from outside through faces.
    fn filled(shape: [usize; 3], solid: &[bool]) -> Vec<bool> {
        let [nz, ny, nx] = shape;
        let mut outside = vec![false; solid.len()];
        let mut stack: Vec<[usize; 3]> = Vec::new();
        let edge = |k: usize, n: usize| k == 0 || k + 1 == n;
        for (i, &s) in solid.iter().enumerate() {
            let at = [i / (ny * nx), i / nx % ny, i % nx];
            if !s && (edge(at[0], nz) || edge(at[1], ny) || edge(at[2], nx)) {
                stack.push(at);
            }
        }
        while let Some(at) = stack.pop() {
            let i = (at[0] * ny + at[1]) * nx + at[2];
            if solid[i] || std::mem::replace(&mut outside[i], true) {
                continue;
            }
            for k in 0..3 {
                for to in [at[k].wrapping_sub(1), at[k] + 1] {
                    if to < shape[k] {
                        let mut next = at;
                        next[k] = to;
                        stack.push(next);
                    }
                }
            }
        }
        outside.iter().map(|o| !o).collect()
    }

    fn unpack(mask: &Mask) -> Vec<bool> {
        let mut out = vec![false; mask.shape.iter().product()];
        mask.unpack(&mut out);
        out
    }

    #[test]
    fn fill_holes_is_the_flood_from_the_border() {
        let mut rng = Rng::new(5, 0);
        for round in 0..60 {
            let shape: [usize; 3] = std::array::from_fn(|k| rng.uniform(1.0, [9.0, 12.0, 150.0][k]) as usize);
            let density = 0.2 + 0.5 * f64::from(round) / 60.0;
            let solid: Vec<bool> = (0..shape.iter().product()).map(|_| rng.unit() < density).collect();
            let mut mask = Mask::new(shape, |z, y, row| {
                let at = (z * shape[1] + y) * shape[2];
                row.copy_from_slice(&solid[at..at + shape[2]]);
            });
            assert_eq!(unpack(&mask), solid, "{shape:?}");
            mask.fill_holes();
            assert_eq!(unpack(&mask), filled(shape, &solid), "{shape:?} {density}");
        }
    }

    #[test]
    fn a_maze_is_walked_to_its_end() {
        // Serpentine walls: the outside enters at one corner and winds through every corridor.
        let shape = [3, 40, 70];
        let wall = |z: usize, y: usize, x: usize| {
            z != 1
                || x == 0
                || x == 69
                || y == 0
                || y == 39
                || (y.is_multiple_of(2) && if y.is_multiple_of(4) { x > 1 } else { x < 68 })
        };
        let mut mask = Mask::new(shape, |z, y, row| {
            row.iter_mut().enumerate().for_each(|(x, r)| *r = wall(z, y, x) && (z, y, x) != (0, 1, 1));
        });
        let solid = unpack(&mask);
        mask.fill_holes();
        assert_eq!(unpack(&mask), filled(shape, &solid));
        assert!(!unpack(&mask)[(40 + 37) * 70 + 5], "the far corridor is outside");
    }
}
