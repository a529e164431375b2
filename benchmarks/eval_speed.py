r"""Images/s of inference/evaluate.py against a plain loop `for x, y in loader: model(x)` of the same model and loader.

    PYTHONPATH=inference python benchmarks/eval_speed.py                   ResNet18, 112 px, on the CPU
    PYTHONPATH=inference python benchmarks/eval_speed.py \
        --arch resnet50 --crop 224 --images 10000 --device cuda --workers 12

Rounds alternate between the two; the ratio is evaluation / plain loop (1 = no cost), per round, as median (min-max).
Claim: within 3 %.
"""
import argparse
import platform
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torchvision
from eval_sets import ImageSet, Preparation, make_loader
from evaluate import evaluate
from PIL import Image

from MRL import build_model


def make_images(folder, n, pixels, classes=10):
    rng = np.random.default_rng(0)
    for i in range(n):
        path = Path(folder, str(i % classes), f"{i}.jpeg")
        path.parent.mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((pixels, pixels), Image.BICUBIC).save(path, quality=90)


def seconds(work, device):
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@torch.inference_mode()
def plain_loop(model, loader, device):
    for x, _ in loader:
        model(x.to(device, non_blocking=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--head", default="mrl")
    parser.add_argument("--crop", type=int, default=112)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = parser.parse_args()

    model = build_model(args.arch, args.head).eval().to(args.device)
    with tempfile.TemporaryDirectory() as folder:
        make_images(folder, args.images, args.crop * 256 // 224)
        images = ImageSet(folder, [str(i) for i in range(10)], None, Preparation(args.crop * 256 // 224, args.crop))
        loader = make_loader(images, args.batch_size, args.workers, args.device.type == "cuda")
        plain_loop(model, loader, args.device)                                                      # warm-up
        rounds = [(seconds(lambda: plain_loop(model, loader, args.device), args.device),
                   seconds(lambda: evaluate(model, images, loader, args.device), args.device))
                  for _ in range(args.rounds)]

    name = torch.cuda.get_device_name() if args.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{platform.machine()}, {name}, torch {torch.__version__}, torchvision {torchvision.__version__}")
    print(f"{args.arch} {args.head}, {args.crop} px, {args.images} images, batch {args.batch_size}")
    for label, times in zip(("plain loop", "evaluate"), zip(*rounds, strict=True), strict=True):
        speeds = [args.images / t for t in times]
        print(f"{label:>11}: {median(speeds):7.1f} images/s ({min(speeds):.1f}-{max(speeds):.1f})")
    ratios = [plain / ours for plain, ours in rounds]
    print(f"{'ratio':>11}: {median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})")


if __name__ == "__main__":
    main()
