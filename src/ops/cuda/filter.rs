//! How filters lie on a card.
//!
//! A filter that was read for inference is there in the storage and in all the orders that it may be asked for in. One that
//! learns is f32, and its other orders and storages are made from that when they are asked for first; from then on every step
//! of the optimizer writes them, too.

use std::sync::Arc;

use super::{FIRST, backend, card, memory, part, plain, unsupported};
use crate::autograd::{Ctx, Param, ParamKind};
use crate::backend::cuda::optim::{self, Order, Shape};
use crate::backend::cuda::{Storage, padded};
use crate::error::{Error, Result};
use crate::tensor::cuda::Memory;
use crate::tensor::{Device, Dims, Layout, Precision, Tensor};

/// In which storage the pass computes with a filter: the filter's own, or, of one that learns, what the pass asks for.
pub(super) fn computed(cx: &Ctx<'_>, w: &Param) -> Precision {
    match w.precision() {
        Precision::F32 => cx.precision(),
        own => own,
    }
}

/// The orders in which a filter lies one after the other, as far as it may be asked for in them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// For one source, and for two of which the first fills whole blocks of channels.
    Whole,
    /// For two sources of equal channels that do not.
    Halves,
    /// For few channels that arrive as planes.
    First,
}

impl Form {
    pub(super) fn exists(self, [_, i, ..]: [usize; 5], precision: Precision) -> bool {
        match self {
            Form::Whole => true,
            Form::Halves => i.is_multiple_of(2) && !(i / 2).is_multiple_of(backend::BLOCK),
            Form::First => i <= FIRST && precision != Precision::F32,
        }
    }

    /// Input channels with their padding, all taps together.
    pub(super) fn terms(self, [_, i, kernel @ ..]: [usize; 5]) -> usize {
        let taps: usize = kernel.iter().product();
        match self {
            Form::Whole => padded(i) * taps,
            Form::Halves => 2 * padded(i / 2) * taps,
            Form::First => padded(i * taps),
        }
    }

    /// The form of sources with these channels.
    pub(super) fn of(op: &str, channels: &[usize]) -> Result<Form> {
        match *channels {
            [_] => Ok(Form::Whole),
            [a, _] if a.is_multiple_of(backend::BLOCK) => Ok(Form::Whole),
            [a, b] if a == b => Ok(Form::Halves),
            _ => {
                unsupported(op, &format!("sources of {channels:?} channels, the first neither whole blocks nor a half"))
            }
        }
    }

    /// Where it is, in the storage that the pass computes with.
    pub(super) fn memory(self, op: &'static str, cx: &Ctx<'_>, w: &Param) -> Result<Memory> {
        let (device, precision) = (cx.device(), computed(cx, w));
        if precision == w.precision() {
            return self.stored(op, device, w);
        }
        let form = match self {
            Form::Whole => Kept::Same,
            Form::Halves => Kept::Halves,
            Form::First => Kept::First,
        };
        memory(op, device, &*kept(op, device, w, precision, form)?)
    }

    /// Where it is in the memory of the filter itself.
    fn stored(self, op: &'static str, device: &Device, w: &Param) -> Result<Memory> {
        let (dims, precision) = (w.dims().five(), w.precision());
        let all = memory(op, device, w.value())?;
        let bytes =
            |f: Form| if f.exists(dims, precision) { f.terms(dims) * padded(dims[0]) * precision.size() } else { 0 };
        let before: usize =
            [Form::Whole, Form::Halves, Form::First].into_iter().take_while(|f| *f != self).map(bytes).sum();
        let part = Memory { address: all.address + before as u64, bytes: bytes(self) };
        if part.bytes == 0 || before + part.bytes > all.bytes {
            return Err(Error::shape(op, format!("filter {:?} is not packed for a card", w.dims())));
        }
        Ok(part)
    }
}

/// What a parameter is, with its padding.
pub(super) fn shape(w: &Param) -> Shape {
    match w.kind() {
        ParamKind::Vector => Shape::Vector(w.dims().len()),
        ParamKind::Filter => {
            let [filters, channels, kernel @ ..] = w.dims().five();
            Shape::Filter { filters, channels, taps: kernel.iter().product() }
        }
        ParamKind::TransposedFilter => {
            let [channels, filters, kernel @ ..] = w.dims().five();
            Shape::Filter { filters, channels, taps: kernel.iter().product() }
        }
    }
}

/// Floats of a parameter that learns, and of its gradient: of a filter in the order of [`Form::Whole`].
pub(crate) fn floats(w: &Param) -> Result<usize> {
    shape(w).values()
}

/// An order that is kept beside a filter that learns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kept {
    Same,
    First,
    Halves,
    /// For the gradient of the input channels from the first on, so many: taps mirrored.
    Mirrored(usize, usize),
    /// The same with taps as they are.
    Turned,
}

/// Bits of a number in a key.
const BITS: u32 = 28;

impl Kept {
    /// What it is kept by: unlike the keys of other devices, of which no filter of a card has one.
    fn key(self, precision: Precision) -> u64 {
        let (kind, first, count) = match self {
            Kept::Same => (0, 0, 0),
            Kept::First => (1, 0, 0),
            Kept::Halves => (2, 0, 0),
            Kept::Mirrored(first, count) => (3, first as u64, count as u64),
            Kept::Turned => (4, 0, 0),
        };
        let storage = match precision {
            Precision::F32 => 0,
            Precision::Bf16 => 1,
            Precision::F16 => 2,
        };
        kind << 60 | storage << 58 | first << BITS | count
    }

    fn of(key: u64) -> Option<(Self, Precision)> {
        let part = |at: u32| (key >> at & ((1 << BITS) - 1)) as usize;
        let kept = match key >> 60 {
            0 => Kept::Same,
            1 => Kept::First,
            2 => Kept::Halves,
            3 => Kept::Mirrored(part(BITS), part(0)),
            4 => Kept::Turned,
            _ => return None,
        };
        let precision = match key >> 58 & 3 {
            0 => Precision::F32,
            1 => Precision::Bf16,
            2 => Precision::F16,
            _ => return None,
        };
        Some((kept, precision))
    }

    /// The orders that it is made of, one after the other.
    fn orders(self, w: &Param) -> Vec<Order> {
        let Shape::Filter { channels, .. } = shape(w) else { return Vec::new() };
        match self {
            Kept::Same => vec![Order::Same],
            Kept::First => vec![Order::First],
            Kept::Halves => [0..channels / 2, channels / 2..channels].map(|channels| Order::Apart { channels }).into(),
            Kept::Mirrored(first, count) => vec![Order::Turned { channels: first..first + count, mirrored: true }],
            Kept::Turned => vec![Order::Turned { channels: 0..channels, mirrored: false }],
        }
    }
}

/// The forms of which `to` is made.
fn forms(op: &'static str, orders: Vec<Order>, w: &Param, storage: Storage, to: Memory) -> Result<Vec<optim::Form>> {
    let (mut at, shape) = (0, shape(w));
    let mut all = Vec::with_capacity(orders.len());
    for order in orders {
        let bytes = order.values(shape)? * storage.bytes();
        if at + bytes > to.bytes {
            return Err(Error::shape(op, format!("a form of the filter {:?} in {} bytes", w.dims(), to.bytes)));
        }
        all.push(optim::Form { order, to: Memory { address: to.address + at as u64, bytes } });
        at += bytes;
    }
    Ok(all)
}

/// A form of a filter that learns, made if nobody asked for it before.
pub(super) fn kept(
    op: &'static str,
    device: &Device,
    w: &Param,
    precision: Precision,
    kept: Kept,
) -> Result<Arc<Tensor>> {
    if w.precision() != Precision::F32 {
        return unsupported(op, &format!("other forms of {}, stored as {}", w.name(), w.precision().name()));
    }
    let key = kept.key(precision);
    w.derived(key, || {
        let (orders, storage) = (kept.orders(w), Storage::from(precision));
        let mut values = 0;
        for order in &orders {
            values += order.values(shape(w))?;
        }
        // It outlives the pass.
        let made = device.unplanned(|| Tensor::empty_in(Dims::from([values]), Layout::PLAIN, precision, device))?;
        let forms = forms(op, orders, w, storage, memory(op, device, &made)?)?;
        let value = part(w.value(), 0, floats(w)?)?;
        let p =
            optim::Parameter { shape: shape(w), value, gradient: None, kept: [None; 2], first: false, forms: &forms };
        let table = optim::table(storage, &[p])?;
        let at = device.unplanned(|| plain(table.bytes().len().div_ceil(4), device))?;
        let driver = card(op, device)?;
        driver.upload(memory(op, device, &at)?, table.bytes())?;
        optim::repack(driver, &table, memory(op, device, &at)?)?;
        Ok(made)
    })
}

/// All forms of a parameter that learns, which change with it, by their storage.
pub(super) fn all_forms(op: &'static str, w: &Param) -> Result<Vec<(Precision, Vec<optim::Form>)>> {
    let mut all = Vec::new();
    if w.kind() == ParamKind::Filter && Form::Halves.exists(w.dims().five(), w.precision()) {
        let to = Form::Halves.stored(op, w.value().device(), w)?;
        all.push((Precision::F32, forms(op, Kept::Halves.orders(w), w, Storage::F32, to)?));
    }
    for (key, tensor) in w.all_derived() {
        let Some((kept, precision)) = Kept::of(key) else {
            return Err(Error::shape(op, format!("an unknown form of {}", w.name())));
        };
        let to = memory(op, w.value().device(), &tensor)?;
        all.push((precision, forms(op, kept.orders(w), w, precision.into(), to)?));
    }
    Ok(all)
}
