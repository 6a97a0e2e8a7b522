//! NumPy's legacy random numbers (`numpy.random.RandomState`), bit for bit: nnU-Net draws its splits, its intensity
//! samples and its class locations from them.

const N: usize = 624;
const M: usize = 397;

/// Matsumoto and Nishimura's MT19937 behind NumPy's legacy methods.
#[derive(Clone)]
pub(crate) struct RandomState {
    key: [u32; N],
    at: usize,
}

impl RandomState {
    /// `RandomState(seed)` of an integer (Knuth's generator fills the state, not `init_by_array`).
    pub(crate) fn new(seed: u32) -> Self {
        let mut key = [seed; N];
        for i in 1..N {
            let last = key[i - 1];
            key[i] = 1_812_433_253u32.wrapping_mul(last ^ (last >> 30)).wrapping_add(i as u32);
        }
        Self { key, at: N }
    }

    fn refill(&mut self) {
        let key = &mut self.key;
        let mix = |high: u32, low: u32, far: u32| {
            let y = (high & 0x8000_0000) | (low & 0x7fff_ffff);
            far ^ (y >> 1) ^ (0x9908_b0df & (y & 1).wrapping_neg())
        };
        for i in 0..N - M {
            key[i] = mix(key[i], key[i + 1], key[i + M]);
        }
        for i in N - M..N - 1 {
            key[i] = mix(key[i], key[i + 1], key[i + M - N]);
        }
        key[N - 1] = mix(key[N - 1], key[0], key[M - 1]);
        self.at = 0;
    }

    /// 32 random bits.
    pub(crate) fn bits(&mut self) -> u32 {
        if self.at == N {
            self.refill();
        }
        let mut y = self.key[self.at];
        self.at += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// An integer in `0..=max`: bits under a mask, drawn again while too large.
    fn up_to(&mut self, max: u64) -> u64 {
        if max == 0 {
            return 0;
        }
        let mask = u64::MAX >> max.leading_zeros();
        loop {
            let bits = match u32::try_from(mask) {
                Ok(mask) => u64::from(self.bits() & mask),
                Err(_) => {
                    let high = u64::from(self.bits());
                    (high << 32 | u64::from(self.bits())) & mask
                }
            };
            if bits <= max {
                return bits;
            }
        }
    }

    /// `randint(0, n)` of the default type, one number; an array of them is that many calls. It draws nothing for n = 1.
    ///
    /// # Panics
    /// `n` is 0.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        assert!(n > 0, "no integer is below 0");
        // Not above n - 1, which is a usize.
        self.up_to(n as u64 - 1) as usize
    }

    /// `shuffle(items)` of a list or of an array of one dimension.
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            let j = self.up_to(i as u64) as usize;
            items.swap(i, j);
        }
    }

    /// `permutation(n)`.
    pub(crate) fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut items: Vec<usize> = (0..n).collect();
        self.shuffle(&mut items);
        items
    }

    /// `choice(n, k, replace=False)`; `choice(items, k)` with replacement is `k` times `items[below(items.len())]`.
    ///
    /// # Panics
    /// `k > n`.
    pub(crate) fn choice(&mut self, n: usize, k: usize) -> Vec<usize> {
        assert!(k <= n, "{k} of {n} without replacement");
        // Half the memory while it fits: n may be all voxels of an image.
        let Ok(short) = u32::try_from(n) else {
            let mut items = self.permutation(n);
            items.truncate(k);
            return items;
        };
        let mut items: Vec<u32> = (0..short).collect();
        self.shuffle(&mut items);
        items[..k].iter().map(|&i| i as usize).collect()
    }
}

/// Known answers are those of NumPy 2.4.
#[cfg(test)]
mod tests {
    use super::*;

    fn many(rng: &mut RandomState, n: u64, count: usize) -> Vec<u64> {
        (0..count).map(|_| rng.up_to(n - 1)).collect()
    }

    #[test]
    fn bits() {
        let mut rng = RandomState::new(1234);
        let got: [u32; 6] = std::array::from_fn(|_| rng.bits());
        assert_eq!(got, [822_569_775, 2_137_449_171, 2_671_936_806, 3_512_589_365, 1_880_026_316, 2_629_000_564]);
        let mut rng = RandomState::new(0);
        assert_eq!([rng.bits(), rng.bits()], [2_357_136_044, 2_546_248_239]);
        let mut rng = RandomState::new(5489);
        (0..623).for_each(|_| _ = rng.bits());
        assert_eq!([rng.bits(), rng.bits(), rng.bits()], [4_020_325_887, 4_178_893_912, 610_818_241]);
    }

    #[test]
    fn integers_of_every_width() {
        let mut rng = RandomState::new(1234);
        let got: Vec<usize> = (0..12).map(|_| rng.below(10)).collect();
        assert_eq!(got, [3, 6, 5, 4, 8, 9, 1, 7, 9, 6, 8, 0]);
        let mut rng = RandomState::new(1234);
        assert_eq!(many(&mut rng, 1, 3), [0, 0, 0]);
        assert_eq!(many(&mut rng, 1 << 32, 3), [822_569_775, 2_137_449_171, 2_671_936_806]);
        assert_eq!(many(&mut rng, (1 << 32) + 1, 3), [3_373_089_432, 3_444_014_763, 4_115_177_196]);
        assert_eq!(many(&mut rng, 1_000_000_000_000, 3), [536_338_046_746, 508_342_954_426, 517_547_833_200]);
        assert_eq!(many(&mut rng, 7, 4), [4, 5, 0, 1]);
    }

    #[test]
    fn orders() {
        assert_eq!(RandomState::new(12345).permutation(12), [8, 0, 3, 7, 11, 10, 6, 9, 4, 1, 5, 2]);
        let mut letters: Vec<char> = ('a'..='j').collect();
        RandomState::new(7).shuffle(&mut letters);
        assert_eq!(letters.iter().collect::<String>(), "ifacbjhdge");
        assert_eq!(RandomState::new(1).permutation(0), [0; 0]);
        assert_eq!(RandomState::new(1).permutation(1), [0]);
    }

    #[test]
    fn choices() {
        assert_eq!(RandomState::new(1234).choice(1000, 8), [681, 990, 155, 768, 438, 363, 688, 555]);
        let mut rng = RandomState::new(1234);
        assert_eq!(rng.choice(50, 3), [37, 45, 6]);
        assert_eq!(rng.choice(5, 3), [2, 3, 4]);
        assert_eq!([rng.below(9), rng.below(9), rng.below(9)], [0, 8, 8]);
    }
}
