//! Data, references and launches of the probe kernels.
#![allow(dead_code, reason = "every test file uses its own part")]

use ptxsim::{Im2col, Machine, Module, Options, Params, Report, Result, Swizzle, TensorMap, bf16_to_f32, f32_to_bf16};

/// The text of a probe kernel.
pub fn text(name: &str) -> String {
    let path = format!("{}/tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Numbers between -1 and 1.
pub fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed;
    let mut next = || {
        s = s.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (s >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

pub fn bytes(v: &[f32]) -> Vec<u8> {
    v.iter().flat_map(|x| x.to_le_bytes()).collect()
}

pub fn floats(b: &[u8]) -> Vec<f32> {
    b.chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect()
}

pub fn words(b: &[u8]) -> Vec<u32> {
    b.chunks_exact(4).map(|c| u32::from_le_bytes(c.try_into().unwrap())).collect()
}

pub fn bf16_bytes(v: &[f32]) -> Vec<u8> {
    v.iter().flat_map(|x| f32_to_bf16(*x).to_le_bytes()).collect()
}

/// Numbers that bf16 holds.
pub fn rounded(v: Vec<f32>) -> Vec<f32> {
    v.into_iter().map(|x| bf16_to_f32(f32_to_bf16(x))).collect()
}

/// A 3x3x3 convolution with padding: channels last, filters `[k][27][c]`.
pub struct Conv {
    pub size: [usize; 3],
    pub c: usize,
    pub k: usize,
    pub x: Vec<f32>,
    pub w: Vec<f32>,
    pub y: Vec<f64>,
}

impl Conv {
    pub fn new(size: [usize; 3], c: usize, k: usize) -> Conv {
        let voxels: usize = size.iter().product();
        let (x, w) = (rounded(noise(voxels * c, 7)), rounded(noise(k * 27 * c, 8)));
        let mut conv = Conv { size, c, k, x, w, y: Vec::new() };
        let [d, h, q] = size;
        for (z, y, x) in (0..voxels).map(|i| (i / h / q, i / q % h, i % q)) {
            let taps: Vec<(usize, usize)> = (0..27)
                .filter_map(|t| {
                    let (a, b, e) = (z + t / 9, y + t / 3 % 3, x + t % 3);
                    let inside = (1..=d).contains(&a) && (1..=h).contains(&b) && (1..=q).contains(&e);
                    inside.then(|| (t, ((a - 1) * h + b - 1) * q + e - 1))
                })
                .collect();
            for f in 0..k {
                let dot = |(t, v): &(usize, usize)| {
                    let (w, x) = (&conv.w[(f * 27 + t) * c..][..c], &conv.x[v * c..][..c]);
                    w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum::<f64>()
                };
                conv.y.push(taps.iter().map(dot).sum());
            }
        }
        conv
    }

    pub fn voxels(&self) -> usize {
        self.size.iter().product()
    }

    pub fn flops(&self) -> f64 {
        2.0 * 27.0 * (self.voxels() * self.c * self.k) as f64
    }

    /// Relative error of a bf16 result.
    pub fn error(&self, y: &[u8]) -> f64 {
        let values = y.chunks_exact(2).map(|b| f64::from(bf16_to_f32(u16::from_le_bytes([b[0], b[1]]))));
        let (e, n) = values.zip(&self.y).fold((0.0, 0.0), |(e, n), (v, r)| (e + (v - r).powi(2), n + r * r));
        assert_eq!(y.len(), 2 * self.y.len());
        (e / n).sqrt()
    }

    fn sizes(&self, p: Params) -> Params {
        self.size.iter().chain([&self.c, &self.k]).fold(p, |p, v| p.u32(*v as u32))
    }

    /// The map of the filters, in boxes of `rows` filters by 64 channels.
    fn filters(&self, base: u64, rows: usize) -> TensorMap {
        let taps = 27 * self.c as u64;
        TensorMap {
            base,
            element: 2,
            dims: vec![taps, self.k as u64],
            strides: vec![taps * 2],
            tile: vec![64, rows],
            element_strides: vec![1; 2],
            swizzle: Swizzle::B128,
            im2col: None,
        }
    }

    fn images(&self, base: u64) -> TensorMap {
        let [d, h, w] = self.size.map(|s| s as u64);
        let c = self.c as u64;
        TensorMap {
            base,
            element: 2,
            dims: vec![c, w, h, d, 1],
            strides: vec![c * 2, c * w * 2, c * w * h * 2, c * w * h * d * 2],
            tile: vec![64, 10, 10, 6, 1],
            element_strides: vec![1; 5],
            swizzle: Swizzle::B128,
            im2col: None,
        }
    }

    /// Runs `conv3d_mma`; the output may be made too short.
    pub fn mma(&self, ptx: &str, short: usize, options: &Options) -> Result<(Vec<u8>, Report)> {
        let module = Module::parse(ptx)?;
        let mut gpu = Machine::new();
        let (x, w) = (gpu.upload(&bf16_bytes(&self.x)), gpu.upload(&bf16_bytes(&self.w)));
        let y = gpu.alloc(2 * self.y.len() - short);
        let params = self.sizes(Params::new().u64(x).u64(w).u64(y));
        let grid = [self.voxels().div_ceil(64) as u32, self.k.div_ceil(64) as u32, 1];
        let report = gpu.launch(&module, "conv3d_k3_bf16", grid, [128, 1, 1], 0, params.as_bytes(), options)?;
        Ok((gpu.download(y)?, report))
    }

    /// Runs `conv3d_wgmma`.
    pub fn wgmma(&self, ptx: &str, options: &Options) -> Result<(Vec<u8>, Report)> {
        let module = Module::parse(ptx)?;
        let mut gpu = Machine::new();
        let (x, w) = (gpu.upload(&bf16_bytes(&self.x)), gpu.upload(&bf16_bytes(&self.w)));
        let y = gpu.alloc(2 * self.y.len());
        let im2col = Im2col { lower: vec![-1; 3], upper: vec![-1; 3], channels: 64, pixels: 128 };
        let images = gpu.tensor_map(TensorMap { im2col: Some(im2col), ..self.images(x) })?;
        let filters = gpu.tensor_map(self.filters(w, 128))?;
        let params = self.sizes(Params::new().map(&images).map(&filters).u64(y));
        let grid = [self.voxels().div_ceil(128) as u32, self.k.div_ceil(128) as u32, 1];
        let shared = 4 * 32768;
        let report = gpu.launch(&module, "conv3d_k3_wgmma", grid, [384, 1, 1], shared, params.as_bytes(), options)?;
        Ok((gpu.download(y)?, report))
    }

    /// Runs `conv3d_brick`.
    pub fn brick(&self, ptx: &str, options: &Options) -> Result<(Vec<u8>, Report)> {
        let module = Module::parse(ptx)?;
        let mut gpu = Machine::new();
        let (x, w) = (gpu.upload(&bf16_bytes(&self.x)), gpu.upload(&bf16_bytes(&self.w)));
        let y = gpu.alloc(2 * self.y.len());
        let images = gpu.tensor_map(self.images(x))?;
        let filters = gpu.tensor_map(self.filters(w, 64))?;
        let params = self.sizes(Params::new().map(&images).map(&filters).u64(y));
        let [d, h, q] = self.size;
        let bricks = d.div_ceil(4) * h.div_ceil(8) * q.div_ceil(8);
        let grid = [bricks as u32, self.k.div_ceil(64) as u32, 1];
        let shared = 2 * 76800 + 4 * 8192;
        let report = gpu.launch(&module, "conv3d_k3_brick", grid, [384, 1, 1], shared, params.as_bytes(), options)?;
        Ok((gpu.download(y)?, report))
    }
}
