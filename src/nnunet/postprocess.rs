//! What nnU-Net does to a finished label map.

use std::ops::Range;

use crate::io::LabelData;

/// Keeps the largest connected component of each label of `wanted` (all of them where several are equally large) and
/// turns the rest of that label into background. Voxels touch by faces, as in nnU-Net v1
/// `remove_all_but_the_largest_connected_component`. `shape` is (z, y, x).
///
/// One pass for all labels, on runs along x joined by union-find: memory follows the surface, not the volume.
pub(crate) fn keep_largest_components(labels: &mut LabelData, shape: [usize; 3], wanted: &[u16]) {
    let mut table = vec![false; usize::from(u16::MAX) + 1];
    wanted.iter().for_each(|&l| table[usize::from(l)] = l != 0);
    if !table.contains(&true) {
        return;
    }
    match labels {
        LabelData::U8(v) => keep(v, shape, &table),
        LabelData::U16(v) => keep(v, shape, &table),
    }
}

/// Voxels `start..end` of one row, all of one label.
struct Run {
    start: usize,
    end: usize,
    label: u16,
}

fn keep<T: Copy + Default + PartialEq + Into<u16>>(labels: &mut [T], [nz, ny, nx]: [usize; 3], wanted: &[bool]) {
    let mut runs: Vec<Run> = Vec::new();
    // Parent of each run; a root is its own.
    let mut parents: Vec<usize> = Vec::new();
    // First run of each row.
    let mut rows = Vec::with_capacity(nz * ny + 1);
    for row in 0..nz * ny {
        rows.push(runs.len());
        let mut at = row * nx;
        for piece in labels[at..at + nx].chunk_by(|a, b| a == b) {
            let label = piece[0].into();
            if wanted[usize::from(label)] {
                parents.push(runs.len());
                runs.push(Run { start: at, end: at + piece.len(), label });
            }
            at += piece.len();
        }
        let here = rows[row]..runs.len();
        for back in [(row % ny > 0).then_some(1), (row >= ny).then_some(ny)].into_iter().flatten() {
            let there = rows[row - back]..rows[row - back + 1];
            join(&runs, &mut parents, here.clone(), there, back * nx);
        }
    }
    let mut sizes = vec![0usize; runs.len()];
    let mut largest = vec![0usize; wanted.len()];
    for (i, run) in runs.iter().enumerate() {
        let root = root(&mut parents, i);
        sizes[root] += run.end - run.start;
        let most = &mut largest[usize::from(run.label)];
        *most = (*most).max(sizes[root]);
    }
    for (i, run) in runs.iter().enumerate() {
        if sizes[root(&mut parents, i)] < largest[usize::from(run.label)] {
            labels[run.start..run.end].fill(T::default());
        }
    }
}

/// Joins the runs `here` with those of a row `back` voxels before that touch them and have their label.
fn join(runs: &[Run], parents: &mut [usize], here: Range<usize>, there: Range<usize>, back: usize) {
    let (mut i, mut j) = (here.start, there.start);
    while i < here.end && j < there.end {
        let (a, b) = (&runs[i], &runs[j]);
        if a.label == b.label && a.start < b.end + back && b.start + back < a.end {
            let (a, b) = (root(parents, i), root(parents, j));
            parents[a.max(b)] = a.min(b);
        }
        // The one that ends first touches nothing further.
        if a.end <= b.end + back { i += 1 } else { j += 1 }
    }
}

/// The run that stands for the component of run `i`; halves the way for the next who asks.
pub(super) fn root(parents: &mut [usize], mut i: usize) -> usize {
    while parents[i] != i {
        parents[i] = parents[parents[i]];
        i = parents[i];
    }
    i
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::rng::Rng;

    #[test]
    fn only_the_largest_pieces_stay() {
        // Diagonal neighbours do not touch.
        let mut labels = LabelData::U8(vec![1, 1, 0, 0, 0, 1, 2, 0, 1, 1, 0, 0]);
        keep_largest_components(&mut labels, [1, 4, 3], &[1]);
        assert_eq!(labels, LabelData::U8(vec![1, 1, 0, 0, 0, 1, 2, 0, 1, 0, 0, 0]));
        keep_largest_components(&mut labels, [1, 4, 3], &[300, 0]);
        assert_eq!(labels.get(6), 2);
    }

    /// The definition: a flood from every voxel of the label.
    fn flooded(labels: &[u16], [nz, ny, nx]: [usize; 3], label: u16) -> Vec<u16> {
        let mut seen = vec![false; labels.len()];
        let mut components: Vec<Vec<usize>> = Vec::new();
        for start in 0..labels.len() {
            let (mut stack, mut component) = (vec![start], Vec::new());
            while let Some(i) = stack.pop() {
                if labels[i] != label || std::mem::replace(&mut seen[i], true) {
                    continue;
                }
                component.push(i);
                let (z, y, x) = (i / (ny * nx), i / nx % ny, i % nx);
                for (at, n, step) in [(z, nz, ny * nx), (y, ny, nx), (x, nx, 1)] {
                    stack.extend((at > 0).then(|| i - step));
                    stack.extend((at + 1 < n).then_some(i + step));
                }
            }
            components.push(component);
        }
        let most = components.iter().map(Vec::len).max().unwrap_or(0);
        let mut out = labels.to_vec();
        components.iter().filter(|c| c.len() < most).flatten().for_each(|&i| out[i] = 0);
        out
    }

    #[test]
    fn components_are_those_of_a_flood() {
        let mut rng = Rng::new(11, 0);
        for round in 0..80 {
            let shape: [usize; 3] = std::array::from_fn(|_| rng.uniform(1.0, 9.0) as usize);
            let density = 0.3 + 0.6 * f64::from(round) / 80.0;
            let draw = |rng: &mut Rng| if rng.unit() < density { rng.uniform(1.0, 4.0) as u16 } else { 0 };
            let labels: Vec<u16> = (0..shape.iter().product()).map(|_| draw(&mut rng)).collect();
            let expected = [1, 3].into_iter().fold(labels.clone(), |l, label| flooded(&l, shape, label));
            let mut found = LabelData::U16(labels);
            keep_largest_components(&mut found, shape, &[3, 1, 7]);
            assert_eq!(found, LabelData::U16(expected), "{shape:?}");
        }
    }
}
