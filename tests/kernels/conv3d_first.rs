//! The first convolution, of few channels given as planes.

use stunet::backend_testing::cuda::Storage;
use stunet::backend_testing::cuda::conv3d::first;

use super::conv3d::{Case, check_values, reference};
use super::sim::Sim;
use super::{Input, SEEDS, cards, random, room, rounded, unpadded, voxels};

/// On every card that knows the storage.
fn check(
    batch: usize,
    channels: usize,
    space: [usize; 3],
    filters: usize,
    kernel: [usize; 3],
    stride: [usize; 3],
    storage: Storage,
    wide: bool,
) {
    for card in cards(storage) {
        check_on(*card, batch, channels, space, filters, kernel, stride, storage, wide);
    }
}

fn check_on(
    card: [u32; 2],
    batch: usize,
    channels: usize,
    space: [usize; 3],
    filters: usize,
    kernel: [usize; 3],
    stride: [usize; 3],
    storage: Storage,
    wide: bool,
) {
    let case = Case {
        storage,
        batch,
        sources: vec![(channels, [1; 3], false)],
        filters,
        kernel,
        stride,
        bias: true,
        ..Case::new(space, channels, filters)
    };
    let n: usize = space.iter().product();
    let planes = random(batch * channels * n, 3);
    let planes = if wide { planes } else { rounded(&planes, storage) };
    // What the matrix units get: values in storage, in the order of the reference.
    let stored = rounded(&planes, storage);
    let values = (0..batch)
        .flat_map(|b| voxels(space).enumerate().map(move |(v, _)| (b, v)))
        .flat_map(|(b, v)| (0..channels).map(move |c| (b * channels + c) * n + v))
        .map(|at| stored[at])
        .collect();
    let (weight, bias) = (case.weight(), case.bias());
    let dims = [filters, channels, kernel[0], kernel[1], kernel[2]];
    let packed = first::pack_weight(&weight, dims, storage).unwrap();
    let tiles = first::tiles(case.out());
    let results: usize = case.out().iter().product();
    let padded = filters.next_multiple_of(16);
    let run = |seed: u64| {
        // So small a card that its blocks compute several tiles.
        let sim = Sim::of(seed, card).with_multiprocessors(1);
        let p = first::Problem {
            storage,
            batch,
            channels,
            planes: sim.with(&if wide { Storage::F32 } else { storage }.store(&planes)),
            wide,
            space,
            weight: sim.with(&packed),
            bias: Some(sim.with(bytemuck::cast_slice(&bias))),
            filters,
            kernel,
            stride,
            out: room(&sim, batch * results * padded, storage),
            partials: Some(room(&sim, batch * tiles * 3 * padded, Storage::F32)),
        };
        first::run(&sim, &p).unwrap();
        (sim.bytes(p.out), sim.bytes(p.partials.unwrap()))
    };
    let (out, moments) = run(SEEDS[0]);
    let input = Input { values, source: super::absent() };
    let expected = reference(&case, &[input], &weight, &bias);
    let terms = dims[1..].iter().product();
    check_values(&format!("{case:?}"), &case, &out, &moments, &expected, terms, tiles);
    assert!(!unpadded(&storage.load(&out), filters).is_empty());
    for seed in &SEEDS[1..] {
        assert!(run(*seed) == (out.clone(), moments.clone()), "bytes depend on the schedule");
    }
}

#[test]
pub(super) fn ptx_conv3d_first() {
    check(2, 1, [5, 9, 10], 16, [3; 3], [1; 3], Storage::Bf16, true);
    check(1, 1, [6, 7, 17], 32, [3; 3], [1; 3], Storage::F16, false);
    check(1, 3, [4, 8, 8], 48, [1, 3, 3], [1; 3], Storage::Bf16, false);
    check(1, 8, [3, 5, 6], 20, [3; 3], [1; 3], Storage::F16, true);
    check(1, 2, [2, 3, 2], 80, [3, 1, 1], [1; 3], Storage::Bf16, true);
    check(1, 4, [5, 5, 5], 16, [3; 3], [1; 3], Storage::F16, false);
    check(1, 1, [4, 4, 9], 16, [3; 3], [1; 3], Storage::F16, true);
    check(2, 2, [4, 4, 9], 16, [1, 3, 3], [1; 3], Storage::Bf16, false);
}

#[test]
pub(super) fn ptx_conv3d_first_over_many_tiles() {
    // Tiles along every axis and in several samples, shared unevenly.
    check(2, 1, [9, 17, 20], 32, [3; 3], [1; 3], Storage::Bf16, true);
    check(3, 2, [5, 9, 19], 80, [3; 3], [1; 3], Storage::F16, true);
}

#[test]
pub(super) fn ptx_conv3d_first_strides() {
    check(2, 1, [9, 17, 20], 16, [3; 3], [2; 3], Storage::Bf16, true);
    check(1, 8, [7, 18, 19], 40, [3; 3], [2; 3], Storage::F16, true);
    check(1, 4, [6, 9, 18], 32, [1, 3, 3], [1, 2, 2], Storage::Bf16, false);
    check(1, 3, [8, 5, 11], 20, [3, 1, 3], [2, 2, 1], Storage::F16, false);
    check(1, 1, [1, 2, 17], 32, [3; 3], [1, 1, 2], Storage::Bf16, true);
}

/// What the interpreter counts: results fill their sectors, filters and sums lie in banks of their own.
#[test]
pub(super) fn ptx_conv3d_first_wastes_no_sector() {
    for filters in [16, 32] {
        let (sim, space) = (Sim::new(0).with_multiprocessors(1), [8, 16, 16]);
        let [n, tiles] = [space.iter().product::<usize>(), first::tiles(space)];
        let weight = first::pack_weight(&random(filters * 27, 1), [filters, 1, 3, 3, 3], Storage::Bf16).unwrap();
        let p = first::Problem {
            storage: Storage::Bf16,
            batch: 1,
            channels: 1,
            planes: sim.with(&Storage::F32.store(&random(n, 2))),
            wide: true,
            space,
            weight: sim.with(&weight),
            bias: None,
            filters,
            kernel: [3; 3],
            stride: [1; 3],
            out: room(&sim, n * filters, Storage::Bf16),
            partials: Some(room(&sim, tiles * 3 * filters, Storage::F32)),
        };
        first::run(&sim, &p).unwrap();
        let [entry] = &sim.entries()[..] else { panic!("{:?}", sim.entries()) };
        for (what, banks) in [("ldmatrix", true), ("cp.async", false), ("st.global", false)] {
            let t = sim.traffic(entry, what);
            let (used, ideal) = if banks { (t.wavefronts, t.ideal_wavefronts) } else { (t.sectors, t.ideal_sectors) };
            assert!(t.requests > 0 && used <= ideal, "{entry}: {what}: {used} for {ideal}");
        }
    }
}
