//! Windows added to the sums of an image.

use stunet::backend_testing::cuda::{Storage, aggregate};

use super::sim::Sim;
use super::{cards, random, voxels};

/// Two overlapping windows, the second mirrored, into a ring of planes: to the bit what f32 gives in that order.
#[test]
pub(super) fn ptx_aggregate_adds_windows_in_order() {
    let cases = [(Storage::Bf16, true), (Storage::F16, false), (Storage::F32, true)].into_iter();
    for (storage, norm, card) in cases.flat_map(|(s, norm)| cards(s).iter().map(move |c| (s, norm, *c))) {
        let (space, ring, all, first, channels) = ([3, 4, 5], [4, 6, 7], 48, 16, 20);
        let sim = Sim::of(3, card);
        let importance: Vec<f32> = random(60, 1).iter().map(|v| v.abs()).collect();
        let planes: usize = ring.iter().product();
        let mut sums = vec![0.5f32; planes * all];
        let mut weights = vec![0.25f32; planes];
        let (sum, weight) = (sim.with(bytemuck::cast_slice(&sums)), sim.with(bytemuck::cast_slice(&weights)));
        let windows = [([2usize, 0, 1], [false; 3]), ([3, 2, 2], [true, false, true])];
        for (i, (start, flip)) in windows.into_iter().enumerate() {
            let x = super::input_in(&sim, storage, Storage::F32, 1, space, channels, [1; 3], norm, 70 + i as u64);
            let p = aggregate::Problem {
                storage,
                features: x.source,
                importance: Some(sim.with(bytemuck::cast_slice(&importance))),
                sum,
                weight: (i == 1).then_some(weight),
                ring,
                channels: [all, first],
                start,
                flip,
                scale: 0.125,
            };
            aggregate::run(&sim, &p).unwrap();
            for (v, (z, y, k)) in voxels(space).enumerate() {
                let to = ((start[0] + z) % ring[0] * ring[1] + start[1] + y) * ring[2] + start[2] + k;
                let mirrored = |a: usize, i: usize| if flip[a] { space[a] - 1 - i } else { i };
                let from = (mirrored(0, z) * space[1] + mirrored(1, y)) * space[2] + mirrored(2, k);
                let g = importance[v] * 0.125;
                for c in 0..channels {
                    sums[to * all + first + c] += g * x.values[from * channels + c];
                }
                if i == 1 {
                    weights[to] += importance[v];
                }
            }
        }
        assert!(Storage::F32.load(&sim.bytes(sum)) == sums, "{storage:?}");
        assert!(Storage::F32.load(&sim.bytes(weight)) == weights, "{storage:?}");
    }
}
