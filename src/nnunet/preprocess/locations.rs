//! Where the voxels of each class are (nnU-Net `DefaultPreprocessor._sample_foreground_locations`).

use std::collections::BTreeMap;

use crate::base::mt19937::RandomState;
use crate::base::par;
use crate::nnunet::training_case::{ClassKey, ClassLocations};

const SEED: u32 = 1234;

/// Voxels kept of every class, if it has as many.
const AT_LEAST: usize = 10_000;

/// The same choice of voxels that nnU-Net makes: of every class 10000 or 1 %, whichever is more, without repetition.
///
/// `labels` is (z, y, x) with `shape` voxels. Voxels of a class are numbered label by label in the order in which the
/// class names its labels, and within a label as they lie in memory.
#[must_use]
pub fn class_locations(labels: &[i16], shape: [usize; 3], classes: &[ClassKey]) -> ClassLocations {
    let plane = (shape[1] * shape[2]).max(1);
    let counts: Vec<BTreeMap<i16, usize>> = par::map(labels.len() / plane, |z| count(&labels[z * plane..][..plane]));
    let total = |label: i16| counts.iter().filter_map(|c| c.get(&label)).sum::<usize>();
    let mut rng = RandomState::new(SEED);
    let classes = classes.iter().map(|class| {
        let parts: Vec<(i16, usize)> = match class {
            ClassKey::Label(label) => vec![(*label, total(*label))],
            ClassKey::Region(labels) => labels.iter().map(|&l| (l, total(l))).collect(),
        };
        let n: usize = parts.iter().map(|(_, n)| n).sum();
        let kept = AT_LEAST.min(n).max((n as f64 * 0.01).ceil() as usize);
        let mut found = vec![[0; 3]; kept];
        if n > 0 {
            let chosen = rng.choice(n, kept);
            let mut begin = 0;
            for (label, size) in parts {
                // (number within the label, place in the result)
                let mut of_label: Vec<(usize, usize)> = chosen
                    .iter()
                    .enumerate()
                    .filter(|(_, c)| (begin..begin + size).contains(c))
                    .map(|(place, c)| (c - begin, place))
                    .collect();
                of_label.sort_unstable();
                locate(labels, shape, label, &counts, &of_label, &mut found);
                begin += size;
            }
        }
        (class.clone(), found)
    });
    ClassLocations { classes: classes.collect() }
}

/// Voxels of each label.
fn count(plane: &[i16]) -> BTreeMap<i16, usize> {
    let mut counts = BTreeMap::new();
    let mut rest = plane;
    // Labels come in runs.
    while let Some(&label) = rest.first() {
        let run = rest.iter().position(|&l| l != label).unwrap_or(rest.len());
        *counts.entry(label).or_insert(0) += run;
        rest = &rest[run..];
    }
    counts
}

/// Writes the voxels of `label` whose numbers are `wanted`, which rise.
fn locate(
    labels: &[i16],
    [_, ny, nx]: [usize; 3],
    label: i16,
    counts: &[BTreeMap<i16, usize>],
    wanted: &[(usize, usize)],
    found: &mut [[u32; 3]],
) {
    // Cut by plane.
    let mut parts = Vec::new();
    let (mut before, mut rest) = (0, wanted);
    for (z, counts) in counts.iter().enumerate() {
        let here = counts.get(&label).copied().unwrap_or(0);
        let (part, after) = rest.split_at(rest.partition_point(|(n, _)| *n < before + here));
        if !part.is_empty() {
            parts.push((z, before, part));
        }
        (before, rest) = (before + here, after);
    }
    let placed = par::map(parts.len(), |i| {
        let (z, before, part) = parts[i];
        let plane = &labels[z * ny * nx..][..ny * nx];
        let mut voxels = plane.iter().enumerate().filter(|(_, l)| **l == label).map(|(at, _)| at);
        let mut next = before;
        part.iter()
            .filter_map(|&(n, place)| {
                let at = voxels.nth(n - next)?;
                next = n + 1;
                Some((place, [z, at / nx, at % nx].map(|v| v as u32)))
            })
            .collect::<Vec<_>>()
    });
    for (place, voxel) in placed.into_iter().flatten() {
        found[place] = voxel;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::rng::Rng;

    /// nnU-Net's own way: every voxel of a class in one list.
    fn listed(labels: &[i16], [_, ny, nx]: [usize; 3], classes: &[ClassKey]) -> ClassLocations {
        let mut rng = RandomState::new(SEED);
        let of = |label: i16| (0..labels.len()).filter(move |&i| labels[i] == label);
        let classes = classes.iter().map(|class| {
            let all: Vec<usize> = match class {
                ClassKey::Label(label) => of(*label).collect(),
                ClassKey::Region(labels) => labels.iter().flat_map(|&l| of(l)).collect(),
            };
            let kept = all.len().min(10_000).max(all.len().div_ceil(100));
            let chosen = if all.is_empty() { Vec::new() } else { rng.choice(all.len(), kept) };
            let voxel = |c: usize| [all[c] / (ny * nx), all[c] / nx % ny, all[c] % nx].map(|v| v as u32);
            (class.clone(), chosen.into_iter().map(voxel).collect())
        });
        ClassLocations { classes: classes.collect() }
    }

    #[test]
    fn locations_are_those_of_the_whole_list() {
        let mut rng = Rng::new(3, 0);
        let classes = [
            ClassKey::Label(1),
            ClassKey::Label(7),
            ClassKey::Region(vec![3, 1]),
            ClassKey::Region(vec![7, 9]),
            ClassKey::Region(vec![-1, 0, 1, 2, 3]),
        ];
        for shape in [[5, 6, 7], [40, 50, 30], [1, 3, 1]] {
            let labels: Vec<i16> = (0..shape.iter().product()).map(|_| rng.uniform(-1.0, 5.0) as i16).collect();
            let ours = class_locations(&labels, shape, &classes);
            assert_eq!(ours, listed(&labels, shape, &classes));
            assert_eq!(ours.classes.len(), classes.len());
        }
        let empty = class_locations(&[0; 8], [2; 3], &classes);
        assert_eq!(empty.classes[0].1, [[0u32; 3]; 0]);
        assert_eq!(empty.classes[4].1.len(), 8);
    }
}
