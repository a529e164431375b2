"""Private memory of an embedding dump against the number of images: it must not grow with it.

    PYTHONPATH=inference python benchmarks/dump_memory.py      20,000 and 200,000 images, 2 workers, on the CPU

RssAnon of the dumping process and its workers, summed, sampled 20 times a second; resident size would count the pages
of the mapped file too. The images of a class are hard links to one file. Claim: the peaks differ by less than 100 MB.
"""
import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import features
import numpy as np
import torch
from eval_sets import ImageSet, Preparation
from PIL import Image


def make_tree(folder, n, classes=100):
    for name in (f"n{c:08}" for c in range(classes)):
        (folder / "tree" / name).mkdir(parents=True)
        image = folder / "tree" / name / f"{name}_00000000.JPEG"
        Image.new("RGB", (16, 16), (90, 120, 30)).save(image)
        for i in range(1, n // classes):
            os.link(image, folder / "tree" / name / f"{name}_{i:08}.JPEG")


def dump(folder):
    """Runs in a process of its own: the dump of a tiny network, 512 features per image."""
    tree = Path(folder, "tree")
    images = ImageSet(tree, sorted(os.listdir(tree)), None, Preparation(8, 8))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 512)).eval()
    features.dump(model, images, Path(folder, "1K_train_m"), {"nesting_list": [512]}, torch.device("cpu"), 256, 2)


def private_mb(pid):
    """RssAnon of a process and its children, MB."""
    total = 0
    for process in [pid, *children(pid)]:
        try:
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
        except OSError:                                        # it has ended meanwhile
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    return total / 1024


def children(pid):
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [grandchild for child in map(int, found) for grandchild in (child, *children(child))]


def peak_mb(n):
    with tempfile.TemporaryDirectory() as folder:
        make_tree(Path(folder), n)
        process, samples, start = subprocess.Popen([sys.executable, __file__, "--dump", folder]), [], time.time()
        while process.poll() is None:
            samples.append(private_mb(process.pid))
            time.sleep(0.05)
        assert process.returncode == 0 and len(np.load(Path(folder, "1K_train_m-y.npy"))) == n
    print(f"{n:>8} images: peak {max(samples):7.1f} MB private, {time.time() - start:5.1f} s", flush=True)
    return max(samples)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs=2, default=[20_000, 200_000])
    parser.add_argument("--dump", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.dump:
        return dump(args.dump)
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    few, many = map(peak_mb, args.images)
    print(f"difference: {many - few:.1f} MB")


if __name__ == "__main__":
    main()
