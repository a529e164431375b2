r"""Images/s of `evaluate` in inference/ against a plain loop `for x, y in loader: model(x)`, of one model and loader.

    PYTHONPATH=inference python benchmarks/eval_speed.py                   ResNet18, 112 px, on the CPU
    PYTHONPATH=inference python benchmarks/eval_speed.py \
        --arch resnet50 --crop 224 --images 10000 --device cuda --workers 12

Rounds alternate between the two; the ratio is that of their images/s (1 = no cost), per round, as median (min–max).
Claim: within 3 %.
"""
import argparse
import os
import tempfile

import torch
from classification import evaluate
from image_set import ImageSet, Preparation, make_loader
from measure import machine, make_images, spread, take_turns

from mrl_models import build_model


@torch.inference_mode()
def plain_loop(model, loader, device):
    for x, _ in loader:
        model(x.to(device, non_blocking=True))


def compare(args):
    """-> {side: seconds [rounds]}."""
    model, pixels = build_model(args.arch, args.head).eval().to(args.device), args.crop * 256 // 224
    with tempfile.TemporaryDirectory() as folder:
        make_images(folder, args.images, pixels * 4 // 3)
        images = ImageSet(folder, sorted(os.listdir(folder)), None, Preparation(pixels, args.crop))
        loader = make_loader(images, args.batch_size, args.workers, args.device.type == "cuda")
        plain_loop(model, loader, args.device)                                                      # warm-up
        return take_turns({"plain loop": lambda: plain_loop(model, loader, args.device),
                           "evaluate": lambda: evaluate(model, images, loader, args.device)}, args.rounds, args.device)


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
    print(f"{machine(args.device)}; {args.arch} {args.head}, {args.crop} px, {args.images} images, "
          f"batch {args.batch_size}, {args.workers} workers")
    times = compare(args)
    for side, values in times.items():
        print(f"{side:>11}: {spread(args.images / values, 4)} images/s")
    print(f"{'ratio':>11}: {spread(times['plain loop'] / times['evaluate'], 4)}")


if __name__ == "__main__":
    main()
