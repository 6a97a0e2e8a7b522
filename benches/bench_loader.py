#!/usr/bin/env python3
"""nnU-Net's own loader and transforms on cases of our making: the opponent of `cargo bench -- loader`.

  bench_loader.py make FOLDER        writes cases of 200^3 voxels, as raw f32 and i16 and as nnU-Net's two stores
  bench_loader.py run FOLDER STORE   batches per second from store numpy or blosc2: patch 128^3, batch 2, 3D augmentation,
                                     two processes; ROUNDS medians [3]

Needs nnunetv2 2.8.1 with batchgeneratorsv2.
"""
import os
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

for name in ("raw", "preprocessed", "results"):
    os.environ.setdefault(f"nnUNet_{name}", "/tmp")

import numpy as np

SHAPE, PATCH, BATCH, CASES, PROCESSES = (200,) * 3, (128,) * 3, 2, 4, 2


def make(folder):
    from nnunetv2.training.dataloading.nnunet_dataset import (comp_blosc2_params, nnUNetDatasetBlosc2,
                                                                 nnUNetDatasetNumpy)
    from scipy.ndimage import gaussian_filter
    rng = np.random.default_rng(0)
    for store in ("numpy", "blosc2"):
        (folder / store).mkdir(parents=True, exist_ok=True)
    for i in range(CASES):
        smooth = gaussian_filter(rng.normal(size=SHAPE).astype(np.float32), 6)
        image = (smooth / smooth.std() + 0.2 * rng.normal(size=SHAPE)).astype(np.float32)
        fields = np.stack([gaussian_filter(rng.normal(size=SHAPE).astype(np.float32), 8) for _ in range(6)])
        fields[0] += fields.std()
        labels = fields.argmax(0).astype(np.int16)
        image.tofile(folder / f"case_{i}.f32")
        labels.tofile(folder / f"case_{i}.i16")
        where = {k: np.argwhere(labels[None] == k)[::97][:10000] for k in range(1, 6)}
        for store, dataset in (("numpy", nnUNetDatasetNumpy), ("blosc2", nnUNetDatasetBlosc2)):
            kw = {}
            if store == "blosc2":
                block, chunk = comp_blosc2_params((1, *SHAPE), PATCH)
                kw = dict(chunks=chunk, blocks=block, chunks_seg=chunk, blocks_seg=block)
            dataset.save_case(image[None], labels[None], {"class_locations": where}, str(folder / store / f"case_{i}"), **kw)
    nnUNetDatasetNumpy.unpack_dataset(str(folder / "numpy"), False, 1, False)


def run(folder, store):
    from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
    from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2, nnUNetDatasetNumpy
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    fake = SimpleNamespace(configuration_manager=SimpleNamespace(patch_size=list(PATCH)), print_to_log_file=print)
    rotation, dummy, initial, mirror = nnUNetTrainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size(fake)
    transforms = nnUNetTrainer.get_training_transforms(list(PATCH), rotation, None, mirror, dummy, [False])
    manager = SimpleNamespace(all_labels=list(range(6)), has_ignore_label=False)
    dataset = {"numpy": nnUNetDatasetNumpy, "blosc2": nnUNetDatasetBlosc2}[store](str(folder / store))
    loader = nnUNetDataLoader(dataset, BATCH, initial, PATCH, manager, 0.33, transforms=transforms)
    batches = NonDetMultiThreadedAugmenter(loader, None, PROCESSES, 6, None, False, wait_time=0.002)
    for _ in range(8):
        next(batches)
    rates, n = [], 8
    for _ in range(int(os.environ.get("ROUNDS", 3))):
        start = time.perf_counter()
        for _ in range(n):
            next(batches)
        rates.append(n / (time.perf_counter() - start))
    print(f"nnU-Net, {store}: {statistics.median(rates):.2f} batches/s of {[round(r, 2) for r in rates]}", flush=True)
    batches._finish()


if __name__ == "__main__":
    {"make": make, "run": run}[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
