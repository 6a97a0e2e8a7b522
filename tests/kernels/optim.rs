//! Steps of optimizers: the processor's bits in values and in what is kept, and forms that are the values packed anew.

use std::ops::Range;

use stunet::Result;
use stunet::backend_testing::cuda::optim::{
    self, Adam, Form, Order, Outcome, Parameter, Sgd, Shape, Squares, Step, Table,
};
use stunet::backend_testing::cuda::{Storage, conv3d, padded};
use stunet::tensor::cuda::{Driver, Memory};

use super::sim::Sim;
use super::{SEEDS, cards, random, room};
use crate::common::bound::U;

const STORAGES: [Storage; 3] = [Storage::F32, Storage::Bf16, Storage::F16];

/// What a parameter is, and the orders in which it is asked for.
#[derive(Clone)]
struct Asked {
    /// `[O, I, kD, kH, kW]`, or the length of a vector.
    dims: Vec<usize>,
    orders: Vec<Order>,
    /// Took steps before the first of the test.
    known: bool,
}

fn vector(n: usize) -> Asked {
    Asked { dims: vec![n], orders: Vec::new(), known: false }
}

fn filter(dims: [usize; 5], orders: Vec<Order>) -> Asked {
    Asked { dims: dims.into(), orders, known: false }
}

fn turned(channels: Range<usize>, mirrored: bool) -> Order {
    Order::Turned { channels, mirrored }
}

fn apart(channels: Range<usize>) -> Order {
    Order::Apart { channels }
}

/// Every order, by tiles and gathered; sizes of less than a tile and of several blocks.
fn ragged() -> Vec<Asked> {
    let halves = [apart(0..12), apart(12..24), turned(0..12, true), turned(12..24, false)];
    vec![
        vector(20),
        filter([20, 24, 3, 3, 3], vec![Order::Same, turned(0..24, true)]),
        filter([16, 40, 1, 1, 1], vec![turned(16..40, false), Order::Same, turned(0..16, true)]),
        Asked { known: true, ..vector(300) },
        filter([33, 1, 3, 3, 1], vec![Order::Same, Order::First]),
        Asked { known: true, ..filter([17, 24, 1, 3, 3], [&[Order::Same][..], &halves].concat()) },
        filter([16, 48, 1, 2, 1], vec![turned(0..16, true), turned(16..32, false), turned(32..48, true)]),
        filter([40, 3, 1, 2, 3], vec![Order::Same, Order::First, turned(0..3, true), Order::Same]),
    ]
}

impl Asked {
    fn shape(&self) -> Shape {
        match self.dims[..] {
            [n] => Shape::Vector(n),
            [filters, channels, ref kernel @ ..] => Shape::Filter { filters, channels, taps: kernel.iter().product() },
            [] => unreachable!(),
        }
    }

    fn five(&self) -> [usize; 5] {
        self.dims[..].try_into().unwrap()
    }

    /// Random numbers as they lie on a card, zeros for the padding.
    fn packed(&self, seed: u64) -> Vec<f32> {
        let values = random(self.dims.iter().product(), seed);
        if let [n] = self.dims[..] {
            return [&values[..], &vec![0.0; padded(n) - n]].concat();
        }
        pack(&values, self.five(), Storage::F32)
    }

    /// What the form has to hold for these values as they lie on a card.
    fn form(&self, order: &Order, packed: &[f32], storage: Storage) -> Vec<u8> {
        let [o, i, d, h, w] = self.five();
        let taps = d * h * w;
        let at = |f: usize, c: usize, t: usize| packed[((c / 16 * taps + t) * padded(o) + f) * 16 + c % 16];
        let values = |channels: &Range<usize>| {
            let all = (0..o).flat_map(|f| channels.clone().map(move |c| (f, c)));
            all.flat_map(|(f, c)| (0..taps).map(move |t| at(f, c, t))).collect::<Vec<f32>>()
        };
        let bytes = match order {
            Order::Same => conv3d::pack_weight(&values(&(0..i)), self.five(), &[i], storage),
            Order::First => conv3d::first::pack_weight(&values(&(0..i)), self.five(), storage),
            Order::Apart { channels } => {
                let n = channels.len();
                conv3d::pack_weight(&values(channels), [o, n, d, h, w], &[n], storage)
            }
            Order::Turned { channels, mirrored } => {
                let all = channels.clone().flat_map(|c| (0..o).map(move |f| (f, c)));
                let tap = |t: usize| if *mirrored { taps - 1 - t } else { t };
                let swapped: Vec<f32> = all.flat_map(|(f, c)| (0..taps).map(move |t| at(f, c, tap(t)))).collect();
                conv3d::pack_weight(&swapped, [channels.len(), o, d, h, w], &[o], storage)
            }
        };
        bytes.unwrap()
    }
}

fn pack(values: &[f32], dims: [usize; 5], storage: Storage) -> Vec<f32> {
    storage.load(&conv3d::pack_weight(values, dims, &[dims[1]], storage).unwrap())
}

/// A rule and its arithmetic, one operation after the other.
#[derive(Debug, Clone, Copy)]
enum Rule {
    Sgd(Sgd),
    Adam(Adam),
}

impl Rule {
    /// The value after a step and what is kept of it, for a gradient that is scaled.
    fn step(&self, p: f32, g: f32, kept: [f32; 2], first: bool) -> (f32, [f32; 2]) {
        match self {
            Rule::Sgd(s) => {
                let (mut d, mut kept) = (g, kept);
                if s.weight_decay != 0.0 {
                    d = p.mul_add(s.weight_decay, d);
                }
                if s.momentum != 0.0 {
                    kept[0] = if first { d } else { kept[0] * s.momentum + d };
                    d = if s.nesterov { kept[0].mul_add(s.momentum, d) } else { kept[0] };
                }
                (d.mul_add(-s.rate, p), kept)
            }
            Rule::Adam(a) => {
                let [m, q] = if first { [0.0; 2] } else { kept };
                let p = p * a.shrink;
                let d = if a.weight_decay != 0.0 { p.mul_add(a.weight_decay, g) } else { g };
                let m = a.share1.mul_add(d - m, m);
                let q = (a.share2 * d).mul_add(d, q * a.beta2);
                (p + -a.rate * m / (q.sqrt() / a.correction + a.eps), [m, q])
            }
        }
    }

    fn kept(&self) -> usize {
        match self {
            Rule::Sgd(s) => usize::from(s.momentum != 0.0),
            Rule::Adam(_) => 2,
        }
    }
}

/// Parameters in the memory of a device.
struct Placed<'a> {
    sim: &'a Sim,
    asked: &'a [Asked],
    storage: Storage,
    values: Vec<Memory>,
    gradients: Vec<Memory>,
    kept: Vec<[Option<Memory>; 2]>,
    forms: Vec<Vec<Form>>,
}

impl<'a> Placed<'a> {
    /// With room for as much to keep as the rule needs, which nothing has written unless it is known.
    fn new(sim: &'a Sim, asked: &'a [Asked], storage: Storage, kept: usize) -> Placed<'a> {
        let all = |f: &dyn Fn(&Asked, u64) -> Memory| -> Vec<Memory> {
            asked.iter().zip(0..).map(|(a, i)| f(a, i)).collect()
        };
        let with = |v: Vec<f32>| sim.with(bytemuck::cast_slice(&v));
        let count = |a: &Asked| a.shape().values().unwrap();
        let keep = |a: &Asked, seed: u64, n: usize| {
            (n < kept).then(|| if a.known { with(known(a, seed, n)) } else { room(sim, count(a), Storage::F32) })
        };
        let forms = |a: &Asked| {
            let form = |o: &Order| Form { order: o.clone(), to: room(sim, o.values(a.shape()).unwrap(), storage) };
            a.orders.iter().map(form).collect()
        };
        Placed {
            sim,
            asked,
            storage,
            values: all(&|a, i| with(a.packed(100 + i))),
            gradients: all(&|a, _| room(sim, count(a), Storage::F32)),
            kept: asked.iter().zip(0..).map(|(a, i)| [0, 1].map(|n| keep(a, i, n))).collect(),
            forms: asked.iter().map(forms).collect(),
        }
    }

    /// The table, in which what is not known is new if `first`; in the device's memory.
    fn table(&self, first: bool) -> (Table, Memory) {
        let of = |(i, a): (usize, &Asked)| Parameter {
            shape: a.shape(),
            value: self.values[i],
            gradient: Some(self.gradients[i]),
            kept: self.kept[i],
            first: first && !a.known,
            forms: &self.forms[i],
        };
        let all: Vec<Parameter<'_>> = self.asked.iter().enumerate().map(of).collect();
        let table = optim::table(self.storage, &all).unwrap();
        let at = self.sim.with(table.bytes());
        (table, at)
    }

    fn gradients(&self, gradients: &[Vec<f32>]) {
        for (m, g) in self.gradients.iter().zip(gradients) {
            self.sim.upload(*m, bytemuck::cast_slice(g)).unwrap();
        }
    }

    /// All that a step may change.
    fn bytes(&self) -> Vec<u8> {
        let kept = self.kept.iter().flatten().flatten();
        let forms = self.forms.iter().flatten().map(|f| &f.to);
        self.values.iter().chain(kept).chain(forms).flat_map(|m| self.sim.bytes(*m)).collect()
    }

    fn check_forms(&self, values: &[Vec<f32>], what: &str) {
        for ((a, forms), v) in self.asked.iter().zip(&self.forms).zip(values) {
            for f in forms {
                let same = self.sim.bytes(f.to) == a.form(&f.order, v, self.storage);
                assert!(same, "{what}: {:?} in the order {:?}", a.dims, f.order);
            }
        }
    }
}

/// What is kept of a parameter that took steps before; mean squares are not negative.
fn known(a: &Asked, seed: u64, n: usize) -> Vec<f32> {
    let values = a.packed(200 + 2 * seed + n as u64);
    if n == 1 { values.iter().map(|v| v.abs()).collect() } else { values }
}

/// Sums the squares and asks what they came to: the outcome, and each parameter's.
fn summed(
    sim: &Sim,
    table: &Table,
    at: Memory,
    guard: Option<f32>,
    max_norm: Option<f64>,
    unscale: f64,
) -> (Outcome, Vec<f64>, Memory) {
    let p = Squares {
        table,
        at,
        partials: sim.alloc(table.partials()).unwrap(),
        guard: guard.map(|g| sim.with(&g.to_le_bytes())),
        max_norm,
        unscale,
        outcome: sim.alloc(table.outcome()).unwrap(),
    };
    optim::squares(sim, &p).unwrap();
    let bytes = sim.bytes(p.outcome);
    let sums = bytes[Outcome::BYTES..].as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)).collect();
    (Outcome::read(&bytes).unwrap(), sums, p.outcome)
}

fn run(sim: &Sim, rule: &Rule, step: &Step<'_>) -> Result<()> {
    match rule {
        Rule::Sgd(s) => optim::sgd(sim, step, s),
        Rule::Adam(a) => optim::adam(sim, step, a),
    }
}

/// Relative error of a sum of squares: of 32 exact pairs of a thread, whose low halves are at most 33 roundings of the high
/// ones and are rounded twice a term, and of so many sums in f64 here and there.
fn pairs(terms: usize) -> f64 {
    2.0 * 32.0 * 33.0 * U * U + 2.0 * terms as f64 * f64::EPSILON
}

/// The sums against f64, and what follows from them to the bit.
fn check_sums(o: &Outcome, sums: &[f64], gradients: &[Vec<f32>], max_norm: Option<f64>, unscale: f64) {
    let mut total = 0.0;
    for (s, g) in sums.iter().zip(gradients) {
        let expected: f64 = g.iter().map(|v| f64::from(*v).powi(2)).sum();
        assert!((s - expected).abs() <= pairs(g.len()) * expected, "{s}, expected {expected}");
        total += s;
    }
    assert!((o.squares - total).abs() <= 2.0 * sums.len() as f64 * f64::EPSILON * total, "{} {total}", o.squares);
    assert_eq!(o.norm, o.squares.sqrt() * unscale);
    let clip = max_norm.map_or(1.0, |m| (m / (o.norm + 1e-6)).min(1.0));
    assert_eq!(o.scale, (clip * unscale) as f32);
    assert!(o.finite && o.wrong.is_none());
}

/// Three steps on every card that knows the storage; the same bytes under every schedule.
fn check(storage: Storage, rule: Rule, max_norm: Option<f64>, unscale: f64) {
    for card in cards(storage) {
        let bytes = SEEDS.map(|seed| steps(*card, seed, storage, rule, max_norm, unscale));
        assert!(bytes.iter().all(|b| *b == bytes[0]), "{rule:?}: bytes depend on the schedule");
    }
}

fn steps(card: [u32; 2], seed: u64, storage: Storage, rule: Rule, max_norm: Option<f64>, unscale: f64) -> Vec<u8> {
    let (sim, asked) = (Sim::of(seed, card), ragged());
    let placed = Placed::new(&sim, &asked, storage, rule.kept());
    let mut values: Vec<Vec<f32>> = asked.iter().zip(100..).map(|(a, s)| a.packed(s)).collect();
    let mut kept: Vec<[Vec<f32>; 2]> = asked.iter().zip(0..).map(|(a, i)| [0, 1].map(|n| known(a, i, n))).collect();
    for i in 0..3 {
        let factor = (1.0 / unscale) as f32;
        let of = |(a, s): (&Asked, u64)| a.packed(s).iter().map(|v| v * factor).collect();
        let gradients: Vec<Vec<f32>> = asked.iter().zip(1000 * (i + 1)..).map(of).collect();
        placed.gradients(&gradients);
        let (table, at) = placed.table(i == 0);
        let (o, sums, outcome) = summed(&sim, &table, at, Some(0.5), max_norm, unscale);
        check_sums(&o, &sums, &gradients, max_norm, unscale);
        assert_eq!((f64::from(o.scale) < unscale, o.guard), (max_norm.is_some(), 0.5), "clipped");
        run(&sim, &rule, &Step { table: &table, at, outcome }).unwrap();
        for (p, a) in asked.iter().enumerate() {
            let first = i == 0 && !a.known;
            for (k, g) in gradients[p].iter().enumerate() {
                let [m, q] = &mut kept[p];
                let (value, [new_m, new_q]) = rule.step(values[p][k], g * o.scale, [m[k], q[k]], first);
                (values[p][k], m[k], q[k]) = (value, new_m, new_q);
            }
            let what = format!("{rule:?} in {storage:?}, step {i}: {:?}", a.dims);
            assert!(sim.bytes(placed.values[p]) == bytemuck::cast_slice::<f32, u8>(&values[p]), "{what}");
            for (m, expected) in placed.kept[p].iter().zip(&kept[p]) {
                let Some(m) = m else { continue };
                assert!(sim.bytes(*m) == bytemuck::cast_slice::<f32, u8>(expected), "{what}: kept");
            }
        }
        placed.check_forms(&values, &format!("{rule:?} in {storage:?}, step {i}"));
    }
    placed.bytes()
}

const NNUNET: Sgd = Sgd { weight_decay: 3e-5, momentum: 0.99, rate: 0.01, nesterov: true };

/// Adam's numbers in its third step of a rate of 0.001.
fn adam(decoupled: bool) -> Adam {
    Adam {
        weight_decay: if decoupled { 0.0 } else { 0.01 },
        shrink: if decoupled { 1.0 - 1e-5 } else { 1.0 },
        share1: 0.1,
        beta2: 0.999,
        share2: 0.001,
        rate: (0.001 / (1.0 - 0.9f64.powi(3))) as f32,
        correction: (1.0 - 0.999f64.powi(3)).sqrt() as f32,
        eps: 1e-8,
    }
}

#[test]
pub(super) fn cuda_train_optim_sgd() {
    for storage in STORAGES {
        check(storage, Rule::Sgd(NNUNET), Some(12.0), 1.0);
    }
    check(Storage::F16, Rule::Sgd(Sgd { nesterov: false, ..NNUNET }), None, 1.0 / 1024.0);
    check(
        Storage::Bf16,
        Rule::Sgd(Sgd { momentum: 0.0, nesterov: false, weight_decay: 0.0, ..NNUNET }),
        Some(3.0),
        0.5,
    );
}

#[test]
pub(super) fn cuda_train_optim_adam() {
    for storage in STORAGES {
        check(storage, Rule::Adam(adam(false)), Some(12.0), 1.0);
    }
    check(Storage::F16, Rule::Adam(adam(true)), None, 1.0 / 65536.0);
}

/// Two halves one after the other are a filter for two sources.
#[test]
pub(super) fn cuda_train_optim_halves_are_packed_for_two_sources() {
    let a = filter([20, 24, 1, 2, 1], Vec::new());
    let values = random(20 * 24 * 2, 1);
    for storage in STORAGES {
        let sim = Sim::new(0);
        let each = apart(0..12).values(a.shape()).unwrap() * storage.bytes();
        let all = sim.alloc(2 * each).unwrap();
        let to = |half: usize| Memory { address: all.address + (half * each) as u64, bytes: each };
        let forms = [0, 1].map(|h| Form { order: apart(12 * h..12 * (h + 1)), to: to(h) });
        let value = sim.with(bytemuck::cast_slice(&pack(&values, a.five(), Storage::F32)));
        let p = Parameter { shape: a.shape(), value, gradient: None, kept: [None; 2], first: false, forms: &forms };
        let table = optim::table(storage, &[p]).unwrap();
        optim::repack(&sim, &table, sim.with(table.bytes())).unwrap();
        let expected = conv3d::pack_weight(&values, a.five(), &[12; 2], storage).unwrap();
        assert!(sim.bytes(all) == expected, "{storage:?}");
    }
}

/// Values that were loaded are packed without a step, and stay as they are.
#[test]
pub(super) fn cuda_train_optim_packs_without_a_step() {
    for storage in STORAGES {
        let (sim, asked) = (Sim::new(1), ragged());
        let placed = Placed::new(&sim, &asked, storage, 0);
        let (table, at) = placed.table(true);
        optim::repack(&sim, &table, at).unwrap();
        let values: Vec<Vec<f32>> = asked.iter().zip(100..).map(|(a, s)| a.packed(s)).collect();
        placed.check_forms(&values, "packed");
        for (m, v) in placed.values.iter().zip(&values) {
            assert!(sim.bytes(*m) == bytemuck::cast_slice::<f32, u8>(v), "{storage:?}: values changed");
        }
    }
}

/// One value anywhere, or the loss, is enough: it is found, and nothing is changed.
#[test]
pub(super) fn cuda_train_optim_changes_nothing_unless_all_is_finite() {
    let mut asked = ragged();
    asked.iter_mut().for_each(|a| a.known = true);
    for (rule, storage) in [(Rule::Sgd(NNUNET), Storage::F16), (Rule::Adam(adam(false)), Storage::F32)] {
        let sim = Sim::new(0);
        let placed = Placed::new(&sim, &asked, storage, 2);
        let (table, at) = placed.table(false);
        optim::repack(&sim, &table, at).unwrap();
        let before = placed.bytes();
        let sound: Vec<Vec<f32>> = asked.iter().zip(7..).map(|(a, s)| a.packed(s)).collect();
        for (wrong, value, guard) in [
            (Some(1), f32::NAN, Some(1.0)),
            (Some(3), f32::INFINITY, None),
            (Some(7), f32::NEG_INFINITY, Some(f32::NAN)),
            (None, 0.0, Some(f32::NAN)),
            (None, 0.0, Some(f32::NEG_INFINITY)),
        ] {
            let mut gradients = sound.clone();
            if let Some(p) = wrong {
                *gradients[p].last_mut().unwrap() = value;
                // A later one is not the first.
                gradients[7][5] = f32::NAN;
            }
            placed.gradients(&gradients);
            let (o, sums, outcome) = summed(&sim, &table, at, guard, Some(12.0), 1.0);
            assert_eq!((o.finite, o.wrong, o.scale), (false, wrong, 0.0));
            assert_eq!(o.guard.to_bits(), guard.unwrap_or(0.0).to_bits());
            assert_eq!(sums.iter().position(|s| !s.is_finite()), wrong);
            run(&sim, &rule, &Step { table: &table, at, outcome }).unwrap();
            assert!(placed.bytes() == before, "{rule:?} with {value} and {guard:?}");
        }
    }
}

/// More parameters than a warp has lanes, and squares that no f32 holds.
#[test]
pub(super) fn cuda_train_optim_squares() {
    let mut asked: Vec<Asked> = (0..70).map(|i| vector(1 + 5 * i)).collect();
    asked[40] = filter([16, 600, 3, 1, 1], Vec::new());
    let mut all: Vec<Vec<f32>> = asked.iter().zip(1..).map(|(a, s)| a.packed(s)).collect();
    all[2] = vec![1e30; all[2].len()];
    all[3][1] = -f32::MAX;
    all[40][9000] = 3e25;
    let small: Vec<Vec<f32>> = all.iter().map(|g| g.iter().map(|v| v * 1e-12).collect()).collect();
    let ordinary: Vec<Vec<f32>> = asked.iter().zip(1..).map(|(a, s)| a.packed(s)).collect();
    for card in [[8, 6], [7, 5]] {
        for (gradients, max_norm, unscale) in
            [(&all, Some(12.0), 1.0), (&small, None, 0.25), (&ordinary, Some(12.0), 1.0), (&ordinary, Some(1e4), 1.0)]
        {
            let outcomes = SEEDS.map(|seed| {
                let sim = Sim::of(seed, card);
                let placed = Placed::new(&sim, &asked, Storage::F32, 0);
                placed.gradients(gradients);
                let (table, at) = placed.table(true);
                let (o, sums, outcome) = summed(&sim, &table, at, None, max_norm, unscale);
                check_sums(&o, &sums, gradients, max_norm, unscale);
                sim.bytes(outcome)
            });
            assert!(outcomes.iter().all(|o| *o == outcomes[0]), "bytes depend on the schedule");
        }
    }
}

/// A step is bound by memory: every sector that it touches is full, and it touches none twice.
#[test]
pub(super) fn cuda_train_optim_wastes_no_sector() {
    let asked = [filter([64, 64, 3, 3, 3], vec![Order::Same, turned(0..32, true), turned(32..64, true)])];
    let floats = 64 * 64 * 27;
    for (rule, name, kept) in [(Rule::Sgd(NNUNET), "sgd", 1), (Rule::Adam(adam(false)), "adam", 2)] {
        let sim = Sim::new(0);
        let placed = Placed::new(&sim, &asked, Storage::Bf16, 2);
        placed.gradients(&[asked[0].packed(1)]);
        placed.kept[0].iter().flatten().for_each(|m| sim.memset(*m, 0).unwrap());
        let (table, at) = placed.table(false);
        let (_, _, outcome) = summed(&sim, &table, at, None, None, 1.0);
        run(&sim, &rule, &Step { table: &table, at, outcome }).unwrap();
        let entry = format!("optim_{name}_bf16");
        for (entry, what, bytes) in [
            ("optim_squares", "ld.global.v4", 4),
            (&entry, "ld.global.v4", 4 * (2 + kept)),
            (&entry, "st.global", 4 * (1 + kept) + 2 + 2),
        ] {
            let t = sim.traffic(entry, what);
            assert_eq!((t.sectors, t.sectors), (t.ideal_sectors, floats * bytes / 32), "{entry}: {what}");
        }
        let t = sim.traffic(&entry, "st.shared");
        assert_eq!(t.wavefronts, t.ideal_wavefronts, "{entry}: stores to shared memory");
    }
}

#[test]
pub(super) fn cuda_train_optim_refuses_what_does_not_fit() {
    let sim = Sim::new(0);
    let asked = [filter([16, 20, 1, 1, 1], Vec::new())];
    let placed = Placed::new(&sim, &asked, Storage::F16, 1);
    let whole = Parameter {
        shape: asked[0].shape(),
        value: placed.values[0],
        gradient: Some(placed.gradients[0]),
        kept: placed.kept[0],
        first: true,
        forms: &[],
    };
    let refuses = |p: Parameter<'_>| assert!(optim::table(Storage::F16, &[p]).is_err(), "{p:?}");
    let short = Memory { bytes: whole.value.bytes - 1, ..whole.value };
    let odd = Memory { address: whole.value.address + 4, ..whole.value };
    refuses(Parameter { value: short, ..whole });
    refuses(Parameter { value: odd, ..whole });
    refuses(Parameter { gradient: Some(short), ..whole });
    refuses(Parameter { kept: [Some(short), None], ..whole });
    refuses(Parameter { shape: Shape::Filter { filters: 16, channels: 20, taps: 0 }, ..whole });
    refuses(Parameter { shape: Shape::Vector(usize::MAX / 64), ..whole });
    let to = room(&sim, 32 * 16, Storage::F16);
    for order in [turned(0..21, true), turned(4..4, true), apart(20..21), Order::Same] {
        let to = if order == Order::Same { Memory { bytes: to.bytes - 1, ..to } } else { to };
        refuses(Parameter { forms: &[Form { order, to }], ..whole });
    }
    refuses(Parameter { shape: Shape::Vector(16), forms: &[Form { order: Order::First, to }], ..whole });
    refuses(Parameter { shape: Shape::Vector(16), forms: &[Form { order: Order::Same, to }], ..whole });
    assert!(optim::table(Storage::F16, &[]).is_err());
    assert!(Outcome::read(&[0; 31]).is_err());
    let table = optim::table(Storage::F16, &[whole]).unwrap();
    let (at, outcome) = (sim.with(table.bytes()), sim.with(&[0; Outcome::BYTES]));
    let step = Step { table: &table, at, outcome };
    assert!(optim::adam(&sim, &step, &adam(false)).is_err(), "one buffer");
    assert!(optim::sgd(&sim, &Step { at: Memory { bytes: at.bytes - 1, ..at }, ..step }, &NNUNET).is_err());
    let bare = optim::table(Storage::F16, &[Parameter { gradient: None, ..whole }]).unwrap();
    assert!(optim::sgd(&sim, &Step { table: &bare, ..step }, &NNUNET).is_err(), "no gradient");
    let squares = |table, partials, outcome| {
        optim::squares(&sim, &Squares { table, at, partials, guard: None, max_norm: None, unscale: 1.0, outcome })
    };
    assert!(squares(&bare, to, to).is_err(), "no gradient");
    assert!(squares(&table, Memory { bytes: 7, ..to }, to).is_err());
    assert!(squares(&table, to, outcome).is_err(), "no room for the sums of parameters");
}
