//! Augmentation: its cores against batchgeneratorsv2 with the same parameters, and what is drawn.

use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::Value;
use stunet::Isa;
use stunet::nnunet::augment::{
    AugmentConfig, Augmenter, Item, Operation, Operator, Parameters, Removal, Scratch, Spatial,
};
use stunet::nnunet::training_case::{ClassKey, ClassLocations, TrainingCase};

/// A case in memory.
pub struct Case {
    pub shape: [usize; 3],
    pub image: Vec<f32>,
    pub labels: Vec<i16>,
    pub locations: ClassLocations,
}

impl Case {
    /// One channel of random values, labels from -1 to 3.
    pub fn random(shape: [usize; 3], channels: usize, seed: u64) -> Self {
        let n: usize = shape.iter().product();
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut bits = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state >> 33
        };
        let image = (0..n * channels).map(|_| bits() as f32 / f32::powi(2.0, 30) - 1.0).collect();
        let labels = (0..n).map(|_| (bits() % 5) as i16 - 1).collect();
        Self { shape, image, labels, locations: ClassLocations::default() }
    }

    /// The patch of this very size, its initial patch that of the case.
    pub fn run(&self, config: &AugmentConfig, p: &Parameters, isa: Isa) -> (Vec<f32>, Vec<u16>) {
        let n: usize = config.patch.iter().product();
        let (mut image, mut target) = (vec![f32::NAN; n * self.channels()], vec![u16::MAX; n]);
        let augmenter = Augmenter::new(config.clone(), &[]).with_isa(isa);
        augmenter.run(self, [0; 3], p, &mut Scratch::default(), &mut image, &mut target).unwrap();
        (image, target)
    }

    fn each(&self, lower: [i64; 3], size: [usize; 3], mut put: impl FnMut(usize, Option<usize>)) {
        let [_, h, w] = size;
        for i in 0..size.iter().product() {
            let at = [i / (h * w), i / w % h, i % w];
            let voxel: [i64; 3] = std::array::from_fn(|k| lower[k] + at[k] as i64);
            let inside = (0..3).all(|k| (0..self.shape[k] as i64).contains(&voxel[k]));
            let [_, ch, cw] = self.shape.map(|n| n as i64);
            put(i, inside.then_some(((voxel[0] * ch + voxel[1]) * cw + voxel[2]) as usize));
        }
    }
}

impl TrainingCase for Case {
    fn channels(&self) -> usize {
        self.image.len() / self.shape.iter().product::<usize>()
    }

    fn label_channels(&self) -> usize {
        self.labels.len() / self.shape.iter().product::<usize>()
    }

    fn shape(&self) -> [usize; 3] {
        self.shape
    }

    fn classes(&self) -> Vec<(&ClassKey, usize)> {
        self.locations.counts()
    }

    fn location(&self, class: usize, at: usize) -> stunet::Result<[u32; 3]> {
        Ok(self.locations.classes[class].1[at])
    }

    fn crop(&self, lower: [i64; 3], size: [usize; 3], data: &mut [f32], labels: &mut [i16]) -> stunet::Result<()> {
        let (all, volume) = (self.shape.iter().product::<usize>(), size.iter().product::<usize>());
        self.each(lower, size, |to, from| {
            for c in 0..self.channels() {
                data[c * volume + to] = from.map_or(0.0, |f| self.image[c * all + f]);
            }
            for c in 0..self.label_channels() {
                labels[c * volume + to] = from.map_or(-1, |f| self.labels[c * all + f]);
            }
        });
        Ok(())
    }
}

fn numbers(v: &Value) -> Vec<f64> {
    v.as_array().into_iter().flatten().map(|x| x.as_f64().unwrap()).collect()
}

fn floats(v: &Value) -> Vec<f32> {
    numbers(v).into_iter().map(|x| x as f32).collect()
}

fn three(v: &[f64]) -> [f64; 3] {
    let mut out = [0.0; 3];
    out[3 - v.len()..].copy_from_slice(v);
    out
}

/// Three sizes; 1 along z in 2D.
fn sizes(v: &Value) -> [usize; 3] {
    let n = numbers(v);
    std::array::from_fn(|k| if k + n.len() < 3 { 1 } else { n[k + n.len() - 3] as usize })
}

fn parameters(p: &Value) -> Parameters {
    let mut out = Parameters::default();
    if let Some(s) = p.get("spatial") {
        let angles = three(&numbers(&s["angles"]));
        out.spatial = Some(Spatial { angles, scale: s["scale"].as_f64().unwrap() });
    }
    let list = |name: &str| p.get(name).and_then(Value::as_array).cloned().unwrap_or_default();
    out.blur = list("blur").iter().map(|v| v.is_array().then(|| three(&numbers(v)))).collect();
    out.low_resolution = list("low_resolution").iter().map(|v| v.as_f64().map(|s| s as f32)).collect();
    out.brightness = floats(&p["brightness"]);
    out.contrast = floats(&p["contrast"]);
    out.gamma_inverted = floats(&p["gamma_inverted"]);
    out.gamma = floats(&p["gamma"]);
    numbers(&p["mirror"]).into_iter().for_each(|axis| out.mirror[axis as usize] = true);
    let channel = |v: &Value| v[0].as_u64().unwrap() as usize;
    let operator = |name: &str| match name {
        "dilation" => Operator::Dilation,
        "erosion" => Operator::Erosion,
        "closing" => Operator::Closing,
        _ => Operator::Opening,
    };
    let operation = |v: &Value| Operation {
        channel: channel(v),
        operator: operator(v[1].as_str().unwrap()),
        radius: v[2].as_f64().unwrap(),
    };
    out.operations = list("operations").iter().map(operation).collect();
    out.removals =
        list("removals").iter().map(|v| Removal { channel: channel(v), choice: v[1].as_f64().unwrap() }).collect();
    out
}

/// Data to 1e-4, labels equal in 99.9 % of the voxels, cascades in all; with every instruction set.
#[test]
fn cores_do_what_batchgenerators_does() {
    let bytes = include_bytes!("fixtures/augment.safetensors");
    let file = SafeTensors::deserialize(bytes).unwrap();
    let meta = SafeTensors::read_metadata(bytes).unwrap().1.metadata().clone().unwrap();
    let cases: Vec<Value> = serde_json::from_str(&meta["cases"]).unwrap();
    let patches: Value = serde_json::from_str(&meta["patches"]).unwrap();
    let f32s = |name: &str| -> Vec<f32> { bytemuck::pod_collect_to_vec(file.tensor(name).unwrap().data()) };
    let (mut voxels, mut other) = (0, 0);
    for (i, case) in cases.iter().enumerate() {
        let (kind, p) = (case["kind"].as_str().unwrap(), &case["parameters"]);
        let patch = &patches[kind][0];
        let list: Vec<usize> = numbers(patch).into_iter().map(|n| n as usize).collect();
        let masked: Vec<bool> = p["masked"].as_array().into_iter().flatten().map(|m| m.as_bool().unwrap()).collect();
        let mut config = AugmentConfig::new(&list, &masked).unwrap();
        assert_eq!((config.planes, config.two_d), (kind != "volume", kind == "two_d"));
        config.initial_patch = sizes(&patches[kind][1]);
        let source = Case {
            shape: config.initial_patch,
            image: f32s(&format!("{kind}.image")),
            labels: bytemuck::pod_collect_to_vec(file.tensor(&format!("{kind}.labels")).unwrap().data()),
            locations: ClassLocations::default(),
        };
        let previous: Vec<u16> = numbers(&p["previous"]).into_iter().map(|n| n as u16).collect();
        let volume: usize = config.patch.iter().product();
        for &isa in Isa::available() {
            let augmenter = Augmenter::new(config.clone(), &previous).with_isa(isa);
            let mut image = vec![f32::NAN; (2 + previous.len()) * volume];
            let mut target = vec![u16::MAX; volume];
            let mut scratch = Scratch::default();
            // Twice: memory that has been used changes nothing.
            for _ in 0..2 {
                augmenter.run(&source, [0; 3], &parameters(p), &mut scratch, &mut image, &mut target).unwrap();
            }
            if !previous.is_empty() {
                let expected = file.tensor(&format!("{i}.one_hot")).unwrap().data();
                let odd = image[2 * volume..].iter().zip(expected).filter(|(a, b)| **a != f32::from(**b)).count();
                assert_eq!(odd, 0, "case {i} {case} {isa:?}: {odd} of {} voxels", expected.len());
                continue;
            }
            let expected = f32s(&format!("{i}.image"));
            assert_eq!(image.len(), expected.len());
            let worst = image.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0f32, |m, d| m.max(d));
            assert!(worst <= 1e-4, "case {i} {case} {isa:?}: {worst:e}");
            let labels = file.tensor(&format!("{i}.target")).unwrap().data();
            let odd = target.iter().zip(labels).filter(|(a, b)| **a != u16::from(**b)).count();
            voxels += volume;
            other += odd;
        }
    }
    assert!(other * 1000 <= voxels, "{other} of {voxels} labels");
}

#[test]
fn what_does_not_fit_is_an_error() {
    let case = Case::random([4, 4, 4], 2, 1);
    let config = AugmentConfig::new(&[4, 4, 4], &[]).unwrap();
    let run = |config: &AugmentConfig, previous: &[u16], p: &Parameters, values: usize| {
        let (mut image, mut target) = (vec![0.0; values], vec![0; 64]);
        let augmenter = Augmenter::new(config.clone(), previous);
        augmenter.run(&case, [0; 3], p, &mut Scratch::default(), &mut image, &mut target).map_err(|e| e.to_string())
    };
    let none = Parameters::default();
    assert_eq!(run(&config, &[], &none, 128), Ok(()));
    assert!(run(&config, &[], &none, 64).unwrap_err().contains("2 channels"));
    assert!(run(&config, &[1], &none, 192).unwrap_err().contains("stage before"));
    let mut odd = Parameters::default();
    odd.gamma = vec![1.0];
    assert!(run(&config, &[], &odd, 128).unwrap_err().contains("expected 2"));
    odd = Parameters::default();
    odd.removals = vec![Removal { channel: 0, choice: 0.0 }];
    assert!(run(&config, &[], &odd, 128).unwrap_err().contains("label 0"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Whatever is drawn and whatever the sizes: every value is written and finite, labels are some of the case's, the same
    /// parameters give the same bytes.
    #[test]
    fn any_patch_is_whole(size in prop::array::uniform3(2usize..20), planes: bool, channels in 1usize..3, seed: u64) {
        let list = if planes { vec![size[1], size[2]] } else { size.to_vec() };
        let config = AugmentConfig::new(&list, &vec![true; channels]).unwrap();
        let case = Case::random([5, 11, 17], channels, seed);
        for index in 0..8 {
            let p = Parameters::draw(&config, channels, 0, Item { seed, epoch: 1, index });
            let (image, target) = case.run(&config, &p, Isa::detect());
            prop_assert!(image.iter().all(|v| v.is_finite()), "{p:?}");
            prop_assert!(target.iter().all(|l| *l <= 3));
            prop_assert_eq!(case.run(&config, &p, Isa::detect()), (image, target));
        }
    }
}

/// nnU-Net's own sizes (`configure_rotation_dummyDA_mirroring_and_inital_patch_size`).
#[test]
fn initial_patches_are_nnunets() {
    for (patch, initial, planes, degrees) in INITIAL {
        let config = AugmentConfig::new(patch, &[]).unwrap();
        let n = patch.len();
        assert_eq!(&config.initial_patch[3 - n..], *initial, "{patch:?}");
        assert_eq!((config.planes, config.rotation.to_degrees().round()), (*planes || n == 2, *degrees), "{patch:?}");
        assert_eq!(config.mirror, [n == 3, true, true]);
    }
    assert!(AugmentConfig::new(&[3], &[]).is_err() && AugmentConfig::new(&[3, 0], &[]).is_err());
}

/// Patch, initial patch, dummy 2D, largest angle in degrees.
#[rustfmt::skip]
const INITIAL: &[(&[usize], &[usize], bool, f64)] = &[
    (&[128, 128, 128], &[205, 205, 205], false, 30.0),
    (&[64, 160, 160], &[159, 257, 200], false, 30.0),
    (&[512, 512], &[602, 602], false, 180.0),
    (&[16, 256, 224], &[16, 301, 301], true, 180.0),
    (&[320, 256], &[376, 376], false, 180.0),
    (&[40, 56, 40], &[73, 80, 64], false, 30.0),
    (&[20, 320, 256], &[20, 376, 376], true, 180.0),
    (&[96, 160, 160], &[191, 257, 219], false, 30.0),
    (&[34, 34], &[40, 40], false, 180.0),
    (&[80, 192, 160], &[194, 289, 210], false, 30.0),
    (&[48, 192, 192], &[48, 225, 225], true, 180.0),
    (&[512, 320], &[679, 376], false, 15.0),
    (&[17, 51, 34], &[47, 71, 44], false, 30.0),
    (&[17, 52, 34], &[17, 61, 61], true, 180.0),
    (&[1, 64, 64], &[1, 75, 75], true, 180.0),
    (&[112, 112, 128], &[179, 189, 196], false, 30.0),
    (&[28, 256, 256], &[28, 301, 301], true, 180.0),
    (&[170, 68], &[213, 80], false, 15.0),
    (&[160, 160, 192], &[257, 275, 289], false, 30.0),
    (&[8, 8, 8], &[12, 12, 12], false, 30.0),
];
