"""Time of the analysis at ImageNet's full size, and its ratio to plain loops over images.

    PYTHONPATH=model_analysis python benchmarks/analysis.py           ratio on 2,000 images, both sides in one run
    PYTHONPATH=model_analysis python benchmarks/analysis.py --full    seconds and private memory: 9 x 50,000 x 1,000

The softmax is made up (a signal that grows with the size, harder and easier images). The plain side is what one writes
first: one pass for confidences and predictions, then loops over images, as in the original's notebooks, but without
their reading the file again for every seed and cap. Both sides must give the same numbers.
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
from measure import machine, private_mb, seconds, spread, take_turns

from MRL import NESTING_LIST

CLASSES, SEEDS, FRACTION = 1000, 30, 0.2


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


# ------------------------------------------------------------------------------------------------ ours

def ours_cascades(softmax, predictions, gt):
    return cascades.repeat(*cascades.confidence(softmax, gt), NESTING_LIST, FRACTION, SEEDS)


def ours_oracle(softmax, predictions, gt):
    result = oracle.evaluate(predictions, gt, NESTING_LIST)
    return {key: result[key] for key in ("histogram", "never_correct", "expected_size")}


def ours_superclasses(softmax, predictions, gt):
    result = superclass.evaluate(softmax, gt, superclass.choose())
    return {key: result[key] for key in ("superclass", "restricted", "within")}


# ------------------------------------------------------------------------------------------------ plain loops

def plain_cascades(softmax, predictions, gt):
    conf, correct = softmax.max(-1), softmax.argmax(-1) == gt
    rows = []
    for seed in range(SEEDS):
        tune = cascades.hold_out(len(gt), FRACTION, seed)
        thresholds = []
        for small in range(len(conf) - 1):
            right = [np.where(conf[small, tune] > t, correct[small, tune], correct[small + 1, tune]).mean()
                     for t in cascades.GRID]
            thresholds.append(cascades.GRID[int(np.argmax(right))])
        by_cap = [plain_policy(conf, correct, np.flatnonzero(~tune), thresholds, cap) for cap in range(1, len(conf))]
        accuracy, expected, touched = zip(*by_cap, strict=True)
        rows.append({"thresholds": thresholds, "accuracy": accuracy, "expected_size": expected,
                     "touched_size": touched})
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


def plain_policy(conf, correct, images, thresholds, cap):
    right = size = touched = 0
    for i in images:
        g = 0
        while g < cap and not conf[g, i] > thresholds[g]:
            g += 1
        right += correct[g, i]
        size += NESTING_LIST[g]
        touched += sum(NESTING_LIST[:g + 1])
    return right / len(images), size / len(images), touched / len(images)


def plain_oracle(softmax, predictions, gt):
    histogram, never = np.zeros(len(NESTING_LIST), int), 0
    for i in range(len(gt)):
        for g in range(len(NESTING_LIST)):
            if predictions[g, i] == gt[i]:
                histogram[g] += 1
                break
        else:
            never += 1
    return {"histogram": histogram, "never_correct": never, "expected_size": histogram @ NESTING_LIST / histogram.sum()}


def plain_superclasses(softmax, predictions, gt):
    wnids = superclass.choose()
    siblings = [superclass.members(wnid) for wnid in wnids]
    of_class = {int(c): s for s, classes in enumerate(siblings, 1) for c in classes}
    right, restricted, within = (np.zeros((len(softmax), k)) for k in (1, 1, len(wnids)))
    images = np.zeros(len(wnids))
    for i, c in enumerate(gt.tolist()):
        s = of_class.get(c, 0)
        images[s - 1] += s > 0
        for g in range(len(softmax)):
            right[g] += of_class.get(int(predictions[g, i]), 0) == s
            if s:
                restricted[g] += predictions[g, i] == c
                within[g, s - 1] += siblings[s - 1][softmax[g, i, siblings[s - 1]].argmax()] == c
    return {"superclass": right[:, 0] / len(gt), "restricted": restricted[:, 0] / images.sum(),
            "within": within / images}


PARTS = {"cascades, 30 seeds, all caps": (ours_cascades, plain_cascades), "oracle": (ours_oracle, plain_oracle),
         "superclasses": (ours_superclasses, plain_superclasses)}


# ------------------------------------------------------------------------------------------------ measuring

def compare(arrays, rounds):
    """Median (min–max) over the rounds; the two sides take turns."""
    print(f"{'':30s}{'ours (s)':>28s}{'plain loop (s)':>28s}{'plain / ours':>28s}")
    for name, (ours, plain) in PARTS.items():
        ours_result, plain_result = ours(*arrays), plain(*arrays)
        for key in ours_result:
            assert np.allclose(ours_result[key], plain_result[key], rtol=1e-12), (name, key)
        times = take_turns({"ours": lambda f=ours: f(*arrays), "plain": lambda f=plain: f(*arrays)}, rounds)
        columns = times["ours"], times["plain"], times["plain"] / times["ours"]
        print(f"{name:30s}" + "".join(f"{spread(column):>28s}" for column in columns), flush=True)


def full(arrays):
    sizes, stop = [private_mb(os.getpid())], threading.Event()

    def watch():
        while not stop.wait(0.005):
            sizes.append(private_mb(os.getpid()))
    watcher = threading.Thread(target=watch)
    watcher.start()
    times = {name: seconds(lambda f=ours: f(*arrays)) for name, (ours, _) in PARTS.items()}
    stop.set()
    watcher.join()
    for name, value in {**times, "together": sum(times.values())}.items():
        print(f"{name:32s}{value:8.2f} s")
    print(f"private memory: {sizes[0]:.0f} MB before, {max(sizes):.0f} MB at most")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--images", type=int, default=2000, help="for the ratio; 1,000 or more")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    n = 50_000 if args.full else args.images
    print(f"{machine()}; G={len(NESTING_LIST)}, N={n}, C={CLASSES}")
    with tempfile.TemporaryDirectory() as folder:
        write_world(Path(folder), n)
        softmax, gt, _ = outputs.read(folder, "softmax", tta=True)
        predictions, _, _ = outputs.read(folder, "predictions", tta=True)
        full((softmax, predictions, gt)) if args.full else compare((softmax, predictions, gt), args.rounds)


if __name__ == "__main__":
    main()
