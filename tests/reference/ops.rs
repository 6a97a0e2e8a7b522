//! Everything between the convolutions.

use super::tape::{Array, Sum, Tape, Var, sum};

/// What PyTorch and nnU-Net add to the variance.
const EPS: f64 = 1e-5;

/// Mean and 1 / standard deviation of each channel of each sample, the variance with `voxels` as its divisor.
fn moments(x: &Array) -> Vec<(f64, f64)> {
    let voxels = x.voxels() as f64;
    let of = |x: &[f64]| {
        let mean = sum(x.iter().copied()) / voxels;
        let variance = sum(x.iter().map(|v| (v - mean).powi(2))) / voxels;
        (mean, 1.0 / (variance + EPS).sqrt())
    };
    x.values.chunks_exact(x.voxels()).map(of).collect()
}

/// Sums of each channel over samples and voxels.
fn channel_sums(dims: [usize; 5], mut values: impl Iterator<Item = f64>) -> Vec<f64> {
    let [n, c, d, h, w] = dims;
    let mut sums = vec![Sum::default(); c];
    for nc in 0..n * c {
        values.by_ref().take(d * h * w).for_each(|v| sums[nc % c].add(v));
    }
    sums.into_iter().map(Sum::value).collect()
}

/// The place in `x [N, C, D, H, W]` of every voxel of an array `factor` times as large.
fn repeated(dims: [usize; 5], factor: [usize; 3]) -> impl Iterator<Item = usize> {
    let [n, c, d, h, w] = dims;
    let [od, oh, ow] = [d * factor[0], h * factor[1], w * factor[2]];
    let rows = (0..n * c).flat_map(move |nc| (0..od).flat_map(move |z| (0..oh).map(move |y| (nc, z, y))));
    rows.flat_map(move |(nc, z, y)| {
        let row = ((nc * d + z / factor[0]) * h + y / factor[1]) * w;
        (0..ow).map(move |x| row + x / factor[2])
    })
}

impl Tape {
    /// One number per channel on every voxel; `b [C, 1, 1, 1, 1]`.
    pub fn bias(&mut self, x: Var, b: Var) -> Var {
        let (input, bias) = (self.value(x), &self.value(b).values);
        assert_eq!(bias.len(), input.dims[1], "channels");
        let mut y = input.clone();
        for (nc, y) in y.values.chunks_exact_mut(input.voxels()).enumerate() {
            y.iter_mut().for_each(|y| *y += bias[nc % bias.len()]);
        }
        let dims = y.dims;
        self.result(y, &[x, b], move |_, dy, gradients| {
            gradients.add(x, || dy.to_vec());
            gradients.add(b, || channel_sums(dims, dy.iter().copied()));
        })
    }

    /// `gain * (x - mean) / sqrt(variance + 1e-5) + shift`, both moments of each channel of each sample;
    /// `gain`, `shift [C, 1, 1, 1, 1]`.
    pub fn instance_norm(&mut self, x: Var, gain: Var, shift: Var) -> Var {
        let input = self.value(x);
        let (c, voxels, dims) = (input.dims[1], input.voxels(), input.dims);
        let moments = moments(input);
        let mut y = input.clone();
        for ((nc, y), (mean, inv)) in y.values.chunks_exact_mut(voxels).enumerate().zip(&moments) {
            let (gain, shift) = (self.value(gain).values[nc % c], self.value(shift).values[nc % c]);
            y.iter_mut().for_each(|y| *y = (*y - mean) * inv * gain + shift);
        }
        self.result(y, &[x, gain, shift], move |tape, dy, gradients| {
            let x_hat = || {
                let channels = tape.value(x).values.chunks_exact(voxels).zip(&moments);
                channels.flat_map(|(x, (mean, inv))| x.iter().map(move |v| (v - mean) * inv))
            };
            gradients.add(gain, || channel_sums(dims, x_hat().zip(dy).map(|(x, dy)| x * dy)));
            gradients.add(shift, || channel_sums(dims, dy.iter().copied()));
            gradients.add(x, || {
                let mut dx: Vec<f64> = x_hat().collect();
                for ((nc, dx), dy) in dx.chunks_exact_mut(voxels).enumerate().zip(dy.chunks_exact(voxels)) {
                    let mean_dy = sum(dy.iter().copied()) / voxels as f64;
                    let mean_dy_x = sum(dx.iter().zip(dy).map(|(x, dy)| x * dy)) / voxels as f64;
                    let scale = tape.value(gain).values[nc % c] * moments[nc].1;
                    dx.iter_mut().zip(dy).for_each(|(x, dy)| *x = scale * ((dy - mean_dy) - *x * mean_dy_x));
                }
                dx
            });
        })
    }

    /// Of each channel, the most that rounding leaves of the sum over voxels of an instance norm's gradient by `x`,
    /// which is zero in exact arithmetic; `dy` is the gradient by the norm's result.
    ///
    /// With `s = gain / deviation` and `m = mean(dy * x_hat)` the sum is `s * (sum(dy) - n * mean(dy) - m *
    /// sum(x_hat))`. In units of roundoff and to first order, compensated sums being exact to 2: the first two terms
    /// leave 3 `sum |dy|`, the last `|m| / deviation` times 3 `sum |x|` from the mean and 2 `sum |x - mean|` from its
    /// own operations; the elements of the gradient come with 4 and their sum with 2 of `|s| * (2 sum |dy| + |m| sum
    /// |x_hat|)`. All deviations from the mean together are at most twice `sum |x|`, so that 15 and 19 are the factors
    /// of the two kinds; 20 covers the second order.
    pub fn norm_gradient_rounding(&self, x: Var, gain: Var, dy: &[f64]) -> Vec<f64> {
        let (input, gain) = (self.value(x), &self.value(gain).values);
        let voxels = input.voxels();
        let mut out = vec![0.0; gain.len()];
        let channels = input.values.chunks_exact(voxels).zip(dy.chunks_exact(voxels)).zip(moments(input));
        for (nc, ((x, dy), (mean, inv))) in channels.enumerate() {
            let m = sum(x.iter().zip(dy).map(|(x, dy)| (x - mean) * inv * dy)) / voxels as f64;
            let of = |v: &[f64]| v.iter().map(|v| v.abs()).sum::<f64>();
            let c = nc % gain.len();
            out[c] += 20.0 * (f64::EPSILON / 2.0) * (gain[c] * inv).abs() * (of(dy) + m.abs() * inv * of(x));
        }
        out
    }

    /// `x`, or `slope * x` below zero.
    pub fn leaky_relu(&mut self, x: Var, slope: f64) -> Var {
        let mut y = self.value(x).clone();
        y.values.iter_mut().filter(|y| **y <= 0.0).for_each(|y| *y *= slope);
        let this = self.next();
        self.result(y, &[x], move |tape, dy, gradients| {
            gradients.add(x, || {
                let x = &tape.value(x).values;
                let mut dx: Vec<f64> =
                    x.iter().zip(dy).map(|(x, dy)| if *x > 0.0 { *dy } else { slope * dy }).collect();
                tape.turned(this).for_each(|i| dx[i] = if x[i] > 0.0 { slope * dy[i] } else { dy[i] });
                dx
            });
        })
    }

    pub fn add(&mut self, a: Var, b: Var) -> Var {
        assert_eq!(self.value(a).dims, self.value(b).dims, "sizes");
        let mut y = self.value(a).clone();
        y.values.iter_mut().zip(&self.value(b).values).for_each(|(y, b)| *y += b);
        self.result(y, &[a, b], move |_, dy, gradients| {
            gradients.add(a, || dy.to_vec());
            gradients.add(b, || dy.to_vec());
        })
    }

    /// The channels of `a`, then those of `b`.
    pub fn concat(&mut self, a: Var, b: Var) -> Var {
        let (va, vb) = (self.value(a), self.value(b));
        let ([n, ca, d, h, w], cb) = (va.dims, vb.dims[1]);
        assert_eq!(vb.dims, [n, cb, d, h, w], "sizes");
        let [la, lb] = [ca, cb].map(|c| c * d * h * w);
        let samples = va.values.chunks_exact(la).zip(vb.values.chunks_exact(lb));
        let values = samples.flat_map(|(a, b)| a.iter().chain(b).copied()).collect();
        self.result(Array::new([n, ca + cb, d, h, w], values), &[a, b], move |_, dy, gradients| {
            let samples = || dy.chunks_exact(la + lb);
            gradients.add(a, || samples().flat_map(|dy| &dy[..la]).copied().collect());
            gradients.add(b, || samples().flat_map(|dy| &dy[la..]).copied().collect());
        })
    }

    /// Every voxel `factor` times along each axis.
    pub fn upsample_nearest(&mut self, x: Var, factor: [usize; 3]) -> Var {
        let input = self.value(x);
        let dims = input.dims;
        let values = repeated(dims, factor).map(|i| input.values[i]).collect();
        let out = [dims[0], dims[1], dims[2] * factor[0], dims[3] * factor[1], dims[4] * factor[2]];
        self.result(Array::new(out, values), &[x], move |_, dy, gradients| {
            gradients.add(x, || {
                let mut dx = vec![0.0; dims.iter().product()];
                repeated(dims, factor).zip(dy).for_each(|(i, dy)| dx[i] += dy);
                dx
            });
        })
    }

    /// The mean of every `size` voxels, which follow each other without overlap.
    pub fn avg_pool(&mut self, x: Var, size: [usize; 3]) -> Var {
        let input = self.value(x);
        let [n, c, ..] = input.dims;
        assert!((0..3).all(|a| input.space()[a].is_multiple_of(size[a])), "{:?} by {size:?}", input.dims);
        let [d, h, w] = [0, 1, 2].map(|a| input.space()[a] / size[a]);
        let (out, share) = ([n, c, d, h, w], 1.0 / size.iter().product::<usize>() as f64);
        let mut y = Array::zeros(out);
        repeated(out, size).zip(&input.values).for_each(|(i, x)| y.values[i] += share * x);
        self.result(y, &[x], move |_, dy, gradients| {
            gradients.add(x, || repeated(out, size).map(|i| share * dy[i]).collect());
        })
    }

    /// `sum_i weights[i] * losses[i]`, without those of weight zero, which get no gradient.
    pub fn weighted_sum(&mut self, losses: &[Var], weights: &[f64]) -> Var {
        let terms = losses.iter().copied().zip(weights.iter().copied()).filter(|(_, w)| *w != 0.0);
        let terms: Vec<(Var, f64)> = terms.collect();
        let value = sum(terms.iter().map(|(v, w)| w * self.value(*v).values[0]));
        let inputs: Vec<Var> = terms.iter().map(|(v, _)| *v).collect();
        self.result(Array::new([1; 5], vec![value]), &inputs, move |_, dy, gradients| {
            terms.iter().for_each(|(v, w)| gradients.add(*v, || vec![w * dy[0]]));
        })
    }
}
