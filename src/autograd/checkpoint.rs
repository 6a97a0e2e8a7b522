//! Recomputation: a part of a pass that keeps its inputs only and runs again on the way back (Chen, Xu, Zhang, Guestrin,
//! "Training Deep Nets with Sublinear Memory Cost", 2016).

use super::{Backward, Ctx, Grads, Tape, Var};
use crate::error::Result;
use crate::tensor::{Precision, Tensor};

/// The way back of a part that runs again.
struct Recompute<F> {
    /// And whether their gradients are wanted.
    inputs: Vec<(Tensor, bool)>,
    /// What results were stored in.
    precision: Precision,
    part: F,
}

impl<'m> Ctx<'m> {
    /// Runs `part` on `inputs`. When the pass is recorded, only the inputs are kept, and the way back runs `part` once
    /// more: memory for time. `part` has to do the same both times.
    ///
    /// # Errors
    /// Those of `part`, here or on the way back.
    pub fn checkpoint(
        &mut self,
        inputs: Vec<Var>,
        part: impl Fn(&mut Ctx<'m>, Vec<Var>) -> Result<Var> + Send + 'm,
    ) -> Result<Var> {
        let Some(tape) = self.tape.take() else { return part(self, inputs) };
        let nodes: Vec<_> = inputs.iter().map(|v| v.node).collect();
        let kept: Vec<_> = inputs.iter().map(|v| (v.value.clone(), v.node.is_some())).collect();
        // On a tape that is thrown away: what is recorded is computed as it will be on the way back, to the last bit.
        self.tape = Some(Tape::new());
        let inputs = inputs.into_iter().map(|v| self.input(v.value, v.node.is_some())).collect();
        let y = part(self, inputs);
        self.tape = Some(tape);
        let precision = self.precision;
        Ok(self.record(y?.value, &nodes, || Box::new(Recompute { inputs: kept, precision, part })))
    }

    /// An input of a part.
    fn input(&mut self, value: Tensor, wanted: bool) -> Var {
        if wanted { self.variable(value) } else { self.leaf(value) }
    }
}

impl<'m, F: Fn(&mut Ctx<'m>, Vec<Var>) -> Result<Var> + Send> Backward<'m> for Recompute<F> {
    fn name(&self) -> &'static str {
        "checkpoint"
    }

    fn saved<'s>(&'s self, visit: &mut dyn FnMut(&'s Tensor)) {
        self.inputs.iter().map(|i| &i.0).for_each(visit);
    }

    fn backward(self: Box<Self>, cx: &mut Ctx<'m>, grads: &mut Grads, dy: Tensor) -> Result<Vec<Option<Tensor>>> {
        let Self { inputs, precision, part } = *self;
        let before = cx.set_precision(precision);
        cx.tape = Some(Tape::new());
        let inputs: Vec<Var> = inputs.into_iter().map(|(x, wanted)| cx.input(x, wanted)).collect();
        let nodes: Vec<_> = inputs.iter().map(|v| v.node).collect();
        let y = part(cx, inputs);
        // The walk around this one is not to be recorded either way.
        let (tape, _) = (cx.tape.take(), cx.set_precision(before));
        let y = y?;
        let (Some(tape), Some(root)) = (tape, y.node) else { return Ok(vec![None; nodes.len()]) };
        drop(y);
        let mut found = tape.walk(cx, vec![(root, dy)], grads)?;
        Ok(nodes.into_iter().map(|n| n.and_then(|n| found.remove(&n))).collect())
    }
}
