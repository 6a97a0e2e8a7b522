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

/// Sums of `value(i)`, a pair of `g` and `h`, over voxels.
#[inline(always)]
fn summed<S: Simd>(s: S, voxels: usize, mut value: impl FnMut(usize) -> (S::V, S::V)) -> Sums {
    let mut all = Sums::default();
    let zero = s.splat(0.0);
    for first in (0..voxels).step_by(VOXELS) {
        let n = VOXELS.min(voxels - first);
        let (mut g4, mut gh4) = ([zero; 4], [zero; 4]);
        let mut take = |k: usize, i: usize| {
            let (g, h) = value(first + i);
            g4[k] = s.add(g4[k], g);
            gh4[k] = s.fma(g, h, gh4[k]);
        };
        for i in (0..n / 4 * 4).step_by(4) {
            for k in 0..4 {
                take(k, i + k);
            }
        }
        for i in n / 4 * 4..n {
            take(0, i);
        }
        let (mut g, mut gh) = ([0.0; BLOCK], [0.0; BLOCK]);
        s.store(s.add(s.add(g4[0], g4[1]), s.add(g4[2], g4[3])), &mut g);
        s.store(s.add(s.add(gh4[0], gh4[1]), s.add(gh4[2], gh4[3])), &mut gh);
        for lane in 0..BLOCK {
            all.g[lane] += f64::from(g[lane]);
            all.gh[lane] += f64::from(gh[lane]);
        }
    }
    all
}

#[inline(always)]
fn sums_of_normalised<S: Simd>(s: S, c: &Channels, x: &[f32], dy: &[f32]) -> Sums {
    let a = &c.affine;
    let (mean, scale, shift) = (s.load(&a.mean), s.load(&a.scale), s.load(&a.shift));
    let (inverse, slope) = (s.load(&c.inverse), s.splat(a.slope));
    let (x, dy) = (x.as_chunks::<BLOCK>().0, dy.as_chunks::<BLOCK>().0);
    summed(s, x.len(), |i| {
        let d = s.sub(s.load(&x[i]), mean);
        let g = s.leaky_relu_grad(s.fma(d, scale, shift), slope, s.load(&dy[i]));
        (g, s.mul(d, inverse))
    })
}

#[inline(always)]
fn sums_of_result<S: Simd>(s: S, c: &Channels, x: &[f32], y: &[f32], dy: &mut [f32]) -> Sums {
    let (mean, inverse, slope) = (s.load(&c.affine.mean), s.load(&c.inverse), s.splat(c.affine.slope));
    let (x, y, dy) = (x.as_chunks::<BLOCK>().0, y.as_chunks::<BLOCK>().0, dy.as_chunks_mut::<BLOCK>().0);
    summed(s, x.len(), |i| {
        let g = s.leaky_relu_grad(s.load(&y[i]), slope, s.load(&dy[i]));
        s.store(g, &mut dy[i]);
        (g, s.mul(s.sub(s.load(&x[i]), mean), inverse))
    })
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
    let a = &c.affine;
    let (mean, scale, shift) = (s.load(&a.mean), s.load(&a.scale), s.load(&a.shift));
    let (inverse, slope) = (s.load(&c.inverse), s.splat(a.slope));
    let (g_mean, gh_mean) = (s.load(&mean_g[0]), s.load(&mean_g[1]));
    let zero = s.splat(0.0);
    let (x, out) = (x.as_chunks::<BLOCK>().0, out.as_chunks_mut::<BLOCK>().0);
    let dy = dy.map(|dy| dy.as_chunks::<BLOCK>().0);
    for (i, (x, o)) in x.iter().zip(out).enumerate() {
        let d = s.sub(s.load(x), mean);
        let mut g = s.load(dy.map_or(&*o, |dy| &dy[i]));
        if masked {
            g = s.leaky_relu_grad(s.fma(d, scale, shift), slope, g);
        }
        // (g - mean(g)) - h * mean(g * h)
        let h = s.mul(d, inverse);
        let centred = s.fma(s.sub(zero, h), gh_mean, s.sub(g, g_mean));
        s.store(s.mul(centred, scale), o);
    }
}
