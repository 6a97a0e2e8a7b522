//! A card's peak, for benchmarks to be held against, `kernels/probe.cu`.

use bytemuck::{Pod, Zeroable};

use super::launch::{Driver, Files, Launch, Memory, files};
use super::{Entry, Storage, int};
use crate::error::{Error, Result};

const OP: &str = "probe";
const THREADS: usize = 256;
/// Blocks for each multiprocessor: all that have room on it.
const BLOCKS: usize = 8;
/// `CHAINS` of `kernels/probe.cu`.
const CHAINS: usize = 8;
/// What a product adds: 16 of it make 1, and sums of that many rounds are exact.
const SEED: f32 = 1.0 / 16.0;
/// Rounds of the first try and at most.
const ROUNDS: [usize; 2] = [64, 1 << 18];
/// A launch that takes as long is not measured by its beginning and end.
const LEAST_SECONDS: f64 = 5e-3;
/// Measurements of which the best counts.
const TRIES: usize = 5;

static FILES: Files = files!("probe");

/// `ProbeParams` of `kernels/probe.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Params {
    from: u64,
    to: u64,
    pieces: u64,
    rounds: i32,
    seed: f32,
}

/// Threads that [`products`] runs.
#[must_use]
pub fn threads(driver: &dyn Driver) -> usize {
    driver.multiprocessors() * BLOCKS * THREADS
}

/// Adds up products as convolutions do that are stored so, `rounds` in each chain of each thread, into f32
/// `[`[`threads`]`]`; returns how many operations that is, a multiply-addition as two.
///
/// # Errors
/// [`Error::Shape`] for memory that is too small; [`Error::Device`].
pub fn products(driver: &dyn Driver, storage: Storage, rounds: usize, sums: Memory) -> Result<f64> {
    let threads = threads(driver);
    let to = sums.at_least(4 * threads, OP, "the sums")?;
    let params = Params { from: 0, to, pieces: 0, rounds: int(OP, rounds)?, seed: SEED };
    let launch = Launch::line(threads / THREADS, THREADS as u32, 0)?;
    FILES.launch(driver, &entry(storage), launch, bytemuck::bytes_of(&params))?;
    // A warp's product of matrices is 16 x 8 x 16.
    let each = if storage == Storage::F32 { 1.0 } else { (16 * 8 * 16 / 32) as f64 };
    Ok(2.0 * each * (threads * CHAINS) as f64 * rounds as f64)
}

/// What each thread of [`products`] has at its end, by its place in its warp.
#[must_use]
pub fn expected(storage: Storage, rounds: usize, lane: usize) -> f32 {
    let (sums, added) = if storage == Storage::F32 { (1, SEED) } else { (4, 16.0 * SEED) };
    let chain = |k: usize| (k + lane) as f32 + added * rounds as f32;
    (0..CHAINS).map(|k| sums as f32 * chain(k)).sum()
}

/// Copies `from` to `to`; returns how many bytes that moves, those read and those written.
///
/// # Errors
/// [`Error::Shape`] for memory of different sizes, [`Error::Device`].
pub fn copy(driver: &dyn Driver, from: Memory, to: Memory) -> Result<f64> {
    if from.bytes != to.bytes || !from.bytes.is_multiple_of(16) || from.bytes == 0 {
        return Err(Error::shape(OP, format!("a copy of {} bytes to {}", from.bytes, to.bytes)));
    }
    let params = Params { from: from.address, to: to.address, pieces: (from.bytes / 16) as u64, rounds: 0, seed: SEED };
    let launch = Launch::line(driver.multiprocessors() * BLOCKS, THREADS as u32, 0)?;
    FILES.launch(driver, "probe_copy", launch, bytemuck::bytes_of(&params))?;
    Ok(2.0 * from.bytes as f64)
}

/// Work per second that `run` does in so many rounds: the best of some tries that take long enough to be timed. `clock`
/// tells seconds.
///
/// # Errors
/// Those of `run`, [`Error::Device`].
pub fn rate(
    driver: &dyn Driver,
    clock: &mut dyn FnMut() -> f64,
    mut run: impl FnMut(usize) -> Result<f64>,
) -> Result<f64> {
    let [mut rounds, most] = ROUNDS;
    let mut timed = |rounds: usize| -> Result<(f64, f64)> {
        driver.synchronize()?;
        let begin = clock();
        let work = run(rounds)?;
        driver.synchronize()?;
        Ok((work, clock() - begin))
    };
    // The first run loads the kernel.
    timed(rounds)?;
    while timed(rounds)?.1 < LEAST_SECONDS && rounds < most {
        rounds *= 4;
    }
    let mut best = 0f64;
    for _ in 0..TRIES {
        let (work, seconds) = timed(rounds)?;
        best = best.max(work / seconds.max(f64::MIN_POSITIVE));
    }
    Ok(best)
}

/// Operations per second of [`products`], and bytes per second of [`copy`].
///
/// # Errors
/// [`Error::OutOfMemory`], [`Error::Device`].
pub fn peaks(driver: &dyn Driver, storage: Storage, clock: &mut dyn FnMut() -> f64) -> Result<(f64, f64)> {
    let operations = with_memory(driver, 4 * threads(driver), |sums| {
        rate(driver, clock, |rounds| products(driver, storage, rounds, sums))
    })?;
    // Far more than a card keeps in its caches, a small part of its memory.
    let bytes = (driver.total() / 32).clamp(1 << 10, 256 << 20).next_multiple_of(16);
    let moved = with_memory(driver, bytes, |from| {
        driver.memset(from, 0)?;
        with_memory(driver, bytes, |to| {
            rate(driver, clock, |rounds| (0..rounds.div_ceil(ROUNDS[0])).map(|_| copy(driver, from, to)).sum())
        })
    })?;
    Ok((operations, moved))
}

/// What `f` makes of memory that is its own as long as it runs.
fn with_memory<R>(driver: &dyn Driver, bytes: usize, f: impl FnOnce(Memory) -> Result<R>) -> Result<R> {
    let memory = driver.alloc(bytes)?;
    let result = f(memory);
    driver.free(memory)?;
    result
}

fn entry(storage: Storage) -> String {
    let unit = if storage == Storage::F32 { "fma" } else { "mma" };
    format!("{OP}_{unit}_{}", storage.name())
}

pub(super) fn entries() -> Vec<Entry> {
    let names = [Storage::F32, Storage::Bf16, Storage::F16].map(entry);
    let all = names.into_iter().chain(["probe_copy".to_owned()]);
    all.flat_map(|name| Entry::of(&FILES, name, size_of::<Params>())).collect()
}
