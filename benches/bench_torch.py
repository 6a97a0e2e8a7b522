#!/usr/bin/env python3
"""PyTorch on the card of `stunet bench forward --device cuda`: the opponent of its numbers, at its best.

  bench_torch.py net --model base          forward passes of a STU-Net in every memory format and mode
  bench_torch.py layers --model base       its convolutions one by one
  bench_torch.py norm --model base         instance normalisation with leaky ReLU at the size of every stage
  bench_torch.py step --model base         training steps: five heads, Dice and cross-entropy, backward, clipping, SGD
  bench_torch.py table --results FOLDER    a table of what gpu_run.sh left there; needs no PyTorch

One line of JSON a case. bf16 by autocast, cudnn.benchmark on, TF32 allowed, warmed up, timed by CUDA events, median of as
many runs as fit into --secs; the fastest mode is the opponent. With --smoke the processor runs it at small sizes, which
says that the script works and nothing else.

Compiling takes longer than all the timing. With --go FILE a process builds and compiles everything, says {"ready": ...} and
times nothing until FILE is there: several can get ready beside each other and beside other work, and then be timed one by
one. Memory is that of a mode alone: its weights, its input and what a pass takes beyond what was there before.
"""

import argparse
import copy
import glob
import json
import os
import signal
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
    p.add_argument("what", choices=["net", "layers", "norm", "step", "table"])
    p.add_argument("--model", choices=MODELS, default="base")
    p.add_argument("--patch", type=int, default=128, help="voxels along each axis")
    p.add_argument("--batch", type=int, default=2, help="samples of a training step")
    p.add_argument("--secs", type=float, default=0.5, help="seconds of timed runs of a case")
    p.add_argument("--limit", type=float, default=500, help="seconds of timing after which no case begins")
    p.add_argument("--go", metavar="FILE", help="get ready, and time only when FILE exists")
    p.add_argument("--compile-limit", type=int, default=200, help="seconds of getting ready; of norm, of a compilation")
    p.add_argument("--autotune", action="store_true", help="compile by max-autotune-no-cudagraphs: minutes")
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


def network(torch, dims, depth, training=False):
    """A STU-Net whose decoder ends in one head, as predictions need it, or with one at every level."""
    nn, F = torch.nn, torch.nn.functional

    class Block(nn.Module):
        def __init__(self, i, o, stride, projected):
            super().__init__()
            self.conv1, self.norm1 = nn.Conv3d(i, o, 3, stride, 1), nn.InstanceNorm3d(o, affine=True)
            self.conv2, self.norm2 = nn.Conv3d(o, o, 3, 1, 1), nn.InstanceNorm3d(o, affine=True)
            self.conv3 = nn.Conv3d(i, o, 1, stride) if projected else None

        def forward(self, x):
            # In place, as STU-Net itself.
            y = F.leaky_relu(self.norm1(self.conv1(x)), 0.01, inplace=True)
            y = self.norm2(self.conv2(y))
            y += x if self.conv3 is None else self.conv3(x)
            return F.leaky_relu(y, 0.01, inplace=True)

    def stage(i, o, stride):
        return nn.Sequential(Block(i, o, stride, True), *[Block(o, o, 1, False) for _ in range(depth - 1)])

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.ModuleList(stage(dims[i - 1] if i else 1, dims[i], 2 if i else 1) for i in range(6))
            self.conv = nn.ModuleList(nn.Conv3d(dims[i + 1], dims[i], 1) for i in range(5))
            self.up = nn.ModuleList(stage(2 * dims[i], dims[i], 1) for i in range(5))
            self.head = nn.Conv3d(dims[0], CLASSES, 1)
            if training:
                self.heads = nn.ModuleList(nn.Conv3d(dims[i], CLASSES, 1) for i in range(1, 5))

        def forward(self, x):
            skips, outs = [], []
            for down in self.down:
                x = down(x)
                skips.append(x)
            for i in range(4, -1, -1):
                x = self.conv[i](F.interpolate(x, scale_factor=2, mode="nearest"))
                x = self.up[i](torch.cat((x, skips[i]), 1))
                if training and i:
                    outs.insert(0, self.heads[i - 1](x))
            if training:
                return [self.head(x), *outs]
            # Labels, as ours.
            return self.head(x).argmax(1)

    return Net()


def formats(torch):
    return (("ncdhw", torch.contiguous_format), ("channels_last_3d", torch.channels_last_3d))


def compiled(torch, f, a):
    # Shapes never change here.
    return torch.compile(f, dynamic=False, mode="max-autotune-no-cudagraphs" if a.autotune else "default")


def within(seconds, f):
    """Calls f; an error after so many seconds."""

    def late(*_):
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        return f()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Case:
    """A network in one memory format and mode."""

    def __init__(self, torch, device, memory_format, mode, model, x, own):
        self.format, self.mode, self.own = memory_format, mode, own
        autocast = mode != "eager_bf16"

        def forward():
            with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=autocast):
                return model(x)

        self.forward = forward


def cases(torch, device, patch, dims, depth, a):
    """What there is to be timed. Weights are there once for all modes that have the same."""
    allocated = torch.cuda.memory_allocated if device == "cuda" else lambda: 0
    for name, memory_format in formats(torch):
        torch.manual_seed(0)
        before = allocated()
        model = network(torch, dims, depth).to(device).to(memory_format=memory_format).eval()
        x = torch.randn(1, 1, patch, patch, patch, device=device).to(memory_format=memory_format)
        own = allocated() - before
        yield Case(torch, device, name, "eager", model, x, own)
        # Without autocast no weight is rounded anew in every pass.
        before = allocated()
        model16, x16 = copy.deepcopy(model).bfloat16(), x.bfloat16()
        yield Case(torch, device, name, "eager_bf16", model16, x16, allocated() - before)
        if not a.smoke:
            yield Case(torch, device, name, "compile", compiled(torch, model, a), x, own)


def pickers(torch, final):
    """How cuDNN chooses. While others have the card it must not choose by time, and what it chose is kept by a key of which
    this switch is a part; on 16 bits it has no other effect."""
    torch.backends.cudnn.benchmark = final
    torch.backends.cudnn.allow_tf32 = final


def net(torch, device, timer, a):
    dims, depth = MODELS[a.model]
    patch = a.patch
    if a.smoke:
        dims, patch = [c // 8 for c in dims], 64
    begin = time.time()
    ready = []
    pickers(torch, a.go is None)
    # What is to be compiled last, and given up when time is: the others then still count.
    for case in sorted(cases(torch, device, patch, dims, depth, a), key=lambda c: c.mode == "compile"):
        about = {"model": a.model, "format": case.format, "mode": case.mode}
        try:
            left = max(1, int(a.compile_limit - time.time() + begin))
            took = timer.clocked(lambda: within(left, case.forward))
            ready.append((about, case))
            say(**about, prepared_seconds=round(took / 1e3, 1))
        except Exception as e:  # A mode that does not work is no reason to lose the others.
            say(**about, error=str(e)[:200])
    say(ready=a.model, seconds=round(time.time() - begin, 1))
    while a.go and not os.path.exists(a.go):
        time.sleep(0.05)
    pickers(torch, True)
    begin = time.time()
    for about, case in ready:
        if time.time() - begin > a.limit:
            say(**about, error="no time left")
            continue
        try:
            case.forward()
            peak = before = 0
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            ms = timer.median(case.forward)
            if device == "cuda":
                peak = case.own + torch.cuda.max_memory_allocated() - before
            say(**about, patch=patch, ms=round(ms, 4), peak_bytes=peak)
        except Exception as e:
            say(**about, error=str(e)[:200])
    for about, case in ready:
        if case.mode.startswith("eager") and time.time() - begin < a.limit:
            try:
                say(**about, kernels=longest(torch, device, case.forward))
            except Exception as e:
                say(**about, kernels_error=str(e)[:200])


def dice_and_ce(torch, logits, target):
    """nnU-Net's loss of one output: cross-entropy, and soft Dice of each sample without the background, smoothed by 1e-5."""
    ce = torch.nn.functional.cross_entropy(logits, target[:, 0])
    p = logits.float().softmax(1)
    hot = torch.zeros(p.shape, device=p.device, dtype=torch.bool).scatter_(1, target, 1)
    axes = (2, 3, 4)
    both, ours, truth = (p[:, 1:] * hot[:, 1:]).sum(axes), p[:, 1:].sum(axes), hot[:, 1:].sum(axes)
    dice = (2 * both + 1e-5) / torch.clip(truth + ours + 1e-5, 1e-8)
    return ce - dice.mean()


def step(torch, device, timer, a):
    """Whole training steps in every memory format and mode, the memory of each alone."""
    dims, depth = MODELS[a.model]
    patch = a.patch
    if a.smoke:
        dims, patch = [c // 8 for c in dims], 64
    weights = [w / sum(0.5**i for i in range(4)) for w in (1, 0.5, 0.25, 0.125, 0)]
    begin = time.time()
    for mode in ("eager", "compile"):
        for name, memory_format in formats(torch):
            about = {"model": a.model, "step": True, "format": name, "mode": mode}
            if time.time() - begin > a.limit or (a.smoke and mode == "compile"):
                say(**about, error="no time left")
                continue
            try:
                if device == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                torch.manual_seed(0)
                model = network(torch, dims, depth, True).to(device).to(memory_format=memory_format)
                run = compiled(torch, model, a) if mode == "compile" else model
                x = torch.randn(a.batch, 1, patch, patch, patch, device=device).to(memory_format=memory_format)
                label = torch.arange(x.numel(), device=device) // 7 % CLASSES
                label = label.reshape(x.shape)
                targets = [label[:, :, :: 2**i, :: 2**i, :: 2**i].contiguous() for i in range(5)]
                sgd = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.99, nesterov=True, weight_decay=3e-5)

                def once():
                    sgd.zero_grad(set_to_none=True)
                    with torch.autocast(device, torch.bfloat16):
                        outs = run(x)
                        # The last weight is 0: nnU-Net leaves that output out.
                        loss = sum(w * dice_and_ce(torch, o, t) for w, o, t in zip(weights, outs, targets) if w)
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 12)
                    sgd.step()

                took = timer.clocked(lambda: within(a.compile_limit, once))
                ms = timer.median(once)
                peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
                say(**about, patch=patch, batch=a.batch, ms=round(ms, 4), peak_bytes=peak, prepared_seconds=round(took / 1e3, 1))
            except Exception as e:  # A mode that does not work is no reason to lose the others.
                say(**about, error=str(e)[:200])
            model = run = sgd = x = label = targets = None


def longest(torch, device, f):
    """Names and milliseconds of the five kernels that take longest: convolutions that are not cuDNN's would be seen."""
    from torch.profiler import ProfilerActivity, profile

    kind = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[kind]) as p:
        f()
        if device == "cuda":
            torch.cuda.synchronize()
    times = {}
    for e in p.key_averages():
        if device == "cuda":
            us = getattr(e, "self_device_time_total", None) or getattr(e, "self_cuda_time_total", 0)
        else:
            us = e.self_cpu_time_total
        times[e.key[:120]] = times.get(e.key[:120], 0) + us
    return {k: round(times[k] / 1e3, 3) for k in sorted(times, key=times.get, reverse=True)[:5]}


def norm(torch, device, timer, a):
    """As `stunet bench instance-norm`: from a stored activation to another one."""
    functional = torch.nn.functional
    dims, _ = MODELS[a.model]
    patch = 32 if a.smoke else a.patch
    begin = time.time()
    for stage, channels in enumerate(dims):
        size = patch >> stage
        row = {"norm": f"{channels} at {size}x{size}x{size}"}
        if size**3 == 1:
            continue  # PyTorch normalises no single voxel.
        for name, memory_format in formats(torch):
            x = torch.randn(1, channels, size, size, size, device=device, dtype=torch.bfloat16)
            x = x.to(memory_format=memory_format)
            w, b = torch.ones(channels, device=device), torch.zeros(channels, device=device)

            def run(x):
                y = functional.instance_norm(x, weight=w, bias=b, eps=1e-5)
                return functional.leaky_relu(y, 0.01, inplace=True)

            for mode in ("eager",) if a.smoke else ("eager", "compile"):
                if time.time() - begin > a.limit:
                    row[f"{name}_{mode}_error"] = "no time left"
                    continue
                f = compiled(torch, run, a) if mode == "compile" else run
                try:
                    with torch.inference_mode():
                        within(a.compile_limit, lambda: f(x))
                        row[f"{name}_{mode}"] = round(timer.median(lambda: f(x)), 5)
                except Exception as e:
                    row[f"{name}_{mode}_error"] = str(e)[:100]
                if mode == "compile":
                    torch._dynamo.reset()
        say(**row)


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


def summed(what):
    """Channels of two inputs as one number."""
    channels, _, rest = what.partition("->")
    return f"{sum(int(c) for c in channels.split('+'))}->{rest}"


def times_of(row):
    return [v for k, v in row.items() if isinstance(v, float) and k.startswith(("ncdhw", "channels_last_3d"))]


def table(folder):
    def log(name):
        return records(os.path.join(folder, f"{name}.log"))

    for first in sorted(glob.glob(os.path.join(folder, "train_1_*.log"))):
        model = os.path.basename(first)[len("train_1_") : -len(".log")]
        ours = [r for n in (1, 2) for r in log(f"train_{n}_{model}") if "seconds" in r]
        if ours:
            ms, peak = [r["seconds"] * 1e3 for r in ours], max(r["peak_bytes"] for r in ours)
            print(f"{model}, training step {ours[0]['patch']}: ours {' / '.join(f'{m:.3f}' for m in ms)} ms, {peak / 2**20:.0f} MiB\n")
            forward_table(log(f"torch_step_{model}"), max(ms), peak)
    for first in sorted(glob.glob(os.path.join(folder, "ours_1_*.log"))):
        model = os.path.basename(first)[len("ours_1_") : -len(".log")]
        ours = [r for n in (1, 2) for r in log(f"ours_{n}_{model}") if "seconds" in r]
        if not ours:
            print(f"{model}: no numbers of ours, see {first}\n")
            continue
        ms = [r["seconds"] * 1e3 for r in ours]
        peak = max(r["peak_bytes"] for r in ours)
        line = f"{model} {ours[0]['patch']} {ours[0]['precision']}: ours {' / '.join(f'{m:.3f}' for m in ms)} ms, {peak / 2**20:.0f} MiB"
        if max(ms) / min(ms) > 1 + DRIFT:
            line += f" (drift {max(ms) / min(ms) - 1:.1%}: no comparison)"
        for key, what in (("seconds_in_a_row", "one after the other"), ("seconds_on_host", "labels on the host")):
            if key in ours[-1]:
                line += f"; {what} {ours[-1][key] * 1e3:.3f} ms"
        print(line + "\n")
        forward_table(log(f"torch_net_{model}"), max(ms), peak)
        layer_table(ours[-1], log(f"variants_{model}"), log(f"torch_layers_{model}"))
        norm_table(log(f"ours_norm_{model}"), log(f"torch_norm_{model}"))


def forward_table(theirs, own, peak):
    """Every mode of PyTorch, beside the slower of our runs."""
    timed = [r for r in theirs if "ms" in r]
    if not timed:
        return
    best = min(timed, key=lambda r: r["ms"])
    print("| PyTorch | ms | ratio | MiB | ratio |\n|---|---|---|---|---|")
    for r in theirs:
        title = f"{r.get('format')}, {r.get('mode')}"
        if "ms" in r:
            mark = " (fastest)" if r is best else ""
            memory = f"{r['peak_bytes'] / 2**20:.0f} | {r['peak_bytes'] / peak:.2f}"
            print(f"| {title}{mark} | {r['ms']:.3f} | {r['ms'] / own:.2f} | {memory} |")
        elif "error" in r:
            print(f"| {title}: {r['error']} | | | | |")
    print()
    for r in theirs:
        if "kernels" in r:
            print(f"{r['format']}, {r['mode']}: {'; '.join(f'{ms} ms {k}' for k, ms in r['kernels'].items())}\n")


def layer_table(pass_, variants, theirs):
    opponents = {r["layer"]: r for r in theirs if "layer" in r}
    row_of = {summed(l["what"]): l for r in variants for l in r.get("layers", []) if "in_a_row" in l}
    if not opponents and not row_of:
        return
    # With its launch and a wait a small layer of a pass takes twice as long.
    print("Layers alone, many runs in a row; with * as part of a pass, with its launch and a wait.\n")
    print("| layer | kernel | ours ms | TFLOP/s | PyTorch ms | ratio |\n|---|---|---|---|---|---|")
    for layer in pass_["layers"]:
        alone = row_of.get(layer["what"]) if layer["operation"] == "conv3d" else None
        l = alone or layer
        own = l["seconds"] * 1e3
        rate = f"{l['gflops'] / 1e3:.1f}" if l["gflops"] else ""
        times = times_of(opponents.get(layer["what"], {}))
        them = f"{min(times):.4f} | {min(times) / own:.2f}" if times and own else " | "
        mark = "" if alone else "*"
        print(f"| {layer['operation']} {layer['what']} | {l['implementation']} | {own:.4f}{mark} | {rate} | {them} |")
    print()


def norm_table(ours, theirs):
    opponents = {r["norm"]: times_of(r) for r in theirs if "norm" in r}
    layers = [l for r in ours for l in r.get("layers", [])]
    if not layers:
        return
    print("| instance norm, leaky ReLU | ours ms | of a copy | PyTorch ms | ratio |\n|---|---|---|---|---|")
    for l in layers:
        own, share = l["seconds"] * 1e3, l.get("memory_share")
        times = opponents.get(l["what"], [])
        them = f"{min(times):.4f} | {min(times) / own:.2f}" if times else " | "
        print(f"| {l['what']} | {own:.4f} | {f'{share:.0%}' if share else ''} | {them} |")
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
    {"net": net, "layers": layers, "norm": norm, "step": step}[a.what](torch, device, timer, a)


if __name__ == "__main__":
    main()
