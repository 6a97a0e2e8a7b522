//! The way back of instance normalisation with leaky ReLU: one pass for the sums over voxels, one for the input's gradient.
//!
//! With `h = (x - mean) * inverse` and `g` the gradient of `h * w + b` (that of the result, times the slope where leaky
//! ReLU applied it), `dw = sum(g * h)`, `db = sum(g)` and, as mean and deviation depend on x themselves,
//! `dx = w * inverse * (g - db / N - h * dw / N)` (Ioffe, Szegedy, "Batch Normalization", 2015, section 3, for one channel of
//! one sample).

use super::PIECE;
use super::conv3d::Norm;
use super::instance_norm::Affine;
use super::isa::{Simd, simd_entry};
use crate::base::par;
use crate::tensor::{BLOCK, Isa, Stored};

/// Voxels whose sums are taken in f32 in four strands each, as for moments.
const VOXELS: usize = 256;

/// Where leaky ReLU applied its slope.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Mask<'a> {
    /// Where the normalised value, computed once more, is not above zero.
    Normalised,
    /// Where the result, which something was added to, is not above zero.
    Result(Stored<'a>),
}

/// All but the gradients, of blocked tensors.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Problem<'a> {
    /// Voxels per channel, at least one.
    pub(crate) space: usize,
    pub(crate) norm: Norm<'a>,
    /// One over the deviation, `[batch][channels padded to blocks]`.
    pub(crate) inverse: &'a [f32],
    pub(crate) x: Stored<'a>,
    pub(crate) mask: Mask<'a>,
}

/// `sum(g)` and `sum(g * h)` of 16 channels.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Sums {
    pub(crate) g: [f64; BLOCK],
    pub(crate) gh: [f64; BLOCK],
}

impl Sums {
    fn plus(mut self, other: &Sums) -> Sums {
        for c in 0..BLOCK {
            self.g[c] += other.g[c];
            self.gh[c] += other.gh[c];
        }
        self
    }
}

/// What a channel block is normalised with.
#[derive(Clone, Copy)]
struct Channels {
    affine: Affine,
    inverse: [f32; BLOCK],
}

impl Channels {
    fn of(p: &Problem<'_>, block: usize) -> Self {
        Self { affine: Affine::of(&p.norm, block), inverse: p.inverse.as_chunks::<BLOCK>().0[block] }
    }
}

/// The sums of every channel block. Where the mask is a result's, `dy` becomes `g`, which is also the gradient of what was
/// added.
pub(crate) fn sums(isa: Isa, p: &Problem<'_>, dy: &mut [f32]) -> Vec<Sums> {
    let len = p.space * BLOCK;
    let per_block = len.div_ceil(PIECE);
    let mut parts = vec![Sums::default(); dy.len() / len * per_block];
    let pieces = dy.chunks_mut(len).flat_map(|block| block.chunks_mut(PIECE)).zip(&mut parts).collect();
    par::each(pieces, |i, (dy, sums): (&mut [f32], &mut Sums)| {
        let block = i / per_block;
        let at = block * len + i % per_block * PIECE;
        let c = Channels::of(p, block);
        let x = p.x.part(at..at + dy.len());
        *sums = match p.mask {
            Mask::Normalised => sums_normalised::on(isa, &c, &x, dy),
            Mask::Result(y) => sums_result::on(isa, &c, &x, &y.part(at..at + dy.len()), dy),
        };
    });
    parts.chunks(per_block).map(|p| p.iter().fold(Sums::default(), |all, s| all.plus(s))).collect()
}

/// Writes the input's gradient to `out`: from `dy` as [`sums`] left it, which is `out` itself where it is `None`.
pub(crate) fn input(isa: Isa, p: &Problem<'_>, sums: &[Sums], dy: Option<&[f32]>, out: &mut [f32]) {
    let len = p.space * BLOCK;
    let per_block = len.div_ceil(PIECE);
    let pieces: Vec<&mut [f32]> = out.chunks_mut(len).flat_map(|block| block.chunks_mut(PIECE)).collect();
    par::each(pieces, |i, out| {
        let block = i / per_block;
        let at = block * len + i % per_block * PIECE;
        let c = Channels::of(p, block);
        let [mut g, mut gh] = [[0.0; BLOCK]; 2];
        for lane in 0..BLOCK {
            g[lane] = (sums[block].g[lane] / p.space as f64) as f32;
            gh[lane] = (sums[block].gh[lane] / p.space as f64) as f32;
        }
        let masked = matches!(p.mask, Mask::Normalised) && p.norm.slope != 1.0;
        let (x, dy) = (p.x.part(at..at + out.len()), dy.map(|dy| &dy[at..at + out.len()]));
        input_of::on(isa, &c, masked, &[g, gh], &x, dy, out);
    });
}

simd_entry!(sums_normalised = sums_of_normalised(c: &Channels, x: &[f32], dy: &[f32]) -> Sums);
simd_entry!(sums_result = sums_of_result(c: &Channels, x: &[f32], y: &[f32], dy: &mut [f32]) -> Sums);
simd_entry!(input_of = input_piece(
    c: &Channels, masked: bool, mean: &[[f32; BLOCK]; 2], x: &[f32], dy: Option<&[f32]>, out: &mut [f32]
));

/// [`Channels`] in registers.
#[derive(Clone, Copy)]
struct Loaded<S: Simd> {
    mean: S::V,
    scale: S::V,
    shift: S::V,
    inverse: S::V,
    slope: S::V,
}

impl<S: Simd> Loaded<S> {
    #[inline(always)]
    fn of(s: S, c: &Channels) -> Self {
        let a = &c.affine;
        Self {
            mean: s.load(&a.mean),
            scale: s.load(&a.scale),
            shift: s.load(&a.shift),
            inverse: s.load(&c.inverse),
            slope: s.splat(a.slope),
        }
    }

    /// `dy` through leaky ReLU of what was `d` from the mean.
    #[inline(always)]
    fn masked(&self, s: S, d: S::V, dy: S::V) -> S::V {
        s.leaky_relu_grad(s.fma(d, self.scale, self.shift), self.slope, dy)
    }
}

/// Sums over voxels that are taken in. No closures: they would not be compiled for the instruction set.
struct Strands<S: Simd> {
    g: [S::V; 4],
    gh: [S::V; 4],
}

impl<S: Simd> Strands<S> {
    #[inline(always)]
    fn new(s: S) -> Self {
        let zeros = [s.splat(0.0); 4];
        Self { g: zeros, gh: zeros }
    }

    #[inline(always)]
    fn take(&mut self, s: S, strand: usize, g: S::V, h: S::V) {
        self.g[strand] = s.add(self.g[strand], g);
        self.gh[strand] = s.fma(g, h, self.gh[strand]);
    }

    #[inline(always)]
    fn add_to(&self, s: S, all: &mut Sums) {
        let (mut g, mut gh) = ([0.0; BLOCK], [0.0; BLOCK]);
        s.store(s.add(s.add(self.g[0], self.g[1]), s.add(self.g[2], self.g[3])), &mut g);
        s.store(s.add(s.add(self.gh[0], self.gh[1]), s.add(self.gh[2], self.gh[3])), &mut gh);
        for lane in 0..BLOCK {
            all.g[lane] += f64::from(g[lane]);
            all.gh[lane] += f64::from(gh[lane]);
        }
    }
}

#[inline(always)]
fn sums_of_normalised<S: Simd>(s: S, c: &Channels, x: &[f32], dy: &[f32]) -> Sums {
    let c = Loaded::of(s, c);
    let (x, dy) = (x.as_chunks::<BLOCK>().0, dy.as_chunks::<BLOCK>().0);
    let mut all = Sums::default();
    for (x, dy) in x.chunks(VOXELS).zip(dy.chunks(VOXELS)) {
        let mut strands = Strands::new(s);
        let ((x4, x), (dy4, dy)) = (x.as_chunks::<4>(), dy.as_chunks::<4>());
        for (x, dy) in x4.iter().zip(dy4) {
            for k in 0..4 {
                let d = s.sub(s.load(&x[k]), c.mean);
                strands.take(s, k, c.masked(s, d, s.load(&dy[k])), s.mul(d, c.inverse));
            }
        }
        for (x, dy) in x.iter().zip(dy) {
            let d = s.sub(s.load(x), c.mean);
            strands.take(s, 0, c.masked(s, d, s.load(dy)), s.mul(d, c.inverse));
        }
        strands.add_to(s, &mut all);
    }
    all
}

#[inline(always)]
fn sums_of_result<S: Simd>(s: S, c: &Channels, x: &[f32], y: &[f32], dy: &mut [f32]) -> Sums {
    let c = Loaded::of(s, c);
    let (x, y, dy) = (x.as_chunks::<BLOCK>().0, y.as_chunks::<BLOCK>().0, dy.as_chunks_mut::<BLOCK>().0);
    let mut all = Sums::default();
    for ((x, y), dy) in x.chunks(VOXELS).zip(y.chunks(VOXELS)).zip(dy.chunks_mut(VOXELS)) {
        let mut strands = Strands::new(s);
        let ((x4, x), (y4, y), (dy4, dy)) = (x.as_chunks::<4>(), y.as_chunks::<4>(), dy.as_chunks_mut::<4>());
        for ((x, y), dy) in x4.iter().zip(y4).zip(dy4) {
            for k in 0..4 {
                let g = s.leaky_relu_grad(s.load(&y[k]), c.slope, s.load(&dy[k]));
                s.store(g, &mut dy[k]);
                strands.take(s, k, g, s.mul(s.sub(s.load(&x[k]), c.mean), c.inverse));
            }
        }
        for ((x, y), dy) in x.iter().zip(y).zip(dy) {
            let g = s.leaky_relu_grad(s.load(y), c.slope, s.load(dy));
            s.store(g, dy);
            strands.take(s, 0, g, s.mul(s.sub(s.load(x), c.mean), c.inverse));
        }
        strands.add_to(s, &mut all);
    }
    all
}

#[inline(always)]
fn input_piece<S: Simd>(
    s: S,
    c: &Channels,
    masked: bool,
    mean_g: &[[f32; BLOCK]; 2],
    x: &[f32],
    dy: Option<&[f32]>,
    out: &mut [f32],
) {
    let c = Loaded::of(s, c);
    let means = [s.load(&mean_g[0]), s.load(&mean_g[1])];
    let (x, out) = (x.as_chunks::<BLOCK>().0, out.as_chunks_mut::<BLOCK>().0);
    match dy {
        Some(dy) => {
            for ((x, dy), o) in x.iter().zip(dy.as_chunks::<BLOCK>().0).zip(out) {
                s.store(input_voxel(s, &c, masked, means, s.load(x), s.load(dy)), o);
            }
        }
        None => {
            for (x, o) in x.iter().zip(out) {
                s.store(input_voxel(s, &c, masked, means, s.load(x), s.load(o)), o);
            }
        }
    }
}

/// `w * inverse * ((g - mean(g)) - h * mean(g * h))`.
#[inline(always)]
fn input_voxel<S: Simd>(s: S, c: &Loaded<S>, masked: bool, means: [S::V; 2], x: S::V, dy: S::V) -> S::V {
    let d = s.sub(x, c.mean);
    let g = if masked { c.masked(s, d, dy) } else { dy };
    let minus_h = s.sub(s.splat(0.0), s.mul(d, c.inverse));
    s.mul(s.fma(minus_h, means[1], s.sub(g, means[0])), c.scale)
}
