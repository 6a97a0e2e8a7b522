//! Convolution from halo bricks.

use rayon::prelude::*;
use stunet::backend_testing::cuda::conv3d::{self, Wish};
use stunet::backend_testing::cuda::{Source, Storage, padded};
use stunet::tensor::cuda::Driver;

use super::sim::Sim;
use super::{Input, SEEDS, input, random, room, rounded, stored, unpadded, voxels};
use crate::common::bound::{self, Bounded, gamma};

/// A source: channels, repeated along z, y and x, normalised as it is read.
type From = (usize, [usize; 3], bool);

#[derive(Debug, Clone)]
pub struct Case {
    pub storage: Storage,
    pub batch: usize,
    /// As the sources are read.
    pub space: [usize; 3],
    pub sources: Vec<From>,
    pub filters: usize,
    pub kernel: [usize; 3],
    pub stride: [usize; 3],
    pub bias: bool,
    /// Compute capability of the card.
    pub card: [u32; 2],
}

impl Case {
    pub fn new(space: [usize; 3], channels: usize, filters: usize) -> Case {
        Case {
            storage: Storage::Bf16,
            batch: 1,
            space,
            sources: vec![(channels, [1; 3], false)],
            filters,
            kernel: [3; 3],
            stride: [1; 3],
            bias: false,
            card: [8, 6],
        }
    }

    pub fn inputs(&self, sim: &Sim) -> Vec<Input> {
        let one = |(i, (channels, repeat, norm)): (usize, &From)| {
            let space = [0, 1, 2].map(|a| self.space[a] / repeat[a]);
            input(sim, self.storage, self.batch, space, *channels, *repeat, *norm, 100 + 10 * i as u64)
        };
        self.sources.iter().enumerate().map(one).collect()
    }

    fn channels(&self) -> Vec<usize> {
        self.sources.iter().map(|s| s.0).collect()
    }

    pub fn weight(&self) -> Vec<f32> {
        let n = self.filters * self.channels().iter().sum::<usize>() * self.kernel.iter().product::<usize>();
        rounded(&random(n, 7), self.storage)
    }

    pub fn bias(&self) -> Vec<f32> {
        let mut b = if self.bias { random(self.filters, 8) } else { vec![0.0; self.filters] };
        b.resize(padded(self.filters), 0.0);
        b
    }

    pub fn out(&self) -> [usize; 3] {
        conv3d::output_space(self.space, self.kernel, self.stride)
    }
}

/// Value and sum of absolute values of every output, `[N][D][H][W][filters]`.
pub fn reference(c: &Case, inputs: &[Input], weight: &[f32], bias: &[f32]) -> Vec<(f64, f64)> {
    let [d, h, w] = c.space;
    let out = c.out();
    let channels = c.channels();
    let total: usize = channels.iter().sum();
    let taps: usize = c.kernel.iter().product();
    let places: Vec<_> = (0..c.batch).flat_map(|n| voxels(out).map(move |v| (n, v))).collect();
    let one = |&(n, (z, y, x)): &(usize, (usize, usize, usize))| {
        let mut sums: Vec<(f64, f64)> =
            (0..c.filters).map(|f| (f64::from(bias[f]), f64::from(bias[f]).abs())).collect();
        for (t, (tz, ty, tx)) in voxels(c.kernel).enumerate() {
            let at = |o: usize, a: usize, t: usize| (o * c.stride[a] + t).checked_sub(c.kernel[a] / 2);
            let (Some(z), Some(y), Some(x)) = (at(z, 0, tz), at(y, 1, ty), at(x, 2, tx)) else { continue };
            if z >= d || y >= h || x >= w {
                continue;
            }
            let mut first = 0;
            for (input, &count) in inputs.iter().zip(&channels) {
                let values = &input.values[(((n * d + z) * h + y) * w + x) * count..][..count];
                for (f, sum) in sums.iter_mut().enumerate() {
                    for (k, v) in values.iter().enumerate() {
                        let product = f64::from(*v) * f64::from(weight[(f * total + first + k) * taps + t]);
                        sum.0 += product;
                        sum.1 += product.abs();
                    }
                }
                first += count;
            }
        }
        sums
    };
    places.par_iter().flat_map_iter(one).collect()
}

/// Mean and sum of squared deviations of the partial moments of sample `n`, channel `f`, put together in f64.
fn merged(partials: &[f32], tiles: usize, filters: usize, n: usize, f: usize) -> (f64, f64, f64) {
    let tile = |t: usize| {
        let at = (n * tiles + t) * 3 * filters + f;
        [0, 1, 2].map(|k| f64::from(partials[at + k * filters]))
    };
    let count: f64 = (0..tiles).map(|t| tile(t)[0]).sum();
    let mean = (0..tiles).map(|t| tile(t)[0] * tile(t)[1]).sum::<f64>() / count;
    let squares = (0..tiles).map(|t| tile(t)[2] + tile(t)[0] * (tile(t)[1] - mean).powi(2)).sum();
    (count, mean, squares)
}

/// Runs the case by every variant that supports it, under several schedules.
fn check(c: &Case) {
    check_in(c, &[1]);
}

/// As [`check`], in so many parts each, as far as there are as many.
fn check_in(c: &Case, parts: &[usize]) {
    check_by(c, parts, "");
}

/// As [`check_in`], by variants whose names begin so, of which there has to be one.
pub fn check_by(c: &Case, parts: &[usize], begin: &str) {
    let (weight, bias) = (c.weight(), c.bias());
    let dims = [c.filters, c.channels().iter().sum(), c.kernel[0], c.kernel[1], c.kernel[2]];
    let terms = dims[1..].iter().product::<usize>();
    let filters = padded(c.filters);
    let voxels: usize = c.out().iter().product();
    let packed = conv3d::pack_weight(&weight, dims, &c.channels(), c.storage).unwrap();

    // Output and moments of one variant under one schedule; without a variant all names and the inputs.
    let run = |seed: u64, name: &str, parts: usize, measured: bool| {
        let sim = Sim::of(seed, c.card);
        let inputs = c.inputs(&sim);
        let sources: Vec<Source> = inputs.iter().map(|i| i.source).collect();
        let mut p = conv3d::Problem {
            storage: c.storage,
            batch: c.batch,
            sources: &sources,
            weight: sim.with(&packed),
            bias: c.bias.then(|| sim.with(bytemuck::cast_slice(&bias))),
            filters: c.filters,
            kernel: c.kernel,
            stride: c.stride,
            out: room(&sim, c.batch * voxels * filters, c.storage),
            partials: None,
            workspace: None,
        };
        if name.is_empty() {
            return Some((inputs, conv3d::variants(&sim, &p, measured), Vec::new(), Vec::new(), 0));
        }
        let plan = conv3d::plan(&sim, &p, measured, Wish { variant: Some(name), parts: Some(parts) }).ok()?;
        let tiles = if measured { plan.tiles() } else { 0 };
        p.partials = measured.then(|| room(&sim, c.batch * tiles * 3 * filters, Storage::F32));
        p.workspace = (plan.workspace() > 0).then(|| room(&sim, plan.workspace() / 4, Storage::F32));
        assert_eq!((plan.parts(), p.workspace.is_some()), (parts, parts > 1));
        conv3d::run(&sim, &p, &plan).unwrap_or_else(|e| panic!("{c:?} {name}: {e}"));
        Some((inputs, Vec::new(), sim.bytes(p.out), p.partials.map_or(Vec::new(), |m| sim.bytes(m)), tiles))
    };
    let (inputs, with_moments, ..) = run(0, "", 1, true).unwrap();
    let (_, all, ..) = run(0, "", 1, false).unwrap();
    let expected = reference(c, &inputs, &weight, &bias);
    let mut solved = 0;
    let all: Vec<_> = all.into_iter().filter(|name| name.starts_with(begin)).collect();
    for (name, &parts) in all.iter().flat_map(|name| parts.iter().map(move |parts| (name, parts))) {
        let what = format!("{c:?} {name} in {parts} parts");
        let measured = with_moments.contains(name);
        let Some((_, _, out, moments, tiles)) = run(SEEDS[0], name, parts, measured) else { continue };
        solved += 1;
        check_values(&what, c, &out, &moments, &expected, terms, tiles);
        for seed in &SEEDS[1..] {
            let (_, _, again, again_moments, _) = run(*seed, name, parts, measured).unwrap();
            assert!(again == out && again_moments == moments, "{what}: bytes depend on the schedule");
        }
    }
    assert!(solved >= parts.len(), "{c:?}: no variant, or not in {parts:?} parts");
}

/// Values within their bounds, and moments of tiles that add up to those of the values.
pub fn check_values(
    what: &str,
    c: &Case,
    out: &[u8],
    moments: &[u8],
    expected: &[(f64, f64)],
    terms: usize,
    tiles: usize,
) {
    let bounds: Vec<Bounded> = expected.iter().map(|e| stored(e.0, e.1, terms, c.storage)).collect();
    bound::check(what, &unpadded(&c.storage.load(out), c.filters), &bounds);
    let partials = Storage::F32.load(moments);
    if tiles == 0 {
        return;
    }
    let voxels: usize = c.out().iter().product();
    for n in 0..c.batch {
        for f in 0..c.filters {
            let values = || (0..voxels).map(|v| expected[(n * voxels + v) * c.filters + f]);
            let count = voxels as f64;
            let mean = values().map(|v| v.0).sum::<f64>() / count;
            let squares: f64 = values().map(|v| (v.0 - mean).powi(2)).sum();
            let (got_count, got_mean, got_squares) = merged(&partials, tiles, padded(c.filters), n, f);
            assert_eq!(got_count, count, "{what}: count of filter {f}");
            // Each value is off by the accumulation's error, each tile's sum by that of at most 64 additions in a row.
            let off = values().map(|v| gamma(terms + 64) * (v.1 + v.0.abs())).fold(0.0, f64::max);
            assert!((got_mean - mean).abs() <= off, "{what}: mean {got_mean} of filter {f}, expected {mean}");
            let error = gamma(128) * squares + 2.0 * off * (squares * count).sqrt() + count * off * off;
            let difference = (got_squares - squares).abs();
            assert!(difference <= error, "{what}: squares {got_squares} of filter {f}, expected {squares}");
        }
    }
}

#[test]
pub(super) fn ptx_conv3d_of_ragged_sizes_and_channels() {
    for (space, channels, filters) in
        [([5, 9, 11], 16, 16), ([3, 10, 7], 48, 32), ([9, 8, 9], 32, 80), ([4, 5, 17], 20, 40), ([1, 1, 1], 80, 48)]
    {
        check(&Case::new(space, channels, filters));
    }
}

#[test]
pub(super) fn ptx_conv3d_of_a_batch_in_f16_with_bias() {
    check(&Case { batch: 2, storage: Storage::F16, bias: true, ..Case::new([5, 6, 9], 32, 24) });
}

#[test]
pub(super) fn ptx_conv3d_strides_and_kernels() {
    for (kernel, stride) in [
        ([3; 3], [2; 3]),
        ([3; 3], [1, 2, 2]),
        ([3; 3], [2, 1, 1]),
        ([3; 3], [1, 1, 2]),
        ([1, 3, 3], [1; 3]),
        ([1, 3, 3], [1, 2, 2]),
        ([3, 1, 1], [1; 3]),
        ([1; 3], [1; 3]),
        ([1, 3, 1], [2, 1, 2]),
    ] {
        check(&Case { kernel, stride, ..Case::new([7, 12, 19], 32, 32) });
    }
}

#[test]
pub(super) fn ptx_conv3d_normalises_as_it_reads() {
    let c = Case::new([5, 9, 9], 16, 16);
    check(&Case { batch: 2, sources: vec![(40, [1; 3], true)], ..c.clone() });
    check(&Case { stride: [2; 3], sources: vec![(40, [1; 3], true)], ..c });
}

#[test]
pub(super) fn ptx_conv3d_reads_two_sources_the_first_repeated() {
    let c = Case { batch: 2, ..Case::new([6, 8, 10], 0, 32) };
    for (a, b) in [((32, [2; 3], true), (16, [1; 3], false)), ((20, [1, 2, 2], false), (36, [1; 3], true))] {
        check(&Case { sources: vec![a, b], ..c.clone() });
    }
    check(&Case { sources: vec![(16, [2, 1, 2], true), (16, [1; 3], true)], stride: [1, 2, 2], ..c });
}

/// Matrix instructions of half the depth, no copies beside the computation, 64 KiB of shared memory.
#[test]
pub(super) fn ptx_conv3d_on_cards_before_ampere() {
    let c = Case { storage: Storage::F16, card: [7, 5], ..Case::new([6, 8, 10], 0, 72) };
    check(&Case { sources: vec![(20, [2, 1, 2], true), (16, [1; 3], false)], ..c.clone() });
    check(&Case { sources: vec![(32, [1; 3], true)], filters: 24, stride: [2; 3], ..c.clone() });
    check(&Case { sources: vec![(40, [1; 3], true)], kernel: [1; 3], stride: [2; 3], ..c.clone() });
    // A single brick, loaded anew for every 16 channels.
    check(&Case { sources: vec![(16, [1; 3], true), (16, [1; 3], true)], ..c });
}

/// By warp groups, among all others: two sources, ragged sizes, more filters than a block has.
#[test]
pub(super) fn ptx_conv3d_on_hopper() {
    let c = Case { card: [9, 0], bias: true, ..Case::new([6, 8, 10], 0, 72) };
    check(&Case { sources: vec![(20, [2, 1, 2], true), (16, [1; 3], false)], batch: 2, ..c.clone() });
    check(&Case { sources: vec![(48, [1; 3], true)], storage: Storage::F16, filters: 144, kernel: [1, 3, 3], ..c });
}

/// bf16 is not there before compute capability 8.0, and that is said before anything runs.
#[test]
pub(super) fn ptx_conv3d_in_bf16_is_refused_on_cards_before_ampere() {
    let sim = Sim::of(0, [7, 5]);
    let x = input(&sim, Storage::Bf16, 1, [4; 3], 16, [1; 3], false, 1);
    let memory = room(&sim, 27 * 256, Storage::Bf16);
    let p = conv3d::Problem {
        storage: Storage::Bf16,
        batch: 1,
        sources: &[x.source],
        weight: memory,
        bias: None,
        filters: 16,
        kernel: [3; 3],
        stride: [1; 3],
        out: memory,
        partials: None,
        workspace: None,
    };
    let refused = conv3d::plan(&sim, &p, false, Wish::default())
        .and_then(|plan| conv3d::run(&sim, &p, &plan))
        .unwrap_err()
        .to_string();
    assert!(refused.contains("7.5"), "{refused}");
}

/// What the interpreter counts: rows of matrices lie in banks of their own, and copies and stores fill whole sectors.
#[test]
pub(super) fn ptx_conv3d_wastes_no_bank_and_no_sector() {
    let case = Case::new([8, 16, 16], 64, 64);
    for (kernel, stride) in [([3; 3], [1; 3]), ([3; 3], [2; 3]), ([1; 3], [1; 3])] {
        let c = Case { kernel, stride, ..case.clone() };
        let sim = Sim::new(0);
        let inputs = c.inputs(&sim);
        let sources = [inputs[0].source];
        let packed =
            conv3d::pack_weight(&c.weight(), [64, 64, kernel[0], kernel[1], kernel[2]], &[64], c.storage).unwrap();
        let p = conv3d::Problem {
            storage: c.storage,
            batch: 1,
            sources: &sources,
            weight: sim.with(&packed),
            bias: None,
            filters: 64,
            kernel,
            stride,
            out: room(&sim, c.out().iter().product::<usize>() * 64, c.storage),
            partials: None,
            workspace: None,
        };
        for name in conv3d::variants(&sim, &p, false) {
            for parts in [1, 3] {
                let wish = Wish { variant: Some(name), parts: Some(parts) };
                let Ok(plan) = conv3d::plan(&sim, &p, false, wish) else { continue };
                let workspace = (plan.workspace() > 0).then(|| room(&sim, plan.workspace() / 4, Storage::F32));
                conv3d::run(&sim, &conv3d::Problem { workspace, ..p }, &plan).unwrap();
            }
        }
        let entries = sim.entries();
        assert!(entries.len() >= 3, "{entries:?}");
        for entry in entries {
            for (what, site) in [("ldmatrix", true), ("cp.async", false), ("st.global", false), ("st.shared", true)] {
                let t = sim.traffic(&entry, what);
                // What adds parts up multiplies nothing.
                assert!(t.requests > 0 || entry.starts_with("conv3d_sum"), "{entry}: no {what}");
                let (used, ideal) =
                    if site { (t.wavefronts, t.ideal_wavefronts) } else { (t.sectors, t.ideal_sectors) };
                // Chunks of padding read no sector.
                assert!(used <= ideal, "{entry}: {what}: {used} for {ideal}");
            }
        }
    }
}

#[test]
pub(super) fn ptx_conv3d_plain_in_f32() {
    let c = Case { storage: Storage::F32, batch: 2, bias: true, card: [7, 5], ..Case::new([5, 6, 8], 0, 20) };
    let sources = vec![(20, [1, 2, 2], true), (16, [1; 3], false)];
    check(&Case { sources: sources.clone(), stride: [1, 2, 1], ..c.clone() });
    check(&Case { sources, kernel: [1; 3], stride: [2; 3], card: [8, 6], ..c });
}

#[test]
pub(super) fn ptx_conv3d_of_one_voxel() {
    let c = Case { kernel: [1; 3], batch: 2, bias: true, ..Case::new([6, 4, 10], 0, 80) };
    check(&Case { sources: vec![(100, [1; 3], true)], stride: [2; 3], ..c.clone() });
    check(&Case { sources: vec![(16, [2; 3], true), (40, [1; 3], false)], storage: Storage::F16, ..c });
}

#[test]
pub(super) fn ptx_conv3d_refuses_memory_that_is_too_small() {
    let sim = Sim::new(0);
    let x = input(&sim, Storage::Bf16, 1, [4; 3], 16, [1; 3], false, 1);
    let weight = sim.alloc(27 * 16 * 16 * 2).unwrap();
    let out = sim.alloc(64 * 16 * 2).unwrap();
    let sources = [x.source];
    let good = conv3d::Problem {
        storage: Storage::Bf16,
        batch: 1,
        sources: &sources,
        weight,
        bias: None,
        filters: 16,
        kernel: [3; 3],
        stride: [1; 3],
        out,
        partials: None,
        workspace: None,
    };
    let whole = conv3d::plan(&sim, &good, false, Wish { parts: Some(1), ..Wish::default() }).unwrap();
    let mut small = good;
    small.out.bytes -= 1;
    let refused = |p: &conv3d::Problem<'_>, plan: &conv3d::Plan| conv3d::run(&sim, p, plan).unwrap_err().to_string();
    assert!(refused(&small, &whole).contains("the result"));
    let more = conv3d::Problem { batch: 2, ..good };
    assert!(refused(&more, &whole).contains("a source"));
    let parts = conv3d::plan(&sim, &good, false, Wish { parts: Some(3), ..Wish::default() }).unwrap();
    assert_eq!(parts.workspace(), 3 * 64 * 16 * 4);
    assert!(refused(&good, &parts).contains("the workspace"));
    let workspace = Some(sim.alloc(parts.workspace()).unwrap());
    assert!(refused(&conv3d::Problem { workspace, ..small }, &parts).contains("the result"));
    let other = conv3d::Problem { kernel: [1, 3, 3], workspace, ..good };
    assert!(refused(&other, &parts).contains("another problem"));
    assert!(conv3d::plan(&sim, &good, false, Wish { parts: Some(4), ..Wish::default() }).is_err());
}

/// A part is a range of planes of taps, whose ends lie anywhere in a slab of channels.
#[test]
pub(super) fn ptx_conv3d_in_parts() {
    let c = Case { bias: true, ..Case::new([3, 9, 10], 0, 40) };
    check_in(&Case { sources: vec![(20, [1; 3], true), (36, [1; 3], false)], ..c.clone() }, &[2, 5]);
    check_in(&Case { sources: vec![(72, [1; 3], true)], storage: Storage::F16, stride: [2; 3], ..c.clone() }, &[15]);
    check_in(&Case { sources: vec![(40, [1; 3], false)], kernel: [1, 3, 3], ..c.clone() }, &[3]);
    let old = Case { storage: Storage::F16, card: [7, 5], ..c.clone() };
    check_in(&Case { sources: vec![(16, [2, 1, 2], true), (48, [1; 3], true)], space: [4, 3, 8], ..old }, &[7]);
    check_in(
        &Case { sources: vec![(48, [1; 3], true)], card: [9, 0], filters: 72, space: [4; 3], batch: 2, ..c },
        &[4],
    );
}

/// Few bricks are cut into parts until the card is busy, many are not; the same for the same card.
#[test]
pub(super) fn ptx_conv3d_is_cut_where_a_card_would_idle() {
    let anywhere = stunet::tensor::cuda::Memory { address: 0, bytes: usize::MAX };
    let plan = |multiprocessors: usize, space: [usize; 3], channels: usize, kernel: [usize; 3]| {
        let sim = Sim::new(0).with_multiprocessors(multiprocessors);
        let p = conv3d::Problem {
            storage: Storage::Bf16,
            batch: 1,
            sources: &[Source::plain(anywhere, channels, space)],
            weight: anywhere,
            bias: None,
            filters: channels,
            kernel,
            stride: [1; 3],
            out: anywhere,
            partials: None,
            workspace: None,
        };
        conv3d::plan(&sim, &p, true, Wish::default()).unwrap()
    };
    for multiprocessors in [108, 132] {
        let deep = plan(multiprocessors, [4; 3], 512, [3; 3]);
        assert!((8..=33).contains(&deep.parts()), "{deep:?}");
        assert_eq!(deep.workspace(), deep.parts() * 64 * 512 * 4);
        assert!(plan(multiprocessors, [8; 3], 256, [3; 3]).parts() >= 4);
    }
    assert_eq!(plan(132, [32; 3], 128, [3; 3]).parts(), 1);
    assert_eq!(plan(1, [8; 3], 256, [3; 3]).parts(), 1);
    assert_eq!(plan(132, [4; 3], 16, [1, 3, 3]).parts(), 1);
}
