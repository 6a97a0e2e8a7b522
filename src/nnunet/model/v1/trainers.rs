//! nnU-Net 1.7.1's trainers, by what their names say of a network and of inference and nothing else does.

/// Trainers that build a `Generic_UNet` of convolutions, instance norms and leaky ReLUs in this order, and predict by softmax.
/// Others give weights of the same names and shapes to other networks (ReLU, another order of layers, group norms, sigmoids).
const KNOWN: &[&str] = &[
    "nnUNetTrainer",
    "nnUNetTrainerCE",
    "nnUNetTrainerNoDA",
    "nnUNetTrainerCascadeFullRes",
    "nnUNetTrainerV2",
    "nnUNetTrainerV2CascadeFullRes",
];

/// The same, of names that begin with `nnUNetTrainerV2_`.
const OF_V2: &[&str] = &[
    "2epochs",
    "2epochs_dummyLoad",
    "3ConvPerStage",
    "3ConvPerStageSameFilters",
    "5epochs",
    "5epochs_CEnoDS",
    "5epochs_dummyLoad",
    "5epochs_dummyLoadCEnoDS",
    "5epochs_noDS",
    "Adam",
    "Adam_ReduceOnPlateau",
    "Adam_nnUNetTrainerlr",
    "DA2",
    "DA3",
    "DA5",
    "DDP",
    "DDP_5epochs",
    "DDP_5epochs_dummyLoad",
    "DP",
    "ForceBD",
    "ForceSD",
    "Loss_CE",
    "Loss_CEGDL",
    "Loss_Dice",
    "Loss_DiceCE_noSmooth",
    "Loss_DiceTopK10",
    "Loss_Dice_LR1en3",
    "Loss_Dice_squared",
    "Loss_DicewithBG",
    "Loss_DicewithBG_LR1en3",
    "Loss_MCC",
    "Loss_MCCnoBG",
    "Loss_TopK10",
    "Ranger_lr1en2",
    "Ranger_lr3en3",
    "Ranger_lr3en4",
    "SGD_ReduceOnPlateau",
    "SGD_fixedSchedule",
    "SGD_fixedSchedule2",
    "SGD_lr1en1",
    "SGD_lr1en3",
    "SegLoss_Focal",
    "allConv3x3",
    "copy1",
    "copy2",
    "copy3",
    "copy4",
    "cycleAtEnd",
    "cycleAtEnd2",
    "fp16",
    "fp32",
    "graduallyTransitionFromCEToDice",
    "independentScalePerAxis",
    "insaneDA",
    "lReLU_biasInSegOutput",
    "momentum09",
    "momentum095",
    "momentum098",
    "momentum09in2D",
    "noDataAugmentation",
    "noDeepSupervision",
    "noMirroring",
    "reduceMomentumDuringTraining",
    "resample33",
    "softDeepSupervision",
    "warmup",
];

/// The same, of names that begin with `nnUNetTrainerV2CascadeFullRes_`.
const OF_CASCADES: &[&str] = &[
    "EducatedGuess",
    "EducatedGuess2",
    "EducatedGuess3",
    "lowerLR",
    "noConnComp",
    "shorter",
    "shorter_lowerLR",
    "smallerBinStrel",
];

/// Whether a trainer is known to train a `Generic_UNet` as it is found here.
pub(super) fn is_known(trainer: &str) -> bool {
    let among = |prefix: &str, names: &[&str]| trainer.strip_prefix(prefix).is_some_and(|rest| names.contains(&rest));
    KNOWN.contains(&trainer) || among("nnUNetTrainerV2_", OF_V2) || among("nnUNetTrainerV2CascadeFullRes_", OF_CASCADES)
}

/// Whether it mirrors images in training, so that inference may.
pub(super) fn mirrors(trainer: &str) -> bool {
    let name = trainer.to_lowercase();
    !["nomirror", "nodataaugmentation", "trainernoda"].iter().any(|n| name.contains(n))
}

/// Whether it is the second stage of a cascade.
pub(super) fn is_second_stage(trainer: &str) -> bool {
    trainer.contains("Cascade")
}

/// Whether all its kernels have three voxels along each axis, whatever the plans say.
pub(super) fn has_only_kernels_of_three(trainer: &str) -> bool {
    trainer == "nnUNetTrainerV2_allConv3x3"
}

/// Which of its arguments (`init`) is the stage.
pub(super) fn stage_argument(trainer: &str) -> usize {
    // The third one is the process, where several train.
    if trainer.starts_with("nnUNetTrainerV2_DDP") { 6 } else { 5 }
}
