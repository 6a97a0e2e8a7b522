//! Counter-based random numbers: no state, so any thread may draw any number at any time.

/// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): 128 random bits for a key
/// and a counter.
#[must_use]
#[inline]
pub(crate) fn philox4x32(key: [u32; 2], counter: [u32; 4]) -> [u32; 4] {
    const M: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
    const W: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    let ([mut k0, mut k1], mut c) = (key, counter);
    for _ in 0..10 {
        let p0 = u64::from(M[0]) * u64::from(c[0]);
        let p1 = u64::from(M[1]) * u64::from(c[2]);
        c = [(p1 >> 32) as u32 ^ c[1] ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ k1, p0 as u32];
        k0 = k0.wrapping_add(W[0]);
        k1 = k1.wrapping_add(W[1]);
    }
    c
}

/// Names a stream of numbers by what it is for. The first word is not 0: 0 is for the streams of [`Rng::new`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Key {
    pub(crate) seed: u64,
    pub(crate) words: [u32; 3],
}

impl Key {
    /// The four numbers at place `count` of the stream.
    #[inline]
    pub(crate) fn four(self, count: u32) -> [u32; 4] {
        let [a, b, c] = self.words;
        philox4x32([self.seed as u32, (self.seed >> 32) as u32], [count, a, b, c])
    }
}

/// A stream of numbers keyed by a seed and a purpose, so that two uses of one seed never share numbers.
#[derive(Debug, Clone)]
pub(crate) struct Rng {
    key: [u32; 2],
    counter: u128,
    held: [u32; 4],
    left: usize,
}

impl Rng {
    /// The stream number `stream` of `seed`.
    #[must_use]
    pub(crate) fn new(seed: u64, stream: u64) -> Self {
        Self { key: [seed as u32, (seed >> 32) as u32], counter: u128::from(stream) << 64, held: [0; 4], left: 0 }
    }

    /// The stream named `key`, good for 2^34 numbers.
    #[must_use]
    pub(crate) fn keyed(key: Key) -> Self {
        let [a, b, c] = key.words.map(u128::from);
        Self { counter: a << 32 | b << 64 | c << 96, ..Self::new(key.seed, 0) }
    }

    /// 32 random bits.
    pub(crate) fn bits(&mut self) -> u32 {
        if self.left == 0 {
            let c = self.counter;
            self.held = philox4x32(self.key, [c as u32, (c >> 32) as u32, (c >> 64) as u32, (c >> 96) as u32]);
            self.counter += 1;
            self.left = 4;
        }
        self.left -= 1;
        self.held[3 - self.left]
    }

    /// Uniform in [0, 1) with 32 bits.
    pub(crate) fn unit(&mut self) -> f64 {
        f64::from(self.bits()) / 4_294_967_296.0
    }

    /// Uniform in [lo, hi).
    pub(crate) fn uniform(&mut self, lo: f64, hi: f64) -> f64 {
        lo + (hi - lo) * self.unit()
    }

    /// True with probability `p`.
    pub(crate) fn chance(&mut self, p: f64) -> bool {
        self.unit() < p
    }

    /// A whole number in `0..n`, each as likely as the others to 2^-64 n; 0 for `n = 0`.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        let bits = u64::from(self.bits()) << 32 | u64::from(self.bits());
        ((u128::from(bits) * u128::from(n)) >> 64) as u64
    }

    /// Brings `items` into a random order (Fisher and Yates).
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }

    /// Standard normal (Box-Muller).
    pub(crate) fn normal(&mut self) -> f64 {
        let (u, v) = (1.0 - self.unit(), self.unit());
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the Random123 distribution.
    #[test]
    fn philox_known_answers() {
        assert_eq!(philox4x32([0; 2], [0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32([u32::MAX; 2], [u32::MAX; 4]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox4x32([0xa409_3822, 0x299f_31d0], [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn a_keyed_stream_is_the_numbers_at_its_places() {
        let key = Key { seed: 0x0123_4567_89ab_cdef, words: [1, 2, 3] };
        let mut rng = Rng::keyed(key);
        let drawn: Vec<u32> = (0..8).map(|_| rng.bits()).collect();
        assert_eq!(drawn, [key.four(0), key.four(1)].concat());
    }
}
