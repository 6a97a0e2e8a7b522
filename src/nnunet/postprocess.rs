//! What nnU-Net does to a finished label map.

mod determine;
pub mod steps;

use crate::io::{LabelData, Segmentation};
use crate::nnunet::volume::{Components, Neighbours};
pub use determine::{Determined, apply_to_folder, determine};
pub use steps::Step;

/// Keeps the largest connected component of each label of `wanted` (all of them where several are equally large) and
/// turns the rest of that label into background. Voxels touch by faces, as in nnU-Net v1
/// `remove_all_but_the_largest_connected_component`. `shape` is (z, y, x).
pub(crate) fn keep_largest_components(labels: &mut LabelData, shape: [usize; 3], wanted: &[u16]) {
    keep_largest(labels, shape, wanted.iter().map(|&l| (l, l)), Neighbours::Faces);
}

/// Takes the steps one after the other (nnU-Net `apply_postprocessing`).
pub fn apply(steps: &[Step], segmentation: &mut Segmentation) {
    for step in steps {
        let together = step.labels().iter().map(|l| (*l, 1));
        keep_largest(&mut segmentation.labels, segmentation.geometry.shape, together, Neighbours::Corners);
    }
}

/// Keeps the largest connected component of each class (all of them where several are equally large) and turns the rest of it
/// into background. `classes` are labels with the class that each belongs to; other labels, and those of class 0, are left
/// alone.
fn keep_largest(
    labels: &mut LabelData,
    shape: [usize; 3],
    classes: impl IntoIterator<Item = (u16, u16)>,
    neighbours: Neighbours,
) {
    let mut table = vec![0; usize::from(u16::MAX) + 1];
    classes.into_iter().for_each(|(label, class)| table[usize::from(label)] = class);
    if table.iter().all(|class| *class == 0) {
        return;
    }
    match labels {
        LabelData::U8(v) => keep(v, shape, &table, neighbours),
        LabelData::U16(v) => keep(v, shape, &table, neighbours),
    }
}

fn keep<T: Copy + Default + PartialEq + Into<u16> + Sync>(
    labels: &mut [T],
    shape: [usize; 3],
    classes: &[u16],
    neighbours: Neighbours,
) {
    let found = Components::new(labels, shape, neighbours, |label| classes[usize::from(label.into())]);
    let mut largest = vec![0; classes.len()];
    for component in 0..found.len() {
        let most = &mut largest[usize::from(found.class(component))];
        *most = found.size(component).max(*most);
    }
    found.each_run(|component, voxels| {
        if found.size(component) < largest[usize::from(found.class(component))] {
            labels[voxels].fill(T::default());
        }
    });
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
