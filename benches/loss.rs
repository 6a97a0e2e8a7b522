//! Dice and cross-entropy and their gradient, in place of the logits.

use std::sync::mpsc::{Sender, channel};

use criterion::Criterion;
use stunet::autograd::{Backward, Ctx, Grads};
use stunet::ops::{self, LabelMap, Loss, Outputs};
use stunet::tensor::Tensor;
use stunet::{Device, Result};

use crate::common::{Work, activation, measure};

/// Sends the gradient of a value away.
struct Back(Sender<Tensor>);

impl<'m> Backward<'m> for Back {
    fn name(&self) -> &'static str {
        "back"
    }

    fn saved<'s>(&'s self, _: &mut dyn FnMut(&'s Tensor)) {}

    fn backward(self: Box<Self>, _: &mut Ctx<'m>, _: &mut Grads, dy: Tensor) -> Result<Vec<Option<Tensor>>> {
        self.0.send(dy).expect("someone waits");
        Ok(Vec::new())
    }
}

pub fn bench(c: &mut Criterion) {
    let device = Device::cpu();
    let regions = Outputs::Regions((1..4).map(|first| (first..4).collect()).collect());
    for (channels, side, outputs) in
        [(105, 64, Outputs::Labels), (16, 64, Outputs::Labels), (3, 64, Outputs::Labels), (3, 64, regions)]
    {
        let dims = [2, channels, side, side, side];
        let labels: Vec<u16> = (0..2 * side * side * side).map(|i| (i / 64 * 7919 % channels) as u16).collect();
        let target = LabelMap::new(labels, [2, side, side, side]).expect("as many labels as voxels");
        let title = format!("{channels}@{side} {}", if outputs == Outputs::Labels { "labels" } else { "regions" });
        let how = Loss { batch_dice: true, ..Loss::new(outputs) };
        // The memory that is moved holds whole blocks of channels.
        let bytes =
            |passes: usize| Work::Bytes((passes * 4 * channels.next_multiple_of(16) * dims[0] * side.pow(3)) as f64);
        let x = activation(&mut Ctx::infer(&device), dims).into_value();
        measure(c, &device, "loss", &title, bytes(1), || {
            let mut cx = Ctx::infer(&device);
            let x = cx.leaf(x.clone());
            ops::loss(&mut cx, x, &target, &how).expect("a loss").1
        });
        // Read for the loss, read and written for the gradient, which the next run takes for logits.
        let (send, gradients) = channel();
        send.send(x).expect("someone waits");
        measure(c, &device, "loss and gradient", &title, bytes(3), || {
            let mut cx = Ctx::train(&device);
            let x = cx.record(gradients.recv().expect("logits"), &[], || Box::new(Back(send.clone())));
            let (loss, _) = ops::loss(&mut cx, x, &target, &how).expect("a loss");
            cx.backward(loss, &mut Grads::new()).expect("its gradient");
        });
    }
}
