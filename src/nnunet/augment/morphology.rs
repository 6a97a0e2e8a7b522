//! Binary operators with balls, on rows of bits, and connected components.

use std::ops::Range;

use crate::nnunet::volume::{Components, Neighbours};

/// What is done to a set of voxels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operator {
    /// Voxels that the structure reaches from the set.
    Dilation,
    /// Voxels from which the structure reaches nothing outside; beyond the patch all is inside.
    Erosion,
    /// Erosion of the dilation.
    Closing,
    /// Dilation of the erosion.
    Opening,
}

/// A structuring element as scikit-image makes it for a radius that is no whole number: of as many points as fit, which
/// need not be odd. Each row of it is without gaps.
#[derive(Debug, Clone)]
pub(super) struct Structure {
    /// Offsets along z and y, and the offsets along x from the first to the last.
    rows: Vec<([isize; 2], [isize; 2])>,
}

impl Structure {
    /// `skimage.morphology.ball`: points from `-radius` to `radius`, evenly spaced.
    pub(super) fn ball(radius: f64) -> Self {
        let n = (2.0 * radius + 1.0) as usize;
        let step = if n > 1 { 2.0 * radius / (n as f64 - 1.0) } else { 0.0 };
        let points: Vec<f64> = (0..n).map(|i| i as f64 * step - radius).collect();
        Self::of(&points, &points, radius)
    }

    /// `skimage.morphology.disk`: points from `-radius` on, one apart.
    pub(super) fn disk(radius: f64) -> Self {
        let n = (2.0 * radius + 1.0).ceil() as usize;
        let points: Vec<f64> = (0..n).map(|i| i as f64 - radius).collect();
        Self::of(&[0.0], &points, radius)
    }

    /// Points of (z, y, x) within the radius. The middle one of an odd number is the voxel itself.
    fn of(z: &[f64], yx: &[f64], radius: f64) -> Self {
        let offset = |i: usize, n: usize| i as isize - ((n - 1) / 2) as isize;
        let mut rows = Vec::new();
        for (i, &z0) in z.iter().enumerate() {
            for (j, &y0) in yx.iter().enumerate() {
                // Added in scikit-image's order: points on the sphere itself depend on the last bit.
                let within = |x: &f64| x * x + y0 * y0 + z0 * z0 <= radius * radius;
                if let (Some(first), Some(last)) = (yx.iter().position(within), yx.iter().rposition(within)) {
                    let along = [offset(first, yx.len()), offset(last, yx.len())];
                    rows.push(([offset(i, z.len()), offset(j, yx.len())], along));
                }
            }
        }
        Self { rows }
    }

    /// Which voxels are in the set after `operator`; before it those are that are not 0.
    pub(super) fn apply(&self, operator: Operator, shape: [usize; 3], x: &[f32]) -> Vec<bool> {
        let mut bits = Bits::new(shape, x);
        match operator {
            Operator::Dilation => bits = bits.dilated(self),
            Operator::Erosion => bits = bits.eroded(self),
            Operator::Closing => bits = bits.dilated(self).eroded(self),
            Operator::Opening => bits = bits.eroded(self).dilated(self),
        }
        let [d, h, w] = shape;
        (0..d * h * w).map(|i| bits.words[i / w * bits.row + i % w / 64] >> (i % w % 64) & 1 == 1).collect()
    }
}

/// A set of voxels, rows along x in words of their own.
#[derive(Clone)]
struct Bits {
    shape: [usize; 3],
    /// Words of a row.
    row: usize,
    words: Vec<u64>,
}

impl Bits {
    fn new(shape: [usize; 3], x: &[f32]) -> Self {
        let [d, h, w] = shape;
        let row = w.div_ceil(64);
        let mut words = vec![0; d * h * row];
        for (words, x) in words.chunks_exact_mut(row.max(1)).zip(x.chunks_exact(w.max(1))) {
            for (i, x) in x.iter().enumerate() {
                words[i / 64] |= u64::from(*x != 0.0) << (i % 64);
            }
        }
        Self { shape, row, words }
    }

    fn inverted(mut self) -> Self {
        let last = !0 >> (self.row * 64 - self.shape[2]);
        for row in self.words.chunks_exact_mut(self.row) {
            row.iter_mut().for_each(|w| *w = !*w);
            row[self.row - 1] &= last;
        }
        self
    }

    fn eroded(self, structure: &Structure) -> Self {
        self.inverted().dilated(structure).inverted()
    }

    fn dilated(&self, structure: &Structure) -> Self {
        let [d, h, _] = self.shape;
        let mut out = Self { words: vec![0; self.words.len()], ..*self };
        let mut spans: Vec<[isize; 2]> = structure.rows.iter().map(|r| r.1).collect();
        spans.sort_unstable();
        spans.dedup();
        for span in spans {
            let wide = self.widened(span);
            for ([z, y], _) in structure.rows.iter().filter(|r| r.1 == span) {
                for to in 0..d * h {
                    let from = ((to / h) as isize + z, (to % h) as isize + y);
                    if (0..d as isize).contains(&from.0) && (0..h as isize).contains(&from.1) {
                        let from = from.0 as usize * h + from.1 as usize;
                        let from = &wide[from * self.row..][..self.row];
                        out.words[to * self.row..][..self.row].iter_mut().zip(from).for_each(|(o, w)| *o |= w);
                    }
                }
            }
        }
        out
    }

    /// Voxels of which one from `first` to `last` voxels further along x is in the set.
    fn widened(&self, [first, last]: [isize; 2]) -> Vec<u64> {
        let end = !0 >> (self.row * 64 - self.shape[2]);
        let mut out = vec![0; self.words.len()];
        for (out, row) in out.chunks_exact_mut(self.row).zip(self.words.chunks_exact(self.row)) {
            for by in first..=last {
                let (words, bits) = (by.div_euclid(64), by.rem_euclid(64) as u32);
                let word = |i: isize| usize::try_from(i).ok().and_then(|i| row.get(i)).copied().unwrap_or(0);
                for (i, o) in out.iter_mut().enumerate() {
                    let (low, high) = (word(i as isize + words), word(i as isize + words + 1));
                    *o |= low >> bits | high.checked_shl(64 - bits).unwrap_or(0);
                }
            }
            out[self.row - 1] &= end;
        }
        out
    }
}

/// The connected components of voxels that are not 0 and make up less than `share` of all, each as its runs along x, in the
/// order of their first voxels. Voxels touch by faces, edges and corners (`skimage.measure.label`).
pub(super) fn small_components(shape: [usize; 3], x: &[f32], share: f64) -> Vec<Vec<Range<usize>>> {
    let found = Components::new(x, shape, Neighbours::Corners, |v| u16::from(v != 0.0));
    let most = x.len() as f64 * share;
    let small = |component: usize| (found.size(component) as f64) < most;
    let mut components: Vec<Vec<Range<usize>>> = vec![Vec::new(); found.len()];
    found.each_run(|component, voxels| {
        if small(component) {
            components[component].push(voxels);
        }
    });
    components.retain(|c| !c.is_empty());
    components
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::rng::Rng;

    fn random(rng: &mut Rng, [d, h, w]: [usize; 3], share: f64) -> Vec<f32> {
        (0..d * h * w).map(|_| if rng.chance(share) { 1.0 } else { 0.0 }).collect()
    }

    /// The definition, voxel by voxel; beyond the patch there is nothing.
    fn dilated(structure: &Structure, [d, h, w]: [usize; 3], x: &[bool]) -> Vec<bool> {
        let at = |z: isize, y: isize, i: isize| {
            let inside = |v: isize, n: usize| (0..n as isize).contains(&v);
            inside(z, d) && inside(y, h) && inside(i, w) && x[(z as usize * h + y as usize) * w + i as usize]
        };
        let reaches = |i: usize| {
            let [z, y, x] = [i / (h * w), i / w % h, i % w].map(|v| v as isize);
            structure.rows.iter().any(|([dz, dy], [a, b])| (*a..=*b).any(|dx| at(z + dz, y + dy, x + dx)))
        };
        (0..x.len()).map(reaches).collect()
    }

    #[test]
    fn operators_are_their_definitions() {
        let mut rng = Rng::new(3, 1);
        for shape in [[1, 5, 63], [2, 4, 64], [3, 3, 65], [5, 6, 7], [1, 2, 130]] {
            for radius in [1.0, 1.7, 2.0, 2.9, 5.4] {
                let structure = if shape[0] == 1 { Structure::disk(radius) } else { Structure::ball(radius) };
                let x = random(&mut rng, shape, 0.05);
                let set: Vec<bool> = x.iter().map(|v| *v != 0.0).collect();
                let not = |x: Vec<bool>| x.into_iter().map(|v| !v).collect::<Vec<bool>>();
                let grown = dilated(&structure, shape, &set);
                let shrunk = not(dilated(&structure, shape, &not(set)));
                let closed = not(dilated(&structure, shape, &not(grown.clone())));
                let opened = dilated(&structure, shape, &shrunk);
                for (operator, expected) in [
                    (Operator::Dilation, grown),
                    (Operator::Erosion, shrunk),
                    (Operator::Closing, closed),
                    (Operator::Opening, opened),
                ] {
                    assert_eq!(structure.apply(operator, shape, &x), expected, "{operator:?} {shape:?} {radius}");
                }
            }
        }
    }

    /// Against a flood from every voxel.
    #[test]
    fn components_touch_by_corners() {
        let mut rng = Rng::new(3, 2);
        for shape in [[1, 9, 9], [4, 5, 6], [7, 1, 8]] {
            let [d, h, w] = shape;
            let x = random(&mut rng, shape, 0.2);
            let mut open = x.clone();
            let mut expected = Vec::new();
            for start in 0..x.len() {
                let (mut stack, mut component) = (vec![start], Vec::new());
                while let Some(i) = stack.pop() {
                    if std::mem::take(&mut open[i]) == 0.0 {
                        continue;
                    }
                    component.push(i);
                    for j in 0..x.len() {
                        let [a, b] = [i, j].map(|i| [i / (h * w), i / w % h, i % w]);
                        if (0..3).all(|k| a[k].abs_diff(b[k]) <= 1) {
                            stack.push(j);
                        }
                    }
                }
                component.sort_unstable();
                if !component.is_empty() && (component.len() as f64) < 0.04 * (d * h * w) as f64 {
                    expected.push(component);
                }
            }
            let found = small_components(shape, &x, 0.04);
            let found: Vec<Vec<usize>> = found.into_iter().map(|c| c.into_iter().flatten().collect()).collect();
            assert_eq!(found, expected, "{shape:?}");
        }
    }
}
