#!/usr/bin/env python3
"""PyTorch on the card of `stunet bench forward --device cuda`: the opponent of its numbers, at its best.

  bench_torch.py net --model base          forward passes of a STU-Net in every memory format and mode
  bench_torch.py layers --model base       its convolutions one by one
  bench_torch.py table --results FOLDER    a table of what gpu_run.sh left there; needs no PyTorch

One line of JSON a case. bf16 by autocast, cudnn.benchmark on, TF32 allowed, warmed up, timed by CUDA events, median of as
many runs as fit into --secs; the fastest mode is the opponent. With --smoke the processor runs it at small sizes, which
says that the script works and nothing else.
"""

import argparse
import glob
import json
import os
import statistics
import time

MODELS = {
    "small": ([16, 32, 64, 128, 256, 256], 1),
    "base": ([32, 64, 128, 256, 512, 512], 1),
    "large": ([64, 128, 256, 512, 1024, 1024], 2),
    "huge": ([96, 192, 384, 768, 1536, 1536], 3),
}
CLASSES = 105
# Of two runs of ours, before and after PyTorch's: beyond this the comparison says nothing.
DRIFT = 0.03


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["net", "layers", "table"])
    p.add_argument("--model", choices=MODELS, default="base")
    p.add_argument("--patch", type=int, default=128, help="voxels along each axis")
    p.add_argument("--secs", type=float, default=0.5, help="seconds of timed runs of a case")
    p.add_argument("--limit", type=float, default=500, help="seconds after which no case begins")
    p.add_argument("--smoke", action="store_true", help="on the processor, small")
    p.add_argument("--results", default=".", help="folder of gpu_run.sh's logs")
    return p.parse_args()


def say(**record):
    print(json.dumps(record), flush=True)


class Timer:
    def __init__(self, torch, device, seconds):
        self.torch, self.cuda, self.seconds = torch, device == "cuda", seconds

    def clocked(self, f):
        """Milliseconds of one call by the clock."""
        if self.cuda:
            self.torch.cuda.synchronize()
        begin = time.time()
        f()
        if self.cuda:
            self.torch.cuda.synchronize()
        return (time.time() - begin) * 1e3

    def median(self, f):
        """Milliseconds of a call on the device."""
        f()
        f()
        once = self.clocked(f)
        if not self.cuda:
            return once
        events = []
        for _ in range(max(5, min(200, int(self.seconds * 1e3 / max(once, 1e-3))))):
            pair = [self.torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            f()
            pair[1].record()
            events.append(pair)
        self.torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in events)


def network(torch, dims, depth):
    """A STU-Net whose decoder ends in one head, as predictions need it."""
    nn, F = torch.nn, torch.nn.functional

    class Block(nn.Module):
        def __init__(self, i, o, stride, projected):
            super().__init__()
            self.conv1, self.norm1 = nn.Conv3d(i, o, 3, stride, 1), nn.InstanceNorm3d(o, affine=True)
            self.conv2, self.norm2 = nn.Conv3d(o, o, 3, 1, 1), nn.InstanceNorm3d(o, affine=True)
            self.conv3 = nn.Conv3d(i, o, 1, stride) if projected else None

        def forward(self, x):
            y = F.leaky_relu(self.norm1(self.conv1(x)), 0.01)
            y = self.norm2(self.conv2(y))
            return F.leaky_relu(y + (x if self.conv3 is None else self.conv3(x)), 0.01)

    def stage(i, o, stride):
        return nn.Sequential(Block(i, o, stride, True), *[Block(o, o, 1, False) for _ in range(depth - 1)])

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.ModuleList(stage(dims[i - 1] if i else 1, dims[i], 2 if i else 1) for i in range(6))
            self.conv = nn.ModuleList(nn.Conv3d(dims[i + 1], dims[i], 1) for i in range(5))
            self.up = nn.ModuleList(stage(2 * dims[i], dims[i], 1) for i in range(5))
            self.head = nn.Conv3d(dims[0], CLASSES, 1)

        def forward(self, x):
            skips = []
            for down in self.down:
                x = down(x)
                skips.append(x)
            for i in range(4, -1, -1):
                x = self.conv[i](F.interpolate(x, scale_factor=2, mode="nearest"))
                x = self.up[i](torch.cat((x, skips[i]), 1))
            # Labels, as ours.
            return self.head(x).argmax(1)

    return Net()


def formats(torch):
    return (("ncdhw", torch.contiguous_format), ("channels_last_3d", torch.channels_last_3d))


def net(torch, device, timer, a):
    dims, depth = MODELS[a.model]
    patch = a.patch
    if a.smoke:
        dims, patch = [c // 8 for c in dims], 64
    begin = time.time()
    for name, memory_format in formats(torch):
        for mode in ("eager",) if a.smoke else ("eager", "compile"):
            if time.time() - begin > a.limit:
                say(model=a.model, format=name, mode=mode, error="no time left")
                continue
            torch.manual_seed(0)
            model = network(torch, dims, depth).to(device).to(memory_format=memory_format).eval()
            x = torch.randn(1, 1, patch, patch, patch, device=device).to(memory_format=memory_format)
            run = torch.compile(model, mode="max-autotune-no-cudagraphs") if mode == "compile" else model
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()

            def forward():
                with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
                    return run(x)

            try:
                ms = timer.median(forward)
                peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
                say(model=a.model, patch=patch, format=name, mode=mode, ms=round(ms, 4), peak_bytes=peak)
            except Exception as e:  # A mode that does not work is no reason to lose the others.
                say(model=a.model, format=name, mode=mode, error=str(e)[:200])
            del model, run, x
            if device == "cuda":
                torch._dynamo.reset()
                torch.cuda.empty_cache()


def layers(torch, device, timer, a):
    dims, _ = MODELS[a.model]
    patch = 64 if a.smoke else a.patch
    shapes = [(1, dims[0], 3, 1, patch)]
    shapes += [(dims[i], dims[i], 3, 1, patch >> i) for i in range(6)]
    shapes += [(dims[i - 1], dims[i], 3, 2, patch >> (i - 1)) for i in range(1, 6)]
    shapes += [(2 * dims[i], dims[i], 3, 1, patch >> i) for i in range(5)]
    shapes += [(dims[i + 1], dims[i], 1, 1, patch >> (i + 1)) for i in range(5)]
    begin = time.time()
    for i, o, k, stride, size in dict.fromkeys(shapes):
        if time.time() - begin > a.limit:
            say(error="no time left")
            return
        out = size // stride
        # As `stunet bench forward` calls it.
        what = f"{i}->{o} {k}x{k}x{k} stride {stride}x{stride}x{stride} at {out}x{out}x{out}"
        row = {"layer": what, "gflop": 2e-9 * k**3 * i * o * out**3}
        for name, memory_format in formats(torch):
            x = torch.randn(1, i, size, size, size, device=device, dtype=torch.bfloat16).to(memory_format=memory_format)
            w = torch.randn(o, i, k, k, k, device=device, dtype=torch.bfloat16).to(memory_format=memory_format)
            try:
                with torch.inference_mode():
                    row[name] = round(timer.median(lambda: torch.nn.functional.conv3d(x, w, None, stride, k // 2)), 5)
            except RuntimeError as e:
                row[f"{name}_error"] = str(e)[:100]
            del x, w
        say(**row)


def records(path):
    """The lines of a log that are JSON objects."""
    found = []
    if os.path.exists(path):
        for line in open(path, errors="replace"):
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return [r for r in found if isinstance(r, dict)]


def table(folder):
    for first in sorted(glob.glob(os.path.join(folder, "ours_1_*.log"))):
        model = os.path.basename(first)[len("ours_1_") : -len(".log")]
        ours = [r for n in (1, 2) for r in records(os.path.join(folder, f"ours_{n}_{model}.log")) if "seconds" in r]
        if not ours:
            print(f"{model}: no numbers of ours, see {first}\n")
            continue
        ms = [r["seconds"] * 1e3 for r in ours]
        peak = max(r["peak_bytes"] for r in ours)
        line = f"{model} {ours[0]['patch']} {ours[0]['precision']}: ours {' / '.join(f'{m:.3f}' for m in ms)} ms, {peak / 2**20:.0f} MiB"
        if max(ms) / min(ms) > 1 + DRIFT:
            line += f" (drift {max(ms) / min(ms) - 1:.1%}: no comparison)"
        theirs = [r for r in records(os.path.join(folder, f"torch_net_{model}.log")) if "ms" in r]
        if theirs:
            best = min(theirs, key=lambda r: r["ms"])
            line += f"; PyTorch {best['ms']:.3f} ms, {best['peak_bytes'] / 2**20:.0f} MiB ({best['format']}, {best['mode']})"
            line += f"; ratio {best['ms'] / max(ms):.2f}"
        print(line + "\n")
        opponents = {r["layer"]: r for r in records(os.path.join(folder, f"torch_layers_{model}.log")) if "layer" in r}
        print("| layer | kernel | ours ms | TFLOP/s | PyTorch ms | ratio |\n|---|---|---|---|---|---|")
        for layer in ours[-1]["layers"]:
            own = layer["seconds"] * 1e3
            rate = f"{layer['gflops'] / 1e3:.1f}" if layer["gflops"] else ""
            row = opponents.get(layer["what"], {})
            times = [row[k] for k in ("ncdhw", "channels_last_3d") if k in row]
            them = f"{min(times):.4f} | {min(times) / own:.2f}" if times and own else " | "
            print(f"| {layer['operation']} {layer['what']} | {layer['implementation']} | {own:.4f} | {rate} | {them} |")
        print()


def main():
    a = arguments()
    if a.what == "table":
        return table(a.results)
    import torch

    device = "cpu" if a.smoke else "cuda"
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    timer = Timer(torch, device, a.secs)
    say(
        torch=torch.__version__,
        cudnn=torch.backends.cudnn.version(),
        device="cpu" if a.smoke else torch.cuda.get_device_name(),
    )
    (net if a.what == "net" else layers)(torch, device, timer, a)


if __name__ == "__main__":
    main()
