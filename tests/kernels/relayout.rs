//! Planes to voxels and back, and windows of an image: copies, exact but for the rounding to storage.

use stunet::backend_testing::cuda::{Storage, padded, relayout};

use super::sim::Sim;
use super::{cards, random, room, rounded, voxels};

#[test]
pub(super) fn ptx_relayout_there_and_back() {
    let storages = [Storage::F32, Storage::Bf16, Storage::F16];
    for (storage, card) in storages.into_iter().flat_map(|s| cards(s).iter().map(move |c| (s, *c))) {
        for (batch, channels, space, flip) in [
            (2, 3, [3, 5, 7], [false, true, false]),
            (1, 32, [2, 9, 16], [true, false, true]),
            (2, 17, [1, 1, 5], [false; 3]),
        ] {
            let sim = Sim::of(1, card);
            let n: usize = space.iter().product();
            let values = random(batch * channels * n, 4);
            let mut p = relayout::Problem {
                storage,
                batch,
                channels,
                space,
                planes: sim.with(bytemuck::cast_slice(&values)),
                values: room(&sim, batch * n * padded(channels), storage),
                flip,
            };
            relayout::to_voxels(&sim, &p).unwrap();
            let (got, expected) = (storage.load(&sim.bytes(p.values)), rounded(&values, storage));
            for (v, place) in voxels(space).enumerate() {
                let from = mirrored(place, space, flip);
                for b in 0..batch {
                    let to = &got[(b * n + v) * padded(channels)..][..padded(channels)];
                    for (c, v) in to.iter().enumerate() {
                        let e = if c < channels { expected[(b * channels + c) * n + from] } else { 0.0 };
                        assert_eq!(*v, e, "{storage:?} {place:?} channel {c}");
                    }
                }
            }
            // Mirrored twice is as before.
            p.planes = room(&sim, batch * channels * n, Storage::F32);
            relayout::from_voxels(&sim, &p).unwrap();
            assert!(Storage::F32.load(&sim.bytes(p.planes)) == expected, "{storage:?}");
        }
    }
}

/// The place of a mirrored voxel in a plane.
fn mirrored((z, y, x): (usize, usize, usize), [d, h, w]: [usize; 3], flip: [bool; 3]) -> usize {
    let at = |i: usize, size: usize, flip: bool| if flip { size - 1 - i } else { i };
    (at(z, d, flip[0]) * h + at(y, h, flip[1])) * w + at(x, w, flip[2])
}

#[test]
pub(super) fn ptx_relayout_takes_a_window() {
    let (channels, image_space, space) = (2, [5, 6, 7], [4, 8, 5]);
    let image = random(channels * 210, 5);
    for (start, flip, card) in [([1, -1, 2], [false; 3], [8, 6]), ([-2, 0, 4], [true, true, false], [7, 5])] {
        let sim = Sim::of(2, card);
        let window = room(&sim, channels * 160, Storage::F32);
        let image_memory = sim.with(bytemuck::cast_slice(&image));
        let p = relayout::Window { channels, image: image_memory, image_space, window, space, start, flip };
        relayout::window(&sim, &p).unwrap();
        let got = Storage::F32.load(&sim.bytes(window));
        for c in 0..channels {
            for (v, place) in voxels(space).enumerate() {
                let m = mirrored(place, space, flip);
                let place = [m / (space[1] * space[2]), m / space[2] % space[1], m % space[2]];
                let at = [0, 1, 2].map(|a| start[a] + place[a] as i32);
                let inside = (0..3).all(|a| (0..image_space[a] as i32).contains(&at[a]));
                let [z, y, x] = at.map(|a| a.max(0) as usize);
                let e = if inside { image[((c * 5 + z) * 6 + y) * 7 + x] } else { 0.0 };
                assert_eq!(got[c * 160 + v], e, "{start:?} {flip:?} voxel {v}");
            }
        }
    }
}
