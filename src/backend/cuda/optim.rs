//! A step of an optimizer for all parameters at once, `kernels/optim.cu`.
//!
//! What parameters there are, where they lie and in which orders they are stored again is a [`Table`] in the device's memory,
//! which changes when these do. A step is then [`squares`] of the gradients and [`sgd`] or [`adam`], and nothing between them
//! waits for the host, which may ask for the [`Outcome`] afterwards. Parameters that are stepped by other numbers than the
//! rest have tables of their own, beside the one of all whose squares are summed.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use super::launch::{Driver, Files, Launch, Memory, files};
use super::{BLOCK, Entry, Storage, int, padded};
use crate::error::{Error, Result};

const OP: &str = "optim";
const THREADS: u32 = 256;
/// Values that a warp takes at once: of a filter 16 times 16 channels.
const TILE: usize = BLOCK * BLOCK;
/// Values of a block.
const STEPPED: usize = 32 * TILE;
/// Values of a block that gathers.
const GATHERED: usize = 8 * THREADS as usize;
const MERGERS: u32 = 1024;

static FILES: Files = files!("optim");

/// What a parameter is. Everything that belongs to it is padded with zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// `[padded length]`.
    Vector(usize),
    /// `[slab of 16 channels][tap][padded filter][16]`, as from [`super::conv3d::pack_weight`] of one source.
    Filter {
        /// Output channels without padding.
        filters: usize,
        /// Input channels without padding.
        channels: usize,
        /// Of the kernel, all axes together.
        taps: usize,
    },
}

impl Shape {
    /// Values with their padding.
    ///
    /// # Errors
    /// [`Error::Shape`] for none or too many.
    pub fn values(self) -> Result<usize> {
        match self {
            Shape::Vector(n) => counted(&[padded(n)]),
            Shape::Filter { filters, channels, taps } => counted(&[padded(filters), padded(channels), taps]),
        }
    }
}

/// In which order a filter is stored for those that read it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// That of the values themselves.
    Same,
    /// Transposed, for the gradient of an input that has these of the channels:
    /// `[slab of 16 filters][tap][padded channel][16 filters]`.
    Turned {
        /// Of the input channels.
        channels: Range<usize>,
        /// Taps in reverse, on every axis.
        mirrored: bool,
    },
    /// That of a filter with only these of the input channels. Two halves, one after the other, are what
    /// [`super::conv3d::pack_weight`] makes for two sources.
    Apart {
        /// Of the input channels.
        channels: Range<usize>,
    },
    /// That of [`super::conv3d::first::pack_weight`].
    First,
}

impl Order {
    /// Values of a parameter in this order, with their padding.
    ///
    /// # Errors
    /// [`Error::Shape`] when a parameter of this shape does not have the order.
    pub fn values(&self, of: Shape) -> Result<usize> {
        match (self, of) {
            (Order::Same, Shape::Filter { .. }) => of.values(),
            (Order::First, Shape::Filter { filters, channels, taps }) => {
                counted(&[padded(filters), padded(counted(&[channels, taps])?)])
            }
            (
                Order::Turned { channels: Range { start, end }, .. } | Order::Apart { channels: Range { start, end } },
                Shape::Filter { filters, channels, taps },
            ) if start < end && *end <= channels => counted(&[padded(filters), padded(end - start), taps]),
            _ => Err(Error::shape(OP, format!("{of:?} in the order {self:?}"))),
        }
    }
}

/// A parameter once more, in the storage of a [`Table`].
#[derive(Debug, Clone)]
pub struct Form {
    /// How it lies there.
    pub order: Order,
    /// Where; as long as [`Order::values`] says.
    pub to: Memory,
}

/// A parameter and what belongs to it.
#[derive(Debug, Clone, Copy)]
pub struct Parameter<'a> {
    /// What it is.
    pub shape: Shape,
    /// f32.
    pub value: Memory,
    /// f32, in the order of the values; needed for everything but [`repack`].
    pub gradient: Option<Memory>,
    /// f32, in the order of the values: for [`sgd`] the momentum if there is any; for [`adam`] the running means of gradients
    /// and of their squares.
    pub kept: [Option<Memory>; 2],
    /// What is kept is nothing yet: it is written without being read.
    pub first: bool,
    /// What is stored from the values.
    pub forms: &'a [Form],
}

/// `Turned` of `kernels/optim.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
struct TurnedParams {
    to: u64,
    first: i32,
    slabs: i32,
}

/// `Parameter` of `kernels/optim.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
struct Described {
    value: u64,
    gradient: u64,
    kept: [u64; 2],
    same: u64,
    turned: [TurnedParams; 2],
    floats: i32,
    taps: i32,
    groups: i32,
    flags: u32,
}

const FRESH: u32 = 1;
const MIRRORED: u32 = 2;

/// `Piece` of `kernels/optim.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Piece {
    value: u64,
    to: u64,
    values: i32,
    taps: i32,
    groups: i32,
    first: i32,
    channels: i32,
    order: i32,
}

const APART: i32 = 0;
const JOINED: i32 = 1;
const TURNED: i32 = 2;
const TURNED_MIRRORED: i32 = 3;

/// All parameters as kernels find them.
#[derive(Debug)]
pub struct Table {
    storage: Storage,
    bytes: Vec<u8>,
    /// Parameters, and where they stand in the table.
    parameters: Part,
    /// Orders that are none of whole tiles.
    pieces: Part,
    gradients: bool,
    /// Buffers that every parameter has.
    kept: usize,
}

/// A part of a table: first blocks of its elements, then these.
#[derive(Debug, Clone, Copy)]
struct Part {
    starts: usize,
    elements: usize,
    count: usize,
    blocks: usize,
}

impl Table {
    /// What the device's memory of the table has to hold.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Bytes of memory for the sums of blocks.
    #[must_use]
    pub fn partials(&self) -> usize {
        8 * self.parameters.blocks
    }

    /// Bytes of memory for an [`Outcome`], and behind it for the sum of squares of every gradient, f64, in the order of the
    /// parameters.
    #[must_use]
    pub fn outcome(&self) -> usize {
        Outcome::BYTES + 8 * self.parameters.count
    }

    /// Adds the elements, each of which takes so many blocks.
    fn add<T: Pod>(&mut self, elements: &[T], blocks: impl Iterator<Item = usize>) -> Result<Part> {
        let mut part = Part { starts: self.bytes.len(), elements: 0, count: elements.len(), blocks: 0 };
        for n in blocks {
            self.bytes.extend(int(OP, part.blocks)?.to_le_bytes());
            part.blocks += n;
        }
        int(OP, part.blocks)?;
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        part.elements = self.bytes.len();
        self.bytes.extend_from_slice(bytemuck::cast_slice(elements));
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        Ok(part)
    }
}

/// Products that a kernel can count, and not 0.
fn counted(factors: &[usize]) -> Result<usize> {
    let product = factors.iter().try_fold(1usize, |n, f| n.checked_mul(*f));
    match product.filter(|n| *n > 0 && i32::try_from(*n).is_ok()) {
        Some(n) => Ok(n),
        None => Err(Error::shape(OP, format!("{factors:?} values"))),
    }
}

/// Where 16 bytes at a time are read or written.
fn aligned(memory: Memory, bytes: usize, what: &str) -> Result<u64> {
    let address = memory.at_least(bytes, OP, what)?;
    if !address.is_multiple_of(16) {
        return Err(Error::shape(OP, format!("{what} begins at {address:#x}, expected a multiple of 16")));
    }
    Ok(address)
}

/// The table of these parameters, whose forms are in this storage.
///
/// # Errors
/// [`Error::Shape`] when there are none, for sizes that do not fit the memory, and for orders that a parameter does not have.
pub fn table(storage: Storage, parameters: &[Parameter<'_>]) -> Result<Table> {
    if parameters.is_empty() {
        return Err(Error::shape(OP, "no parameters"));
    }
    let (mut described, mut pieces) = (Vec::with_capacity(parameters.len()), Vec::new());
    for p in parameters {
        described.push(describe(storage, p, &mut pieces)?);
    }
    let none = Part { starts: 0, elements: 0, count: 0, blocks: 0 };
    let kept = parameters.iter().map(|p| p.kept.iter().take_while(|k| k.is_some()).count()).min().unwrap_or(0);
    let gradients = parameters.iter().all(|p| p.gradient.is_some());
    let mut table = Table { storage, bytes: Vec::new(), parameters: none, pieces: none, gradients, kept };
    let blocks = |values: i32, each: usize| (values.unsigned_abs() as usize).div_ceil(each);
    table.parameters = table.add(&described, described.iter().map(|d| blocks(d.floats, STEPPED)))?;
    table.pieces = table.add(&pieces, pieces.iter().map(|p| blocks(p.values, GATHERED)))?;
    Ok(table)
}

/// A parameter for the table; what of its forms is not of whole tiles is added to `pieces`.
fn describe(storage: Storage, p: &Parameter<'_>, pieces: &mut Vec<Piece>) -> Result<Described> {
    let values = p.shape.values()?;
    let floats = |m: Memory, what: &str| aligned(m, values * 4, what);
    let (filters, channels, taps) = match p.shape {
        Shape::Vector(_) => (BLOCK, BLOCK, 1),
        Shape::Filter { filters, channels, taps } => (filters, channels, taps),
    };
    let mut d = Described {
        value: floats(p.value, "a parameter")?,
        gradient: p.gradient.map_or(Ok(0), |m| floats(m, "a gradient"))?,
        kept: [0; 2],
        floats: int(OP, values)?,
        taps: int(OP, taps)?,
        groups: int(OP, padded(filters) / BLOCK)?,
        flags: if p.first { FRESH } else { 0 },
        ..Described::default()
    };
    for (to, kept) in d.kept.iter_mut().zip(p.kept) {
        *to = kept.map_or(Ok(0), |m| floats(m, "what an optimizer keeps"))?;
    }
    let mut turned = 0;
    for form in p.forms {
        let count = form.order.values(p.shape)?;
        let to = aligned(form.to, count * storage.bytes(), "a form")?;
        let whole =
            |r: &Range<usize>| r.start.is_multiple_of(BLOCK) && (r.end.is_multiple_of(BLOCK) || r.end == channels);
        let (range, order) = match &form.order {
            Order::Same if d.same == 0 => {
                d.same = to;
                continue;
            }
            Order::Turned { channels: r, mirrored } if turned < d.turned.len() && whole(r) => {
                let (first, slabs) = (int(OP, r.start / BLOCK)?, int(OP, padded(r.len()) / BLOCK)?);
                d.turned[turned] = TurnedParams { to, first, slabs };
                d.flags |= if *mirrored { MIRRORED << turned } else { 0 };
                turned += 1;
                continue;
            }
            Order::Same => (0..channels, APART),
            Order::First => (0..channels, JOINED),
            Order::Apart { channels } => (channels.clone(), APART),
            Order::Turned { channels, mirrored } => {
                (channels.clone(), if *mirrored { TURNED_MIRRORED } else { TURNED })
            }
        };
        pieces.push(Piece {
            value: d.value,
            to,
            values: int(OP, count)?,
            taps: d.taps,
            groups: d.groups,
            first: int(OP, range.start)?,
            channels: int(OP, range.len())?,
            order,
        });
    }
    Ok(d)
}

/// What the squares of the gradients came to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outcome {
    /// Sum of the squares of all gradients.
    pub squares: f64,
    /// Euclidean norm of all gradients, without the factor of the loss and before clipping.
    pub norm: f64,
    /// What gradients are multiplied by; 0 when nothing moves.
    pub scale: f32,
    /// Whether all gradients and the guard are finite. Otherwise no parameter moves.
    pub finite: bool,
    /// The first parameter whose gradient is not finite.
    pub wrong: Option<usize>,
    /// The guard, 0 without one.
    pub guard: f32,
}

/// `Outcome` of `kernels/optim.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct OutcomeBytes {
    squares: f64,
    norm: f64,
    scale: f32,
    finite: i32,
    wrong: i32,
    guard: f32,
}

impl Outcome {
    /// Bytes of it in the device's memory.
    pub const BYTES: usize = size_of::<OutcomeBytes>();

    /// From the first of the bytes that [`squares`] wrote.
    ///
    /// # Errors
    /// [`Error::Shape`] when there are too few.
    pub fn read(bytes: &[u8]) -> Result<Outcome> {
        let own = bytes.get(..Self::BYTES);
        let own = own.ok_or_else(|| Error::shape(OP, format!("{} bytes of an outcome", bytes.len())))?;
        let o: OutcomeBytes = bytemuck::pod_read_unaligned(own);
        let wrong = usize::try_from(o.wrong).ok();
        Ok(Outcome { squares: o.squares, norm: o.norm, scale: o.scale, finite: o.finite != 0, wrong, guard: o.guard })
    }
}

/// Gradients to sum.
#[derive(Debug, Clone, Copy)]
pub struct Squares<'a> {
    /// Of the parameters.
    pub table: &'a Table,
    /// The table in the device's memory.
    pub at: Memory,
    /// [`Table::partials`] bytes.
    pub partials: Memory,
    /// An f32 that has to be finite, too: the loss.
    pub guard: Option<Memory>,
    /// Gradients of a larger norm are scaled down to it.
    pub max_norm: Option<f64>,
    /// One over the factor of the loss: what gradients are multiplied by in any case.
    pub unscale: f64,
    /// [`Table::outcome`] bytes.
    pub outcome: Memory,
}

/// `SquaresParams` of `kernels/optim.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct SquaresParams {
    starts: u64,
    parameters: u64,
    partials: u64,
    count: i32,
    unused: i32,
}

/// `MergeParams` of `kernels/optim.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct MergeParams {
    starts: u64,
    partials: u64,
    guard: u64,
    outcome: u64,
    max_norm: f64,
    unscale: f64,
    count: i32,
    blocks: i32,
}

/// Sums the squares of all gradients: in f64 and in a fixed order those of a parameter, then of all parameters. The factor is
/// `min(1, max_norm / (norm + 1e-6)) * unscale`.
///
/// # Errors
/// [`Error::Shape`] for memory that is too small and parameters without a gradient; [`Error::Device`].
pub fn squares(driver: &dyn Driver, p: &Squares<'_>) -> Result<()> {
    if !p.table.gradients {
        return Err(Error::shape(OP, "a parameter without a gradient"));
    }
    let table = aligned(p.at, p.table.bytes.len(), "the table")?;
    let Part { starts, elements, count, blocks } = p.table.parameters;
    let (starts, partials) = (table + starts as u64, aligned(p.partials, p.table.partials(), "sums of blocks")?);
    let sums =
        SquaresParams { starts, parameters: table + elements as u64, partials, count: int(OP, count)?, unused: 0 };
    let merge = MergeParams {
        starts,
        partials,
        guard: p.guard.map_or(Ok(0), |m| m.at_least(4, OP, "the guard"))?,
        outcome: aligned(p.outcome, p.table.outcome(), "the outcome")?,
        max_norm: p.max_norm.unwrap_or(f64::INFINITY),
        unscale: p.unscale,
        count: sums.count,
        blocks: int(OP, blocks)?,
    };
    FILES.launch(driver, "optim_squares", Launch::line(blocks, THREADS, 0)?, bytemuck::bytes_of(&sums))?;
    FILES.launch(driver, "optim_merge", Launch::line(1, MERGERS, 0)?, bytemuck::bytes_of(&merge))
}

/// Parameters to move.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// Of the parameters.
    pub table: &'a Table,
    /// The table in the device's memory.
    pub at: Memory,
    /// From [`squares`].
    pub outcome: Memory,
}

/// Stochastic gradient descent, as the processor's: `d = scale * g + weight_decay * p`, `b = momentum * b + d` (`b = d` at
/// first), `p -= rate * (d + momentum * b)` with `nesterov`, else `p -= rate * b`.
#[derive(Debug, Clone, Copy)]
pub struct Sgd {
    /// Added to the gradient times the value.
    pub weight_decay: f32,
    /// Factor of the momentum; 0 keeps none.
    pub momentum: f32,
    /// Learning rate.
    pub rate: f32,
    /// Nesterov's momentum.
    pub nesterov: bool,
}

/// Adam and AdamW, as the processor's.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub struct Adam {
    /// Added to the gradient times the value.
    pub weight_decay: f32,
    /// Factor of the value.
    pub shrink: f32,
    /// `1 - beta1`.
    pub share1: f32,
    /// Factor of the running mean of squares.
    pub beta2: f32,
    /// `1 - beta2`.
    pub share2: f32,
    /// `rate / (1 - beta1^step)`.
    pub rate: f32,
    /// `sqrt(1 - beta2^step)`.
    pub correction: f32,
    /// Added to the root of the mean square.
    pub eps: f32,
}

/// `Sgd` of `kernels/optim.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct SgdParams {
    weight_decay: f32,
    momentum: f32,
    rate: f32,
    nesterov: i32,
}

/// `StepParams` of `kernels/optim.cu`, before the rule.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct StepParams {
    starts: u64,
    elements: u64,
    outcome: u64,
    count: i32,
    unused: i32,
}

/// One step of stochastic gradient descent and all forms of the values. Nothing is changed when the outcome is not finite.
///
/// # Errors
/// [`Error::Shape`] for memory that is too small and parameters without a gradient or room for their momentum;
/// [`Error::Device`].
pub fn sgd(driver: &dyn Driver, p: &Step<'_>, rule: &Sgd) -> Result<()> {
    let Sgd { weight_decay, momentum, rate, nesterov } = *rule;
    let rule = SgdParams { weight_decay, momentum, rate, nesterov: nesterov.into() };
    step(driver, p, "sgd", bytemuck::bytes_of(&rule), usize::from(momentum != 0.0))
}

/// One step of Adam and all forms of the values. Nothing is changed when the outcome is not finite.
///
/// # Errors
/// As [`sgd`].
pub fn adam(driver: &dyn Driver, p: &Step<'_>, rule: &Adam) -> Result<()> {
    step(driver, p, "adam", bytemuck::bytes_of(rule), 2)
}

fn step(driver: &dyn Driver, p: &Step<'_>, rule: &str, bytes: &[u8], kept: usize) -> Result<()> {
    if !p.table.gradients || p.table.kept < kept {
        return Err(Error::shape(OP, format!("a parameter without a gradient or without {kept} buffers")));
    }
    let outcome = aligned(p.outcome, Outcome::BYTES, "the outcome")?;
    store(driver, p.table, p.at, outcome, rule, bytes)
}

/// All forms of the values as they are.
///
/// # Errors
/// [`Error::Shape`] for memory that is too small; [`Error::Device`].
pub fn repack(driver: &dyn Driver, table: &Table, at: Memory) -> Result<()> {
    store(driver, table, at, 0, "pack", &[0; 8])
}

/// Runs the rule on all parameters, then stores what is not of whole tiles.
fn store(driver: &dyn Driver, table: &Table, at: Memory, outcome: u64, rule: &str, bytes: &[u8]) -> Result<()> {
    let address = aligned(at, table.bytes.len(), "the table")?;
    let params = |part: &Part| {
        let (starts, elements) = (address + part.starts as u64, address + part.elements as u64);
        Ok(StepParams { starts, elements, outcome, count: int(OP, part.count)?, unused: 0 })
    };
    let all = [bytemuck::bytes_of(&params(&table.parameters)?), bytes].concat();
    let launch = Launch::line(table.parameters.blocks, THREADS, 0)?;
    FILES.launch(driver, &entry(rule, table.storage), launch, &all[..])?;
    if table.pieces.count == 0 {
        return Ok(());
    }
    let launch = Launch::line(table.pieces.blocks, THREADS, 0)?;
    let pieces = params(&table.pieces)?;
    FILES.launch(driver, &entry("gather", table.storage), launch, bytemuck::bytes_of(&pieces))
}

fn entry(what: &str, storage: Storage) -> String {
    format!("optim_{what}_{}", storage.name())
}

pub(super) fn entries() -> Vec<Entry> {
    let step = size_of::<StepParams>();
    let rules = [("sgd", size_of::<SgdParams>()), ("adam", size_of::<Adam>()), ("pack", 8), ("gather", 0)];
    let mut all = vec![
        ("optim_squares".to_owned(), size_of::<SquaresParams>()),
        ("optim_merge".to_owned(), size_of::<MergeParams>()),
    ];
    for storage in [Storage::F32, Storage::Bf16, Storage::F16] {
        all.extend(rules.map(|(what, rule)| (entry(what, storage), step + rule)));
    }
    all.into_iter().flat_map(|(name, params)| Entry::of(&FILES, name, params)).collect()
}
