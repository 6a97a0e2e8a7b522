//! The input's gradient as convolutions of the output's gradient.
//!
//! Along an axis of stride 2, inputs at even and at odd places see different taps, each of them every output: two
//! convolutions of stride 1, and no product with a zero. Where every voxel of a source stands for several, their
//! gradients have a common sum, which is one convolution with sums of taps.

use crate::backend::cpu::Shared;
use crate::backend::cpu::conv3d::direct::{ITEM_FLOPS, cover};
use crate::backend::cpu::conv3d::tile::{Finish, Kernels, STEPS, Stream, Tile, TileFn};
use crate::backend::cpu::conv3d::{Geometry, packed_place, row_share};
use crate::base::par;
use crate::tensor::{BLOCK, Stored};

use super::Dgrad;

/// Neutral vectors of a residual block's end: what the output holds plus the sums.
static ZEROS: [f32; 2 * BLOCK] = [0.0; 2 * BLOCK];
static ONES: [f32; 2 * BLOCK] = [1.0; 2 * BLOCK];

/// Inputs along one axis that see the same taps.
#[derive(Debug, Clone)]
struct Class {
    /// The first, the distance to the next, and how many.
    first: usize,
    step: usize,
    count: usize,
    /// The output at tap 0 of the first, and from input to input.
    base: isize,
    stride: usize,
    /// What the filter's taps are added up to.
    taps: Vec<Vec<usize>>,
}

impl Class {
    /// The classes of an axis with voxels that stand for `factor` each.
    fn all(g: &Geometry, axis: usize, factor: usize) -> Vec<Self> {
        let (kernel, stride, padding) = (g.kernel[axis], g.stride[axis], g.padding[axis]);
        let step = (stride / factor).max(1);
        let size = g.input[axis] / factor;
        let class = |first: usize| {
            let mut pairs = Vec::new();
            for (r, k) in (0..factor).flat_map(|r| (0..kernel).map(move |k| (r, k))) {
                let at = (factor * first + r + padding) as isize - k as isize;
                if at.rem_euclid(stride as isize) == 0 {
                    pairs.push((at.div_euclid(stride as isize), k));
                }
            }
            let base = pairs.iter().map(|p| p.0).min().unwrap_or(0);
            let len = pairs.iter().map(|p| (p.0 - base) as usize + 1).max().unwrap_or(0);
            let tap = |q: usize| pairs.iter().filter(|p| (p.0 - base) as usize == q).map(|p| p.1).collect();
            Self {
                first,
                step,
                count: (size - first).div_ceil(step),
                base,
                stride: (factor / stride).max(1),
                taps: (0..len).map(tap).collect(),
            }
        };
        (0..step.min(size)).map(class).collect()
    }

    /// Output at tap 0 of the `t`-th input.
    fn at(&self, t: usize) -> isize {
        self.base + (t * self.stride) as isize
    }

    /// Taps of the `t`-th input that meet one of `outputs` outputs.
    fn valid(&self, t: usize, outputs: usize) -> (usize, usize) {
        let (at, taps) = (self.at(t), self.taps.len() as isize);
        let first = (-at).clamp(0, taps);
        (first as usize, (outputs as isize - at).clamp(first, taps) as usize)
    }
}

/// The sizes of all classes: for every one the class of each axis.
fn classes(g: &Geometry, factor: [usize; 3]) -> Vec<[Class; 3]> {
    let [z, y, x] = [0, 1, 2].map(|a| Class::all(g, a, factor[a]));
    let mut all = Vec::new();
    for z in &z {
        for y in &y {
            all.extend(x.iter().map(|x| [z.clone(), y.clone(), x.clone()]));
        }
    }
    all
}

fn taps(class: &[Class; 3]) -> usize {
    class.iter().map(|c| c.taps.len()).product()
}

/// Whether there are tiles for the distances between outputs.
pub(super) fn fits(factor: [usize; 3], stride: [usize; 3]) -> bool {
    (0..3).all(|a| factor[a] <= 2 * stride[a] && (factor[a] == 1 || factor[a].is_multiple_of(stride[a])))
}

/// Floats of all classes' filters.
pub(super) fn packed_len(g: &Geometry, factor: [usize; 3]) -> usize {
    let taps: usize = classes(g, factor).iter().map(taps).sum();
    taps * g.out_channels * g.in_channels.next_multiple_of(BLOCK)
}

/// Multiply-adds of 16 gradients, at the share of the peak that the tiles reach.
pub(super) fn cycles(g: &Geometry, factor: [usize; 3]) -> f64 {
    let one = |c: &Class, axis: usize| -> f64 {
        (0..c.count).map(|t| c.valid(t, g.output[axis])).map(|(first, last)| (last - first) as f64).sum()
    };
    let class = |c: &[Class; 3]| (0..3).map(|a| one(&c[a], a)).product::<f64>() / row_share(c[2].count);
    let sums: f64 = classes(g, factor).iter().map(class).sum();
    sums * (g.batch * g.out_channels * g.in_channels.div_ceil(BLOCK)) as f64 / 0.88
}

/// Packs the weights of the input channels of `g`, from outputs to inputs, each tap of `lists` the sum of so many of the
/// filter's: `[group of two blocks][tap][O][32 or 16]`.
pub(super) fn repack(g: &Geometry, filter: Stored<'_>, lists: &[Vec<usize>], out: &mut [f32]) {
    par::chunks_mut(out, 2 * BLOCK * g.out_channels * lists.len(), |group, out| {
        let width = out.len() / (g.out_channels * lists.len()).max(1);
        for (q, list) in lists.iter().enumerate() {
            for block in 0..g.out_channels.div_ceil(BLOCK) {
                let (place, step) = packed_place(g, block);
                let outputs = BLOCK.min(g.out_channels - block * BLOCK);
                for first in (0..width).step_by(BLOCK) {
                    let inputs = BLOCK.min(g.in_channels - group * 2 * BLOCK - first);
                    let mut sums = [[0.0; BLOCK]; BLOCK];
                    let mut row = [0.0; BLOCK];
                    for (i, sum) in sums.iter_mut().enumerate().take(inputs) {
                        for tap in list {
                            let channel = tap * g.filter_inputs + group * 2 * BLOCK + first + i;
                            filter.read(place + channel * step, &mut row);
                            sum.iter_mut().zip(row).for_each(|(s, w)| *s += w);
                        }
                    }
                    for o in 0..outputs {
                        let to = (q * g.out_channels + block * BLOCK + o) * width + first;
                        for (i, to) in out[to..][..BLOCK].iter_mut().enumerate() {
                            *to = sums[i][o];
                        }
                    }
                }
            }
        }
    });
}

/// The convolution of the output's gradient that a gradient at stride 1 is: with the filter turned round, from outputs to
/// inputs, and sums over `factor` neighbours as its stride.
pub(super) fn turned(g: &Geometry, factor: [usize; 3]) -> Geometry {
    Geometry {
        batch: g.batch,
        in_channels: g.out_channels,
        out_channels: g.in_channels,
        input: g.output,
        output: [0, 1, 2].map(|a| g.input[a] / factor[a]),
        kernel: g.kernel,
        stride: factor,
        padding: [0, 1, 2].map(|a| g.kernel[a] - 1 - g.padding[a]),
        filter_inputs: g.out_channels,
        filter_first: 0,
    }
}

/// The filter's taps in turned order.
pub(super) fn turned_taps(g: &Geometry) -> Vec<Vec<usize>> {
    let taps: usize = g.kernel.iter().product();
    (0..taps).rev().map(|k| vec![k]).collect()
}

/// A tile of a row: first input, function, taps along x, and whether its ends lie in the padding.
struct Span {
    first: usize,
    function: TileFn,
    taps: (usize, usize),
    left: bool,
    right: bool,
}

/// Covers the inputs of a class with tiles.
fn spans(widths: &[(usize, [[TileFn; 2]; 4])], class: &Class, outputs: usize, add: bool) -> Vec<Span> {
    let step = STEPS.iter().position(|s| *s == class.stride * BLOCK).unwrap_or(0);
    let (count, taps) = (class.count, class.taps.len());
    // A tile leaves out one tap of its first voxel and one of its last; what lacks more stands alone.
    let ends = |t: usize| {
        let (first, last) = class.valid(t, outputs);
        (t == 0 && first == 1, t + 1 == count && taps - last == 1)
    };
    let alone = |t: &usize| {
        let ((first, last), (left, right)) = (class.valid(*t, outputs), ends(*t));
        first != usize::from(left) || taps - last != usize::from(right)
    };
    let before = (0..count).take_while(alone).count();
    let after = (before..count).rev().take_while(alone).count();
    let mut out = Vec::new();
    for (first, width, function) in cover(widths, step, add, count - before - after) {
        let first = before + first;
        let (left, right) = (ends(first).0, ends(first + width - 1).1);
        out.push(Span { first, function, taps: (0, taps), left, right });
    }
    for first in (0..before).chain(count - after..count) {
        if let Some((_, functions)) = widths.last() {
            let function = functions[step][usize::from(add)];
            out.push(Span { first, function, taps: class.valid(first, outputs), left: false, right: false });
        }
    }
    out
}

/// Rows of one class for one group of input blocks.
struct Item {
    class: usize,
    group: usize,
    sample: usize,
    rows: std::ops::Range<usize>,
}

struct Job<'a> {
    p: &'a Dgrad<'a>,
    filter: &'a [f32],
    classes: Vec<[Class; 3]>,
    /// Where each class's filter is, and the tiles of its rows, for groups of one block and of two.
    places: Vec<usize>,
    spans: Vec<[Vec<Span>; 2]>,
    /// First input block and number of blocks.
    groups: Vec<(usize, usize)>,
    dx: Shared,
}

/// Writes the gradient of `p`, of the sizes that `p` asks for, to `dx`; `work` has [`packed_len`] floats.
pub(super) fn run(kernels: &Kernels, p: &Dgrad<'_>, work: &mut [f32], dx: &mut [f32]) {
    let g = &p.geometry;
    let classes = classes(g, p.factor);
    let padded = g.in_channels.next_multiple_of(BLOCK);
    let mut places = Vec::new();
    let mut place = 0;
    for class in &classes {
        let len = taps(class) * g.out_channels * padded;
        repack(g, p.filter, &lists(g, class), &mut work[place..place + len]);
        places.push(place);
        place += len;
    }
    let blocks = g.in_channels.div_ceil(BLOCK);
    let pairs = if kernels.two.is_empty() { 0 } else { blocks / 2 };
    let groups: Vec<_> = (0..pairs).map(|i| (2 * i, 2)).chain((2 * pairs..blocks).map(|i| (i, 1))).collect();
    let tiles = |c: &[Class; 3]| [kernels.one, kernels.two].map(|w| spans(w, &c[2], g.output[2], p.add));
    let mut items = Vec::new();
    // Classes and groups are outermost, so that their filters stay in the cache.
    for (i, class) in classes.iter().enumerate().filter(|(_, c)| !p.add || taps(c) > 0) {
        let rows = class[0].count * class[1].count;
        let flops = 2 * taps(class) * g.out_channels * 2 * BLOCK * class[2].count;
        let per_item = (ITEM_FLOPS / flops.max(1)).clamp(1, rows.max(1));
        for group in 0..groups.len() {
            for sample in 0..g.batch {
                let starts = (0..rows).step_by(per_item);
                items.extend(starts.map(|r| Item { class: i, group, sample, rows: r..rows.min(r + per_item) }));
            }
        }
    }
    let spans = classes.iter().map(tiles).collect();
    let job = Job { p, filter: work, classes, places, spans, groups, dx: Shared::new(dx) };
    par::for_each(items.len(), |i| job.item(&items[i]));
}

/// The filter's taps that are added up to each tap of a class.
fn lists(g: &Geometry, [z, y, x]: &[Class; 3]) -> Vec<Vec<usize>> {
    let mut out = Vec::new();
    for z in &z.taps {
        for y in &y.taps {
            for x in &x.taps {
                let mut sum = Vec::new();
                for z in z {
                    for y in y {
                        sum.extend(x.iter().map(|x| (z * g.kernel[1] + y) * g.kernel[2] + x));
                    }
                }
                out.push(sum);
            }
        }
    }
    out
}

impl Job<'_> {
    fn item(&self, item: &Item) {
        let g = &self.p.geometry;
        let class = &self.classes[item.class];
        let [_, ny, _] = [0, 1, 2].map(|a| class[a].count);
        let (block, blocks) = self.groups[item.group];
        let [od, oh, ow] = g.output;
        let [d, h, w] = [0, 1, 2].map(|a| g.input[a] / self.p.factor[a]);
        let (in_blocks, out_blocks) = (g.in_channels.div_ceil(BLOCK), g.out_channels.div_ceil(BLOCK));
        let (all, width) = (taps(class) * g.out_channels, BLOCK * (in_blocks - block / 2 * 2).min(2));
        let filter = self.places[item.class] + block / 2 * 2 * BLOCK * all + block % 2 * BLOCK;
        let (none, zeros) =
            (Stream { start: std::ptr::null(), run: 0, row: 0, slice: 0, runs: 0, lanes: 0, last: 0 }, ZEROS.as_ptr());
        let finish = Finish {
            mean: zeros,
            scale: ONES.as_ptr(),
            shift: zeros,
            slope: 1.0,
            addend: std::ptr::null(),
            addend_block: 0,
            factor: 1,
            x: 0,
        };
        for row in item.rows.clone() {
            let [z, y] = [row / ny, row % ny];
            let from = (class[0].at(z) * oh as isize + class[1].at(y)) * ow as isize * BLOCK as isize;
            let dy = self.p.dy.as_ptr().wrapping_add(item.sample * out_blocks * od * oh * ow * BLOCK);
            let at = [class[0].first + z * class[0].step, class[1].first + y * class[1].step];
            let to = (((item.sample * in_blocks + block) * d + at[0]) * h + at[1]) * w + class[2].first;
            for span in &self.spans[item.class][blocks - 1] {
                let x = class[2].at(span.first) * BLOCK as isize;
                let source = Stream {
                    start: dy.wrapping_offset(from + x),
                    run: od * oh * ow * BLOCK,
                    row: ow * BLOCK,
                    slice: oh * ow * BLOCK,
                    runs: out_blocks,
                    lanes: BLOCK,
                    last: g.out_channels - (out_blocks - 1) * BLOCK,
                };
                let tile = Tile {
                    sources: [source, none],
                    // A class without taps has no weights.
                    filter: self.filter.as_ptr().wrapping_add(filter),
                    channel: width,
                    tap: g.out_channels * width,
                    z: class[0].valid(z, od),
                    y: class[1].valid(y, oh),
                    x: span.taps,
                    kernel: (class[1].taps.len(), class[2].taps.len()),
                    left: span.left,
                    right: span.right,
                    out: self.dx.ptr().wrapping_add((to + span.first * class[2].step) * BLOCK),
                    voxel: class[2].step * BLOCK,
                    block: d * h * w * BLOCK,
                    bias: std::ptr::null(),
                    finish: self.p.add.then_some(finish),
                };
                // SAFETY: `dy` and `dx` have the sizes of the problem, checked by `dgrad`; taps outside the outputs are
                // excluded by `z`, `y`, and `x` or `left` and `right`; the filter has the class's taps; the spans cover
                // each row once, rows belong to one item, and classes to different voxels; the device has the function's
                // instruction set.
                unsafe { (span.function)(&tile) }
            }
        }
    }
}
