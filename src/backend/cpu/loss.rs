//! Cross-entropy and the sums of soft Dice in one pass over the logits, and their gradient in another, which may overwrite
//! the logits. Probabilities are never in memory: the way back computes them again, so that nothing is kept beside the
//! logits.
//!
//! A tile of voxels is summed in f32, everything else in f64, in an order that follows from the sizes alone.

mod regions;
mod softmax;

use super::isa::simd_entry;
use crate::backend::{Impl, levels, no_implementation, pick};
use crate::base::par;
use crate::error::Result;
use crate::tensor::{BLOCK, Isa};

/// Voxels that are summed in f32: their exponentials of 130 classes fit a level-1 cache.
const TILE: usize = 32;

/// Voxels of a piece of parallel work.
const PIECE: usize = 4096;

/// The channels of some voxels, one block each.
type Row = [[f32; BLOCK]];

pub(crate) static LOSS: [Impl<(), ()>; 3] = levels(());

/// What every voxel is, of logits `[sample][block][voxel][BLOCK]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Problem<'a> {
    /// Real channels.
    pub(crate) channels: usize,
    /// Voxels of one sample.
    pub(crate) voxels: usize,
    /// `[sample][voxel]`; less than `channels` or the ignored one where `regions` is `None`.
    pub(crate) labels: &'a [u16],
    /// Voxels of this label take no part.
    pub(crate) ignore: Option<u16>,
    /// `None`: a channel is a label, their probabilities a softmax. Else a channel is a region, its probability a sigmoid.
    pub(crate) regions: Option<&'a Members>,
}

impl Problem<'_> {
    fn blocks(&self) -> usize {
        self.channels.div_ceil(BLOCK)
    }

    fn is_valid(&self, label: u16) -> bool {
        self.ignore != Some(label)
    }

    /// One in the lanes of the last block that are channels, zero in those that fill it up.
    fn last_lanes(&self) -> [f32; BLOCK] {
        let real = self.channels - (self.blocks() - 1) * BLOCK;
        std::array::from_fn(|lane| if lane < real { 1.0 } else { 0.0 })
    }
}

/// Which labels belong to which regions, as the kernels read it.
#[derive(Debug, Clone)]
pub(crate) struct Members {
    /// `[label][block]`, one in the lanes of the regions that the label belongs to; the last row is for all higher labels.
    rows: Vec<[f32; BLOCK]>,
    blocks: usize,
}

impl Members {
    /// Region `i` consists of the labels `regions[i]`.
    pub(crate) fn new(regions: &[Vec<u16>]) -> Self {
        let blocks = regions.len().div_ceil(BLOCK);
        let labels = regions.iter().flatten().map(|&l| usize::from(l) + 1).max().unwrap_or(0);
        let mut rows = vec![[0.0; BLOCK]; (labels + 1) * blocks];
        for (i, region) in regions.iter().enumerate() {
            for &label in region {
                rows[usize::from(label) * blocks + i / BLOCK][i % BLOCK] = 1.0;
            }
        }
        Self { rows, blocks }
    }

    fn row(&self, label: u16) -> &Row {
        let label = usize::from(label).min(self.rows.len() / self.blocks - 1);
        &self.rows[label * self.blocks..][..self.blocks]
    }
}

/// What the loss is made of.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sums {
    /// Probability where the truth is this channel, `[sample][channel]`.
    pub(crate) intersection: Vec<f64>,
    /// Probability, as above.
    pub(crate) predicted: Vec<f64>,
    /// Voxels where the truth is this channel, as above.
    pub(crate) truth: Vec<f64>,
    /// Of the voxels that take part, or of the chosen ones.
    pub(crate) cross_entropy: f64,
    /// Voxels that take part.
    pub(crate) valid: usize,
    /// The voxels of the largest cross-entropies, if they were asked for; `[sample][voxel]`.
    pub(crate) chosen: Option<Vec<bool>>,
}

/// The sums of one piece, channels filled up to whole blocks.
struct Part {
    intersection: Vec<f64>,
    predicted: Vec<f64>,
    truth: Vec<f64>,
    cross_entropy: f64,
    valid: usize,
    /// The cross-entropy of every voxel, if asked for, zero for ignored ones.
    each: Vec<f32>,
}

impl Part {
    fn new(p: &Problem<'_>) -> Self {
        let zeros = vec![0.0; p.blocks() * BLOCK];
        Self {
            intersection: zeros.clone(),
            predicted: zeros.clone(),
            truth: zeros,
            cross_entropy: 0.0,
            valid: 0,
            each: Vec::new(),
        }
    }
}

/// How the loss grows with the sums.
#[derive(Debug, Clone)]
pub(crate) struct Slopes<'a> {
    /// With the intersection, `[block]` per sample or for all; zero in lanes without a channel.
    pub(crate) intersection: &'a [[f32; BLOCK]],
    /// With the predicted volume, as above.
    pub(crate) predicted: &'a [[f32; BLOCK]],
    /// With the cross-entropy.
    pub(crate) cross_entropy: f32,
    /// The voxels whose cross-entropy counts, `[sample][voxel]`; all without.
    pub(crate) chosen: Option<&'a [bool]>,
}

/// The sums over the logits `x`, and who computed them. With `top`, the cross-entropy is that of so many voxels for which it
/// is largest, among equals of the first; softmax only.
pub(crate) fn forward(
    isa: Isa,
    name: Option<&str>,
    p: &Problem<'_>,
    top: Option<usize>,
    x: &[f32],
) -> Result<(Sums, &'static str)> {
    let i = pick(&LOSS, isa, &(), name).ok_or_else(|| no_implementation("loss", name))?;
    let (x, _) = x.as_chunks::<BLOCK>();
    let pieces = p.voxels.div_ceil(PIECE);
    let parts = par::map(p.labels.len() / p.voxels * pieces, |k| {
        let (sample, at) = (k / pieces, k % pieces * PIECE);
        let len = PIECE.min(p.voxels - at);
        let row = |b: usize| &x[(sample * p.blocks() + b) * p.voxels + at..][..len];
        let rows: Vec<&Row> = (0..p.blocks()).map(row).collect();
        let labels = &p.labels[sample * p.voxels + at..][..len];
        match p.regions {
            None => softmax_sums::on(i.isa, p, &rows, labels, top.is_some()),
            Some(members) => region_sums::on(i.isa, p, members, &rows, labels),
        }
    });
    let real = |of: &dyn Fn(&Part) -> &[f64]| -> Vec<f64> {
        let samples = parts.chunks(pieces);
        samples.flat_map(|s| (0..p.channels).map(move |c| s.iter().map(|part| of(part)[c]).sum())).collect()
    };
    let mut sums = Sums {
        intersection: real(&|s| &s.intersection),
        predicted: real(&|s| &s.predicted),
        truth: real(&|s| &s.truth),
        cross_entropy: parts.iter().map(|s| s.cross_entropy).sum(),
        valid: parts.iter().map(|s| s.valid).sum(),
        chosen: None,
    };
    if let Some(top) = top {
        let each: Vec<f32> = parts.iter().flat_map(|s| &s.each).copied().collect();
        let chosen = largest(&each, top);
        let counted = each.iter().zip(&chosen).filter(|(_, chosen)| **chosen);
        sums.cross_entropy = counted.map(|(e, _)| f64::from(*e)).sum();
        sums.chosen = Some(chosen);
    }
    Ok((sums, i.name))
}

/// Which of `values` are the `count` largest; among equals the first ones, NaN above all.
fn largest(values: &[f32], count: usize) -> Vec<bool> {
    let mut sorted = values.to_vec();
    let place = values.len() - count.clamp(1, values.len());
    let least = *sorted.select_nth_unstable_by(place, f32::total_cmp).1;
    let mut equal = count - values.iter().filter(|v| v.total_cmp(&least).is_gt()).count();
    let is_chosen = |v: &f32| match v.total_cmp(&least) {
        std::cmp::Ordering::Greater => true,
        std::cmp::Ordering::Equal if equal > 0 => {
            equal -= 1;
            true
        }
        _ => false,
    };
    values.iter().map(is_chosen).collect()
}

/// Writes the gradient by the logits to `out`: of the logits `x`, or of those in `out`, which it replaces. `name` as
/// [`forward`] has returned it.
pub(crate) fn backward(
    isa: Isa,
    name: &str,
    p: &Problem<'_>,
    slopes: &Slopes<'_>,
    x: Option<&[f32]>,
    out: &mut [f32],
) -> Result<()> {
    let i = pick(&LOSS, isa, &(), Some(name)).ok_or_else(|| no_implementation("loss", Some(name)))?;
    let x = x.map(|x| x.as_chunks::<BLOCK>().0);
    let (blocks, pieces) = (p.blocks(), p.voxels.div_ceil(PIECE));
    // The blocks of a piece lie apart.
    let mut rows: Vec<Vec<&mut Row>> = Vec::new();
    for sample in out.as_chunks_mut::<BLOCK>().0.chunks_exact_mut(blocks * p.voxels) {
        let first = rows.len();
        rows.resize_with(first + pieces, || Vec::with_capacity(blocks));
        for block in sample.chunks_exact_mut(p.voxels) {
            block.chunks_mut(PIECE).zip(&mut rows[first..]).for_each(|(part, rows)| rows.push(part));
        }
    }
    par::each(rows, |k, mut out| {
        let (sample, at) = (k / pieces, k % pieces * PIECE);
        let len = PIECE.min(p.voxels - at);
        let voxels = sample * p.voxels + at..sample * p.voxels + at + len;
        let row = |b: usize| x.map(|x| &x[(sample * blocks + b) * p.voxels + at..][..len]);
        let x: Option<Vec<&Row>> = (0..blocks).map(row).collect();
        let own = |all: &'_ [[f32; BLOCK]]| {
            if all.len() == blocks { 0..blocks } else { sample * blocks..(sample + 1) * blocks }
        };
        let slopes = Slopes {
            intersection: &slopes.intersection[own(slopes.intersection)],
            predicted: &slopes.predicted[own(slopes.predicted)],
            cross_entropy: slopes.cross_entropy,
            chosen: slopes.chosen.map(|c| &c[voxels.clone()]),
        };
        let labels = &p.labels[voxels];
        match p.regions {
            None => softmax_gradient::on(i.isa, p, &slopes, x.as_deref(), labels, &mut out),
            Some(members) => region_gradient::on(i.isa, p, members, &slopes, x.as_deref(), labels, &mut out),
        }
    });
    Ok(())
}

use regions::{region_gradient_piece, region_sums_piece};
use softmax::{softmax_gradient_piece, softmax_sums_piece};

simd_entry!(softmax_sums = softmax_sums_piece(p: &Problem<'_>, x: &[&Row], labels: &[u16], each: bool) -> Part);
simd_entry!(softmax_gradient = softmax_gradient_piece(p: &Problem<'_>, slopes: &Slopes<'_>, x: Option<&[&Row]>,
    labels: &[u16], out: &mut [&mut Row]));
simd_entry!(region_sums = region_sums_piece(p: &Problem<'_>, members: &Members, x: &[&Row], labels: &[u16]) -> Part);
simd_entry!(region_gradient = region_gradient_piece(p: &Problem<'_>, members: &Members, slopes: &Slopes<'_>,
    x: Option<&[&Row]>, labels: &[u16], out: &mut [&mut Row]));

#[cfg(test)]
mod tests {
    use super::largest;

    #[test]
    fn the_largest_are_chosen_and_the_first_among_equals() {
        let values = [1.0, 3.0, 2.0, 3.0, 0.0, 3.0];
        let chosen = |n| (0..6).filter(|&i| largest(&values, n)[i]).collect::<Vec<_>>();
        assert_eq!(chosen(1), [1]);
        assert_eq!(chosen(2), [1, 3]);
        assert_eq!(chosen(4), [1, 2, 3, 5]);
        assert_eq!(chosen(6), [0, 1, 2, 3, 4, 5]);
        assert_eq!(largest(&[1.0, f32::NAN], 1), [false, true]);
    }
}
