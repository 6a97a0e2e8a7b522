//! The driver's side: without a card an error and no panic, with one the same results as the interpreter's within bounds.

use stunet::backend_testing::cuda::{Norm, Source, conv3d};
use stunet::tensor::cuda::{Context, Driver, Memory};
use stunet::{Error, Result};

use super::conv3d::{Case, reference};
use super::sim::Sim;
use super::{stored, unpadded};
use crate::common::bound::{self, Bounded};

/// Memory of `to` with what the memory of `from` holds.
fn moved(from: &Sim, to: &dyn Driver, memory: Memory) -> Result<Memory> {
    let bytes = from.bytes(memory);
    let there = to.alloc(bytes.len())?;
    to.upload(there, &bytes)?;
    Ok(there)
}

#[test]
fn ptx_on_a_card_as_on_the_interpreter() {
    let card = match Context::open(0) {
        Ok(card) => card,
        Err(Error::Device { what }) => {
            eprintln!("skipped: {what}");
            return;
        }
        Err(e) => panic!("{e}"),
    };
    assert!(Context::open(1000).is_err());
    let sim = Sim::of(0, card.capability());
    for stride in [[1; 3], [2; 3]] {
        let c = Case { batch: 2, stride, sources: vec![(40, [1; 3], true)], ..Case::new([9, 12, 17], 0, 80) };
        let (weight, bias) = (c.weight(), c.bias());
        let inputs = c.inputs(&sim);
        let packed = conv3d::pack_weight(&weight, [80, 40, 3, 3, 3], &[40], c.storage).unwrap();
        let mut source = inputs[0].source;
        source.data = moved(&sim, &card, source.data).unwrap();
        source.norm = source.norm.map(|n| Norm { planes: moved(&sim, &card, n.planes).unwrap(), ..n });
        let sources: [Source; 1] = [source];
        let weights = card.alloc(packed.len()).unwrap();
        card.upload(weights, &packed).unwrap();
        let out = card.alloc(2 * c.out().iter().product::<usize>() * 80 * 2).unwrap();
        let p = conv3d::Problem {
            storage: c.storage,
            batch: 2,
            sources: &sources,
            weight: weights,
            bias: None,
            filters: 80,
            kernel: [3; 3],
            stride,
            out,
            partials: None,
        };
        let expected = reference(&c, &inputs, &weight, &bias);
        let bounds: Vec<Bounded> = expected.iter().map(|e| stored(e.0, e.1, 27 * 40, c.storage)).collect();
        for name in conv3d::variants(&card, &p, false) {
            card.memset(out, 0xff).unwrap();
            conv3d::run(&card, &p, Some(name)).unwrap();
            let mut bytes = vec![0; out.bytes];
            card.download(out, &mut bytes).unwrap();
            bound::check(name, &unpadded(&c.storage.load(&bytes), 80), &bounds);
        }
        for memory in [out, weights, source.data] {
            card.free(memory).unwrap();
        }
    }
}
