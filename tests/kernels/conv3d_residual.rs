//! The end of a residual block whose shortcut is a convolution.

use stunet::backend_testing::cuda::conv3d::{self, first, residual};
use stunet::backend_testing::cuda::{Norm, Source, Storage, padded};

use super::conv3d::{Case, reference};
use super::sim::Sim;
use super::{Input, SEEDS, absent, activation, cards, half_ulp, norm_planes, normalised, random, room, rounded};
use super::{unpadded, voxels};
use crate::common::bound::{self, Bounded, gamma};

const SLOPE: f32 = 0.01;

/// On every card that knows the storage; `planes` for an input as it arrives.
fn check(case: &Case, planes: bool) {
    for card in cards(case.storage) {
        check_on(&Case { card: *card, ..case.clone() }, planes);
    }
}

/// What the block begins with, as the device is given it and as the reference reads it.
struct Begin {
    inputs: Vec<Input>,
    planes: Option<residual::Input<'static>>,
}

impl Begin {
    fn new(c: &Case, sim: &Sim, planes: bool) -> Begin {
        if !planes {
            return Begin { inputs: c.inputs(sim), planes: None };
        }
        let (channels, n) = (c.sources[0].0, c.space.iter().product::<usize>());
        let values = random(c.batch * channels * n, 3);
        let data = sim.with(bytemuck::cast_slice(&values));
        let stored = rounded(&values, c.storage);
        let of = |(b, v): (usize, usize)| (0..channels).map(move |k| (b * channels + k) * n + v);
        let places = (0..c.batch).flat_map(|b| voxels(c.space).enumerate().map(move |(v, _)| (b, v)));
        let values = places.flat_map(of).map(|at| stored[at]).collect();
        let planes = Some(residual::Input::Planes { data, channels, space: c.space });
        Begin { inputs: vec![Input { values, source: absent() }], planes }
    }
}

fn check_on(c: &Case, planes: bool) {
    let channels: Vec<usize> = c.sources.iter().map(|s| s.0).collect();
    let (weight, bias, out) = (c.weight(), c.bias(), c.out());
    let packed =
        conv3d::pack_weight(&weight, [c.filters, channels.iter().sum(), 1, 1, 1], &channels, c.storage).unwrap();
    let n = c.batch * out.iter().product::<usize>();
    let y = activation(c.batch, out, c.filters, c.storage, 80);
    let norm = norm_planes(c.batch, c.filters, 81);
    let run = |seed: u64, in_place: bool| {
        // So small a card that its blocks walk over several tiles.
        let sim = Sim::of(seed, c.card).with_multiprocessors(1);
        let begin = Begin::new(c, &sim, planes);
        let sources: Vec<Source> = begin.inputs.iter().map(|i| i.source).collect();
        let to = sim.with(&c.storage.store(&y));
        let norm = Some(Norm { planes: sim.with(bytemuck::cast_slice(&norm)), slope: SLOPE });
        let p = residual::Problem {
            storage: c.storage,
            batch: c.batch,
            input: begin.planes.unwrap_or(residual::Input::Voxels(&sources)),
            weight: sim.with(&packed),
            bias: c.bias.then(|| sim.with(bytemuck::cast_slice(&bias))),
            stride: c.stride,
            y: Source { norm, ..Source::plain(to, c.filters, out) },
            out: if in_place { to } else { room(&sim, n * padded(c.filters), c.storage) },
        };
        residual::run(&sim, &p).unwrap_or_else(|e| panic!("{c:?}: {e}"));
        (begin.inputs, sim.bytes(p.out))
    };
    let (inputs, got) = run(SEEDS[0], false);
    let terms = channels.iter().sum::<usize>();
    let shortcut = reference(c, &inputs, &weight, &bias);
    let added = unpadded(&normalised(&y, &norm, n / c.batch, c.filters, 1.0), c.filters);
    let expected: Vec<Bounded> = shortcut
        .iter()
        .zip(&added)
        .map(|((value, magnitude), y)| {
            let sum = value + f64::from(*y);
            let value = if sum > 0.0 { sum } else { sum * f64::from(SLOPE) };
            // The products, the bias, what is added to them, and the slope.
            let error = gamma(terms + 3) * (magnitude + f64::from(y.abs()));
            Bounded { value, error: error + half_ulp(value.abs() + error, c.storage) }
        })
        .collect();
    let what = format!("{c:?} of planes: {planes}");
    bound::check(&what, &unpadded(&c.storage.load(&got), c.filters), &expected);
    for seed in SEEDS {
        assert!(run(seed, true).1 == got, "{what}: bytes depend on the schedule or the place");
    }
}

#[test]
pub(super) fn ptx_conv3d_residual() {
    let c = Case { kernel: [1; 3], batch: 2, bias: true, ..Case::new([6, 4, 10], 0, 32) };
    // A decoder's: a repeated tensor and a skip; an encoder's at its strides; ragged sizes; tiles of several samples.
    check(&Case { sources: vec![(32, [2; 3], false), (32, [1; 3], false)], ..c.clone() }, false);
    check(&Case { sources: vec![(28, [1, 2, 2], false), (28, [1; 3], true)], filters: 28, ..c.clone() }, false);
    let halves = Case { storage: Storage::F16, ..c.clone() };
    check(&Case { sources: vec![(100, [1; 3], true)], stride: [2; 3], filters: 80, ..halves.clone() }, false);
    check(&Case { sources: vec![(16, [1; 3], false)], stride: [1, 2, 2], filters: 16, bias: false, ..halves }, false);
    check(&Case { sources: vec![(20, [1; 3], false)], space: [3, 5, 7], filters: 144, batch: 3, ..c }, false);
}

#[test]
pub(super) fn ptx_conv3d_residual_over_many_tiles() {
    let c = Case { kernel: [1; 3], bias: true, ..Case::new([6, 10, 14], 0, 32) };
    // Seven tiles a sample by one block; of a repeated tensor and a skip, by several; blocks of 64 filters, of two tiles each.
    check(&Case { sources: vec![(20, [1; 3], true)], filters: 144, batch: 3, ..c.clone() }, false);
    let two = vec![(16, [2; 3], true), (64, [1; 3], false)];
    check(&Case { sources: two, space: [12, 10, 18], storage: Storage::F16, ..c.clone() }, false);
    check(&Case { sources: vec![(24, [1; 3], false)], space: [9, 15, 18], filters: 80, ..c.clone() }, false);
    let planes = Case { sources: vec![(2, [1; 3], false)], space: [5, 12, 31], ..c };
    for filters in [16, 32, 64] {
        check(&Case { filters, ..planes.clone() }, true);
    }
}

#[test]
pub(super) fn ptx_conv3d_residual_of_many_channels() {
    let c = Case { kernel: [1; 3], batch: 2, bias: true, ..Case::new([4, 6, 6], 0, 48) };
    // Few voxels: warps share the channels, evenly or not.
    check(&Case { sources: vec![(256, [1; 3], false)], ..c.clone() }, false);
    let two = vec![(144, [1, 2, 2], true), (150, [1; 3], true)];
    check(&Case { sources: two, stride: [1, 2, 1], storage: Storage::F16, ..c.clone() }, false);
    // More: weights of 32 filters, and too many weights.
    let more = Case { batch: 1, space: [3, 23, 30], filters: 40, ..c };
    check(&Case { sources: vec![(272, [1; 3], false)], ..more.clone() }, false);
    check(&Case { sources: vec![(496, [1; 3], true), (32, [1; 3], false)], storage: Storage::F16, ..more }, false);
}

#[test]
pub(super) fn ptx_conv3d_residual_of_planes() {
    let c = Case { kernel: [1; 3], bias: true, ..Case::new([5, 7, 9], 1, 32) };
    check(&c, true);
    check(&Case { sources: vec![(3, [1; 3], false)], storage: Storage::F16, batch: 2, filters: 48, ..c.clone() }, true);
    check(&Case { sources: vec![(8, [1; 3], false)], stride: [2, 1, 2], filters: 8, ..c }, true);
}

#[test]
pub(super) fn ptx_conv3d_residual_refuses_what_does_not_fit() {
    let sim = Sim::new(0);
    let memory = sim.with(&[0; 64 * 64]);
    let norm = Some(Norm { planes: memory, slope: SLOPE });
    let x = [Source::plain(memory, 16, [4; 3])];
    let good = residual::Problem {
        storage: Storage::Bf16,
        batch: 1,
        input: residual::Input::Voxels(&x),
        weight: memory,
        bias: None,
        stride: [1; 3],
        y: Source { norm, ..x[0] },
        out: memory,
    };
    residual::run(&sim, &good).unwrap();
    let planes = |channels| residual::Input::Planes { data: memory, channels, space: [4; 3] };
    let small = stunet::tensor::cuda::Memory { bytes: 64 * 32 - 1, ..memory };
    for (p, what) in [
        (residual::Problem { storage: Storage::F32, ..good }, "F32"),
        (residual::Problem { stride: [2; 3], ..good }, "stride"),
        (residual::Problem { y: x[0], ..good }, "None"),
        (residual::Problem { input: residual::Input::Voxels(&[]), ..good }, "the end of a block"),
        (residual::Problem { input: planes(first::CHANNELS + 1), ..good }, "9 channels"),
        (residual::Problem { out: small, ..good }, "the result"),
        (residual::Problem { y: Source { data: small, ..good.y }, ..good }, "a source"),
    ] {
        let refused = residual::run(&sim, &p).unwrap_err().to_string();
        assert!(refused.contains(what), "{refused}");
    }
}

/// What the interpreter counts: no two rows meet in a bank, and every sector that is moved is used.
#[test]
pub(super) fn ptx_conv3d_residual_wastes_no_bank_and_no_sector() {
    for (filters, channels, space) in [
        (16, 32, [4, 8, 16]),
        (32, 32, [4, 8, 16]),
        (64, 32, [8, 16, 24]),
        (32, 256, [4, 8, 16]),
        (16, 2, [4, 8, 16]),
        (32, 2, [4, 8, 16]),
        (64, 2, [4, 8, 16]),
    ] {
        let (sim, planes) = (Sim::new(0).with_multiprocessors(1), channels < 16);
        let c = Case { kernel: [1; 3], ..Case::new(space, channels, filters) };
        let begin = Begin::new(&c, &sim, planes);
        let sources: Vec<Source> = begin.inputs.iter().map(|i| i.source).collect();
        let to = sim.with(&c.storage.store(&activation(1, space, filters, c.storage, 80)));
        let norm = Norm { planes: sim.with(bytemuck::cast_slice(&norm_planes(1, filters, 81))), slope: SLOPE };
        let packed = conv3d::pack_weight(&c.weight(), [filters, channels, 1, 1, 1], &[channels], c.storage).unwrap();
        let p = residual::Problem {
            storage: c.storage,
            batch: 1,
            input: begin.planes.unwrap_or(residual::Input::Voxels(&sources)),
            weight: sim.with(&packed),
            bias: None,
            stride: [1; 3],
            y: Source { norm: Some(norm), ..Source::plain(to, filters, space) },
            out: to,
        };
        residual::run(&sim, &p).unwrap();
        for entry in sim.entries() {
            let deep = entry.contains("deep");
            for (what, banks, some) in [
                ("ld.shared", true, true),
                ("st.shared", true, true),
                ("cp.async", false, !deep),
                ("st.global", false, true),
            ] {
                let t = sim.traffic(&entry, what);
                let (used, ideal) =
                    if banks { (t.wavefronts, t.ideal_wavefronts) } else { (t.sectors, t.ideal_sectors) };
                assert!((t.requests > 0) == some && used <= ideal, "{entry}: {what}: {used} for {ideal}");
            }
        }
    }
}
