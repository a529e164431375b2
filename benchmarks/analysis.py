"""Seconds and private memory of the analysis: cascades, oracle and superclasses, at ImageNet's full size or below.

    PYTHONPATH=model_analysis python benchmarks/analysis.py --full        9 x 50,000 x 1,000; without: 2,000 images

The softmax is made up (a signal that grows with the size, harder and easier images) and read as a user's files are.
"""
import argparse
import os
import tempfile
import threading
from pathlib import Path

import cascades
import numpy as np
import oracle
import outputs
import superclass
import torch
from measure import machine, private_mb, spread, take_turns

from MRL import NESTING_LIST

CLASSES = 1000
# What is measured, each on softmax [G, N, C], predictions [G, N] and true classes [N].
PARTS = {"cascades, 30 seeds, all caps": lambda s, p, y: cascades.repeat(*cascades.confidence(s, y), NESTING_LIST),
         "oracle": lambda s, p, y: oracle.evaluate(p, y, NESTING_LIST),
         "superclasses": lambda s, p, y: superclass.evaluate(s, y, superclass.choose())}


def write_world(folder, n):
    """Softmax, predictions and true classes of n made-up images, as inference saves them."""
    rng = np.random.default_rng(0)
    gt = np.arange(n) % CLASSES
    hard = rng.gamma(2.0, 1.0, n)
    softmax = torch.empty(len(NESTING_LIST), n, CLASSES)
    for g in range(len(NESTING_LIST)):
        z = rng.standard_normal((n, CLASSES), dtype=np.float32)
        z[np.arange(n), gt] += (2 + 1.6 * np.log1p(g)) * 2.5 / (0.5 + hard)
        torch.softmax(torch.from_numpy(1.8 * z), -1, out=softmax[g])
    stem = folder / "mrl=True_efficient=False_ff=2048_dataset=V1_tta=True"
    torch.save(softmax, f"{stem}_softmax.pth")
    torch.save(softmax.argmax(-1), f"{stem}_predictions.pth")
    torch.save(torch.from_numpy(gt), folder / "gt_dataset=V1.pth")


def measure(arrays, rounds):
    """Print the seconds of each part and of all, as median (min–max), and the private memory meanwhile."""
    sizes, stop = [private_mb(os.getpid())], threading.Event()

    def watch():
        while not stop.wait(0.005):
            sizes.append(private_mb(os.getpid()))
    watcher = threading.Thread(target=watch)
    watcher.start()
    times = take_turns({name: lambda part=part: part(*arrays) for name, part in PARTS.items()}, rounds)
    stop.set()
    watcher.join()
    for name, values in {**times, "together": sum(times.values())}.items():
        print(f"{name:32s}{spread(values)} s")
    print(f"private memory: {sizes[0]:.0f} MB before, {max(sizes):.0f} MB at most")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="50,000 images")
    parser.add_argument("--images", type=int, default=2000, help="1,000 or more")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    n = 50_000 if args.full else args.images
    print(f"{machine()}; G={len(NESTING_LIST)}, N={n}, C={CLASSES}")
    with tempfile.TemporaryDirectory() as folder:
        write_world(Path(folder), n)
        softmax, gt, _ = outputs.read(folder, "softmax", tta=True)
        predictions, _, _ = outputs.read(folder, "predictions", tta=True)
        measure((softmax, predictions, gt), args.rounds)


if __name__ == "__main__":
    main()
