//! What is done to the values of one channel, `kernels/intensity.cu`. What is known of them stays on the card, so that no
//! step of a chain waits for the host.

use bytemuck::{Pod, Zeroable};

use super::launch::{Driver, Files, Launch, Memory, files};
use super::{Entry, int, ints, voxels};
use crate::error::{Error, Result};

const OP: &str = "intensity";
const THREADS: usize = 256;
/// Values of a block whose statistics are taken at once.
const PART: usize = THREADS * 16;
/// Bytes of `Part` of `kernels/intensity.cu`.
const PART_BYTES: usize = 32;
/// Bytes of what is known of a channel: `State` of `kernels/intensity.cuh`.
pub const STATE: usize = 40;

static FILES: Files = files!("intensity");

/// A channel's values and what is known of them.
#[derive(Debug, Clone, Copy)]
pub struct Channel {
    /// f32.
    pub x: Memory,
    /// How many.
    pub values: usize,
    /// [`STATE`] bytes.
    pub state: Memory,
    /// [`parts_bytes`] bytes to work with.
    pub parts: Memory,
}

/// Bytes of [`Channel::parts`].
#[must_use]
pub const fn parts_bytes(values: usize) -> usize {
    values.div_ceil(PART) * PART_BYTES
}

/// What becomes of what is known.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Step {
    /// Values are as they are in memory, and nothing is known of them.
    Begin,
    /// Nothing.
    Know,
    /// `v <- scale v + shift`.
    Affine(f64, f64),
    /// `v <- factor v + (1 - factor) mean`, held between the smallest and the largest.
    Contrast(f64),
    /// After [`power`]: back to the mean and the deviation before.
    Curve,
}

/// `NoiseParams` of `kernels/intensity.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct NoiseParams {
    x: u64,
    values: i32,
    key: [u32; 2],
    words: [u32; 3],
    sigma: f32,
    unused: i32,
}

/// `StatsParams` of `kernels/intensity.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct StatsParams {
    x: u64,
    values: u64,
    state: u64,
    parts: u64,
    gamma: f32,
    unused: i32,
}

/// `SettleParams` of `kernels/intensity.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct SettleParams {
    state: u64,
    parts: u64,
    scale: f64,
    shift: f64,
    count: i32,
    step: i32,
}

/// `PutParams` of `kernels/intensity.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct PutParams {
    from: u64,
    to: u64,
    state: u64,
    outside: u64,
    shape: [i32; 3],
    flip: [i32; 3],
}

/// `x <- x + sigma n` with the standard normal numbers of a Philox stream of that seed and those words.
///
/// # Errors
/// [`Error::Shape`] for sizes that do not fit the memory; [`Error::Device`].
pub fn noise(driver: &dyn Driver, c: &Channel, sigma: f32, seed: u64, words: [u32; 3]) -> Result<()> {
    let params = NoiseParams {
        x: c.x.at_least(c.values * 4, OP, "the channel")?,
        values: int(OP, c.values)?,
        key: [seed as u32, (seed >> 32) as u32],
        words,
        sigma,
        unused: 0,
    };
    // A thread has four values.
    let threads = c.values.div_ceil(64) * 16;
    launch(driver, "noise", threads, bytemuck::bytes_of(&params))
}

/// Measures the values for the next [`settle`].
///
/// # Errors
/// As [`noise`].
pub fn stats(driver: &dyn Driver, c: &Channel) -> Result<()> {
    measure(driver, "stats", c, 0.0)
}

/// `v <- ((v - min) / max(max - min, 1e-7))^gamma (max - min) + min` with the known smallest and largest value, carried out
/// in memory together with all that was to be done before, and measured for the next [`settle`].
///
/// # Errors
/// As [`noise`].
pub fn power(driver: &dyn Driver, c: &Channel, gamma: f32) -> Result<()> {
    measure(driver, "power", c, gamma)
}

fn measure(driver: &dyn Driver, what: &str, c: &Channel, gamma: f32) -> Result<()> {
    let params = StatsParams {
        x: c.x.at_least(c.values * 4, OP, "the channel")?,
        values: c.values as u64,
        state: c.state.at_least(STATE, OP, "what is known of the values")?,
        parts: c.parts.at_least(parts_bytes(c.values), OP, "room for sums")?,
        gamma,
        unused: 0,
    };
    launch(driver, what, c.values.div_ceil(PART) * THREADS, bytemuck::bytes_of(&params))
}

/// Takes what was measured, if so, and then a step.
///
/// # Errors
/// As [`noise`].
pub fn settle(driver: &dyn Driver, c: &Channel, measured: bool, step: Step) -> Result<()> {
    let (number, scale, shift) = match step {
        Step::Begin => (0, 1.0, 0.0),
        Step::Know => (1, 1.0, 0.0),
        Step::Affine(scale, shift) => (2, scale, shift),
        Step::Contrast(factor) => (3, factor, 0.0),
        Step::Curve => (4, 1.0, 0.0),
    };
    let params = SettleParams {
        state: c.state.at_least(STATE, OP, "what is known of the values")?,
        parts: c.parts.at_least(parts_bytes(c.values), OP, "room for sums")?,
        scale,
        shift,
        count: if measured { int(OP, c.values.div_ceil(PART))? } else { 0 },
        step: number,
    };
    launch(driver, "settle", 1, bytemuck::bytes_of(&params))
}

/// `[D][H][W]` with the axes `flip` reversed: the values of `from` as they are known to be, 0 where `outside` (i16) is
/// negative there.
///
/// # Errors
/// As [`noise`].
pub fn put(
    driver: &dyn Driver,
    from: &Channel,
    outside: Option<Memory>,
    shape: [usize; 3],
    flip: [bool; 3],
    to: Memory,
) -> Result<()> {
    let values = voxels(OP, 1, shape)?;
    let params = PutParams {
        from: from.x.at_least(values * 4, OP, "the channel")?,
        to: to.at_least(values * 4, OP, "the result")?,
        state: from.state.at_least(STATE, OP, "what is known of the values")?,
        outside: outside.map_or(Ok(0), |m| m.at_least(values * 2, OP, "the labels"))?,
        shape: ints(OP, shape)?,
        flip: flip.map(i32::from),
    };
    launch(driver, "put", values, bytemuck::bytes_of(&params))
}

/// `[D][H][W]` of u16 with the axes `flip` reversed: the labels of `from` (i16), 0 where they are negative.
///
/// # Errors
/// As [`noise`].
pub fn put_labels(driver: &dyn Driver, from: Memory, shape: [usize; 3], flip: [bool; 3], to: Memory) -> Result<()> {
    let values = voxels(OP, 1, shape)?;
    let params = PutParams {
        from: from.at_least(values * 2, OP, "the labels")?,
        to: to.at_least(values * 2, OP, "the result")?,
        state: 0,
        outside: 0,
        shape: ints(OP, shape)?,
        flip: flip.map(i32::from),
    };
    launch(driver, "put_labels", values, bytemuck::bytes_of(&params))
}

fn launch(driver: &dyn Driver, what: &str, threads: usize, params: &[u8]) -> Result<()> {
    if threads == 0 {
        return Err(Error::shape(OP, "no values"));
    }
    FILES.launch(driver, &entry(what), Launch::line(threads.div_ceil(THREADS), THREADS as u32, 0)?, params)
}

fn entry(what: &str) -> String {
    format!("{OP}_{what}")
}

pub(super) fn entries() -> Vec<Entry> {
    let sizes = [
        ("noise", size_of::<NoiseParams>()),
        ("stats", size_of::<StatsParams>()),
        ("power", size_of::<StatsParams>()),
        ("settle", size_of::<SettleParams>()),
        ("put", size_of::<PutParams>()),
        ("put_labels", size_of::<PutParams>()),
    ];
    sizes.into_iter().flat_map(|(what, params)| Entry::of(&FILES, entry(what), params)).collect()
}
