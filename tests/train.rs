//! Training as a program of its own: it goes on where it was stopped with the same bytes, says where numbers end, and leaves
//! files that are opened again.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use stunet::nn::{self, Module};
#[cfg(feature = "cuda")]
use stunet::nnunet::checkpoint::{self, Checkpoint, TrainingState};
use stunet::nnunet::loader::Batch;
use stunet::nnunet::model::{ModelFolder, ModelOptions};
use stunet::nnunet::train::{Batches, Data, NetworkChoice, Start, TrainOptions, Trainer, TrainingPlan};
use stunet::{Device, Error, Event, Flow, Precision, Result};

use crate::common::drive::values;

pub const PATCH: [usize; 3] = [16, 16, 16];

pub fn write_json(path: &Path, value: &Value) {
    fs::write(path, serde_json::to_string_pretty(value).unwrap()).unwrap();
}

/// A data set's folder with plans for a U-Net of three stages.
pub fn plans(folder: &Path, labels: &Value, channels: usize) -> PathBuf {
    let resampling =
        |order: usize, seg: bool| json!({"is_seg": seg, "order": order, "order_z": 0, "force_separate_z": null});
    let function = "resample_data_or_seg_to_shape";
    let triples = |v: [usize; 3]| v.map(|n| json!([n, n, n]));
    let plans = json!({
        "dataset_name": "Dataset001_Test",
        "plans_name": "nnUNetPlans",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "configurations": {"3d_fullres": {
            "data_identifier": "nnUNetPlans_3d_fullres",
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": 2,
            "patch_size": PATCH,
            "spacing": [1.0, 1.0, 1.0],
            "normalization_schemes": vec!["ZScoreNormalization"; channels],
            "use_mask_for_norm": vec![false; channels],
            "resampling_fn_data": function,
            "resampling_fn_data_kwargs": resampling(3, false),
            "resampling_fn_seg": function,
            "resampling_fn_seg_kwargs": resampling(1, true),
            "resampling_fn_probabilities": function,
            "resampling_fn_probabilities_kwargs": resampling(1, false),
            "batch_dice": true,
            "architecture": {
                "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
                "arch_kwargs": {
                    "n_stages": 3,
                    "features_per_stage": [4, 8, 8],
                    "conv_op": "torch.nn.modules.conv.Conv3d",
                    "kernel_sizes": triples([3, 3, 3]),
                    "strides": triples([1, 2, 2]),
                    "n_conv_per_stage": [1, 1, 1],
                    "n_conv_per_stage_decoder": [1, 1],
                    "conv_bias": true,
                    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                    "norm_op_kwargs": {"eps": 1e-05, "affine": true},
                    "dropout_op": null,
                    "dropout_op_kwargs": null,
                    "nonlin": "torch.nn.LeakyReLU",
                    "nonlin_kwargs": {"inplace": true},
                },
            },
        }},
    });
    let names: serde_json::Map<String, Value> = (0..channels).map(|c| (c.to_string(), json!("MR"))).collect();
    let dataset = json!({"channel_names": names, "labels": labels, "numTraining": 2, "file_ending": ".nii.gz"});
    write_json(&folder.join("dataset.json"), &dataset);
    let path = folder.join("nnUNetPlans.json");
    write_json(&path, &plans);
    path
}

pub fn labels() -> Value {
    json!({"background": 0, "bright": 1, "brighter": 2})
}

/// Noise whose label is its brightness.
pub struct Noise {
    next: (u32, u32),
    iterations: u32,
    channels: usize,
    patch: [usize; 3],
    /// A batch with a NaN.
    broken: Option<(u32, u32)>,
}

impl Noise {
    fn data(channels: usize, broken: Option<(u32, u32)>) -> Data {
        Self::of(channels, PATCH, broken)
    }

    pub fn of(channels: usize, patch: [usize; 3], broken: Option<(u32, u32)>) -> Data {
        let noise = |iterations| Box::new(Noise { next: (0, 0), iterations, channels, patch, broken });
        Data { train: noise(3), val: noise(2), cases: vec!["first".into(), "second".into()] }
    }
}

impl Batches for Noise {
    fn seek(&mut self, epoch: u32, iteration: u32) -> Result<()> {
        self.next = (epoch + iteration / self.iterations, iteration % self.iterations);
        Ok(())
    }

    fn batch(&mut self) -> Result<Batch> {
        let (epoch, iteration) = self.next;
        self.seek(epoch, iteration + 1)?;
        let voxels: usize = self.patch.iter().product();
        let mut image = values(2 * self.channels * voxels, u64::from(epoch + iteration) % 3);
        let first = image.chunks_exact(voxels).step_by(self.channels);
        let label = |v: &f32| u16::from(*v > 0.0) + u16::from(*v > 0.5);
        let target = first.flatten().map(label).collect();
        if self.broken == Some((epoch, iteration)) {
            image[7] = f32::NAN;
        }
        Batch::new(image, target, self.channels, self.patch, vec![0, 1])
    }
}

pub fn options(network: NetworkChoice) -> TrainOptions {
    let mut o = TrainOptions::new();
    (o.network, o.epochs, o.iterations, o.val_iterations, o.seed) = (network, Some(3), 3, 2, 7);
    o
}

/// A trainer in `folder`/MODEL/fold_0.
fn trainer(folder: &Path, options: &TrainOptions, start: Start, data: Data) -> Result<Trainer> {
    trainer_after(None, folder, options, start, data)
}

/// Of a cascade's second stage, to which the first gave what has this digest.
fn trainer_after(
    digest: Option<&str>,
    folder: &Path,
    options: &TrainOptions,
    start: Start,
    data: Data,
) -> Result<Trainer> {
    let mut plan = TrainingPlan::read(&folder.join("nnUNetPlans.json"), "3d_fullres")?;
    plan.previous_digest = digest.map(str::to_owned);
    let fold = folder.join(options.trainer_name()).join("fold_0");
    Trainer::new(plan, options.clone(), start, &fold, "0", data, &Device::cpu())
}

pub fn parameters(trainer: &Trainer) -> Vec<Vec<f32>> {
    let mut out = Vec::new();
    trainer.network().params(&mut |p| out.push(nn::values(p).unwrap()));
    out
}

#[test]
fn training_that_was_stopped_anywhere_goes_on_with_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    plans(folder.path(), &labels(), 1);
    let options = options(NetworkChoice::Planned);
    let mut whole = trainer(folder.path(), &options, Start::New, Noise::data(1, None)).unwrap();
    let mut epochs = Vec::new();
    whole
        .run(&mut (), &mut |_, report| {
            epochs.push(report.train_loss);
            Ok(())
        })
        .unwrap();
    assert!(epochs.len() == 3 && epochs[2] < epochs[0], "{epochs:?}");
    let expected = parameters(&whole);
    assert!(whole.is_finished());

    // Stopped before every step of training and validation in turn, each time in a folder of its own.
    let mut stopped = 0;
    for stop in 0..15 {
        let folder = tempfile::tempdir().unwrap();
        plans(folder.path(), &labels(), 1);
        let mut started = Start::New;
        let mut count = 0;
        let last = loop {
            let mut t = trainer(folder.path(), &options, started, Noise::data(1, None)).unwrap();
            let mut progress = |e: Event<'_>| {
                let is_step = matches!(e, Event::Steps { .. });
                count += u32::from(is_step);
                if is_step && count == stop + 1 { Flow::Cancel } else { Flow::Continue }
            };
            match t.run(&mut progress, &mut |_, _| Ok(())) {
                Ok(()) => break t,
                Err(Error::Cancelled) => (stopped, started) = (stopped + 1, Start::Continue),
                Err(e) => panic!("{e}"),
            }
        };
        assert!(parameters(&last) == expected, "stopped before step {stop}");
        assert_eq!(last.state().logs.train_losses, whole.state().logs.train_losses);
        assert_eq!(last.state().logs.mean_fg_dice, whole.state().logs.mean_fg_dice);
        assert_eq!(last.state().best_ema, whole.state().best_ema);
    }
    assert_eq!(stopped, 15);
}

#[test]
fn a_training_goes_on_by_the_same_rules_only_and_begins_afresh_without_a_trace() {
    let folder = tempfile::tempdir().unwrap();
    plans(folder.path(), &labels(), 1);
    let first = options(NetworkChoice::Planned);
    let mut t = trainer(folder.path(), &first, Start::New, Noise::data(1, None)).unwrap();
    t.run(&mut (), &mut |_, _| Ok(())).unwrap();
    let fold = t.folder().to_path_buf();
    // A final checkpoint is the end, also where nobody says how many epochs there were to be.
    let mut open = first.clone();
    open.epochs = None;
    let mut t = trainer(folder.path(), &open, Start::Continue, Noise::data(1, None)).unwrap();
    assert!(t.is_finished() && t.run(&mut (), &mut |_, _| panic!("an epoch")).is_ok());

    let mut t = trainer(folder.path(), &first, Start::Afresh, Noise::data(1, None)).unwrap();
    assert!(!fold.join("checkpoint_final.pth").exists() && !fold.join("checkpoint_best.pth").exists());
    t.step().unwrap();
    t.save().unwrap();
    let mut other = first.clone();
    other.iterations = 2;
    let e = trainer(folder.path(), &other, Start::Continue, Noise::data(1, None)).err().unwrap();
    assert!(e.exit_code() == 2 && e.to_string().contains("iterations is 2 here and 3 in the checkpoint"), "{e}");
    other = first.clone();
    other.seed = 8;
    let e = trainer(folder.path(), &other, Start::Continue, Noise::data(1, None)).err().unwrap();
    assert!(e.to_string().contains("seed is 8 here and 7 in the checkpoint"), "{e}");
    let t = trainer(folder.path(), &first, Start::Continue, Noise::data(1, None)).unwrap();
    assert_eq!((t.state().epoch, t.state().losses.len()), (0, 1));
    // Another prediction of the first stage of a cascade is other input.
    let after = |digest, start| trainer_after(Some(digest), folder.path(), &first, start, Noise::data(1, None));
    after("one", Start::Afresh).unwrap().save().unwrap();
    let e = after("other", Start::Continue).err().unwrap();
    assert!(e.exit_code() == 2 && e.to_string().contains("previous_stage is \"other\" here"), "{e}");
    after("one", Start::Continue).unwrap();
}

#[test]
fn a_training_leaves_a_model_that_opens_and_the_files_of_nnunet() {
    let folder = tempfile::tempdir().unwrap();
    plans(folder.path(), &labels(), 2);
    for network in [NetworkChoice::Planned, NetworkChoice::StuNetTiny] {
        let mut options = options(network);
        options.epochs = Some(1);
        let mut t = trainer(folder.path(), &options, Start::New, Noise::data(2, None)).unwrap();
        t.run(&mut (), &mut |_, _| Ok(())).unwrap();
        let model = folder.path().join(options.trainer_name());
        let fold = model.join("fold_0");
        for name in ["checkpoint_final.pth", "checkpoint_best.pth", "debug.json", "metrics.jsonl"] {
            assert!(fold.join(name).is_file(), "{name}");
        }
        assert!(!fold.join("checkpoint_latest.safetensors").exists());
        let log = fs::read_dir(&fold).unwrap().map(|e| e.unwrap().path());
        let log = log.into_iter().find(|p| p.to_string_lossy().contains("training_log_")).unwrap();
        let log = fs::read_to_string(log).unwrap();
        assert!(log.contains("Epoch 0") && log.contains("Pseudo dice [") && log.contains("Training done."), "{log}");
        let opened = ModelFolder::open(&model, &ModelOptions::new()).unwrap();
        assert_eq!(opened.plan.mirror_axes, [0, 1, 2]);
        assert_eq!((opened.plan.trainer.as_str(), opened.plan.heads), (options.trainer_name().as_str(), 3));

        // Not a second time unasked.
        let again = trainer(folder.path(), &options, Start::New, Noise::data(2, None)).err().unwrap();
        assert!(again.exit_code() == 2 && again.to_string().contains("--continue"), "{again}");
    }
}

#[test]
fn fine_tuning_takes_all_but_heads_and_repeats_the_first_filters() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (folder.path().join("one"), folder.path().join("two"));
    [&one, &two].into_iter().for_each(|f| fs::create_dir(f).unwrap());
    plans(&one, &labels(), 1);
    plans(&two, &json!({"background": 0, "only": 1}), 3);
    let mut options = options(NetworkChoice::StuNetTiny);
    options.epochs = Some(1);
    let mut first = trainer(&one, &options, Start::New, Noise::data(1, None)).unwrap();
    first.run(&mut (), &mut |_, _| Ok(())).unwrap();
    let source = first.folder().join("checkpoint_final.pth");

    let mut tuned = options.clone();
    tuned.pretrained = Some(source.clone());
    assert_eq!(tuned.trainer_name(), "STUNetTrainer_tiny_ft");
    let second = trainer(&two, &tuned, Start::New, Noise::data(3, None)).unwrap();
    assert_eq!(second.state().schedule.initial, 1e-3);
    let named = |t: &Trainer| {
        let mut out = std::collections::BTreeMap::new();
        t.network().params(&mut |p| {
            out.insert(p.name().to_string(), nn::values(p).unwrap());
        });
        out
    };
    let (a, b) = (named(&first), named(&second));
    let mut repeated = 0;
    for (name, values) in &b {
        if name.starts_with("seg_outputs.") {
            assert_eq!(values.len() * 3, a[name].len() * 2, "{name}");
        } else if values.len() == a[name].len() {
            assert_eq!(values, &a[name], "{name}");
        } else {
            let kernel = if name.contains("conv1") { 27 } else { 1 };
            let filters = a[name].chunks_exact(kernel).flat_map(|k| [k, k, k].concat());
            assert_eq!(values, &filters.collect::<Vec<f32>>(), "{name}");
            repeated += 1;
        }
    }
    assert_eq!(repeated, 2);

    // Of another size, and of another kind.
    let mut wrong = tuned.clone();
    wrong.network = NetworkChoice::StuNetSmall;
    let e = trainer(&two, &wrong, Start::New, Noise::data(3, None)).err().unwrap();
    assert!(e.to_string().contains("conv_blocks_context.0.0.conv1.weight: shape [8, 1, 3, 3, 3], expected"), "{e}");
    wrong.network = NetworkChoice::Planned;
    let e = trainer(&two, &wrong, Start::New, Noise::data(3, None)).err().unwrap();
    assert!(e.exit_code() == 4 && e.to_string().contains("missing"), "{e}");
}

#[test]
fn numbers_that_end_stop_the_training_and_say_where() {
    let folder = tempfile::tempdir().unwrap();
    plans(folder.path(), &labels(), 1);
    let options = options(NetworkChoice::Planned);
    let mut t = trainer(folder.path(), &options, Start::New, Noise::data(1, Some((1, 2)))).unwrap();
    t.epoch(&mut ()).unwrap();
    t.save().unwrap();
    let before = {
        for _ in 0..2 {
            t.step().unwrap();
        }
        parameters(&t)
    };
    let e = t.run(&mut (), &mut |_, _| Ok(())).unwrap_err();
    assert!(matches!(e, Error::NotFinite { .. }) && e.exit_code() == 1, "{e}");
    assert!(e.to_string().starts_with("epoch 1, step 2, cases first, second: "), "{e}");
    assert!(parameters(&t) == before);
    // The checkpoint before is good.
    let t = trainer(folder.path(), &options, Start::Continue, Noise::data(1, None)).unwrap();
    assert_eq!((t.state().epoch, t.state().step), (1, 3));
}

#[test]
fn what_cannot_be_trained_is_refused_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = plans(folder.path(), &labels(), 1);
    let fold = |o: &TrainOptions| folder.path().join(o.trainer_name());
    let good = options(NetworkChoice::Planned);
    let refused = |change: &dyn Fn(&mut TrainOptions), code: u8, part: &str| {
        let mut o = good.clone();
        change(&mut o);
        let e = trainer(folder.path(), &o, Start::New, Noise::data(1, None)).err().unwrap();
        assert!(e.exit_code() == code && e.to_string().contains(part), "{e}");
        assert!(!fold(&o).exists());
    };
    refused(&|o| o.epochs = Some(0), 2, "epochs");
    refused(&|o| o.learning_rate = Some(-1.0), 2, "learning rate -1");
    refused(&|o| o.workers = 0, 2, "workers");
    refused(&|o| o.precision = Precision::F16, 4, "float16 on the processor; expected float32 or bfloat16");
    refused(&|o| o.augment_on_device = true, 2, "expected --device cuda");
    let e = trainer(folder.path(), &good, Start::Continue, Noise::data(1, None)).err().unwrap();
    assert!(e.to_string().contains("no checkpoint to go on from"), "{e}");
    let plan = TrainingPlan::read(&path, "3d_fullres").unwrap();
    let odd = plan.clone().with_sizes(Some([18, 16, 16]), None).unwrap();
    let e = odd.network(NetworkChoice::Planned).unwrap_err();
    assert!(e.to_string().contains("multiples of [4, 4, 4]"), "{e}");
    assert!(plan.clone().with_sizes(None, Some(0)).is_err());
    let e = TrainingPlan::read(&path, "2d").unwrap_err();
    assert!(e.exit_code() == 4 && e.to_string().contains("no configuration \"2d\""), "{e}");
    // Sizes that were changed stand in the plans that the results carry.
    let other = plan.with_sizes(Some([24, 16, 16]), Some(3)).unwrap();
    assert_eq!(other.plans["configurations"]["3d_fullres"]["patch_size"], json!([24, 16, 16]));
    assert_eq!(other.plans["configurations"]["3d_fullres"]["batch_size"], json!(3));
}

#[test]
fn supervision_follows_the_plan_and_not_the_network() {
    let folder = tempfile::tempdir().unwrap();
    let path = plans(folder.path(), &labels(), 1);
    let mut plan = TrainingPlan::read(&path, "3d_fullres").unwrap();
    plan.pools = vec![[2; 3]; 4];
    // A STU-Net has five outputs: three of them learn.
    assert_eq!(plan.supervision(), [4.0 / 7.0, 2.0 / 7.0, 1.0 / 7.0, 0.0]);
    // All five learn, weighted as if there were a sixth.
    plan.pools = vec![[2; 3]; 6];
    assert_eq!(plan.supervision(), [16.0, 8.0, 4.0, 2.0, 1.0, 0.0].map(|w| w / 31.0));
}

/// On a card, which an interpreter stands for: trained as on the processor, stopped and gone on with, read where there is none.
#[cfg(feature = "cuda")]
#[test]
fn cuda_train_goes_on_with_the_same_bytes_and_leaves_what_the_processor_reads() {
    let patch = [4, 8, 8];
    let sim = || Device::on(std::sync::Arc::new(crate::kernels::Sim::of(0, [8, 6])), "sim".into());
    let mut options = options(NetworkChoice::Planned);
    options.epochs = Some(2);
    let begin = |folder: &Path, precision, start, broken, device: &Device| {
        let plan = TrainingPlan::read(&folder.join("nnUNetPlans.json"), "3d_fullres").unwrap();
        let plan = plan.with_sizes(Some(patch), None).unwrap();
        let mut options = options.clone();
        options.precision = precision;
        let fold = folder.join(options.trainer_name()).join("fold_0");
        Trainer::new(plan, options, start, &fold, "0", Noise::of(1, patch, broken), device)
    };
    let folder = || {
        let folder = tempfile::tempdir().unwrap();
        plans(folder.path(), &labels(), 1);
        folder
    };
    let run = |precision, device: &Device| {
        let folder = folder();
        let mut t = begin(folder.path(), precision, Start::New, None, device).unwrap();
        t.run(&mut (), &mut |_, _| Ok(())).unwrap();
        (folder, t)
    };
    let (there, card) = run(Precision::Bf16, &sim());
    let expected = parameters(&card);
    let (_here, cpu) = run(Precision::Bf16, &Device::cpu());
    for (a, b) in card.state().logs.train_losses.iter().zip(&cpu.state().logs.train_losses) {
        assert!((a.0 - b.0).abs() < 0.02 * b.0.abs(), "losses {a:?} and {b:?}");
    }
    // The final checkpoint by the processor.
    let opened = ModelFolder::open(there.path().join(options.trainer_name()), &ModelOptions::new()).unwrap();
    assert_eq!(opened.plan.heads, 3);

    // Stopped in the second epoch.
    let folder = folder();
    let mut t = begin(folder.path(), Precision::Bf16, Start::New, None, &sim()).unwrap();
    t.epoch(&mut ()).unwrap();
    t.step().unwrap();
    t.save().unwrap();
    drop(t);
    let mut t = begin(folder.path(), Precision::Bf16, Start::Continue, None, &sim()).unwrap();
    t.run(&mut (), &mut |_, _| Ok(())).unwrap();
    assert!(parameters(&t) == expected, "other bytes after a stop");

    // What is no number moves nothing.
    let broken = tempfile::tempdir().unwrap();
    plans(broken.path(), &labels(), 1);
    let mut t = begin(broken.path(), Precision::Bf16, Start::New, Some((0, 1)), &sim()).unwrap();
    t.step().unwrap();
    let before = parameters(&t);
    let e = t.step().unwrap_err().to_string();
    assert!(e.contains("epoch 0, step 1") && parameters(&t) == before, "{e}");
}

/// In float16 gradients that overflow are skipped, and a stop between a step that is skipped and the next changes no byte.
#[cfg(feature = "cuda")]
#[test]
fn cuda_train_in_float16_skips_what_overflows_and_goes_on_with_the_same_bytes() {
    let sim = || Device::on(std::sync::Arc::new(crate::kernels::Sim::of(0, [8, 6])), "sim".into());
    let folder = tempfile::tempdir().unwrap();
    plans(folder.path(), &labels(), 1);
    let mut options = options(NetworkChoice::Planned);
    (options.precision, options.iterations) = (Precision::F16, 9);
    let fold = folder.path().join(options.trainer_name()).join("fold_0");
    let begin = |start| {
        let patch = [4, 4, 8];
        let plan = TrainingPlan::read(&folder.path().join("nnUNetPlans.json"), "3d_fullres").unwrap();
        let plan = plan.with_sizes(Some(patch), None).unwrap();
        Trainer::new(plan, options.clone(), start, &fold, "0", Noise::of(1, patch, None), &sim())
    };
    // A checkpoint whose scale is far too high, after one good step.
    let path = fold.join("checkpoint_latest.safetensors");
    let spoil = |scaler: Value| {
        let good = Checkpoint::open(&path).unwrap();
        let plan = TrainingPlan::read(&folder.path().join("nnUNetPlans.json"), "3d_fullres").unwrap();
        let mut net = plan.network(options.network).unwrap().build(&good, &Device::cpu()).unwrap();
        let optimizer = good.restore(&mut net).unwrap();
        let state = TrainingState { scaler: serde_json::from_value(scaler).unwrap(), ..good.state().clone() };
        checkpoint::write(&path, &net, &optimizer, &state).unwrap();
    };
    let scaler = |scale: f64, backoff: f64| json!({"scale": scale, "growth_factor": 2.0, "backoff_factor": backoff, "growth_interval": 2000, "_growth_tracker": 5});
    let mut t = begin(Start::New).unwrap();
    let first = t.step().unwrap();
    assert!(!first.skipped && first.loss_scale == Some(65536.0) && first.gradient_norm.is_finite(), "{first:?}");
    t.save().unwrap();
    let before = parameters(&t);
    drop(t);
    let high = 2f64.powi(22);
    spoil(scaler(high, 0.5));

    let go_on = |t: &mut Trainer| while t.step().unwrap().skipped {};
    let mut t = begin(Start::Continue).unwrap();
    let report = t.step().unwrap();
    assert!(report.skipped && report.loss_scale == Some(high) && report.gradient_norm == f64::INFINITY, "{report:?}");
    assert!(parameters(&t) == before && t.state().step == 1 && t.state().losses.len() == 2);
    let now = t.state().scaler.unwrap();
    assert_eq!((now.scale(), now.growth_tracker()), (high / 2.0, 0));
    t.save().unwrap();
    go_on(&mut t);
    assert!(parameters(&t) != before && t.state().step == 2);

    let mut resumed = begin(Start::Continue).unwrap();
    go_on(&mut resumed);
    assert!(parameters(&resumed) == parameters(&t) && resumed.state() == t.state(), "other bytes after a stop");
    let logs =
        fs::read_dir(&fold).unwrap().map(|e| e.unwrap().path()).filter(|p| p.extension().is_some_and(|e| e == "txt"));
    let text: String = logs.map(|p| fs::read_to_string(p).unwrap()).collect();
    assert!(text.contains("step 1 is skipped: gradients overflow at loss scale 4194304, which goes back"), "{text}");

    // Nothing is left to give: an error instead of steps that are skipped for ever.
    spoil(scaler(high, 1e-9));
    let mut t = begin(Start::Continue).unwrap();
    let e = t.step().unwrap_err();
    assert!(
        matches!(e, Error::NotFinite { .. }) && e.to_string().contains("of the loss cannot go back any further"),
        "{e}"
    );
    assert!(parameters(&t) == before);
}
