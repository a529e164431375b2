"""One optimiser step with its data on the device: images/s of FF, MRL and MRL-E, against a plain trainer's step.

    python benchmarks/train_step.py                      ResNet50, batch 512, 160, 192 and 224 px, on the GPU
    python benchmarks/train_step.py --compile 1 --precision bf16
    python benchmarks/train_step.py --device cpu --arch resnet18 --batch_size 8 --resolutions 32 --rounds 2

Ours is the step of train/trainer.py: uint8 images normalised on the device, channels-last, fused SGD, one batched loss,
autocast, torch.compile on request; it never waits for the device. Plain is the usual recipe: fp16 autocast and
GradScaler, channels-last, BlurPool, cudnn.benchmark, SGD as PyTorch's default, one linear layer and one cross-entropy
per size; it waits once a step, in GradScaler, as it must with that SGD. Each resolution is warmed up, then all take
turns in each round; ratios are within a round, as median (min–max). Targets on an H200: ours / plain at least 1.4 at
160 and 192 px; MRL's step within 1 % of FF's.
On a CPU the default is fp32 on both sides.
"""
import argparse

import torch
import torch.nn.functional as F
from measure import machine, spread, take_turns
from torch import nn

from MRL import MEAN, STD, Matryoshka_CE_Loss, autocast, build_model, classifier, feature_width

HEADS = {"FF": None, "MRL": "mrl", "MRL-E": "mrl_e"}      # FF: the size is the feature width
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
    head = HEADS[kind] or f"ff{feature_width(args.arch)}"
    return build_model(args.arch, head, num_classes=args.classes)


def groups(model):
    """Two groups, as in training: norm parameters without weight decay."""
    named = list(model.named_parameters())
    return [{"params": [p for name, p in named if "bn" in name], "weight_decay": 0},
            {"params": [p for name, p in named if "bn" not in name], "weight_decay": WEIGHT_DECAY}]


def ours(kind, args):
    """-> step(images uint8 [B, R, R, 3], labels): the way of train/trainer.py."""
    model = make_model(kind, args).to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(groups(model), lr=RATE, momentum=0.9, fused=args.device.type == "cuda")
    for p in model.parameters():      # as recipe.start_momentum
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    criterion = Matryoshka_CE_Loss(label_smoothing=SMOOTHING)
    if args.compile:
        model.compile(dynamic=False)

    def loss(x, labels):
        return criterion.weighted_sum(criterion.per_size(model(x), labels))
    return optimiser_step(loss, optimizer, args.precision, args.device)


def plain(kind, args):
    """-> step(images uint8 [B, R, R, 3], labels): the usual recipe."""
    model = make_model(kind, args)
    name, _ = classifier(model)
    model.set_submodule(name, PlainHead(model.spec["nesting_list"], args.classes, kind == "MRL-E"))
    model = model.to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(groups(model), lr=RATE, momentum=0.9)
    precision = "fp16" if args.device.type == "cuda" else "fp32"

    def loss(x, labels):
        output = model(x.half() if precision == "fp16" else x)
        return sum(F.cross_entropy(logits, labels, label_smoothing=SMOOTHING) for logits in output)
    return optimiser_step(loss, optimizer, precision, args.device)


def optimiser_step(loss, optimizer, precision, device):
    """-> step(images uint8 [B, R, R, 3], labels) that brings loss(normalised images [B, 3, R, R], labels) down."""
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    mean, std = (torch.tensor([255 * v for v in of], device=device).view(3, 1, 1) for of in (MEAN, STD))

    def step(images, labels):
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, precision):
            value = loss((images.permute(0, 3, 1, 2).float() - mean) / std, labels)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
    return step


def compare(resolution, steps, args):
    """-> {(side, head): images/s of each round}; the sides and heads take turns."""
    shape = (args.batch_size, resolution, resolution, 3)
    images = torch.randint(256, shape, dtype=torch.uint8, device=args.device)
    batch = images, torch.randint(args.classes, (args.batch_size,), device=args.device)
    works = {key: lambda step=step: step(*batch) for key, step in steps.items()}
    take_turns(works, 1, args.device, args.warmup)      # cudnn.benchmark's search, compilation
    times = take_turns(works, args.rounds, args.device, args.repeat)
    return {key: args.batch_size / values for key, values in times.items()}


def show(resolution, speeds):
    print(f"\n{resolution} px{'':6s}{'ours, images/s':>26s}{'plain, images/s':>26s}{'ours / plain':>26s}"
          f"{'step time / FF':>26s}")
    for kind in HEADS:
        mine, theirs = speeds["ours", kind], speeds["plain", kind]
        columns = [mine, theirs, mine / theirs, speeds["ours", "FF"] / mine]
        print(f"{kind:12s}" + "".join(f"{spread(column, 4):>26s}" for column in columns), flush=True)


def main():
    args = arguments()
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    print(f"{machine(args.device)}; {args.arch}, batch {args.batch_size}, {args.classes} classes, {args.precision}, "
          f"compile {args.compile}")
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
    return device_and_precision(parser.parse_args())


def device_and_precision(args):
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.precision = args.precision or ("fp16" if args.device.type == "cuda" else "fp32")
    return args


if __name__ == "__main__":
    main()
