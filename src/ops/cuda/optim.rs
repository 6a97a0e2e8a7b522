//! A step of an optimizer on a card: all parameters at once, and every form of them that is kept.

use super::{card, filter, memory, plain};
use crate::autograd::Param;
use crate::backend::cuda::optim::{self as kernels, Outcome};
use crate::error::{Error, Result};
use crate::tensor::{Device, Precision, Tensor};

pub(crate) use crate::backend::cuda::optim::{Adam, Sgd};

const OP: &str = "optim";

/// A parameter that moves.
#[derive(Debug)]
pub(crate) struct Moved<'a> {
    pub(crate) param: &'a Param,
    pub(crate) gradient: &'a Tensor,
    /// What the optimizer keeps of it.
    pub(crate) kept: &'a [Tensor],
    /// It keeps nothing yet.
    pub(crate) first: bool,
}

/// By which numbers.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Rule {
    Sgd(Sgd),
    Adam(Adam),
}

/// What is sent to the card once and stays there as long as it is the same.
#[derive(Debug, Default)]
pub(crate) struct Room {
    tables: Vec<(Vec<u8>, Tensor)>,
}

impl Room {
    /// The `i`-th table in the card's memory.
    fn place(&mut self, i: usize, bytes: &[u8], device: &Device) -> Result<crate::tensor::cuda::Memory> {
        let known = self.tables.get(i).filter(|(_, t)| t.device().shares_memory(device));
        if known.is_none_or(|(old, _)| old.len() != bytes.len()) {
            let t = device.unplanned(|| plain(bytes.len().div_ceil(4), device))?;
            self.tables.truncate(i);
            self.tables.push((Vec::new(), t));
        }
        let (old, t) = self.tables.get_mut(i).ok_or_else(|| Error::shape(OP, "a table is missing"))?;
        let at = memory(OP, device, t)?;
        if old != bytes {
            card(OP, device)?.upload(at, bytes)?;
            *old = bytes.to_vec();
        }
        Ok(at)
    }
}

/// Moves the parameters of every group by its rule, unless a gradient or `guard`, an f32 on the card, is not finite: then
/// nothing is changed. Gradients are multiplied by `unscale` and, where their norm is then above `max_norm`, scaled down to it.
/// Does not wait for the card.
///
/// # Errors
/// [`Error::Shape`] when sizes do not fit; [`Error::OutOfMemory`]; [`Error::Device`].
pub(crate) fn step(
    device: &Device,
    room: &mut Room,
    groups: &[(Rule, Vec<Moved<'_>>)],
    guard: Option<&Tensor>,
    max_norm: Option<f64>,
    unscale: f64,
) -> Result<Asked> {
    let driver = card(OP, device)?;
    let all: Vec<&Moved<'_>> = groups.iter().flat_map(|(_, g)| g).collect();
    let forms: Vec<Vec<(Precision, Vec<kernels::Form>)>> =
        all.iter().map(|m| filter::all_forms(OP, m.param)).collect::<Result<_>>()?;
    // The storage of most forms goes with the step, others follow it.
    let count = |p: Precision| forms.iter().flatten().filter(|(f, _)| *f == p).count();
    let mut storages = [Precision::Bf16, Precision::F16, Precision::F32].map(|p| (count(p), p));
    storages.sort_by_key(|(n, _)| std::cmp::Reverse(*n));
    let of = |i: usize, p: Precision| -> Vec<kernels::Form> {
        forms[i].iter().filter(|(f, _)| *f == p).flat_map(|(_, f)| f.clone()).collect()
    };
    let (mut places, mut start) = (0, 0);
    let mut tables = Vec::new();
    for (_, group) in groups {
        let indices = start..start + group.len();
        start = indices.end;
        for (n, (count, precision)) in storages.iter().enumerate() {
            if n > 0 && *count == 0 {
                continue;
            }
            let lists: Vec<Vec<kernels::Form>> = indices.clone().map(|i| of(i, *precision)).collect();
            let mut parameters = Vec::with_capacity(lists.len());
            for (i, forms) in indices.clone().zip(&lists) {
                if n == 0 || !forms.is_empty() {
                    parameters.push(described(device, all[i], forms)?);
                }
            }
            if parameters.is_empty() {
                continue;
            }
            let table = kernels::table((*precision).into(), &parameters)?;
            let at = room.place(places, table.bytes(), device)?;
            places += 1;
            tables.push((table, at, n == 0));
        }
    }
    // Of one group the table knows all gradients, of several there is one for that alone.
    let whole = if groups.len() == 1 {
        None
    } else {
        let parameters: Vec<_> = all.iter().map(|m| described(device, m, &[])).collect::<Result<_>>()?;
        let table = kernels::table(Precision::F32.into(), &parameters)?;
        let at = room.place(places, table.bytes(), device)?;
        Some((table, at, true))
    };
    let first = whole.as_ref().or(tables.first()).ok_or_else(|| Error::shape(OP, "no parameters"))?;
    let partials = plain(first.0.partials().div_ceil(4), device)?;
    let outcome = plain(first.0.outcome().div_ceil(4), device)?;
    let squares = kernels::Squares {
        table: &first.0,
        at: first.1,
        partials: memory(OP, device, &partials)?,
        guard: guard.map(|g| memory(OP, device, g)).transpose()?,
        max_norm,
        unscale,
        outcome: memory(OP, device, &outcome)?,
    };
    kernels::squares(driver, &squares)?;
    let mut rules = groups.iter().map(|(rule, _)| rule);
    for (table, at, steps) in &tables {
        let rule = if *steps { rules.next() } else { None };
        let step = kernels::Step { table, at: *at, outcome: squares.outcome };
        match rule {
            Some(Rule::Sgd(rule)) => kernels::sgd(driver, &step, rule)?,
            Some(Rule::Adam(rule)) => kernels::adam(driver, &step, rule)?,
            None => kernels::repack(driver, table, *at)?,
        }
    }
    Ok(Asked(outcome))
}

/// What a step will have found.
#[derive(Debug)]
pub(crate) struct Asked(Tensor);

impl Asked {
    /// Waits for the card.
    pub(crate) fn read(&self) -> Result<Outcome> {
        let device = self.0.device();
        let at = memory(OP, device, &self.0)?;
        let mut bytes = vec![0; Outcome::BYTES];
        card(OP, device)?.download(crate::tensor::cuda::Memory { bytes: bytes.len(), ..at }, &mut bytes)?;
        Outcome::read(&bytes)
    }
}

/// A parameter for a table.
fn described<'f>(device: &Device, m: &Moved<'_>, forms: &'f [kernels::Form]) -> Result<kernels::Parameter<'f>> {
    let mut kept = [None; 2];
    for (to, t) in kept.iter_mut().zip(m.kept) {
        *to = Some(memory(OP, device, t)?);
    }
    Ok(kernels::Parameter {
        shape: filter::shape(m.param),
        value: memory(OP, device, m.param.value())?,
        gradient: Some(memory(OP, device, m.gradient)?),
        kept,
        first: m.first,
        forms,
    })
}
