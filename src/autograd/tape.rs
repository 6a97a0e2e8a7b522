//! Reverse mode: what a pass did, in order, and how each step turns the gradient of its result into those of its inputs.

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Ctx, Param, ParamId, Var};
use crate::backend::compute;
#[cfg(feature = "cuda")]
use crate::backend::cuda::pool;
use crate::error::{Error, Result};
#[cfg(feature = "cuda")]
use crate::tensor::cuda::Driver;
use crate::tensor::{BLOCK, Dims, Layout, Tensor};

/// Where on which tape a value was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId {
    tape: u64,
    index: usize,
}

/// The way back of one operation: what it kept of the way forward, and what to do with the gradient of its result.
///
/// Gradients have the sizes of their values and are stored in the order that the device computes with: as f32, those of a
/// card's activations as the activations are; scalars are the processor's.
pub trait Backward<'m>: Send {
    /// The operation.
    fn name(&self) -> &'static str;

    /// Shows every tensor that it keeps.
    fn saved<'s>(&'s self, visit: &mut dyn FnMut(&'s Tensor));

    /// Gradients of the inputs, in the order in which they were given to [`Ctx::record`]; `None` for one that needs none.
    /// Those of parameters go to `grads`. Operations called with `cx` are not recorded.
    ///
    /// # Errors
    /// [`Error::Shape`] when `dy` does not fit; [`Error::OutOfMemory`].
    fn backward(self: Box<Self>, cx: &mut Ctx<'m>, grads: &mut Grads, dy: Tensor) -> Result<Vec<Option<Tensor>>>;
}

struct Node<'m> {
    dims: Dims,
    inputs: Vec<Option<NodeId>>,
    /// None for a variable.
    op: Option<Box<dyn Backward<'m> + 'm>>,
}

/// Operations in the order in which they ran.
pub(super) struct Tape<'m> {
    id: u64,
    nodes: Vec<Node<'m>>,
}

impl std::fmt::Debug for Tape<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names = self.nodes.iter().map(|n| n.op.as_ref().map_or("variable", |o| o.name()));
        f.debug_list().entries(names).finish()
    }
}

/// What an operation keeps for its way back.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Saved {
    /// The operation.
    pub operation: &'static str,
    /// Bytes of its tensors that no operation before it keeps.
    pub bytes: usize,
}

/// Gradients. Passes add to what is there, so that one value may gather several.
#[derive(Debug, Default)]
pub struct Grads {
    params: BTreeMap<ParamId, Tensor>,
    variables: BTreeMap<NodeId, Tensor>,
}

impl Grads {
    /// None yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// That of a parameter, in the parameter's packed order; `None` if the result did not depend on it.
    #[must_use]
    pub fn param(&self, p: &Param) -> Option<&Tensor> {
        self.params.get(&p.id())
    }

    /// That of a parameter, no longer kept here.
    pub(crate) fn take_param(&mut self, p: &Param) -> Option<Tensor> {
        self.params.remove(&p.id())
    }

    /// That of a value from [`Ctx::variable`]; `None` if the result did not depend on it.
    #[must_use]
    pub fn variable(&self, x: &Var) -> Option<&Tensor> {
        self.variables.get(&x.node?)
    }

    /// Adds to the gradient of the parameter `p`.
    ///
    /// # Errors
    /// [`Error::Shape`] when the sizes differ from what is there; [`Error::OutOfMemory`].
    pub fn add_param(&mut self, p: ParamId, g: Tensor) -> Result<()> {
        add_to(&mut self.params, p, g)
    }
}

/// Adds `g` to what `id` has, in place where that is possible. The order of the sum is that of the calls.
fn add_to<K: Ord>(all: &mut BTreeMap<K, Tensor>, id: K, g: Tensor) -> Result<()> {
    let sum = match all.remove(&id) {
        None => g,
        Some(a) => {
            let (mut to, from) = if a.is_unique() { (a, g) } else { (g, a) };
            if to.dims() != from.dims() || to.layout() != from.layout() || to.precision() != from.precision() {
                let what = format!("{:?} and {:?}, expected equal sizes", to.dims(), from.dims());
                return Err(Error::shape("gradient", what));
            }
            #[cfg(feature = "cuda")]
            if let Some(driver) = to.device().driver() {
                let owned = to.is_unique();
                let sum = on_card(driver, to.clone(), &from, owned)?;
                all.insert(id, sum);
                return Ok(());
            }
            if !to.is_unique() {
                let mut copy = Tensor::empty(*to.dims(), to.layout(), to.device())?;
                memory(&mut copy)?.copy_from_slice(to.as_slice());
                to = copy;
            }
            let device = to.device().clone();
            // The sum's kernel knows whole channel blocks only; scalars are less.
            let (from, rest) = from.as_slice().split_at(from.as_slice().len() / BLOCK * BLOCK);
            let (sum, sum_rest) = memory(&mut to)?.split_at_mut(from.len());
            compute!(&device, add::forward(None, None, from, sum), Ok(()))?;
            sum_rest.iter_mut().zip(rest).for_each(|(a, b)| *a += b);
            to
        }
    };
    all.insert(id, sum);
    Ok(())
}

/// The sum of two tensors of a card, in the place of the first if it is `owned`.
#[cfg(feature = "cuda")]
fn on_card(driver: &dyn Driver, a: Tensor, b: &Tensor, owned: bool) -> Result<Tensor> {
    let out = if owned { a.clone() } else { Tensor::empty_in(*a.dims(), a.layout(), a.precision(), a.device())? };
    let at = |t: &Tensor| t.cuda().ok_or_else(|| Error::shape("gradient", "a sum of tensors of different devices"));
    let values = a.layout().len(a.dims());
    pool::add(driver, a.precision().into(), values, at(&a)?, at(b)?, at(&out)?)?;
    Ok(out)
}

fn memory(x: &mut Tensor) -> Result<&mut [f32]> {
    x.as_mut_slice().ok_or_else(|| Error::shape("gradient", "the memory of a sum is shared"))
}

impl<'m> Tape<'m> {
    pub(super) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self { id: NEXT.fetch_add(1, Ordering::Relaxed), nodes: Vec::new() }
    }

    pub(super) fn push(
        &mut self,
        dims: Dims,
        inputs: &[Option<NodeId>],
        op: Option<Box<dyn Backward<'m> + 'm>>,
    ) -> NodeId {
        self.nodes.push(Node { dims, inputs: inputs.to_vec(), op });
        NodeId { tape: self.id, index: self.nodes.len() - 1 }
    }

    pub(super) fn saved(&self) -> Vec<Saved> {
        let mut seen = HashSet::new();
        let ops = self.nodes.iter().filter_map(|n| n.op.as_ref());
        ops.map(|op| {
            let mut bytes = 0;
            op.saved(&mut |t| {
                if seen.insert(t.identity()) {
                    bytes += t.bytes();
                }
            });
            Saved { operation: op.name(), bytes }
        })
        .collect()
    }

    /// Walks back from `roots`. Whatever an operation kept is free as soon as its turn is over. Returns the gradients of
    /// the variables.
    pub(super) fn walk(
        mut self,
        cx: &mut Ctx<'m>,
        roots: Vec<(NodeId, Tensor)>,
        grads: &mut Grads,
    ) -> Result<BTreeMap<NodeId, Tensor>> {
        let (mut open, mut variables) = (BTreeMap::new(), BTreeMap::new());
        for (node, g) in roots {
            self.check(node, &g)?;
            add_to(&mut open, node.index, g)?;
        }
        while let Some(node) = self.nodes.pop() {
            let index = self.nodes.len();
            let Some(dy) = open.remove(&index) else { continue };
            let Some(op) = node.op else {
                variables.insert(NodeId { tape: self.id, index }, dy);
                continue;
            };
            let name = op.name();
            let dx = op.backward(cx, grads, dy)?;
            if dx.len() != node.inputs.len() {
                return Err(Error::shape(name, format!("{} gradients for {} inputs", dx.len(), node.inputs.len())));
            }
            for (input, dx) in node.inputs.iter().zip(dx) {
                if let (Some(input), Some(dx)) = (input, dx) {
                    self.check(*input, &dx)?;
                    add_to(&mut open, input.index, dx)?;
                }
            }
        }
        Ok(variables)
    }

    fn check(&self, node: NodeId, g: &Tensor) -> Result<()> {
        let Some(n) = self.nodes.get(node.index).filter(|_| node.tape == self.id) else {
            return Err(Error::shape("backward", "a value of another pass, or of one whose way back is over"));
        };
        // Scalars and vectors have no channel blocks; a card's activations have one.
        let layout = match n.dims.as_slice() {
            [_, c, _, _, _] if !g.device().is_cpu() => Layout { block: c.next_multiple_of(BLOCK) },
            [_, _, _, _, _] => Layout::BLOCKED,
            _ => Layout::PLAIN,
        };
        if *g.dims() != n.dims || g.layout() != layout {
            return Err(Error::shape("backward", format!("a gradient of {:?} for {:?}", g.dims(), n.dims)));
        }
        Ok(())
    }
}

impl<'m> Ctx<'m> {
    /// Adds the gradients of the scalar `loss`, by all parameters and variables of the pass, to `grads`. The pass is over
    /// then; the context may begin another.
    ///
    /// # Errors
    /// [`Error::Shape`] when `loss` is no scalar of this pass; [`Error::OutOfMemory`].
    pub fn backward(&mut self, loss: Var, grads: &mut Grads) -> Result<()> {
        self.backward_scaled(loss, 1.0, grads)
    }

    /// As [`Ctx::backward`], of the loss times `scale`, which is rounded to an f32: what is stored in few bits stays within
    /// their range, see [`crate::nn::GradScaler`].
    ///
    /// # Errors
    /// As [`Ctx::backward`].
    pub fn backward_scaled(&mut self, loss: Var, scale: f64, grads: &mut Grads) -> Result<()> {
        if loss.value.dims().as_slice() != [1] {
            return Err(Error::shape("backward", format!("a loss of {:?}, expected [1]", loss.value.dims())));
        }
        let scale = Tensor::from_host(&[scale as f32], Dims::from([1]), self.device.host())?;
        self.backward_from(vec![(loss, scale)], grads)
    }

    /// As [`Ctx::backward`], from any values with the gradients of some scalar by each of them, of the values' sizes.
    ///
    /// # Errors
    /// As [`Ctx::backward`].
    pub fn backward_from(&mut self, roots: Vec<(Var, Tensor)>, grads: &mut Grads) -> Result<()> {
        let tape = self.tape.take().ok_or_else(|| Error::shape("backward", "nothing was recorded"))?;
        let node = |(v, g): (Var, Tensor)| {
            let node = v.node.ok_or_else(|| Error::shape("backward", "a value that was not recorded"))?;
            Ok((node, g))
        };
        let done = roots.into_iter().map(node).collect::<Result<_>>().and_then(|r| tape.walk(self, r, grads));
        self.tape = Some(Tape::new());
        for (id, g) in done? {
            add_to(&mut grads.variables, id, g)?;
        }
        Ok(())
    }
}
