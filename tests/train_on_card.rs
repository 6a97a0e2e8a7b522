//! Batches on their way to a card: augmented there, and sent beside the step before.

use std::path::Path;
use std::sync::Arc;

use stunet::nnunet::augment::AugmentConfig;
use stunet::nnunet::loader::{Batch, Loader, LoaderConfig};
use stunet::nnunet::train::{Batches, Data, NetworkChoice, Start, Trainer, TrainingPlan, step_bytes};
use stunet::nnunet::training_case::TrainingCase;
use stunet::{Device, Error, Precision, Result};

use crate::train::{Noise, labels, options, parameters, plans};

/// Patches go to the card as they were read: trained as if the processor had augmented them, and a stop changes no byte.
#[test]
fn cuda_train_augments_on_the_card() {
    let patch = [4, 8, 8];
    let sim = || Arc::new(crate::kernels::Sim::of(0, [8, 6]));
    let data = |raw| {
        let augment = AugmentConfig::new(&patch, &[false]).unwrap();
        let case = |seed| -> Arc<dyn TrainingCase> {
            let mut case = crate::augment::Case::random([9, 12, 14], 1, seed);
            case.labels.iter_mut().for_each(|l| *l = (*l).min(2));
            Arc::new(case)
        };
        let config =
            LoaderConfig { iterations: 5, seed: 7, raw, workers: 1, ahead: 2, ..LoaderConfig::training(augment, 2) };
        let train = Box::new(Loader::new(vec![case(1), case(2)], config).unwrap());
        Data { train, ..Noise::of(1, patch, None) }
    };
    let begin_on = |sim, folder: &Path, start, raw| {
        plans(folder, &labels(), 1);
        let plan = TrainingPlan::read(&folder.join("nnUNetPlans.json"), "3d_fullres").unwrap();
        let plan = plan.with_sizes(Some(patch), None).unwrap();
        let mut options = options(NetworkChoice::Planned);
        (options.epochs, options.iterations, options.val_iterations) = (Some(1), 5, 1);
        (options.augment_on_device, options.precision) = (raw, Precision::Bf16);
        let fold = folder.join(options.trainer_name()).join("fold_0");
        let device = Device::on(sim, "sim".into());
        let bytes = step_bytes(&plan, &options, false, &device).unwrap();
        Trainer::new(plan, options, start, &fold, "0", data(raw), &device).map(|t| (t, device, bytes))
    };
    let begin = |folder: &Path, start, raw| begin_on(sim(), folder, start, raw).map(|(t, ..)| t);
    let folders = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let mut here = begin(folders[2].path(), Start::New, false).unwrap();
    here.run(&mut (), &mut |_, _| Ok(())).unwrap();
    let card = sim();
    let (mut there, device, bytes) = begin_on(card.clone(), folders[1].path(), Start::New, true).unwrap();
    there.run(&mut (), &mut |_, _| Ok(())).unwrap();
    let peak = device.memory().peak;
    assert!(peak <= bytes, "{peak} bytes taken, {bytes} expected");
    // The first batch waits; images and labels of two patches of each other are sent beside the step before.
    let count = card.count();
    assert!(count.filled_beside >= 4 * 4 && count.replays > 0, "{count:?}");
    // Values of patches differ by the order of sums, before the network rounds them to eight bits.
    let losses = [&here, &there].map(|t| t.state().logs.train_losses[0].0);
    assert!((losses[0] - losses[1]).abs() < 2f64.powi(-8) * losses[0].abs(), "mean losses {losses:?}");
    // Stopped after two steps, and gone on with only by the same rules.
    let mut t = begin(folders[0].path(), Start::New, true).unwrap();
    t.step().unwrap();
    t.step().unwrap();
    t.save().unwrap();
    drop(t);
    let e = begin(folders[0].path(), Start::Continue, false).err().unwrap();
    assert!(e.exit_code() == 2 && e.to_string().contains("augmentation is true here and \"on a card\""), "{e}");
    let mut t = begin(folders[0].path(), Start::Continue, true).unwrap();
    t.run(&mut (), &mut |_, _| Ok(())).unwrap();
    assert!(parameters(&t) == parameters(&there), "other bytes after a stop");
}

/// A batch that is missing is the error of its own step, though it is asked for beside the step before.
#[test]
fn cuda_train_a_missing_batch_is_its_steps_error() {
    struct Misses(Box<dyn Batches>, u32);
    impl Batches for Misses {
        fn seek(&mut self, epoch: u32, iteration: u32) -> Result<()> {
            self.0.seek(epoch, iteration)
        }
        fn batch(&mut self) -> Result<Batch> {
            self.1 += 1;
            let batch = self.0.batch()?;
            if self.1 == 2 { Err(Error::Usage { what: "no batch".into() }) } else { Ok(batch) }
        }
    }
    let (folder, patch) = (tempfile::tempdir().unwrap(), [4, 4, 8]);
    plans(folder.path(), &labels(), 1);
    let plan = TrainingPlan::read(&folder.path().join("nnUNetPlans.json"), "3d_fullres").unwrap();
    let mut options = options(NetworkChoice::Planned);
    options.precision = Precision::Bf16;
    let Data { train, val, cases } = Noise::of(1, patch, None);
    let data = Data { train: Box::new(Misses(train, 0)), val, cases };
    let device = Device::on(Arc::new(crate::kernels::Sim::of(0, [8, 6])), "sim".into());
    let (plan, fold) = (plan.with_sizes(Some(patch), None).unwrap(), folder.path().join("fold_0"));
    let mut t = Trainer::new(plan, options, Start::New, &fold, "0", data, &device).unwrap();
    assert!(t.step().is_ok() && t.step().unwrap_err().to_string().contains("no batch") && t.step().is_ok());
    assert_eq!(t.state().step, 2);
}
