//! What nnU-Net does to a finished label map.

use crate::io::LabelData;

/// Keeps the largest connected component of `label` (all of them where several are equally large) and turns the rest
/// into background. Voxels touch by faces, as in nnU-Net v1 `remove_all_but_the_largest_connected_component`.
pub(crate) fn keep_largest_component(labels: &mut LabelData, shape: [usize; 3], label: u16) {
    match labels {
        LabelData::U8(v) => u8::try_from(label).map_or((), |l| keep(v, shape, l)),
        LabelData::U16(v) => keep(v, shape, label),
    }
}

fn keep<T: Copy + PartialEq + Default>(labels: &mut [T], shape: [usize; 3], label: T) {
    let [_, ny, nx] = shape;
    let mut seen = vec![false; labels.len()];
    let mut components: Vec<Vec<usize>> = Vec::new();
    for start in 0..labels.len() {
        if seen[start] || labels[start] != label {
            continue;
        }
        seen[start] = true;
        let mut component = vec![start];
        let mut next = 0;
        while let Some(&i) = component.get(next) {
            next += 1;
            let at = [i / (ny * nx), i / nx % ny, i % nx];
            for (axis, step) in [ny * nx, nx, 1].into_iter().enumerate() {
                let before = (at[axis] > 0).then(|| i - step);
                let after = (at[axis] + 1 < shape[axis]).then_some(i + step);
                for j in [before, after].into_iter().flatten() {
                    if !seen[j] && labels[j] == label {
                        seen[j] = true;
                        component.push(j);
                    }
                }
            }
        }
        components.push(component);
    }
    let largest = components.iter().map(Vec::len).max().unwrap_or(0);
    for i in components.into_iter().filter(|c| c.len() < largest).flatten() {
        labels[i] = T::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_largest_pieces_stay() {
        // Three pieces in a row of 3 x 3 planes: diagonal neighbours do not touch.
        let mut labels = LabelData::U8(vec![1, 1, 0, 0, 0, 1, 2, 0, 1, 1, 0, 0]);
        keep_largest_component(&mut labels, [1, 4, 3], 1);
        assert_eq!(labels, LabelData::U8(vec![1, 1, 0, 0, 0, 1, 2, 0, 1, 0, 0, 0]));
        keep_largest_component(&mut labels, [1, 4, 3], 300);
        assert_eq!(labels.get(6), 2);
    }
}
