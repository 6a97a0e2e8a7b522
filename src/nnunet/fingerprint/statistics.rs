//! NumPy's mean, standard deviation and percentiles, in the arithmetic in which NumPy does them: sums of float32 are not
//! those of float64, and plans carry their digits.

use std::ops::Add;

use crate::base::json::Json;
use crate::base::par;

/// Of the foreground of a channel.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Statistics {
    mean: f64,
    median: f64,
    std: f64,
    min: f64,
    max: f64,
    percentile_99_5: f64,
    percentile_00_5: f64,
}

impl Statistics {
    /// Of the values of all cases, of which at least one has any.
    ///
    /// NumPy joins float32 arrays to float32, but a case without values is an empty list, whose type float64 is then that
    /// of all.
    pub(super) fn of(parts: Vec<Vec<f32>>) -> Self {
        let wide = parts.iter().any(Vec::is_empty);
        let mut values = Vec::with_capacity(parts.iter().map(Vec::len).sum());
        // One case's memory goes as the next one's values come.
        parts.into_iter().for_each(|part| values.extend(part));
        let n = values.len();
        let (mean, std) = if wide {
            let mean = pairwise(&|i| f64::from(values[i]), 0, n) / n as f64;
            let square = |i: usize| (f64::from(values[i]) - mean) * (f64::from(values[i]) - mean);
            (mean, (pairwise(&square, 0, n) / n as f64).sqrt())
        } else {
            let mean = over(pairwise(&|i| values[i], 0, n), n);
            let square = |i: usize| (values[i] - mean) * (values[i] - mean);
            (f64::from(mean), f64::from(over(pairwise(&square, 0, n), n).sqrt()))
        };
        let places = [0.5, 50.0, 99.5].map(|p| (n - 1) as f64 * (p / 100.0));
        let mut ranks = vec![0, n - 1];
        ranks.extend(places.iter().flat_map(|p| [*p as usize, (*p as usize + 1).min(n - 1)]));
        ranks.sort_unstable();
        ranks.dedup();
        select(&mut values, 0, &ranks);
        let at = |rank: usize| f64::from(values[rank]);
        let percentile = |place: f64| {
            let (low, high) = (at(place as usize), at((place as usize + 1).min(n - 1)));
            let diff = if wide { high - low } else { f64::from((high - low) as f32) };
            interpolate(low, high, diff, place.fract())
        };
        let [percentile_00_5, median, percentile_99_5] = places.map(percentile);
        Self { mean, median, std, min: at(0), max: at(n - 1), percentile_99_5, percentile_00_5 }
    }

    /// With keys in the order in which nnU-Net's file has them.
    pub(super) fn to_json(&self) -> Json {
        Json::object([
            ("max", self.max.into()),
            ("mean", self.mean.into()),
            ("median", self.median.into()),
            ("min", self.min.into()),
            ("percentile_00_5", self.percentile_00_5.into()),
            ("percentile_99_5", self.percentile_99_5.into()),
            ("std", self.std.into()),
        ])
    }
}

/// A float32 divided by an int64, which NumPy does in float64.
fn over(sum: f32, n: usize) -> f32 {
    (f64::from(sum) / n as f64) as f32
}

/// NumPy's `_lerp`, from the nearer end.
pub(crate) fn interpolate(low: f64, high: f64, diff: f64, share: f64) -> f64 {
    if share >= 0.5 { high - diff * (1.0 - share) } else { low + diff * share }
}

/// NumPy's sum of `get(begin..begin + n)`: halves, down to blocks of 128 in eight strands.
pub(crate) fn pairwise<T: Copy + Add<Output = T> + Send>(
    get: &(impl Fn(usize) -> T + Sync),
    begin: usize,
    n: usize,
) -> T {
    const BLOCK: usize = 128;
    if n < 8 {
        return (begin + 1..begin + n).fold(get(begin), |sum, i| sum + get(i));
    }
    if n <= BLOCK {
        let mut r: [T; 8] = std::array::from_fn(|k| get(begin + k));
        for at in (8..n - n % 8).step_by(8) {
            for (k, r) in r.iter_mut().enumerate() {
                *r = *r + get(begin + at + k);
            }
        }
        let sum = ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]));
        return (begin + n - n % 8..begin + n).fold(sum, |sum, i| sum + get(i));
    }
    let half = n / 2 - n / 2 % 8;
    let (left, right) = (|| pairwise(get, begin, half), || pairwise(get, begin + half, n - half));
    let (left, right) = if n > 1 << 16 { par::join(left, right) } else { (left(), right()) };
    left + right
}

/// Brings the values of the given rising ranks, counted from `first`, to their places.
fn select(values: &mut [f32], first: usize, ranks: &[usize]) {
    let Some(&rank) = ranks.get(ranks.len() / 2) else { return };
    let middle = rank - first;
    values.select_nth_unstable_by(middle, f32::total_cmp);
    let (low, high) = values.split_at_mut(middle);
    let (below, above) = ranks.split_at(ranks.len() / 2);
    par::join(|| select(low, first, below), || select(&mut high[1..], rank + 1, &above[1..]));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same values as in the script that gave the known answers: NumPy 2.4 on float32 and float64.
    fn values(n: usize) -> Vec<f32> {
        (0..n as u64).map(|i| ((i * i * 7919 + i * 104_729) % 100_003) as f32 / 7.0 - 7000.0).collect()
    }

    #[test]
    fn numbers_are_those_of_numpy() {
        for (n, expected) in NARROW {
            assert_eq!(numbers(&Statistics::of(vec![values(n)])), expected, "{n}");
        }
        for (n, expected) in WIDE {
            assert_eq!(numbers(&Statistics::of(vec![Vec::new(), values(n)])), expected, "{n}");
        }
    }

    fn numbers(s: &Statistics) -> [f64; 7] {
        [s.mean, s.median, s.std, s.min, s.max, s.percentile_99_5, s.percentile_00_5]
    }

    const NARROW: [(usize, [f64; 7]); 5] = [
        (1, [-7000.0, -7000.0, 0.0, -7000.0, -7000.0, -7000.0, -7000.0]),
        (
            7,
            [
                -2513.12255859375,
                -3914.428466796875,
                3808.217529296875,
                -7000.0,
                5207.0,
                5036.239999999999,
                -6945.807138671875,
            ],
        ),
        (
            100,
            [
                -116.01570129394531,
                -562.5,
                3991.6943359375,
                -7000.0,
                7244.2861328125,
                7119.121708984374,
                -6973.411394042969,
            ],
        ),
        (
            1000,
            [
                169.32945251464844,
                148.571533203125,
                4138.27880859375,
                -7000.0,
                7283.857421875,
                7250.34755859375,
                -6946.292072753906,
            ],
        ),
        (
            300001,
            [161.59796142578125, 165.85693359375, 4121.90283203125, -7000.0, 7286.0, 7215.5712890625, -6929.4287109375],
        ),
    ];
    const WIDE: [(usize, [f64; 7]); 3] = [
        (
            2,
            [
                -6096.78564453125,
                -6096.78564453125,
                903.21435546875,
                -7000.0,
                -5193.5712890625,
                -5202.6034326171875,
                -6990.9678564453125,
            ],
        ),
        (
            1000,
            [
                169.32942578125,
                148.571533203125,
                4138.27871194667,
                -7000.0,
                7283.857421875,
                7250.34755859375,
                -6946.292072753906,
            ],
        ),
        (
            300001,
            [
                161.59797116187346,
                165.85693359375,
                4121.9028011245855,
                -7000.0,
                7286.0,
                7215.5712890625,
                -6929.4287109375,
            ],
        ),
    ];
}
