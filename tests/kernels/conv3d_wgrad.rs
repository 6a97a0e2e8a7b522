//! Gradient of a convolution's filters.

use rayon::prelude::*;
use stunet::backend_testing::cuda::conv3d::wgrad::{self, Problem};
use stunet::backend_testing::cuda::{Source, Storage, padded};
use stunet::tensor::cuda::{Driver, Memory};

use super::sim::Sim;
use super::{Input, SEEDS, cards, input, room, voxels};
use crate::common::bound::{self, Bounded, gamma};

/// A source: channels, repeated along z, y and x, normalised as it is read.
type From = (usize, [usize; 3], bool);

#[derive(Debug, Clone)]
struct Case {
    storage: Storage,
    batch: usize,
    /// As the sources are read.
    space: [usize; 3],
    sources: Vec<From>,
    filters: usize,
    /// Whether the gradient is normalised as it is read, as where it is the input of a transposed convolution.
    norm: bool,
    kernel: [usize; 3],
    stride: [usize; 3],
    transpose: bool,
    parts: usize,
}

impl Case {
    fn new(space: [usize; 3], channels: usize, filters: usize) -> Case {
        Case {
            storage: Storage::Bf16,
            batch: 1,
            space,
            sources: vec![(channels, [1; 3], false)],
            filters,
            norm: false,
            kernel: [3; 3],
            stride: [1; 3],
            transpose: false,
            parts: 1,
        }
    }

    fn out(&self) -> [usize; 3] {
        wgrad::output_space(self.space, self.kernel, self.stride).unwrap()
    }

    fn inputs(&self, sim: &Sim) -> Vec<Input> {
        let one = |(i, (channels, repeat, norm)): (usize, &From)| {
            let space = [0, 1, 2].map(|a| self.space[a] / repeat[a]);
            input(sim, self.storage, self.batch, space, *channels, *repeat, *norm, 100 + 10 * i as u64)
        };
        self.sources.iter().enumerate().map(one).collect()
    }

    /// Runs it; inputs, gradient and result.
    fn run(&self, sim: &Sim) -> (Vec<Input>, Input, Vec<u8>) {
        let inputs = self.inputs(sim);
        let dy = input(sim, self.storage, self.batch, self.out(), self.filters, [1; 3], self.norm, 50);
        let sources: Vec<Source> = inputs.iter().map(|i| i.source).collect();
        let mut p = Problem {
            storage: self.storage,
            batch: self.batch,
            sources: &sources,
            dy: dy.source,
            kernel: self.kernel,
            stride: self.stride,
            transpose: self.transpose,
            parts: Some(self.parts),
            out: Memory { address: 0, bytes: 0 },
            workspace: None,
        };
        p.out = room(sim, wgrad::values(&p), Storage::F32);
        let bytes = wgrad::workspace(sim, &p).unwrap();
        assert_eq!(bytes > 0, self.parts > 1);
        p.workspace = (bytes > 0).then(|| sim.alloc(bytes).unwrap());
        wgrad::run(sim, &p).unwrap_or_else(|e| panic!("{self:?}: {e}"));
        let got = sim.bytes(p.out);
        (inputs, dy, got)
    }

    /// Sums of `source` and sums of their products' absolute values, `[channel][tap][filter]`.
    fn reference(&self, source: &Input, dy: &Input) -> Vec<(f64, f64)> {
        let ([d, h, w], out, channels) = (self.space, self.out(), source.source.channels);
        let taps: Vec<_> = voxels(self.kernel).collect();
        let one = |i: usize| {
            let (c, (tz, ty, tx)) = (i / taps.len(), taps[i % taps.len()]);
            let mut sums = vec![(0.0, 0.0); self.filters];
            for n in 0..self.batch {
                for (v, (z, y, x)) in voxels(out).enumerate() {
                    let at =
                        |o: usize, a: usize, t: usize| (o * self.stride[a] + t).checked_sub((self.kernel[a] - 1) / 2);
                    let (Some(z), Some(y), Some(x)) = (at(z, 0, tz), at(y, 1, ty), at(x, 2, tx)) else { continue };
                    if z >= d || y >= h || x >= w {
                        continue;
                    }
                    let value = f64::from(source.values[(((n * d + z) * h + y) * w + x) * channels + c]);
                    let row = (n * out.iter().product::<usize>() + v) * self.filters;
                    for (sum, dy) in sums.iter_mut().zip(&dy.values[row..]) {
                        let product = value * f64::from(*dy);
                        sum.0 += product;
                        sum.1 += product.abs();
                    }
                }
            }
            sums
        };
        (0..channels * taps.len()).into_par_iter().flat_map_iter(one).collect()
    }

    /// Roundings that a product goes through at most: products of 16-bit values are exact, a warp adds up all that it
    /// has one after the other. In f32 it is a row, and what comes after carries its errors along.
    fn roundings(&self) -> usize {
        let row = self.out()[2];
        let all = self.batch * self.out().iter().product::<usize>();
        // Warps that share voxels add their sums up, and the sums of parts are rounded twice.
        if self.storage == Storage::F32 { row + 8 } else { all + 12 }
    }

    fn check(&self) {
        for card in cards(self.storage) {
            let (inputs, dy, got) = self.run(&Sim::of(SEEDS[0], *card));
            let filters = padded(self.filters);
            let taps: usize = self.kernel.iter().product();
            let total: usize = self.sources.iter().map(|s| padded(s.0)).sum();
            let mut expected = vec![Bounded { value: 0.0, error: 0.0 }; total * taps * filters];
            let mut first = 0;
            for input in &inputs {
                for (i, (value, magnitude)) in self.reference(input, &dy).into_iter().enumerate() {
                    let (c, t, f) = (first + i / self.filters / taps, i / self.filters % taps, i % self.filters);
                    let at = if self.transpose {
                        ((f / 16 * taps + t) * total + c) * 16 + f % 16
                    } else {
                        ((c / 16 * taps + t) * filters + f) * 16 + c % 16
                    };
                    expected[at] = Bounded { value, error: gamma(self.roundings()) * magnitude };
                }
                first += padded(input.source.channels);
            }
            let what = format!("{self:?} on {card:?}");
            bound::check(&what, &Storage::F32.load(&got), &expected);
            for seed in &SEEDS[1..] {
                assert!(self.run(&Sim::of(*seed, *card)).2 == got, "{what}: bytes depend on the schedule");
            }
        }
    }
}

#[test]
pub(super) fn cuda_train_conv3d_wgrad_in_f32() {
    let c = Case { storage: Storage::F32, ..Case::new([4, 5, 6], 0, 17) };
    let sources = vec![(20, [1, 1, 2], true), (16, [1; 3], false)];
    Case { batch: 2, sources, parts: 3, ..c.clone() }.check();
    let sources = vec![(16, [1; 3], false)];
    Case { sources: sources.clone(), kernel: [2, 1, 2], stride: [2; 3], norm: true, transpose: true, ..c.clone() }
        .check();
    Case { sources, kernel: [1, 3, 3], stride: [1, 2, 2], ..c }.check();
}

#[test]
pub(super) fn cuda_train_conv3d_wgrad_of_ragged_sizes_and_channels() {
    Case { batch: 2, ..Case::new([5, 9, 11], 20, 17) }.check();
    Case { storage: Storage::F16, ..Case::new([3, 10, 7], 16, 40) }.check();
    Case { sources: vec![(40, [1; 3], true)], ..Case::new([2, 5, 9], 0, 70) }.check();
    Case::new([1, 1, 1], 48, 16).check();
}

#[test]
pub(super) fn cuda_train_conv3d_wgrad_strides_and_kernels() {
    for (kernel, stride, filters) in [
        ([3; 3], [2; 3], 32),
        ([1, 3, 3], [1, 2, 2], 40),
        ([1, 3, 3], [1; 3], 16),
        ([3, 3, 1], [1, 2, 2], 32),
        ([3, 1, 1], [1; 3], 17),
        ([1, 3, 1], [2, 1, 2], 48),
        ([2, 3, 1], [2, 1, 1], 20),
    ] {
        let sources = vec![(48, [1; 3], true)];
        Case { kernel, stride, sources, ..Case::new([4, 9, 13], 0, filters) }.check();
    }
}

#[test]
pub(super) fn cuda_train_conv3d_wgrad_of_one_voxel() {
    let c = Case { kernel: [1; 3], batch: 2, ..Case::new([6, 4, 10], 0, 70) };
    Case { sources: vec![(100, [1; 3], true)], stride: [2; 3], ..c.clone() }.check();
    Case { sources: vec![(16, [2; 3], true), (20, [1; 3], false)], storage: Storage::F16, filters: 17, ..c.clone() }
        .check();
    Case { sources: vec![(40, [1; 3], false)], filters: 16, parts: 3, ..c }.check();
}

/// As a transposed convolution has it: what is large is its gradient and what is small its input, perhaps normalised.
#[test]
pub(super) fn cuda_train_conv3d_wgrad_transposed() {
    let c = Case { transpose: true, norm: true, ..Case::new([4, 6, 10], 40, 17) };
    Case { kernel: [2; 3], stride: [2; 3], batch: 2, ..c.clone() }.check();
    Case { kernel: [1, 2, 2], stride: [1, 2, 2], filters: 70, storage: Storage::F16, ..c.clone() }.check();
    Case { kernel: [2, 2, 1], stride: [2, 2, 1], parts: 2, filters: 32, ..c }.check();
}

#[test]
pub(super) fn cuda_train_conv3d_wgrad_reads_two_sources_the_first_repeated() {
    let c = Case { batch: 2, ..Case::new([4, 6, 10], 0, 20) };
    Case { sources: vec![(20, [2; 3], true), (16, [1; 3], false)], ..c.clone() }.check();
    // Slabs of both in a block.
    let sources = vec![(16, [1, 2, 2], false), (36, [1; 3], true)];
    Case { sources, kernel: [1, 3, 3], storage: Storage::F16, parts: 2, ..c }.check();
}

#[test]
pub(super) fn cuda_train_conv3d_wgrad_in_parts() {
    let c = Case { batch: 2, ..Case::new([9, 9, 17], 16, 16) };
    Case { parts: 5, ..c.clone() }.check();
    Case { parts: 12, transpose: true, storage: Storage::F16, stride: [1, 2, 1], ..c.clone() }.check();
    Case { parts: 19, space: [40, 3, 3], kernel: [1; 3], ..c }.check();
}

/// What the interpreter counts: rows of matrices lie in banks of their own, and copies and stores fill whole sectors.
#[test]
pub(super) fn cuda_train_conv3d_wgrad_wastes_no_bank_and_no_sector() {
    for filters in [16, 32, 64] {
        let sim = Sim::new(0);
        for (kernel, stride) in [([3; 3], [1; 3]), ([3; 3], [2; 3]), ([1; 3], [1; 3]), ([1, 2, 2], [1, 2, 2])] {
            Case { kernel, stride, ..Case::new([4, 16, 16], 64, filters) }.run(&sim);
        }
        let entries = sim.entries();
        assert_eq!(entries.len(), 2, "{entries:?}");
        for entry in entries {
            for (what, site) in [("ldmatrix", true), ("cp.async", false), ("st.global", false), ("st.shared", true)] {
                let t = sim.traffic(&entry, what);
                let (used, ideal) =
                    if site { (t.wavefronts, t.ideal_wavefronts) } else { (t.sectors, t.ideal_sectors) };
                assert!(used <= ideal, "{entry}: {what}: {used} for {ideal}");
                assert!(used > 0 || what == "st.shared", "{entry}: no {what}");
            }
        }
    }
}

#[test]
pub(super) fn cuda_train_conv3d_wgrad_refuses_what_does_not_fit() {
    let sim = Sim::new(0);
    let x = input(&sim, Storage::Bf16, 1, [4; 3], 16, [1; 3], false, 1);
    let dy = input(&sim, Storage::Bf16, 1, [4; 3], 16, [1; 3], false, 2).source;
    let good = Problem {
        storage: Storage::Bf16,
        batch: 1,
        sources: &[x.source],
        dy,
        kernel: [3; 3],
        stride: [1; 3],
        transpose: false,
        parts: Some(1),
        out: room(&sim, 27 * 256, Storage::F32),
        workspace: None,
    };
    let refused = |p: &Problem<'_>| wgrad::run(&sim, p).unwrap_err().to_string();
    let mut small = good;
    small.out.bytes -= 1;
    assert!(refused(&small).contains("the result"));
    assert!(refused(&Problem { parts: Some(3), ..good }).contains("in 3 parts"));
    assert!(refused(&Problem { stride: [2; 3], ..good }).contains("expected [2, 2, 2]"));
    assert!(refused(&Problem { kernel: [4; 3], ..good }).contains("[4, 4, 4]"));
    assert!(refused(&Problem { batch: 2, ..good }).contains("a source"));
    let repeated = Source { repeat: [2; 3], space: [2; 3], ..dy };
    assert!(refused(&Problem { dy: repeated, ..good }).contains("repeated"));
    let two = Problem { kernel: [1; 3], storage: Storage::F32, parts: Some(2), sources: &[], ..good };
    assert!(refused(&two).contains("one or two"));
    let wide = input(&sim, Storage::F32, 1, [4; 3], 16, [1; 3], false, 1).source;
    let two = Problem { sources: &[wide], dy: wide, ..two };
    assert_eq!(wgrad::workspace(&sim, &two).unwrap(), 2 * 256 * 4);
    assert!(refused(&two).contains("the workspace"));
    let old = Sim::of(0, [7, 5]);
    assert!(wgrad::run(&old, &good).unwrap_err().to_string().contains("7.5"));
}

/// Many bricks are cut until every multiprocessor is busy, as far as memory allows.
#[test]
pub(super) fn cuda_train_conv3d_wgrad_is_cut_for_the_card() {
    let anywhere = Memory { address: 0, bytes: usize::MAX };
    let parts = |multiprocessors: usize, space: [usize; 3], channels: usize| {
        let sim = Sim::new(0).with_multiprocessors(multiprocessors);
        let p = Problem {
            storage: Storage::Bf16,
            batch: 2,
            sources: &[Source::plain(anywhere, channels, space)],
            dy: Source::plain(anywhere, channels, space),
            kernel: [3; 3],
            stride: [1; 3],
            transpose: false,
            parts: None,
            out: anywhere,
            workspace: None,
        };
        let bytes = wgrad::workspace(&sim, &p).unwrap();
        assert!(bytes <= 64 << 20);
        bytes / (wgrad::values(&p) * 4)
    };
    for multiprocessors in [108, 132] {
        // Two slabs, two blocks at once.
        assert_eq!(parts(multiprocessors, [128; 3], 32), multiprocessors);
        assert!((2..=16).contains(&parts(multiprocessors, [32; 3], 128)));
        assert_eq!(parts(multiprocessors, [8; 3], 512), 0);
    }
    assert_eq!(parts(1, [8; 3], 64), 0);
}
