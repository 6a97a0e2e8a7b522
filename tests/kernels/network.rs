//! A whole small STU-Net by the kernels' host side, against the CPU's engine.

use std::borrow::Cow;
use std::collections::BTreeMap;

use stunet::autograd::Ctx;
use stunet::backend_testing::cuda::conv3d::{self, Wish, first, residual};
use stunet::backend_testing::cuda::{Norm, Source, Storage, head_labels, instance_norm, moments, padded, relayout};
use stunet::models::StuNetConfig;
use stunet::nn::ParamSource;
use stunet::nn::RandomParams;
use stunet::tensor::cuda::Memory;
use stunet::tensor::{Dims, Tensor};
use stunet::{Device, Error, Precision, Result};

use super::sim::Sim;
use super::{random, room, unpadded};
use crate::common::bound::U;

const SLOPE: f32 = 0.01;
const ONE: [usize; 3] = [1; 3];

/// Random parameters whose biases are not zero and whose norms are not one.
struct Varied(RandomParams);

impl ParamSource for Varied {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.0.shape(name)
    }

    fn values(&self, name: &str) -> Result<Cow<'_, [f32]>> {
        let values = self.0.values(name)?;
        if self.shape(name).is_some_and(|s| s.len() > 1) {
            return Ok(values);
        }
        let seed = name.bytes().map(u64::from).sum();
        let offsets = random(values.len(), seed);
        Ok(values.iter().zip(offsets).map(|(v, o)| v + 0.25 * o).collect())
    }

    fn error(&self, name: &str, what: String) -> Error {
        self.0.error(name, what)
    }
}

/// The network on a device.
struct Net<'a> {
    sim: &'a Sim,
    storage: Storage,
    source: &'a dyn ParamSource,
    batch: usize,
}

impl Net<'_> {
    fn values(&self, name: &str) -> Vec<f32> {
        self.source.values(name).unwrap().into_owned()
    }

    fn vector(&self, name: &str) -> Memory {
        let mut v = self.values(name);
        v.resize(padded(v.len()), 0.0);
        self.sim.with(bytemuck::cast_slice(&v))
    }

    /// Without its bias where a normalisation follows, which takes it out again.
    fn conv(&self, name: &str, from: &[Source], stride: [usize; 3], norm: Option<&str>) -> Source {
        let shape = self.source.shape(&format!("{name}.weight")).unwrap();
        let (o, i, kernel) = (shape[0], shape[1], [shape[2], shape[3], shape[4]]);
        let weight = self.values(&format!("{name}.weight"));
        let channels: Vec<usize> = from.iter().map(|s| s.channels).collect();
        let dims = [o, i, kernel[0], kernel[1], kernel[2]];
        let packed = conv3d::pack_weight(&weight, dims, &channels, self.storage).unwrap();
        let out = conv3d::output_space(from[0].read_space(), kernel, stride);
        let voxels: usize = out.iter().product();
        let mut p = conv3d::Problem {
            storage: self.storage,
            batch: self.batch,
            sources: from,
            weight: self.sim.with(&packed),
            bias: norm.is_none().then(|| self.vector(&format!("{name}.bias"))),
            filters: o,
            kernel,
            stride,
            out: room(self.sim, self.batch * voxels * padded(o), self.storage),
            partials: None,
            workspace: None,
        };
        let measured = norm.is_some() && self.storage != Storage::F32;
        let plan = conv3d::plan(self.sim, &p, measured, Wish::default()).unwrap();
        let tiles = plan.tiles();
        p.partials = measured.then(|| room(self.sim, self.batch * tiles * 3 * padded(o), Storage::F32));
        p.workspace = (plan.workspace() > 0).then(|| room(self.sim, plan.workspace() / 4, Storage::F32));
        conv3d::run(self.sim, &p, &plan).unwrap();
        self.normalised(Source::plain(p.out, o, out), norm, p.partials.map(|m| (m, tiles)))
    }

    /// The first convolution, from planes of f32.
    fn first(&self, name: &str, planes: Memory, channels: usize, space: [usize; 3], norm: Option<&str>) -> Source {
        let shape = self.source.shape(&format!("{name}.weight")).unwrap();
        if self.storage == Storage::F32 {
            return self.conv(name, &[self.voxels(planes, channels, space)], ONE, norm);
        }
        let (o, kernel) = (shape[0], [shape[2], shape[3], shape[4]]);
        let weight = self.values(&format!("{name}.weight"));
        let packed = first::pack_weight(&weight, [o, channels, kernel[0], kernel[1], kernel[2]], self.storage).unwrap();
        let tiles = first::tiles(space);
        let voxels: usize = space.iter().product();
        let p = first::Problem {
            storage: self.storage,
            batch: self.batch,
            channels,
            planes,
            wide: true,
            space,
            weight: self.sim.with(&packed),
            bias: norm.is_none().then(|| self.vector(&format!("{name}.bias"))),
            filters: o,
            kernel,
            stride: ONE,
            out: room(self.sim, self.batch * voxels * padded(o), self.storage),
            partials: norm.map(|_| room(self.sim, self.batch * tiles * 3 * padded(o), Storage::F32)),
        };
        first::run(self.sim, &p).unwrap();
        self.normalised(Source::plain(p.out, o, space), norm, p.partials.map(|m| (m, tiles)))
    }

    fn voxels(&self, planes: Memory, channels: usize, space: [usize; 3]) -> Source {
        let values = room(self.sim, self.batch * space.iter().product::<usize>() * padded(channels), self.storage);
        let p = relayout::Problem {
            storage: self.storage,
            batch: self.batch,
            channels,
            space,
            planes,
            values,
            flip: [false; 3],
        };
        relayout::to_voxels(self.sim, &p).unwrap();
        Source::plain(values, channels, space)
    }

    /// With the normalisation of that name; its moments are of the tensor where the convolution left none.
    fn normalised(&self, mut x: Source, norm: Option<&str>, partials: Option<(Memory, usize)>) -> Source {
        let Some(norm) = norm else { return x };
        let c = padded(x.channels);
        let (partials, tiles) = partials.unwrap_or_else(|| {
            let tiles = moments::count(x.space);
            let partials = room(self.sim, self.batch * tiles * 3 * c, Storage::F32);
            let (storage, batch, channels) = (self.storage, self.batch, x.channels);
            let p = moments::Tiles { storage, batch, channels, space: x.space, data: x.data, partials };
            moments::tiles(self.sim, &p).unwrap();
            (partials, tiles)
        });
        let planes = room(self.sim, self.batch * 3 * c, Storage::F32);
        let merge = moments::Merge {
            batch: self.batch,
            channels: x.channels,
            voxels: x.space.iter().product(),
            tiles,
            partials,
            weight: self.vector(&format!("{norm}.weight")),
            bias: self.vector(&format!("{norm}.bias")),
            eps: 1e-5,
            norm: planes,
            inverses: None,
        };
        moments::merge(self.sim, &merge).unwrap();
        x.norm = Some(Norm { planes, slope: SLOPE });
        x
    }

    /// The end of a block with the shortcut of that name, of planes of f32 or of sources.
    fn end(&self, mut y: Source, name: &str, input: residual::Input<'_>, stride: [usize; 3]) -> Source {
        let out = room(self.sim, y.data.bytes / self.storage.bytes(), self.storage);
        if self.storage == Storage::F32 {
            let shortcut = match input {
                residual::Input::Voxels(from) => self.conv(name, from, stride, None),
                residual::Input::Planes { data, channels, space } => self.first(name, data, channels, space, None),
            };
            // Leaky ReLU comes after the sum.
            y.norm.as_mut().unwrap().slope = 1.0;
            let (storage, batch, shortcut) = (self.storage, self.batch, Some(shortcut));
            let p = instance_norm::Problem { storage, batch, x: y, shortcut, slope: SLOPE, out };
            instance_norm::run(self.sim, &p).unwrap();
            return Source::plain(out, y.channels, y.space);
        }
        let shape = self.source.shape(&format!("{name}.weight")).unwrap();
        let channels: Vec<usize> = match input {
            residual::Input::Voxels(from) => from.iter().map(|s| s.channels).collect(),
            residual::Input::Planes { channels, .. } => vec![channels],
        };
        let weight = self.values(&format!("{name}.weight"));
        let packed = conv3d::pack_weight(&weight, [shape[0], shape[1], 1, 1, 1], &channels, self.storage).unwrap();
        let p = residual::Problem {
            storage: self.storage,
            batch: self.batch,
            input,
            weight: self.sim.with(&packed),
            bias: Some(self.vector(&format!("{name}.bias"))),
            stride,
            y,
            out,
        };
        residual::run(self.sim, &p).unwrap();
        Source::plain(out, y.channels, y.space)
    }

    fn features(&self, config: &StuNetConfig, planes: Memory, space: [usize; 3]) -> Source {
        let mut skips = Vec::new();
        let channels = config.in_channels;
        let mut x = Source::plain(planes, channels, space);
        for s in 0..6 {
            let name = format!("conv_blocks_context.{s}.0");
            let stride = if s == 0 { ONE } else { config.strides[s - 1] };
            let (conv1, norm) = (format!("{name}.conv1"), format!("{name}.norm1"));
            let y = match s {
                0 => self.first(&conv1, planes, channels, space, Some(&norm)),
                _ => self.conv(&conv1, &[x], stride, Some(&norm)),
            };
            let y = self.conv(&format!("{name}.conv2"), &[y], ONE, Some(&format!("{name}.norm2")));
            let from = [x];
            let input = match s {
                0 => residual::Input::Planes { data: planes, channels, space },
                _ => residual::Input::Voxels(&from),
            };
            x = self.end(y, &format!("{name}.conv3"), input, stride);
            skips.push(x);
        }
        skips.pop();
        for u in 0..5 {
            let name = format!("conv_blocks_localization.{u}.0");
            let mut up = self.conv(&format!("upsample_layers.{u}.conv"), &[x], ONE, None);
            up.repeat = config.strides[4 - u];
            let from = [up, skips.pop().unwrap()];
            let y = self.conv(&format!("{name}.conv1"), &from, ONE, Some(&format!("{name}.norm1")));
            let y = self.conv(&format!("{name}.conv2"), &[y], ONE, Some(&format!("{name}.norm2")));
            x = self.end(y, &format!("{name}.conv3"), residual::Input::Voxels(&from), ONE);
        }
        x
    }

    fn labels(&self, features: Source, classes: usize) -> Vec<u8> {
        use stunet::tensor::cuda::Driver;
        let (weight, bias) = (self.values("seg_outputs.4.weight"), self.values("seg_outputs.4.bias"));
        let packed = head_labels::pack_weight(&weight, [classes, features.channels], self.storage).unwrap();
        let voxels = self.batch * features.space.iter().product::<usize>();
        let p = head_labels::Problem {
            storage: self.storage,
            batch: self.batch,
            features,
            weight: self.sim.with(&packed),
            bias: self.sim.with(bytemuck::cast_slice(&head_labels::pack_bias(&bias))),
            classes,
            divisor: None,
            labels: self.sim.alloc(2 * voxels).unwrap(),
        };
        head_labels::run(self.sim, &p).unwrap();
        self.sim.bytes(p.labels)
    }
}

/// Relative error in the root mean square, and the part of labels that agree.
fn compare(card: [u32; 2], storage: Storage, batch: usize, precision: Precision) -> (f64, f64) {
    let config = StuNetConfig { dims: [16, 16, 32, 32, 48, 32], ..StuNetConfig::small(2, 9) };
    let config = config.with_strides([[2, 2, 2], [2, 2, 2], [1, 2, 2], [1, 1, 1], [1, 1, 1]]);
    let shapes: BTreeMap<_, _> = config.parameters().into_iter().collect();
    let source = Varied(RandomParams::new(5, shapes));
    let space = [12, 16, 16];
    let voxels: usize = space.iter().product();
    let image = random(batch * 2 * voxels, 6);

    let device = Device::cpu();
    let net = config.build_with(&source, &device, precision).unwrap();
    let x = || Tensor::from_host(&image, Dims::from([batch, 2, space[0], space[1], space[2]]), &device).unwrap();
    let mut cx = Ctx::infer(&device).strict(true);
    let leaf = cx.leaf(x());
    let expected = net.features(&mut cx, leaf).unwrap().into_value().to_host().unwrap();
    let leaf = cx.leaf(x());
    let expected_labels = net.labels(&mut cx, leaf).unwrap();

    let sim = Sim::of(0, card);
    let on = Net { sim: &sim, storage, source: &source, batch };
    let features = on.features(&config, sim.with(bytemuck::cast_slice(&image)), space);
    let got = unpadded(&storage.load(&sim.bytes(features.data)), 16);
    let (mut error, mut norm) = (0.0, 0.0);
    for b in 0..batch {
        for c in 0..16 {
            for v in 0..voxels {
                let e = f64::from(expected[(b * 16 + c) * voxels + v]);
                let g = f64::from(got[(b * voxels + v) * 16 + c]);
                assert!(g.is_finite());
                error += (g - e).powi(2);
                norm += e * e;
            }
        }
    }
    let labels = on.labels(features, 9);
    let same = labels.as_chunks::<2>().0.iter().zip(&expected_labels).filter(|(g, e)| u16::from_le_bytes(**g) == **e);
    ((error / norm).sqrt(), same.count() as f64 / expected_labels.len() as f64)
}

/// Where sums are in f32 and so is storage, what differs is the order of sums.
#[test]
pub(super) fn ptx_network_in_f32_is_the_cpus() {
    let (error, same) = compare([7, 5], Storage::F32, 2, Precision::F32);
    // Rounding errors of about 500 products in each of 27 layers in a row, as independent ones.
    println!("error {error:.2e}, {same:.5} of the labels");
    let limit = (500.0f64 * 27.0).sqrt() * U * 2.0;
    assert!(error < limit, "{error}, limit {limit}");
    assert!(same > 0.999, "{same}");
}

/// Rounding to storage happens at most three times a layer: of its result, of its normalised input, of its weights. A
/// rounding is off by its unit over the square root of 3 in the root mean square, and independent of others.
#[test]
pub(super) fn ptx_network_in_16_bit_is_near_the_cpus() {
    for (card, storage, digits, precision) in [
        ([8, 6], Storage::Bf16, 8, Precision::Bf16),
        ([9, 0], Storage::F16, 11, Precision::F32),
        ([7, 5], Storage::F16, 11, Precision::F32),
    ] {
        let (error, same) = compare(card, storage, 1, precision);
        println!("{card:?} {storage:?}: error {error:.2e}, {same:.5} of the labels");
        let limit = 2f64.powi(-digits) * (3.0 * 27.0f64 / 3.0).sqrt();
        assert!(error < limit, "{storage:?}: {error}, limit {limit}");
        assert!(same > 1.0 - 4.0 * limit, "{storage:?}: {same} of the labels");
    }
}
