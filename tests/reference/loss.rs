//! nnU-Net's losses (`training/loss/compound_losses.py`, `dice.py`), with their gradients written out.

use super::tape::{Array, Sum, Tape, Var, sum};

/// How a Dice loss is taken.
#[derive(Debug, Clone, Copy)]
pub struct Dice {
    /// Whether the overlap is that of the whole batch instead of each sample's.
    pub batch: bool,
    /// Whether channel 0 counts.
    pub background: bool,
    /// Added to numerator and denominator.
    pub smooth: f64,
}

impl Dice {
    /// `-mean((2 I + smooth) / (P + G + smooth))` over channels, and samples unless they are taken together, with
    /// `I = sum p g`, `P = sum p` and `G = sum g` over voxels where `mask` is 1; and its gradient by `p`.
    ///
    /// `p`, `g`: `[N, C, voxels]`; `mask`: `[N, voxels]`.
    fn loss(self, [n, c, voxels]: [usize; 3], p: &[f64], g: &[f64], mask: &[f64]) -> (f64, Vec<f64>) {
        let first = usize::from(!self.background);
        let groups = if self.batch { 1 } else { n };
        let group = |nc: usize| (if self.batch { 0 } else { nc / c }) * c + nc % c;
        let mut sums = vec![[Sum::default(); 3]; groups * c];
        for nc in 0..n * c {
            let [i_sum, p_sum, g_sum] = &mut sums[group(nc)];
            for v in 0..voxels {
                let (p, g, m) = (p[nc * voxels + v], g[nc * voxels + v], mask[nc / c * voxels + v]);
                i_sum.add(p * g * m);
                p_sum.add(p * m);
                g_sum.add(g * m);
            }
        }
        let ratio = |[i, p, g]: [Sum; 3]| {
            let denominator = (p.value() + g.value() + self.smooth).max(1e-8);
            ((2.0 * i.value() + self.smooth) / denominator, denominator)
        };
        let ratios: Vec<(f64, f64)> = sums.into_iter().map(ratio).collect();
        let counts = |nc: usize| nc % c >= first;
        let terms = (groups * (c - first)) as f64;
        let loss = -sum((0..groups * c).filter(|nc| counts(*nc)).map(|nc| ratios[nc].0)) / terms;
        let mut dp = vec![0.0; p.len()];
        for nc in (0..n * c).filter(|nc| counts(*nc)) {
            let (ratio, denominator) = ratios[group(nc)];
            for v in 0..voxels {
                let m = mask[nc / c * voxels + v];
                dp[nc * voxels + v] = -m * (2.0 * g[nc * voxels + v] - ratio) / (denominator * terms);
            }
        }
        (loss, dp)
    }
}

/// Softmax and its logarithm over the channels of `x [N, C, voxels]`.
fn softmax([n, c, voxels]: [usize; 3], x: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let (mut p, mut log) = (vec![0.0; x.len()], vec![0.0; x.len()]);
    for (n, v) in (0..n).flat_map(|n| (0..voxels).map(move |v| (n, v))) {
        let at = |k: usize| (n * c + k) * voxels + v;
        let largest = (0..c).map(|k| x[at(k)]).fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = (0..c).map(|k| (x[at(k)] - largest).exp()).sum();
        for k in 0..c {
            log[at(k)] = x[at(k)] - largest - total.ln();
            p[at(k)] = (x[at(k)] - largest).exp() / total;
        }
    }
    (p, log)
}

fn sizes(x: &Array) -> [usize; 3] {
    [x.dims[0], x.dims[1], x.voxels()]
}

impl Tape {
    /// Cross-entropy + Dice of the softmax of `logits [N, C, D, H, W]` with the labels `target [N, D, H, W]`. Voxels of
    /// the label `ignore` take no part; where there are no others, the cross-entropy is zero.
    pub fn dice_ce(&mut self, logits: Var, target: &[u8], dice: Dice, ignore: Option<u8>) -> Var {
        let x = self.value(logits);
        let size @ [n, c, voxels] = sizes(x);
        assert_eq!(target.len(), n * voxels, "labels");
        let mask: Vec<f64> = target.iter().map(|t| f64::from(u8::from(Some(*t) != ignore))).collect();
        // Position in `x` of every voxel's true channel.
        let truth = |i: usize| {
            let label = if mask[i] == 0.0 { 0 } else { usize::from(target[i]) };
            assert!(label < c, "label {label} of {c} classes");
            (i / voxels * c + label) * voxels + i % voxels
        };
        let mut one_hot = vec![0.0; x.values.len()];
        (0..target.len()).for_each(|i| one_hot[truth(i)] = 1.0);

        let (p, log) = softmax(size, &x.values);
        let valid: f64 = mask.iter().sum();
        // No valid voxel: every term is zero, whatever the divisor.
        let share = 1.0 / valid.max(1.0);
        let ce = -share * sum((0..target.len()).map(|i| mask[i] * log[truth(i)]));
        let (overlap, dp) = dice.loss(size, &p, &one_hot, &mask);

        let mut dx = vec![0.0; p.len()];
        for i in 0..n * voxels {
            let at = |k: usize| (i / voxels * c + k) * voxels + i % voxels;
            let along: f64 = (0..c).map(|k| p[at(k)] * dp[at(k)]).sum();
            for k in (0..c).map(at) {
                dx[k] = share * mask[i] * (p[k] - one_hot[k]) + p[k] * (dp[k] - along);
            }
        }
        self.loss(logits, ce + overlap, dx)
    }

    /// Binary cross-entropy + Dice of the sigmoid of `logits [N, C, D, H, W]` with `target`, 0 or 1 for each of the C
    /// regions, `[N, C, D, H, W]`; or `[N, C + 1, D, H, W]`, whose last channel then marks voxels that take no part.
    pub fn dice_bce(&mut self, logits: Var, target: &[u8], dice: Dice, ignore_channel: bool) -> Var {
        let x = self.value(logits);
        let size @ [n, c, voxels] = sizes(x);
        let channels = c + usize::from(ignore_channel);
        assert_eq!(target.len(), n * channels * voxels, "regions");
        let (mut g, mut mask) = (Vec::with_capacity(x.values.len()), Vec::with_capacity(n * voxels));
        for sample in target.chunks_exact(channels * voxels) {
            let (regions, ignored) = sample.split_at(c * voxels);
            g.extend(regions.iter().map(|t| f64::from(*t)));
            mask.extend((0..voxels).map(|v| 1.0 - ignored.get(v).map_or(0.0, |t| f64::from(*t))));
        }
        let p: Vec<f64> = x.values.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect();
        let (overlap, dp) = dice.loss(size, &p, &g, &mask);
        let mask_of = |i: usize| mask[i / (c * voxels) * voxels + i % voxels];
        // With a mask the sum over all regions is divided by the number of voxels alone.
        let divisor = if ignore_channel { mask.iter().sum::<f64>().max(1e-8) } else { p.len() as f64 };
        let term = |(i, x): (usize, &f64)| mask_of(i) * (x.max(0.0) - x * g[i] + (-x.abs()).exp().ln_1p());
        let bce = sum(x.values.iter().enumerate().map(term)) / divisor;
        let slope = |i: usize| mask_of(i) * (p[i] - g[i]) / divisor + dp[i] * p[i] * (1.0 - p[i]);
        let dx = (0..p.len()).map(slope).collect();
        self.loss(logits, bce + overlap, dx)
    }

    fn loss(&mut self, logits: Var, value: f64, dx: Vec<f64>) -> Var {
        self.result(Array::new([1; 5], vec![value]), &[logits], move |_, dy, gradients| {
            gradients.add(logits, || dx.iter().map(|dx| dx * dy[0]).collect());
        })
    }
}
