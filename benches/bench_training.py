#!/usr/bin/env python3
"""The same small data set trained by the real nnU-Net and by stunet: same cases, plan, split, epochs and steps.

  bench_training.py make FOLDER STUNET          12 phantoms with two labels, nnU-Net's plan with a small network and patch,
                                                prepared by nnU-Net in FOLDER/nnunet and by stunet in FOLDER/stunet
  bench_training.py nnunet FOLDER SEED          trains and validates on the processor, prints the Dice of the final validation
  bench_training.py stunet FOLDER SEED STUNET   the same by our commands

Needs nnunetv2 2.8.1; STUNET is our program.
"""
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

EPOCHS, STEPS, VAL_STEPS = 30, 50, 10
PATCH, FEATURES, TRAINED = [32, 32, 32], [8, 16, 32, 64], 8
NAME, NUMBER, CASES = "Dataset900_Trunks", 900, 12
LABELS = {3: 1, 5: 2, 6: 2}  # liver, both kidneys; the rest is background


def environment(folder):
    for name in ("raw", "preprocessed", "results"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        os.environ[f"nnUNet_{name}"] = str(folder / name)
    os.environ |= {"nnUNet_n_proc_DA": "2", "nnUNet_compile": "f", "nnUNet_def_n_proc": "1"}


def cases(folder, stunet):
    """Raw cases: our phantoms at 5 mm with two of their organs."""
    import numpy as np
    import SimpleITK as sitk
    raw = folder / "nnunet" / "raw" / NAME
    subprocess.run([stunet, "phantoms", "-o", raw, "-n", str(CASES), "--shape", "56", "44", "60", "--spacing", "5", "5", "5",
                    "--no-progress"], check=True)
    for path in sorted((raw / "labelsTr").glob("*.nii.gz")):
        image = sitk.ReadImage(str(path))
        old = sitk.GetArrayFromImage(image)
        new = np.zeros_like(old)
        for value, label in LABELS.items():
            new[old == value] = label
        changed = sitk.GetImageFromArray(new)
        changed.CopyInformation(image)
        sitk.WriteImage(changed, str(path), useCompression=True)
    description = json.loads((raw / "dataset.json").read_text())
    description["labels"] = {"background": 0, "liver": 1, "kidneys": 2}
    (raw / "dataset.json").write_text(json.dumps(description))
    (folder / "stunet").mkdir(exist_ok=True)
    shutil.copytree(folder / "nnunet" / "raw", folder / "stunet" / "raw", dirs_exist_ok=True)


def small(plans):
    """The plan with a patch and a network that a processor trains in minutes."""
    configuration = plans["configurations"]["3d_fullres"]
    configuration |= {"patch_size": PATCH, "batch_size": 2}
    stages = len(FEATURES)
    configuration["architecture"]["arch_kwargs"] |= {
        "n_stages": stages, "features_per_stage": FEATURES, "kernel_sizes": [[3, 3, 3]] * stages,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1), "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1)}
    plans["configurations"] = {"3d_fullres": configuration}
    return plans


def make(folder, stunet):
    cases(folder, stunet)
    environment(folder / "nnunet")
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (extract_fingerprint_dataset, plan_experiment_dataset,
                                                                         preprocess_dataset)
    extract_fingerprint_dataset(NUMBER, num_processes=1, check_dataset_integrity=True)
    plan_experiment_dataset(NUMBER, ExperimentPlanner)
    prepared = folder / "nnunet" / "preprocessed" / NAME
    plans = json.dumps(small(json.loads((prepared / "nnUNetPlans.json").read_text())), indent=4)
    names = [p.name.removesuffix(".nii.gz") for p in sorted((folder / "nnunet" / "raw" / NAME / "labelsTr").iterdir())]
    splits = json.dumps([{"train": names[:TRAINED], "val": names[TRAINED:]}])
    (prepared / "nnUNetPlans.json").write_text(plans)
    preprocess_dataset(NUMBER, "nnUNetPlans", ["3d_fullres"], [1])
    ours = folder / "stunet" / "preprocessed" / NAME
    environment(folder / "stunet")
    subprocess.run([stunet, "fingerprint", "-d", str(NUMBER)], check=True)
    for place in (prepared, ours):
        (place / "nnUNetPlans.json").write_text(plans)
        (place / "splits_final.json").write_text(splits)
    subprocess.run([stunet, "preprocess", "-d", str(NUMBER), "-c", "3d_fullres"], check=True)


def train_nnunet(folder, seed):
    environment(folder / "nnunet" / f"seed_{seed}")
    os.environ["nnUNet_raw"], os.environ["nnUNet_preprocessed"] = (str(folder / "nnunet" / n) for n in ("raw", "preprocessed"))
    import numpy as np
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    torch.set_num_threads(2)
    torch.manual_seed(seed)
    np.random.seed(seed)
    prepared = folder / "nnunet" / "preprocessed" / NAME
    plans, description = (json.loads((prepared / n).read_text()) for n in ("nnUNetPlans.json", "dataset.json"))
    trainer = nnUNetTrainer(dict(plans, continue_training=False), "3d_fullres", 0, description, device=torch.device("cpu"))
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = EPOCHS, STEPS, VAL_STEPS
    trainer.run_training()
    trainer.perform_actual_validation(False)
    return Path(trainer.output_folder)


def train_stunet(folder, seed, stunet):
    environment(folder / "stunet" / f"seed_{seed}")
    os.environ["nnUNet_preprocessed"] = str(folder / "stunet" / "preprocessed")
    subprocess.run([stunet, "train", "-d", str(NUMBER), "-c", "3d_fullres", "-f", "0", "--seed", str(seed), "--epochs",
                    str(EPOCHS), "--iterations", str(STEPS), "--val-iterations", str(VAL_STEPS), "--no-progress"], check=True)
    results = folder / "stunet" / f"seed_{seed}" / "results" / NAME
    return results / "nnUNetTrainer__nnUNetPlans__3d_fullres" / "fold_0"


def report(who, seed, fold, seconds):
    summary = json.loads((fold / "validation" / "summary.json").read_text())
    dice = {k: round(v["Dice"], 4) for k, v in summary["mean"].items()}
    print(json.dumps({"trained_by": who, "seed": seed, "dice": dice, "mean": round(summary["foreground_mean"]["Dice"], 4),
                      "seconds": round(seconds, 1)}), flush=True)


def main():
    what, folder = sys.argv[1], Path(sys.argv[2]).resolve()
    if what == "make":
        make(folder, sys.argv[3])
        return
    begin = time.monotonic()
    seed = int(sys.argv[3])
    fold = train_nnunet(folder, seed) if what == "nnunet" else train_stunet(folder, seed, sys.argv[4])
    report(what, seed, fold, time.monotonic() - begin)


if __name__ == "__main__":
    main()
