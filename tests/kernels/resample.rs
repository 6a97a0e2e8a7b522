//! Sums over windows to labels of a plane of the image.

use stunet::backend_testing::cuda::head_labels::pack_bias;
use stunet::backend_testing::cuda::resample::{self, Problem, Tap};
use stunet::tensor::cuda::Driver;

use super::random;
use super::sim::Sim;
use crate::common::bound::gamma;

/// Sizes of a case.
#[derive(Clone, Copy)]
struct Case {
    ring: [usize; 3],
    channels: usize,
    classes: usize,
    pad: [usize; 2],
    grid: [usize; 2],
    size: [usize; 2],
    between: Tap,
    threshold: Option<f32>,
    wide: bool,
}

/// Of an axis that goes from `n` voxels to `m`, or the nearest.
fn taps(n: usize, m: usize, nearest: bool) -> Vec<Tap> {
    let tap = |o: usize| {
        let c = ((o as f64 + 0.5) * n as f64 / m as f64 - 0.5).clamp(0.0, (n - 1) as f64);
        let i = c.floor() as usize;
        if nearest || n == m { (c.round() as usize, n, 0.0) } else { (i, (i + 1).min(n - 1), (c - c.floor()) as f32) }
    };
    (0..m).map(tap).collect()
}

/// A value, and a bound of what the absolute values of its parts add up to wherever rounding may happen.
#[derive(Clone, Copy, Default)]
struct Part {
    value: f64,
    magnitude: f64,
}

impl Part {
    /// `a + w (b - a)`.
    fn mix(a: Part, b: Part, w: f32) -> Part {
        let w = f64::from(w);
        Part { value: a.value + w * (b.value - a.value), magnitude: (1.0 + w) * a.magnitude + w * b.magnitude }
    }
}

/// What is on the host.
struct Values {
    sums: Vec<f32>,
    counted: Vec<f32>,
    weight: Vec<f32>,
    bias: Vec<f32>,
    names: Vec<u16>,
    rows: Vec<Tap>,
    columns: Vec<Tap>,
}

impl Case {
    fn values(&self, nearest: bool) -> Values {
        let planes: usize = self.ring.iter().product();
        Values {
            sums: random(planes * self.channels, 31),
            counted: random(planes, 32).iter().map(|v| v.abs() + 0.1).collect(),
            weight: random(self.classes * self.channels, 33),
            bias: random(self.classes, 34),
            names: match self.threshold {
                None => (0..self.classes as u16).collect(),
                Some(_) => (0..self.classes as u16).map(|c| (c * 7 + 3) % 250).collect(),
            },
            rows: taps(self.grid[0], self.size[0], nearest),
            columns: taps(self.grid[1], self.size[1], false),
        }
    }

    /// The labels, and whether something was odd.
    fn run(&self, sim: &Sim, v: &Values) -> (Vec<u16>, bool) {
        let n = self.size[0] * self.size[1];
        let pack = |taps: &[Tap], n: usize| sim.with(bytemuck::cast_slice(&resample::pack_taps(taps, n).unwrap()));
        let filter = resample::pack_filter(&v.weight, [self.classes, self.channels]).unwrap();
        let p = Problem {
            sum: sim.with(bytemuck::cast_slice(&v.sums)),
            counted: sim.with(bytemuck::cast_slice(&v.counted)),
            ring: self.ring,
            channels: self.channels,
            between: self.between,
            pad: self.pad,
            grid: self.grid,
            filter: sim.with(bytemuck::cast_slice(&filter)),
            bias: sim.with(bytemuck::cast_slice(&pack_bias(&v.bias))),
            names: sim.with(bytemuck::cast_slice(&resample::pack_names(&v.names))),
            classes: self.classes,
            threshold: self.threshold,
            taps: [pack(&v.rows, self.grid[0]), pack(&v.columns, self.grid[1])],
            size: self.size,
            // Nothing wrote there yet: a voxel that is left out is found.
            labels: sim.alloc(n * if self.wide { 2 } else { 1 }).unwrap(),
            wide: self.wide,
            odd: sim.with(&[0; 4]),
        };
        resample::run(sim, &p).unwrap();
        let bytes = sim.bytes(p.labels);
        let labels = match self.wide {
            true => bytes.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b)).collect(),
            false => bytes.iter().map(|b| u16::from(*b)).collect(),
        };
        (labels, sim.bytes(p.odd) != [0; 4])
    }

    /// Scores of the voxel at (y, x) in f64.
    fn scores(&self, v: &Values, y: usize, x: usize) -> Vec<Part> {
        let [_, h, w] = self.ring;
        let (row, column) = (v.rows[y], v.columns[x]);
        let feature = |c: usize| {
            let at = |z: usize, y: usize, x: usize| {
                let voxel = (z * h + self.pad[0] + y) * w + self.pad[1] + x;
                let value = f64::from(v.sums[voxel * self.channels + c]) / f64::from(v.counted[voxel]);
                Part { value, magnitude: value.abs() }
            };
            // What has no weight is not looked at.
            let either = |tap: Tap, of: &dyn Fn(usize) -> Part| {
                if tap.2 == 0.0 { of(tap.0) } else { Part::mix(of(tap.0), of(tap.1), tap.2) }
            };
            let through = |y: usize, x: usize| either(self.between, &|z| at(z, y, x));
            either(column, &|x| either(row, &|y| through(y, x)))
        };
        let features: Vec<Part> = (0..self.channels).map(feature).collect();
        let score = |(weights, bias): (&[f32], &f32)| {
            let begin = Part { value: f64::from(*bias), magnitude: f64::from(bias.abs()) };
            weights.iter().zip(&features).fold(begin, |s, (w, f)| {
                let w = f64::from(*w);
                Part { value: s.value + w * f.value, magnitude: s.magnitude + w.abs() * f.magnitude }
            })
        };
        v.weight.chunks_exact(self.channels).zip(&v.bias).map(score).collect()
    }

    /// Features that fit no block's shared memory.
    fn refused(&self, card: [u32; 2]) {
        let sim = Sim::of(0, card);
        // A card with more of it takes them.
        if sim.capability() == card {
            assert!(!resample::supports(&sim, self.channels));
        }
    }

    fn check(&self, card: [u32; 2], nearest: bool) {
        let v = self.values(nearest);
        let (got, odd) = self.run(&Sim::of(0, card), &v);
        assert!(!odd);
        for seed in [1, 2] {
            assert!(self.run(&Sim::of(seed, card), &v).0 == got, "bytes depend on the schedule");
        }
        // The division, at most two roundings for each of three interpolations, the products and their sum.
        let error = |p: &Part| gamma(self.channels + 10) * p.magnitude;
        let (mut seen, mut near) = (std::collections::BTreeSet::new(), 0);
        for (i, &label) in got.iter().enumerate() {
            let (y, x) = (i / self.size[1], i % self.size[1]);
            let scores = self.scores(&v, y, x);
            let what = format!("voxel {y}, {x} of {:?} has label {label}", self.size);
            seen.insert(label);
            if let Some(threshold) = self.threshold {
                let above = |p: &Part| p.value - f64::from(threshold);
                let sure = scores.iter().all(|s| above(s).abs() > error(s));
                let painted = scores.iter().zip(&v.names).fold(0, |l, (s, n)| if above(s) > 0.0 { *n } else { l });
                near += usize::from(!sure);
                assert!(!sure || label == painted, "{what}, expected {painted}");
                continue;
            }
            let own = scores[usize::from(label)];
            let rivals = scores.iter().filter(|s| s.value > own.value);
            for s in rivals {
                near += 1;
                assert!(s.value - own.value <= error(s) + error(&own), "{what}: {} and {}", own.value, s.value);
            }
        }
        assert!(seen.len() > 3 && near * 50 < got.len().max(50), "labels {seen:?}, {near} near ties");
    }
}

/// Finer and coarser grids of ragged sizes, between planes and on one, with few and with many channels.
#[test]
pub(super) fn ptx_resample_labels() {
    let plain = Case {
        ring: [3, 9, 11],
        channels: 16,
        classes: 21,
        pad: [1, 2],
        grid: [7, 8],
        size: [13, 19],
        between: (2, 0, 0.3),
        threshold: None,
        wide: false,
    };
    plain.check([8, 6], false);
    // The plane of no weight is not there.
    Case { between: (1, 77, 0.0), size: [5, 6], wide: true, ..plain }.check([7, 5], true);
    Case { grid: [8, 9], pad: [0, 1], size: [8, 9], classes: 33, between: (0, 1, 0.0), ..plain }.check([8, 6], false);
    // Blocks of 128 and of 32 voxels, classes that are one over a block of them.
    Case { channels: 96, classes: 17, size: [9, 17], ..plain }.check([8, 6], false);
    Case { channels: 160, classes: 5, size: [6, 7], ..plain }.check([7, 5], false);
    Case { channels: 640, ..plain }.refused([8, 6]);
}

#[test]
pub(super) fn ptx_resample_labels_paints_regions() {
    let case = Case {
        ring: [2, 6, 6],
        channels: 32,
        classes: 6,
        pad: [0, 0],
        grid: [6, 6],
        size: [11, 14],
        between: (0, 1, 0.75),
        threshold: Some(0.25),
        wide: false,
    };
    case.check([8, 6], false);
    Case { wide: true, threshold: Some(0.0), ..case }.check([7, 5], false);
}

/// Values that are no numbers are told of, where they are looked at; of equal scores the first wins.
#[test]
pub(super) fn ptx_resample_labels_of_odd_and_of_equal_values() {
    let case = Case {
        ring: [2, 5, 5],
        channels: 16,
        classes: 40,
        pad: [0, 0],
        grid: [5, 4],
        size: [7, 9],
        between: (0, 1, 0.0),
        threshold: None,
        wide: false,
    };
    let mut v = case.values(false);
    v.weight.fill(0.0);
    for (bias, expected) in [
        (vec![0.5f32; 40], 0),
        ((0..40).map(|k| [0.0f32, 1.0][usize::from(k > 12)]).collect(), 13),
        (vec![f32::NEG_INFINITY; 40], 0),
    ] {
        v.bias = bias;
        let (labels, odd) = case.run(&Sim::new(1), &v);
        assert!(labels.iter().all(|l| *l == expected) && !odd, "{expected}");
    }
    for value in [f32::NAN, f32::INFINITY] {
        // In the column that is not the grid's, and in the plane of no weight; then on the grid.
        let mut v = case.values(false);
        v.sums[(2 * 5 + 4) * 16] = value;
        v.sums[(25 + 7) * 16] = value;
        assert!(!case.run(&Sim::new(1), &v).1);
        v.sums[(2 * 5 + 3) * 16 + 5] = value;
        assert!(case.run(&Sim::new(1), &v).1);
    }
    let mut v = case.values(false);
    v.counted[0] = 0.0;
    assert!(case.run(&Sim::new(1), &v).1);
}
