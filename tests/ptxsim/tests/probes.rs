//! The probe kernels give what plain loops give, whatever the schedule and the number of threads.
#![allow(missing_docs, unreachable_pub, reason = "test code")]

mod common;

use std::time::Instant;

use common::{Conv, bytes, floats, noise, text};
use ptxsim::{Machine, Module, Options, Params, Report};

fn seeded(seed: u64) -> Options {
    Options { seed, ..Options::default() }
}

fn speed(name: &str, start: Instant, report: &Report) {
    let s = start.elapsed().as_secs_f64();
    let (warps, lanes) = (report.warp_instructions as f64 / s / 1e6, report.lane_instructions as f64 / s / 1e6);
    println!("{name}: {s:.3} s, {warps:.1} M warp instructions/s, {lanes:.0} M lane instructions/s");
}

#[test]
fn sums_of_vectors_and_blocks() {
    let module = Module::parse(&text("vadd.sm75.ptx")).unwrap();
    let n = 1_000_003;
    let (a, b) = (noise(n, 1), noise(n, 2));
    let mut gpu = Machine::new();
    let (pa, pb, pc) = (gpu.upload(&bytes(&a)), gpu.upload(&bytes(&b)), gpu.alloc(4 * n));
    let params = Params::new().u64(pa).u64(pb).u64(pc).i32(n as i32);
    for threads in [1, 0] {
        gpu.forget(pc).unwrap();
        let options = Options { threads, ..Options::default() };
        let start = Instant::now();
        let grid = [n.div_ceil(256) as u32, 1, 1];
        let report = gpu.launch(&module, "vadd_f32", grid, [256, 1, 1], 0, params.as_bytes(), &options).unwrap();
        speed(&format!("vadd, {threads} threads"), start, &report);
        let sum: Vec<f32> = a.iter().zip(&b).map(|(x, y)| x + y).collect();
        assert_eq!(floats(&gpu.download(pc).unwrap()), sum);
        let loads: Vec<_> = report.counters.values().collect();
        assert_eq!(loads.len(), 3);
        assert!(loads.iter().all(|s| s.sectors == s.ideal_sectors && s.requests == 31251));
    }
    let parts = gpu.alloc(4 * 64);
    let params = Params::new().u64(pa).u64(parts).i32(n as i32);
    gpu.launch(&module, "block_sum_f32", [64, 1, 1], [256, 1, 1], 0, params.as_bytes(), &seeded(5)).unwrap();
    let sum: f64 = floats(&gpu.download(parts).unwrap()).iter().map(|x| f64::from(*x)).sum();
    let expected: f64 = a.iter().map(|x| f64::from(*x)).sum();
    assert!((sum - expected).abs() < 0.1, "{sum} {expected}");
}

#[test]
fn instance_norm() {
    let module = Module::parse(&text("vadd.sm75.ptx")).unwrap();
    let (c, n) = (5, 777);
    let (x, gamma, beta) = (noise(c * n, 3), noise(c, 4), noise(c, 5));
    let mut gpu = Machine::new();
    let [px, pg, pb] = [&x, &gamma, &beta].map(|v| gpu.upload(&bytes(v)));
    let py = gpu.alloc(4 * c * n);
    let params = Params::new().u64(px).u64(pg).u64(pb).u64(py).u32(c as u32).u32(n as u32).f32(1e-5).f32(0.01);
    let grid = [c as u32, 1, 1];
    gpu.launch(&module, "inorm_apply_f32", grid, [128, 1, 1], 0, params.as_bytes(), &seeded(1)).unwrap();
    let y = floats(&gpu.download(py).unwrap());
    for ch in 0..c {
        let v: Vec<f64> = (0..n).map(|i| f64::from(x[i * c + ch])).collect();
        let mean = v.iter().sum::<f64>() / n as f64;
        let var = v.iter().map(|q| (q - mean).powi(2)).sum::<f64>() / n as f64;
        for (i, v) in v.iter().enumerate() {
            let r = (v - mean) / (var + 1e-5).sqrt() * f64::from(gamma[ch]) + f64::from(beta[ch]);
            let r = if r > 0.0 { r } else { r * 0.01 };
            assert!((f64::from(y[i * c + ch]) - r).abs() < 1e-4);
        }
    }
}

/// One result for every schedule, and for one thread as for several.
fn same(name: &str, conv: &Conv, seeds: u64, run: impl Fn(&Options) -> ptxsim::Result<(Vec<u8>, Report)>) {
    let mut first: Option<Vec<u8>> = None;
    for seed in 0..seeds {
        let options = Options { threads: (seed as usize + 1) % 3, ..seeded(seed) };
        let start = Instant::now();
        let (y, report) = run(&options).unwrap_or_else(|e| panic!("{name}, seed {seed}: {e}"));
        speed(name, start, &report);
        println!("{:.2} GFLOP/s", conv.flops() / start.elapsed().as_secs_f64() / 1e9);
        let error = conv.error(&y);
        assert!(error < 4e-3, "{name}, seed {seed}: relative error {error}");
        assert!(first.as_ref().is_none_or(|f| *f == y), "{name}: the result depends on the schedule");
        first = Some(y);
    }
}

#[test]
fn convolution_with_mma() {
    let conv = Conv::new([5, 6, 7], 64, 40);
    let ptx = text("conv3d_mma.sm80.ptx");
    same("mma", &conv, 6, |o| conv.mma(&ptx, 0, o));
}

#[test]
fn convolution_with_wgmma() {
    let conv = Conv::new([4, 5, 9], 64, 136);
    let ptx = text("conv3d_wgmma.sm90a.ptx");
    same("wgmma", &conv, 6, |o| conv.wgmma(&ptx, o));
}

#[test]
fn convolution_with_bricks() {
    let conv = Conv::new([5, 9, 11], 128, 72);
    let ptx = text("conv3d_brick.sm90a.ptx");
    same("brick", &conv, 6, |o| conv.brick(&ptx, o));
}

/// `mixed.cu` once more, in Rust.
fn mixed(input: &[i32], bytes: &[u8], i: usize) -> [u32; 15] {
    let v = input[i];
    let pick = [v.wrapping_mul(3), v / 7, v ^ 0x55, v % 11, v.wrapping_neg(), v << 3, v >> 2, 77];
    let weights = [1, -2, 3, -4, 5, -6, 7, -8];
    let mut local = [0i32; 16];
    (0..16).for_each(|j: i32| local[((j * 5 + v) & 15) as usize] = j.wrapping_mul(v));
    let warp = &input[i / 32 * 32..][..32];
    let ballot = (0..32).fold(0u32, |s, l| s | u32::from(warp[l] > 0) << l);
    let any = u32::from(warp.contains(&7)) + u32::from(warp.iter().all(|v| *v < 1 << 30));
    let bits = v.count_ones() + v.leading_zeros() + if v == 0 { 0 } else { v.trailing_zeros() + 1 };
    let x = v as f32;
    let sum = (x * 0.37).floor() + (x * 0.11).round_ties_even() + x.min(3.0) + (x * 0.5).abs();
    let (u, at) = (v as u32, i as u32);
    let bytes_of = [u & 255, at & 255, u >> 8 & 255, at >> 8 & 255];
    let permuted = bytes_of[0] | bytes_of[1] << 8 | bytes_of[2] << 16 | bytes_of[3] << 24;
    let shifted = at << 7 | u >> 25;
    let block = &input[i / 64 * 64..][..64];
    let count = |b: usize| block.iter().filter(|v| **v as usize & 31 == b).count() as u32;
    let hist = if i.is_multiple_of(32) { count(0).max(5) } else { count(i % 32) };
    let (s, c, us) = (i32::from(v as i16), i32::from(v as i8), v.wrapping_mul(3) as u16);
    let chosen = (v > 5 && i < 40) || (v < -3 && i % 2 == 1);
    [
        pick[i & 7] as u32,
        (weights[v as usize & 7] + i32::from(bytes[i])) as u32,
        local[(v >> 3 & 15) as usize] as u32,
        (i64::from(v) * i64::from(v) / (i as i64 + 1)) as u32,
        bits.wrapping_add(u.reverse_bits()),
        ballot.wrapping_add(any),
        (warp[(i % 32).saturating_sub(1)].wrapping_add(warp[i % 32 / 8 * 8 + 5])) as u32,
        sum.to_bits(),
        ((x * 0.123) as i32 as u32).wrapping_add((i as f32 * 1.5).round_ties_even() as u32),
        permuted.wrapping_add(shifted).wrapping_add(u.min(1000)).wrapping_add(v.max(-5) as u32),
        (f64::from(v) * 1.25) as i64 as u32,
        (((u64::from(u) * 0x9e37_79b9) >> 32) as u32).wrapping_add(u % 1_000_003),
        hist,
        (s * c + i32::from(us / 3) + i32::from(us >> 5)) as u32,
        if chosen { u } else { !u },
    ]
}

#[test]
fn many_small_things_on_every_target() {
    let input: Vec<i32> = noise(256, 9).iter().map(|x| (x * 5000.0) as i32).collect();
    let bytes: Vec<u8> = (0..=255).collect();
    for target in ["75", "80", "90a"] {
        let module = Module::parse(&text(&format!("mixed.sm{target}.ptx"))).unwrap();
        let mut gpu = Machine::new();
        let raw: Vec<u8> = input.iter().flat_map(|v| v.to_le_bytes()).collect();
        let (from, small, to) = (gpu.upload(&raw), gpu.upload(&bytes), gpu.alloc(256 * 64));
        let params = Params::new().u64(from).u64(small).u64(to).i32(256);
        gpu.launch(&module, "mixed", [4, 1, 1], [64, 1, 1], 0, params.as_bytes(), &seeded(3)).unwrap();
        let got = common::words(&gpu.download(to).unwrap());
        for i in 0..256 {
            assert_eq!(got[16 * i..16 * i + 15], mixed(&input, &bytes, i), "sm_{target}, thread {i}");
        }
    }
}
