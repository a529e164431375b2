"""One optimiser step with its data on the device: images/s of FF, MRL and MRL-E, against a plain trainer's step.

    export PYTHONPATH=train
    python benchmarks/train_step.py                      ResNet50, batch 512, 160, 192 and 224 px, on the GPU
    python benchmarks/train_step.py --compile 1 --precision bf16
    python benchmarks/train_step.py --device cpu --arch resnet18 --batch_size 8 --resolutions 32 --rounds 2

Ours is train/trainer.py's own step; it never waits for the device. Plain is the usual recipe: fp16 autocast and
GradScaler (which waits once a step), channels-last, BlurPool, SGD as PyTorch's default, head.py's plain heads and loss.
On a CPU the default is fp32 on both sides. Each resolution is warmed up, then all take turns in each round; ratios are
within a round, as median (min–max). Targets on an H200: ours / plain at least 1.4 at 160 and 192 px; MRL's step within
1 % of FF's.
"""
import argparse

import torch
from head import SMOOTHING, PlainSeparate, PlainShared, plain_loss
from measure import machine, spread, take_turns
from recipe import model_spec
from settings import given_settings
from train_imagenet import CONFIG
from trainer import Trainer

from mrl_models import MEAN, STD, autocast, build_model, classifier

HEADS = {"FF": {}, "MRL": {"mrl": 1}, "MRL-E": {"efficient": 1}}      # FF: the size is the feature width
WEIGHT_DECAY, RATE = 1e-4, 1e-3


def settings_for(kind, args):
    nothing = {"train_dataset": "", "val_dataset": "", "num_workers": 1, "in_memory": 1}
    return given_settings(CONFIG, {
        "model": {"arch": args.arch, "num_classes": args.classes, **HEADS[kind]}, "data": nothing,
        "logging": {"folder": ""}, "training": {
            "batch_size": args.batch_size, "weight_decay": WEIGHT_DECAY, "label_smoothing": SMOOTHING,
            "use_blurpool": 1, "compile": args.compile, "precision": args.precision, "device": args.device.type}})


def ours(kind, args):
    """-> step(images uint8 [B, R, R, 3], labels): the trainer's."""
    settings = settings_for(kind, args)
    trainer = Trainer(args.device, settings, model_spec(settings), folder=None)
    return lambda images, labels: trainer.train_step(images, labels, RATE)


def plain(kind, args):
    """-> step(images uint8 [B, R, R, 3], labels): the usual recipe."""
    spec, device = model_spec(settings_for(kind, args)), args.device
    model = build_model(args.arch, spec["head"], num_classes=args.classes)
    head = (PlainShared if kind == "MRL-E" else PlainSeparate)(spec["nesting_list"], args.classes)
    model.set_submodule(classifier(model)[0], head)
    model = model.to(device, memory_format=torch.channels_last)
    norms, others = ([p for name, p in model.named_parameters() if ("bn" in name) == norm] for norm in (True, False))
    optimizer = torch.optim.SGD([{"params": norms, "weight_decay": 0}, {"params": others}], lr=RATE, momentum=0.9,
                                weight_decay=WEIGHT_DECAY)
    half = device.type == "cuda"
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    mean, std = (torch.tensor([255 * v for v in of], device=device).view(3, 1, 1) for of in (MEAN, STD))

    def step(images, labels):
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, "fp16" if half else "fp32"):
            x = (images.permute(0, 3, 1, 2).float() - mean) / std
            loss = plain_loss(model(x.half() if half else x), labels)
        scaler.scale(loss).backward()
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
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--resolutions", type=int, nargs="+", default=[160, 192, 224])
    add_step_flags(parser)
    return device_and_precision(parser.parse_args())


def add_step_flags(parser):
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--precision", choices=["fp16", "bf16", "fp32"], help="ours [default: fp16; fp32 on a CPU]")
    parser.add_argument("--compile", type=int, choices=[0, 1], default=0, help="ours")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeat", type=int, default=10, help="steps in each measurement")
    parser.add_argument("--warmup", type=int, default=5, help="steps before the first round")
    parser.add_argument("--device", type=torch.device, help="[default: cuda where there is one]")


def device_and_precision(args):
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.precision = args.precision or ("fp16" if args.device.type == "cuda" else "fp32")
    return args


if __name__ == "__main__":
    main()
