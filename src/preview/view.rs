//! Which slices to show and how they lie: from voxel planes to anatomical views.

use crate::base::par;
use crate::io::image::{Geometry, Segmentation};
use std::collections::BTreeMap;

/// An array axis and whether the patient's direction (right, front or top) runs along it or against it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Axis {
    /// 0, 1, 2 for z, y, x of the array.
    pub(super) array: usize,
    /// The index grows towards the patient's right, front or top.
    pub(super) forward: bool,
}

/// For the patient's axes (right, front, top) the array axis closest to each. Every array axis is used once, even for
/// a scan oblique by 45 degrees.
pub(super) fn axes_of_patient(geometry: &Geometry) -> [Axis; 3] {
    const ORDERS: [[usize; 3]; 6] = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
    // cosine[p][i]: direction of the affine's column i (x, y, z) along the patient's axis p.
    let norm = |i: usize| (0..3).map(|p| geometry.affine[p][i].powi(2)).sum::<f64>().sqrt();
    let cosine = |p: usize, i: usize| if norm(i) > 0.0 { geometry.affine[p][i] / norm(i) } else { 0.0 };
    let fit = |order: [usize; 3]| (0..3).map(|p| cosine(p, order[p]).abs()).sum::<f64>();
    let mut best = ORDERS[0];
    for order in ORDERS {
        // A tie keeps the earlier order.
        if fit(order) > fit(best) + 1e-9 {
            best = order;
        }
    }
    [0, 1, 2].map(|p| Axis { array: 2 - best[p], forward: cosine(p, best[p]) >= 0.0 })
}

/// Which plane is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Plane {
    Axial,
    Coronal,
    Sagittal,
}

/// One slice in the radiological convention: the patient's right is on the left of axial and coronal views, the front
/// on the left of sagittal views.
#[derive(Debug, Clone, Copy)]
pub(super) struct View {
    /// The array axis across, and whether the picture's right is its upper end.
    pub(super) across: Axis,
    /// The array axis downwards, and whether the picture's bottom is its upper end.
    pub(super) down: Axis,
    /// The array axis of the slices.
    pub(super) through: Axis,
    /// Name of the plane.
    pub(super) name: &'static str,
    /// Letters at the left, right, top and bottom edge.
    pub(super) letters: [char; 4],
}

impl View {
    pub(super) fn new(plane: Plane, [right, front, top]: [Axis; 3]) -> Self {
        let towards = |a: Axis| Axis { forward: !a.forward, ..a };
        match plane {
            Plane::Axial => Self {
                across: towards(right),
                down: towards(front),
                through: top,
                name: "axial",
                letters: ['R', 'L', 'A', 'P'],
            },
            Plane::Coronal => Self {
                across: towards(right),
                down: towards(top),
                through: front,
                name: "coronal",
                letters: ['R', 'L', 'S', 'I'],
            },
            Plane::Sagittal => Self {
                across: towards(front),
                down: towards(top),
                through: right,
                name: "sagittal",
                letters: ['A', 'P', 'S', 'I'],
            },
        }
    }
}

/// How often each label occurs, in all and per slice of every array axis.
pub(super) struct Census {
    /// Present labels, ascending, background left out, with their voxels.
    pub(super) voxels: BTreeMap<u16, usize>,
    /// Per array axis and slice: label -> voxels.
    slices: [Vec<BTreeMap<u16, usize>>; 3],
}

impl Census {
    pub(super) fn new(seg: &Segmentation) -> Self {
        let [nz, ny, nx] = seg.geometry.shape;
        // Counted plane by plane; rows of equal labels are long, so runs are counted instead of voxels where possible.
        let planes = par::map(nz, |z| {
            let mut whole = BTreeMap::<u16, usize>::new();
            let mut rows = vec![BTreeMap::<u16, usize>::new(); ny];
            let mut columns = vec![BTreeMap::<u16, usize>::new(); nx];
            for (y, row) in rows.iter_mut().enumerate() {
                let start = (z * ny + y) * nx;
                let mut x = 0;
                while x < nx {
                    let label = seg.labels.get(start + x);
                    let first = x;
                    while x < nx && seg.labels.get(start + x) == label {
                        if label != 0 {
                            *columns[x].entry(label).or_default() += 1;
                        }
                        x += 1;
                    }
                    if label != 0 {
                        *row.entry(label).or_default() += x - first;
                    }
                }
                row.iter().for_each(|(&l, &n)| *whole.entry(l).or_default() += n);
            }
            (whole, rows, columns)
        });
        let mut census = Self { voxels: BTreeMap::new(), slices: [nz, ny, nx].map(|n| vec![BTreeMap::new(); n]) };
        let add = |to: &mut BTreeMap<u16, usize>, from: &BTreeMap<u16, usize>| {
            from.iter().for_each(|(&l, &n)| *to.entry(l).or_default() += n);
        };
        for (z, (whole, rows, columns)) in planes.into_iter().enumerate() {
            add(&mut census.voxels, &whole);
            rows.iter().enumerate().for_each(|(y, r)| add(&mut census.slices[1][y], r));
            columns.iter().enumerate().for_each(|(x, c)| add(&mut census.slices[2][x], c));
            census.slices[0][z] = whole;
        }
        census
    }

    /// [`Census::best_slice`] of each array axis.
    pub(super) fn best_slices(&self) -> [usize; 3] {
        [0, 1, 2].map(|axis| self.best_slice(axis))
    }

    /// The slice along `axis` that shows most: each label counts by the share of its largest cross-section, so that
    /// many organs cut through their middle win over one large organ. The middle slice when there is no label.
    pub(super) fn best_slice(&self, axis: usize) -> usize {
        let slices = &self.slices[axis];
        let mut largest = BTreeMap::<u16, usize>::new();
        for (&label, &n) in slices.iter().flatten() {
            let most = largest.entry(label).or_default();
            *most = n.max(*most);
        }
        let score = |slice: &BTreeMap<u16, usize>| -> f64 {
            slice.iter().map(|(label, &n)| (n as f64 / largest[label] as f64).sqrt()).sum()
        };
        let mut best = (slices.len() / 2, 0.0);
        for (i, slice) in slices.iter().enumerate() {
            let s = score(slice);
            if s > best.1 {
                best = (i, s);
            }
        }
        best.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::image::LabelData;

    fn geometry(shape: [usize; 3], columns: [[f64; 3]; 3]) -> Geometry {
        let mut g = Geometry::new(shape, [1.0; 3]);
        for (i, column) in columns.iter().enumerate() {
            for (p, v) in column.iter().enumerate() {
                g.affine[p][i] = *v;
            }
        }
        g
    }

    #[test]
    fn axes_follow_the_affine() {
        let ras = axes_of_patient(&Geometry::new([3, 4, 5], [1.0; 3]));
        assert_eq!(ras.map(|a| (a.array, a.forward)), [(2, true), (1, true), (0, true)]);
        // x to the left, y to the feet, z to the front, all a little oblique.
        let g = geometry([3, 4, 5], [[-0.9, 0.1, 0.1], [0.1, 0.2, -2.0], [0.2, 3.0, 0.3]]);
        assert_eq!(axes_of_patient(&g).map(|a| (a.array, a.forward)), [(2, false), (0, true), (1, false)]);
        // Nothing to go by: any order, but every axis once.
        let none = axes_of_patient(&geometry([3, 4, 5], [[0.0; 3]; 3])).map(|a| a.array);
        assert_eq!(none, [2, 1, 0]);
    }

    #[test]
    fn the_best_slice_cuts_most_organs_in_their_middle() {
        let g = Geometry::new([9, 4, 4], [1.0; 3]);
        let mut labels = vec![0u8; g.len()];
        let mut put = |z: usize, y: usize, n: usize, label: u8| labels[(z * 4 + y) * 4..][..n].fill(label);
        put(2, 0, 4, 1);
        put(2, 1, 4, 1);
        put(6, 0, 3, 1);
        put(6, 2, 2, 7);
        put(7, 2, 1, 7);
        let census = Census::new(&Segmentation::new(LabelData::U8(labels), g, vec![]).unwrap());
        assert_eq!(census.best_slice(0), 6);
        assert_eq!(census.voxels.into_iter().collect::<Vec<_>>(), [(1, 11), (7, 3)]);
        let empty = Geometry::new([9, 4, 4], [1.0; 3]);
        let seg = Segmentation::new(LabelData::zeros(144, 1), empty, vec![]).unwrap();
        assert_eq!(Census::new(&seg).best_slice(0), 4);
    }
}
