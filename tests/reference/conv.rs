//! Convolutions: one walk over the taps, and what each pass does at a tap.

use super::tape::{Array, Tape, Var};

/// Sizes of a convolution of an input that is already padded.
#[derive(Debug, Clone, Copy)]
struct Geometry {
    batch: usize,
    /// Channels of the side with the larger space, a convolution's input.
    wide: usize,
    /// Channels of the other side, a convolution's output.
    narrow: usize,
    large: [usize; 3],
    small: [usize; 3],
    kernel: [usize; 3],
    stride: [usize; 3],
}

impl Geometry {
    /// Of the filters `w [narrow, wide, KD, KH, KW]`.
    fn new(batch: usize, w: &Array, stride: [usize; 3], large: [usize; 3], small: [usize; 3]) -> Self {
        let [narrow, wide, ..] = w.dims;
        Self { batch, wide, narrow, large, small, kernel: w.space(), stride }
    }

    /// Calls `tap(w, x, y)` with where a tap is and where the rows along x start that it connects: element `i` of the
    /// small row belongs to element `i * stride` of the large one.
    fn for_each_tap(&self, mut tap: impl FnMut(usize, usize, usize)) {
        let ([ld, lh, lw], [sd, sh, sw]) = (self.large, self.small);
        let ([kd, kh, kw], [stride_z, stride_y, _]) = (self.kernel, self.stride);
        for n in 0..self.batch {
            for co in 0..self.narrow {
                for (z, y) in (0..sd).flat_map(|z| (0..sh).map(move |y| (z, y))) {
                    let small = (((n * self.narrow + co) * sd + z) * sh + y) * sw;
                    for ci in 0..self.wide {
                        for (kz, ky) in (0..kd).flat_map(|kz| (0..kh).map(move |ky| (kz, ky))) {
                            let plane = (n * self.wide + ci) * ld + z * stride_z + kz;
                            let large = (plane * lh + y * stride_y + ky) * lw;
                            let w = (((co * self.wide + ci) * kd + kz) * kh + ky) * kw;
                            for kx in 0..kw {
                                tap(w + kx, large + kx, small);
                            }
                        }
                    }
                }
            }
        }
    }

    /// From the large side to the small one.
    fn gather(&self, large: &[f64], w: &[f64]) -> Vec<f64> {
        let [sd, sh, width] = self.small;
        let mut out = vec![0.0; self.batch * self.narrow * sd * sh * width];
        let step = self.stride[2];
        self.for_each_tap(|tap, x, y| {
            let a = w[tap];
            let row = &mut out[y..y + width];
            // The unit stride by itself is what vectorises.
            if step == 1 {
                row.iter_mut().zip(&large[x..x + width]).for_each(|(y, x)| *y += a * x);
            } else {
                row.iter_mut().zip(large[x..].iter().step_by(step)).for_each(|(y, x)| *y += a * x);
            }
        });
        out
    }

    /// From the small side to the large one: the transpose of [`Geometry::gather`].
    fn scatter(&self, small: &[f64], w: &[f64]) -> Vec<f64> {
        let [ld, lh, lw] = self.large;
        let mut out = vec![0.0; self.batch * self.wide * ld * lh * lw];
        let (width, step) = (self.small[2], self.stride[2]);
        self.for_each_tap(|tap, x, y| {
            let a = w[tap];
            let row = &small[y..y + width];
            if step == 1 {
                out[x..x + width].iter_mut().zip(row).for_each(|(x, y)| *x += a * y);
            } else {
                out[x..].iter_mut().step_by(step).zip(row).for_each(|(x, y)| *x += a * y);
            }
        });
        out
    }

    /// What both sides say about the filters.
    fn correlate(&self, large: &[f64], small: &[f64]) -> Vec<f64> {
        let taps: usize = self.kernel.iter().product();
        let mut out = vec![0.0; self.narrow * self.wide * taps];
        let (width, step) = (self.small[2], self.stride[2]);
        self.for_each_tap(|tap, x, y| {
            let row = &small[y..y + width];
            out[tap] += if step == 1 {
                dot(&large[x..x + width], row)
            } else {
                large[x..].iter().step_by(step).zip(row).map(|(x, y)| x * y).sum()
            };
        });
        out
    }
}

/// In eight strands, which a processor adds side by side.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut strands = [0.0; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f64 = a8.remainder().iter().zip(b8.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a8.zip(b8) {
        for i in 0..8 {
            strands[i] += a[i] * b[i];
        }
    }
    let [a, b, c, d, e, f, g, h] = strands;
    ((a + b) + (c + d)) + ((e + f) + (g + h)) + rest
}

/// Copies every row of `space` from or to its place in a volume with `padding` around it.
fn for_each_row(channels: usize, space: [usize; 3], padding: [usize; 3], mut copy: impl FnMut(usize, usize)) {
    let [d, h, w] = space;
    let [pd, ph, pw] = [0, 1, 2].map(|a| space[a] + 2 * padding[a]);
    for c in 0..channels {
        for (z, y) in (0..d).flat_map(|z| (0..h).map(move |y| (z, y))) {
            copy(((c * d + z) * h + y) * w, ((c * pd + z + padding[0]) * ph + y + padding[1]) * pw + padding[2]);
        }
    }
}

/// `x` with zeros around it.
fn pad(x: &Array, padding: [usize; 3]) -> Array {
    let [n, c, d, h, w] = x.dims;
    let mut out = Array::zeros([n, c, d + 2 * padding[0], h + 2 * padding[1], w + 2 * padding[2]]);
    for_each_row(n * c, x.space(), padding, |from, to| {
        out.values[to..to + w].copy_from_slice(&x.values[from..from + w]);
    });
    out
}

/// What [`pad`] was given.
fn crop(padded: &[f64], dims: [usize; 5], padding: [usize; 3]) -> Vec<f64> {
    let [n, c, d, h, w] = dims;
    let mut out = vec![0.0; dims.iter().product()];
    for_each_row(n * c, [d, h, w], padding, |to, from| out[to..to + w].copy_from_slice(&padded[from..from + w]));
    out
}

impl Tape {
    /// `y[o] = sum_i w[o, i] * x[i]`, a cross-correlation; `x [N, Ci, D, H, W]`, `w [Co, Ci, KD, KH, KW]`.
    pub fn conv3d(&mut self, x: Var, w: Var, stride: [usize; 3], padding: [usize; 3]) -> Var {
        let (input, filters) = (pad(self.value(x), padding), self.value(w));
        assert_eq!(input.dims[1], filters.dims[1], "input channels");
        let (large, kernel) = (input.space(), filters.space());
        let small = [0, 1, 2].map(|a| (large[a] - kernel[a]) / stride[a] + 1);
        let g = Geometry::new(input.dims[0], filters, stride, large, small);
        let y = Array::new([g.batch, g.narrow, small[0], small[1], small[2]], g.gather(&input.values, &filters.values));
        self.result(y, &[x, w], move |tape, dy, gradients| {
            let (input, filters) = (tape.value(x), tape.value(w));
            gradients.add(x, || crop(&g.scatter(dy, &filters.values), input.dims, padding));
            gradients.add(w, || g.correlate(&pad(input, padding).values, dy));
        })
    }

    /// `y[o] += w[i, o] * x[i]` at every tap, without padding; `x [N, Ci, D, H, W]`, `w [Ci, Co, KD, KH, KW]`.
    pub fn conv_transpose3d(&mut self, x: Var, w: Var, stride: [usize; 3]) -> Var {
        let (input, filters) = (self.value(x), self.value(w));
        assert_eq!(input.dims[1], filters.dims[0], "input channels");
        let (small, kernel) = (input.space(), filters.space());
        let large = [0, 1, 2].map(|a| (small[a] - 1) * stride[a] + kernel[a]);
        let g = Geometry::new(input.dims[0], filters, stride, large, small);
        let y = Array::new([g.batch, g.wide, large[0], large[1], large[2]], g.scatter(&input.values, &filters.values));
        self.result(y, &[x, w], move |tape, dy, gradients| {
            gradients.add(x, || g.gather(dy, &tape.value(w).values));
            gradients.add(w, || g.correlate(dy, &tape.value(x).values));
        })
    }
}
