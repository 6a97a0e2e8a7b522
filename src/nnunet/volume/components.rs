//! Connected components by union-find over runs of voxels along x: memory follows the surface, not the volume.
//!
//! Rosenfeld and Pfaltz, "Sequential operations in digital picture processing", 1966, on runs instead of voxels.

use std::ops::Range;

use crate::base::par;

/// Which voxels touch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Neighbours {
    /// Those that share a face: 6 in space, 4 in a plane.
    Faces,
    /// Those that share a face, an edge or a corner: 26 in space, 8 in a plane.
    Corners,
}

/// Voxels `start..end` of one row, all of one class.
#[derive(Debug, Clone, Copy)]
struct Run {
    start: u32,
    end: u32,
    class: u16,
}

/// The connected components of a volume, numbered in the order of their first voxels.
#[derive(Debug)]
pub(crate) struct Components {
    shape: [usize; 3],
    runs: Vec<Run>,
    /// First run of each row, and the number of all runs.
    rows: Vec<usize>,
    /// Component of each run.
    numbers: Vec<usize>,
    /// Voxels of each component.
    sizes: Vec<usize>,
    /// Class of each component.
    classes: Vec<u16>,
}

/// Planes that are looked at together; the same for any number of threads.
const SLAB: usize = 8;

/// The runs of neighbouring rows, each with a run of its component that stands before it or is itself.
struct Part {
    runs: Vec<Run>,
    rows: Vec<usize>,
    parents: Vec<usize>,
}

impl Components {
    /// Those of `voxels`, (z, y, x) with `shape`: voxels of one class that touch. Voxels of class 0 are in none. Rows are
    /// shorter than 2^32 voxels, as those of all image files are.
    pub(crate) fn new<T: Copy + PartialEq + Sync>(
        voxels: &[T],
        shape: [usize; 3],
        neighbours: Neighbours,
        class: impl Fn(T) -> u16 + Sync + Send,
    ) -> Self {
        let [nz, ny, nx] = shape;
        let parts = par::map(nz.div_ceil(SLAB), |s| {
            let planes = s * SLAB..(s * SLAB + SLAB).min(nz);
            Part::new(&voxels[planes.start * ny * nx..planes.end * ny * nx], [ny, nx], neighbours, &class)
        });
        let total = parts.iter().map(|p| p.runs.len()).sum();
        let mut whole = Part {
            runs: Vec::with_capacity(total),
            rows: Vec::with_capacity(nz * ny + 1),
            parents: Vec::with_capacity(total),
        };
        let mut borders = Vec::new();
        for part in parts {
            let first = whole.runs.len();
            borders.push(whole.rows.len());
            whole.runs.extend(part.runs);
            whole.rows.extend(part.rows.iter().map(|r| r + first));
            whole.parents.extend(part.parents.iter().map(|p| p + first));
        }
        whole.rows.push(whole.runs.len());
        for first in borders.into_iter().skip(1) {
            (first..first + ny).for_each(|row| whole.join_plane_before(row, ny, neighbours));
        }
        whole.numbered(shape)
    }

    /// The number of components.
    pub(crate) fn len(&self) -> usize {
        self.sizes.len()
    }

    /// Voxels of a component.
    pub(crate) fn size(&self, component: usize) -> usize {
        self.sizes[component]
    }

    /// The class of a component's voxels.
    pub(crate) fn class(&self, component: usize) -> u16 {
        self.classes[component]
    }

    /// Calls `f(component, its voxels)` for every run of every row, as they lie in memory.
    pub(crate) fn each_run(&self, mut f: impl FnMut(usize, Range<usize>)) {
        for row in 0..self.rows.len() - 1 {
            self.row(row, &mut f);
        }
    }

    fn row(&self, row: usize, f: &mut impl FnMut(usize, Range<usize>)) {
        let base = row * self.shape[2];
        for i in self.rows[row]..self.rows[row + 1] {
            let run = self.runs[i];
            f(self.numbers[i], base + run.start as usize..base + run.end as usize);
        }
    }

    /// Writes the number of each voxel's component, counted from 1; voxels in none keep what they have.
    pub(crate) fn number(&self, out: &mut [u32]) {
        let [_, ny, nx] = self.shape;
        par::chunks_mut(out, ny * nx, |z, plane| {
            for y in 0..ny {
                self.row(z * ny + y, &mut |component, voxels| {
                    let first = z * ny * nx;
                    // At most as many as voxels, which the caller counts in u32.
                    plane[voxels.start - first..voxels.end - first].fill(component as u32 + 1);
                });
            }
        });
    }
}

impl Part {
    fn new<T: Copy + PartialEq>(
        voxels: &[T],
        [ny, nx]: [usize; 2],
        neighbours: Neighbours,
        class: &impl Fn(T) -> u16,
    ) -> Self {
        let mut part = Self { runs: Vec::new(), rows: Vec::new(), parents: Vec::new() };
        for (row, voxels) in voxels.chunks_exact(nx.max(1)).enumerate() {
            part.rows.push(part.runs.len());
            part.add_row(voxels, class);
            // The rows before this one know where they end.
            part.rows.push(part.runs.len());
            if row % ny > 0 {
                part.join(row, row - 1, neighbours);
            }
            part.join_plane_before(row, ny, neighbours);
            part.rows.pop();
        }
        part
    }

    fn add_row<T: Copy + PartialEq>(&mut self, voxels: &[T], class: &impl Fn(T) -> u16) {
        let first = self.runs.len();
        let mut at = 0;
        while at < voxels.len() {
            let end = at + alike(&voxels[at..]);
            let class = class(voxels[at]);
            if class != 0 {
                match self.runs[first..].last_mut() {
                    Some(run) if run.end as usize == at && run.class == class => run.end = end as u32,
                    _ => {
                        self.parents.push(self.runs.len());
                        self.runs.push(Run { start: at as u32, end: end as u32, class });
                    }
                }
            }
            at = end;
        }
    }

    /// Joins a row with those of the plane before that it touches.
    fn join_plane_before(&mut self, row: usize, ny: usize, neighbours: Neighbours) {
        if row < ny {
            return;
        }
        let (above, y) = (row - ny, row % ny);
        self.join(row, above, neighbours);
        if neighbours == Neighbours::Corners {
            if y > 0 {
                self.join(row, above - 1, neighbours);
            }
            if y + 1 < ny {
                self.join(row, above + 1, neighbours);
            }
        }
    }

    /// Joins the runs of two rows that lie beside each other.
    fn join(&mut self, row: usize, before: usize, neighbours: Neighbours) {
        let reach = u32::from(neighbours == Neighbours::Corners);
        let (here_end, there_end) = (self.rows[row + 1], self.rows[before + 1]);
        let (mut i, mut j) = (self.rows[row], self.rows[before]);
        while i < here_end && j < there_end {
            self.link(i, j, reach);
            let (a, b) = (self.runs[i].end, self.runs[j].end);
            if a == b && reach > 0 {
                // Where runs of two classes follow each other without a gap, those that end together touch the next ones
                // by a corner.
                if i + 1 < here_end {
                    self.link(i + 1, j, reach);
                }
                if j + 1 < there_end {
                    self.link(i, j + 1, reach);
                }
            }
            // The one that ends first touches nothing further.
            i += usize::from(a <= b);
            j += usize::from(b <= a);
        }
    }

    fn link(&mut self, i: usize, j: usize, reach: u32) {
        let (a, b) = (self.runs[i], self.runs[j]);
        if a.class == b.class && a.start < b.end + reach && b.start < a.end + reach {
            let (a, b) = (root(&mut self.parents, i), root(&mut self.parents, j));
            self.parents[a.max(b)] = a.min(b);
        }
    }

    fn numbered(self, shape: [usize; 3]) -> Components {
        let Self { runs, rows, parents: mut numbers } = self;
        let (mut sizes, mut classes) = (Vec::new(), Vec::new());
        for (i, run) in runs.iter().enumerate() {
            // A parent stands before its run, so it has its number already.
            numbers[i] = if numbers[i] == i {
                sizes.push(0);
                classes.push(run.class);
                sizes.len() - 1
            } else {
                numbers[numbers[i]]
            };
            sizes[numbers[i]] += (run.end - run.start) as usize;
        }
        Components { shape, runs, rows, numbers, sizes, classes }
    }
}

/// How many of the first voxels are equal; at least 1.
fn alike<T: Copy + PartialEq>(voxels: &[T]) -> usize {
    const STEP: usize = 32;
    let first = voxels[0];
    let mut n = 1;
    // Most runs of noise end at once.
    if voxels.get(1).is_some_and(|v| *v != first) {
        return n;
    }
    while let Some(next) = voxels.get(n..n + STEP) {
        if !next.iter().fold(true, |all, v| all & (*v == first)) {
            break;
        }
        n += STEP;
    }
    n + voxels[n..].iter().take_while(|v| **v == first).count()
}

/// The run that stands for the component of run `i`; halves the way for the next who asks.
fn root(parents: &mut [usize], mut i: usize) -> usize {
    while parents[i] != i {
        parents[i] = parents[parents[i]];
        i = parents[i];
    }
    i
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition: a flood from every voxel that is in no component yet.
    fn flooded(voxels: &[u16], [nz, ny, nx]: [usize; 3], neighbours: Neighbours) -> Vec<u32> {
        let mut out = vec![0; voxels.len()];
        let mut count = 0;
        for start in 0..voxels.len() {
            if voxels[start] == 0 || out[start] != 0 {
                continue;
            }
            count += 1;
            let mut open = vec![start];
            while let Some(i) = open.pop() {
                if out[i] != 0 || voxels[i] != voxels[start] {
                    continue;
                }
                out[i] = count;
                let (z, y, x) = (i / (ny * nx), i / nx % ny, i % nx);
                for step in 0..27 {
                    let by = [step / 9, step / 3 % 3, step % 3];
                    let near = |at: usize, by: usize, n: usize| (at + by).checked_sub(1).filter(|to| *to < n);
                    let faces = by.iter().filter(|b| **b != 1).count() <= 1;
                    if !faces && neighbours == Neighbours::Faces {
                        continue;
                    }
                    if let (Some(z), Some(y), Some(x)) = (near(z, by[0], nz), near(y, by[1], ny), near(x, by[2], nx)) {
                        open.push((z * ny + y) * nx + x);
                    }
                }
            }
        }
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn components_are_those_of_a_flood(
            shape in [1usize..20, 1usize..8, 1usize..12],
            values in proptest::collection::vec(0u16..4, 20 * 8 * 12),
            sparse in 0u16..3,
            corners: bool,
        ) {
            let n = shape.iter().product();
            let voxels: Vec<u16> = values[..n].iter().map(|v| v.saturating_sub(sparse)).collect();
            let neighbours = if corners { Neighbours::Corners } else { Neighbours::Faces };
            let found = Components::new(&voxels, shape, neighbours, |v| v);
            let mut numbers = vec![0; n];
            found.number(&mut numbers);
            let expected = flooded(&voxels, shape, neighbours);
            prop_assert_eq!(&numbers, &expected);
            prop_assert_eq!(found.len(), expected.iter().max().copied().unwrap_or(0) as usize);
            for component in 0..found.len() {
                let voxels_of = expected.iter().filter(|e| **e as usize == component + 1).count();
                prop_assert_eq!(found.size(component), voxels_of);
                let first = expected.iter().position(|e| *e as usize == component + 1).unwrap();
                prop_assert_eq!(found.class(component), voxels[first]);
            }
        }
    }

    #[test]
    fn long_rows_and_values_that_are_no_numbers() {
        let mut row = vec![1.0f32; 200];
        (row[70], row[71], row[150]) = (f32::NAN, f32::NAN, 0.0);
        let found = Components::new(&row, [1, 1, 200], Neighbours::Corners, |v| u16::from(v != 0.0));
        assert_eq!((found.len(), found.size(0), found.size(1)), (2, 150, 49));
        let none = Components::new::<u8>(&[], [0, 3, 4], Neighbours::Faces, u16::from);
        assert_eq!(none.len(), 0);
        none.each_run(|_, _| unreachable!());
    }
}
