"""One optimiser step with its data on the device: images/s of FF, MRL and MRL-E, against a plain trainer's step.

    python benchmarks/train_step.py                      ResNet50, batch 512, 160, 192 and 224 px, on the GPU
    python benchmarks/train_step.py --compile 1 --precision bf16
    python benchmarks/train_step.py --device cpu --arch resnet18 --batch_size 8 --resolutions 32 --rounds 2

Ours is the step of train/trainer.py: uint8 images normalised on the device, channels-last, fused SGD, one batched loss,
autocast, torch.compile on request. Plain is the usual recipe: fp16 autocast and GradScaler, channels-last, BlurPool,
cudnn.benchmark, SGD as PyTorch's default, one linear layer and one cross-entropy per size. Nothing in either waits for
the device. Each resolution is warmed up, then all take turns in each round; ratios are within a round, as median
(min–max). Targets on an H200: ours / plain at least 1.4 at 160 and 192 px; MRL's step within 1 % of FF's.
On a CPU the default is fp32 on both sides.
"""
import argparse
import os
import platform
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from MRL import Matryoshka_CE_Loss, build_model, classifier

HEADS = {"FF": None, "MRL": "mrl", "MRL-E": "mrl_e"}      # FF: the size is the feature width
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
SMOOTHING, WEIGHT_DECAY, RATE = 0.1, 1e-4, 1e-3


class PlainHead(nn.Module):
    """One linear layer per size; MRL-E slices one matrix at each size."""

    def __init__(self, sizes, classes, efficient):
        super().__init__()
        self.sizes = sizes
        self.layers = nn.ModuleList(nn.Linear(size, classes) for size in (sizes[-1:] if efficient else sizes))

    def forward(self, x):
        if len(self.layers) == len(self.sizes):
            return [layer(x[:, :size]) for layer, size in zip(self.layers, self.sizes, strict=True)]
        (layer,) = self.layers
        return [F.linear(x[:, :size], layer.weight[:, :size], layer.bias) for size in self.sizes]


def make_model(kind, args):
    with torch.device("meta"):
        width = build_model(args.arch, "ff1").spec["feature_dim"]
    return build_model(args.arch, f"ff{width}" if kind == "FF" else HEADS[kind], num_classes=args.classes)


def groups(model):
    """Two groups, as in training: norm parameters without weight decay."""
    named = list(model.named_parameters())
    return [{"params": [p for name, p in named if "bn" in name], "weight_decay": 0},
            {"params": [p for name, p in named if "bn" not in name], "weight_decay": WEIGHT_DECAY}]


def ours(kind, args):
    """-> step(images uint8 [B, R, R, 3], labels): the way of train/trainer.py."""
    model = make_model(kind, args).to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(groups(model), lr=RATE, momentum=0.9, fused=args.device.type == "cuda")
    criterion = Matryoshka_CE_Loss(label_smoothing=SMOOTHING)
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.precision == "fp16")
    mean, std = (torch.tensor(v, device=args.device).view(3, 1, 1) for v in (MEAN, STD))
    if args.compile:
        model.compile(dynamic=False)

    def step(images, labels):
        optimizer.zero_grad(set_to_none=True)
        with autocast(args.device, args.precision):
            output = model((images.permute(0, 3, 1, 2).float() - mean) / std)
            loss = criterion.weighted_sum(criterion.per_size(output, labels))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return step


def plain(kind, args):
    """-> step(images uint8 [B, R, R, 3], labels): the usual recipe."""
    model = make_model(kind, args)
    name, _ = classifier(model)
    model.set_submodule(name, PlainHead(model.spec["nesting_list"], args.classes, kind == "MRL-E"))
    model = model.to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(groups(model), lr=RATE, momentum=0.9)
    precision = "fp16" if args.device.type == "cuda" else "fp32"
    scaler = torch.amp.GradScaler(args.device.type, enabled=precision == "fp16")
    half = torch.float16 if precision == "fp16" else torch.float32
    mean, std = (torch.tensor(v, device=args.device).view(3, 1, 1) for v in (MEAN, STD))

    def step(images, labels):
        optimizer.zero_grad(set_to_none=True)
        with autocast(args.device, precision):
            output = model(((images.permute(0, 3, 1, 2).float() - mean) / std).to(half))
            loss = sum(F.cross_entropy(logits, labels, label_smoothing=SMOOTHING) for logits in output)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return step


def autocast(device, precision):
    return torch.autocast(device.type, {"fp16": torch.float16}.get(precision, torch.bfloat16),
                          enabled=precision != "fp32")


def images_per_second(step, batch, device, repeat):
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(repeat):
        step(*batch)
    synchronize()
    return repeat * len(batch[0]) / (time.perf_counter() - start)


def compare(resolution, steps, args):
    """-> {(side, head): images/s of each round}; the sides and heads take turns."""
    shape = (args.batch_size, resolution, resolution, 3)
    images = torch.randint(256, shape, dtype=torch.uint8, device=args.device)
    batch = images, torch.randint(args.classes, (args.batch_size,), device=args.device)
    for step in steps.values():
        images_per_second(step, batch, args.device, args.warmup)      # cudnn.benchmark's search, compilation
    speeds = {key: [] for key in steps}
    for _ in range(args.rounds):
        for key, step in steps.items():
            speeds[key].append(images_per_second(step, batch, args.device, args.repeat))
    return {key: np.array(values) for key, values in speeds.items()}


def show(resolution, speeds):
    print(f"\n{resolution} px{'':6s}{'ours, images/s':>26s}{'plain, images/s':>26s}{'ours / plain':>26s}"
          f"{'step time / FF':>26s}")
    for kind in HEADS:
        mine, theirs = speeds["ours", kind], speeds["plain", kind]
        columns = [mine, theirs, mine / theirs, speeds["ours", "FF"] / mine]
        print(f"{kind:12s}" + "".join(f"{spread(column):>26s}" for column in columns), flush=True)


def spread(values):
    return f"{np.median(values):.4g} ({values.min():.4g}–{values.max():.4g})"


def main():
    args = arguments()
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    device = torch.cuda.get_device_name() if args.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{platform.machine()}, {os.cpu_count()} cores (load {os.getloadavg()[0]:.1f}), {device}, "
          f"torch {torch.__version__}; {args.arch}, batch {args.batch_size}, {args.classes} classes, "
          f"{args.precision}, compile {args.compile}")
    steps = {(side.__name__, kind): side(kind, args) for kind in HEADS for side in (ours, plain)}
    for resolution in args.resolutions:
        show(resolution, compare(resolution, steps, args))
    if args.device.type == "cuda":
        print(f"\npeak memory, all models together: {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--resolutions", type=int, nargs="+", default=[160, 192, 224])
    parser.add_argument("--precision", choices=["fp16", "bf16", "fp32"], help="ours [default: fp16; fp32 on a CPU]")
    parser.add_argument("--compile", type=int, choices=[0, 1], default=0, help="ours")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeat", type=int, default=10, help="steps in each measurement")
    parser.add_argument("--warmup", type=int, default=5, help="steps before the first round")
    parser.add_argument("--device", type=torch.device, help="[default: cuda where there is one]")
    args = parser.parse_args()
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.precision = args.precision or ("fp16" if args.device.type == "cuda" else "fp32")
    return args


if __name__ == "__main__":
    main()
