#!/usr/bin/env python3
"""Connected components, holes and distances: scipy.ndimage and `stunet bench volume` in turn on the same 512^3 masks, each
voxel compared.

Usage: bench_volume.py STUNET [--rounds N] [--size N] [--only NAME ...]
"""
import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np
import scipy
from scipy import ndimage

SPACING = (3.0, 0.75, 1.125)  # such as float32 has exactly, which NIfTI stores


def organs(n, rng):
    """Ellipsoids with vessels through them, one label for all, and a few voxels that a network got wrong."""
    out = np.zeros((n, n, n), bool)
    axis = np.arange(n, dtype=np.float32)
    for _ in range(40):
        middle, radii = rng.uniform(0, n, 3), rng.uniform(n / 40, n / 8, 3)
        box = [slice(max(0, int(m - r)), int(m + r) + 2) for m, r in zip(middle, radii)]
        z, y, x = np.ix_(*[axis[b] for b in box])
        r = sum(((a - m) / s) ** 2 for a, m, s in zip((z, y, x), middle, radii))
        out[tuple(box)] |= (r < 1) & ~(((y - middle[1]) ** 2 + (x - middle[2]) ** 2) < (radii.min() / 5) ** 2) & ~(r < 0.05)
    return out ^ (rng.random(out.shape, dtype=np.float32) < 1e-5)


def shells(n, rng):
    """Shells around the middle, with a speck of nothing every few thousand voxels."""
    z, y, x = np.ogrid[:n, :n, :n]
    r = (z - n // 2) ** 2 + (y - n // 2) ** 2 + (x - n // 2) ** 2
    return (r % (n * n // 9) < n * n // 18) & (rng.random((n, n, n), dtype=np.float32) > 1 / 4096)


def body(n, rng):
    """The inside of a body as nnU-Net's nonzero mask has it: one large piece, with specks missing."""
    z, y, x = np.ogrid[:n, :n, :n]
    inside = ((y - n / 2) / (0.35 * n)) ** 2 + ((x - n / 2) / (0.45 * n)) ** 2 + 0 * z < 1
    return inside & (rng.random((n, n, n), dtype=np.float32) > 1e-3)


def noise(n, rng):
    """No label of anything: every third voxel."""
    return rng.random((n, n, n), dtype=np.float32) < 1 / 3


def of_scipy(mask):
    def timed(f):
        begin = time.perf_counter()
        found = f()
        return time.perf_counter() - begin, found

    yield "faces", *timed(lambda: ndimage.label(mask)[0])
    yield "corners", *timed(lambda: ndimage.label(mask, np.ones((3, 3, 3)))[0])
    yield "filled", *timed(lambda: ndimage.binary_fill_holes(mask))
    yield "distances", *timed(lambda: ndimage.distance_transform_edt(mask, SPACING))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("stunet")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--only", nargs="*")
    args = parser.parse_args()
    print(f"scipy {scipy.__version__}, {args.size}^3, medians of {args.rounds} rounds\n")
    print("| mask | operation | scipy s | stunet s | times | differing voxels |\n|---|---|---|---|---|---|")
    for make in (organs, shells, body, noise):
        if args.only and make.__name__ not in args.only:
            continue
        mask = make(args.size, np.random.default_rng(1))
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            image = nibabel.Nifti1Image(mask.T.astype(np.uint8), np.diag([*SPACING[::-1], 1.0]))
            nibabel.save(image, folder / "mask.nii")
            theirs, ours, differing = {}, {}, {}
            for round_ in range(args.rounds):
                line = [args.stunet, "bench", "volume", folder / "mask.nii", "--runs", "1", "--json"]
                line += ["--output", folder / "found"] if round_ == 0 else []
                found = json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)
                for name, seconds, expected in of_scipy(mask):
                    theirs.setdefault(name, []).append(seconds)
                    ours.setdefault(name, []).append(found[name])
                    if round_ > 0:
                        continue
                    kind = {"filled": ("u8", bool), "distances": ("f64", np.float64)}.get(name, ("u32", np.uint32))
                    numbers = np.fromfile(folder / "found" / f"{name}.{kind[0]}", kind[1]).reshape(mask.shape)
                    # Distances are roots of sums of squares on both sides: a few roundings apart.
                    same = np.abs(numbers - expected) <= 16 * np.finfo(float).eps * expected if name == "distances" else numbers == expected
                    differing[name] = int(np.count_nonzero(~same))
        for name in theirs:
            a, b = statistics.median(theirs[name]), statistics.median(ours[name])
            print(f"| {make.__name__} | {name} | {a:.2f} | {b:.3f} | {a / b:.1f} | {differing[name]} |", flush=True)


if __name__ == "__main__":
    main()
