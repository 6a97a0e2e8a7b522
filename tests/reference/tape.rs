//! Reverse-mode differentiation of plain f64 arrays.

use std::collections::BTreeSet;

/// A dense array `[N, C, D, H, W]`; filters are `[Co, Ci, KD, KH, KW]`, one number per channel is `[C, 1, 1, 1, 1]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Array {
    pub dims: [usize; 5],
    pub values: Vec<f64>,
}

impl Array {
    pub fn new(dims: [usize; 5], values: Vec<f64>) -> Self {
        assert_eq!(dims.iter().product::<usize>(), values.len(), "{dims:?}");
        Self { dims, values }
    }

    pub fn zeros(dims: [usize; 5]) -> Self {
        Self { dims, values: vec![0.0; dims.iter().product()] }
    }

    pub fn space(&self) -> [usize; 3] {
        [self.dims[2], self.dims[3], self.dims[4]]
    }

    /// Voxels of one channel.
    pub fn voxels(&self) -> usize {
        self.space().iter().product()
    }
}

/// A sum whose rounding error does not grow with the number of terms (Neumaier, ZAMM 54, 1974).
#[derive(Debug, Clone, Copy, Default)]
pub struct Sum {
    sum: f64,
    lost: f64,
}

impl Sum {
    pub fn add(&mut self, x: f64) {
        let sum = self.sum + x;
        self.lost += if self.sum.abs() >= x.abs() { (self.sum - sum) + x } else { (x - sum) + self.sum };
        self.sum = sum;
    }

    pub fn value(self) -> f64 {
        self.sum + self.lost
    }
}

pub fn sum(terms: impl IntoIterator<Item = f64>) -> f64 {
    let mut s = Sum::default();
    terms.into_iter().for_each(|x| s.add(x));
    s.value()
}

/// A value on a tape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Var(usize);

/// From the gradient of the loss by an operation's result to the gradients by its inputs.
type Backward = Box<dyn Fn(&Tape, &[f64], &mut Gradients)>;

struct Node {
    value: Array,
    /// Whether the loss is to be differentiated by this value or by one that it depends on.
    wanted: bool,
    /// Whether the gradient outlives the backward pass.
    kept: bool,
    backward: Option<Backward>,
}

/// Values in the order of their computation.
#[derive(Default)]
pub struct Tape {
    nodes: Vec<Node>,
    /// Voxels of leaky ReLUs' results whose gradient goes back by the slope of the kink's other side.
    turned: BTreeSet<(Var, usize)>,
}

impl Tape {
    /// A parameter.
    pub fn parameter(&mut self, value: Array) -> Var {
        self.push(Node { value, wanted: true, kept: true, backward: None })
    }

    /// A value without a gradient.
    pub fn constant(&mut self, value: Array) -> Var {
        self.push(Node { value, wanted: false, kept: false, backward: None })
    }

    /// The result of an operation on `inputs`, whose gradients `backward` adds.
    pub fn result(
        &mut self,
        value: Array,
        inputs: &[Var],
        backward: impl Fn(&Tape, &[f64], &mut Gradients) + 'static,
    ) -> Var {
        let wanted = inputs.iter().any(|v| self.nodes[v.0].wanted);
        self.push(Node { value, wanted, kept: false, backward: Some(Box::new(backward)) })
    }

    /// Keeps the gradient by a value between parameters and loss.
    pub fn keep(&mut self, v: Var) {
        self.nodes[v.0].kept = true;
    }

    pub fn value(&self, v: Var) -> &Array {
        &self.nodes[v.0].value
    }

    /// The value that the next operation gives.
    pub fn next(&self) -> Var {
        Var(self.nodes.len())
    }

    /// Lets the gradient of `y`, a leaky ReLU's result, go back at `voxel` by the slope of the kink's other side. Values
    /// stay: across the kink they differ by no more than the voxel is away from it.
    pub fn turn(&mut self, y: Var, voxel: usize) {
        assert!(self.turned.insert((y, voxel)), "turned twice");
    }

    /// Those of [`Tape::turn`].
    pub fn turned(&self, y: Var) -> impl Iterator<Item = usize> {
        self.turned.range((y, 0)..=(y, usize::MAX)).map(|(_, voxel)| *voxel)
    }

    /// Gradients of the scalar `loss` by all parameters and kept values that it depends on.
    pub fn backward(&self, loss: Var) -> Gradients {
        assert_eq!(self.value(loss).dims, [1; 5], "a loss is one number");
        self.backward_between(loss, vec![1.0], Var(0))
    }

    /// From the gradient `dy` of a loss by `y` to those by the parameters and kept values of all operations from `y` back
    /// to the one that gave `first`.
    pub fn backward_between(&self, y: Var, dy: Vec<f64>, first: Var) -> Gradients {
        let wanted = |(i, n): (usize, &Node)| n.wanted && (i >= first.0 || n.backward.is_none());
        let wanted = self.nodes.iter().enumerate().map(wanted).collect();
        let mut gradients = Gradients { wanted, values: vec![None; self.nodes.len()] };
        gradients.values[y.0] = Some(dy);
        for (i, node) in self.nodes.iter().enumerate().take(y.0 + 1).skip(first.0).rev() {
            let Some(backward) = &node.backward else { continue };
            let Some(dy) = gradients.values[i].take() else { continue };
            backward(self, &dy, &mut gradients);
            if node.kept {
                gradients.values[i] = Some(dy);
            }
        }
        gradients
    }

    fn push(&mut self, node: Node) -> Var {
        self.nodes.push(node);
        Var(self.nodes.len() - 1)
    }
}

/// Gradients of a loss by values of a tape.
pub struct Gradients {
    wanted: Vec<bool>,
    values: Vec<Option<Vec<f64>>>,
}

impl Gradients {
    /// Adds to the gradient by `v`, which is computed only where somebody wants it.
    pub fn add(&mut self, v: Var, gradient: impl FnOnce() -> Vec<f64>) {
        if !self.wanted[v.0] {
            return;
        }
        let more = gradient();
        match &mut self.values[v.0] {
            Some(sum) => sum.iter_mut().zip(&more).for_each(|(s, m)| *s += m),
            none => *none = Some(more),
        }
    }

    /// The gradient by `v`; `None` where the loss does not depend on it.
    pub fn of(&self, v: Var) -> Option<&[f64]> {
        self.values[v.0].as_deref()
    }
}
