"""Private memory of an embedding dump against the number of images: it must not grow with it.

    PYTHONPATH=inference python benchmarks/dump_memory.py      20,000 and 200,000 images, 2 workers, on the CPU

RssAnon of the dumping process and its workers, summed, sampled 50 times a second; resident size would count the pages
of the mapped file too. Claim: the peaks differ by less than 100 MB.
"""
import argparse
import os
import sys
import tempfile
from pathlib import Path

import embeddings
import numpy as np
import torch
from image_set import ImageSet, Preparation
from measure import machine, make_images, watch


def dump(folder, width):
    """Runs in a process of its own: the dump of a tiny network."""
    tree = Path(folder, "tree")
    images = ImageSet(tree, sorted(os.listdir(tree)), None, Preparation(8, 8))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, width)).eval()
    embeddings.dump(model, images, Path(folder, "1K_train_m"), embeddings.describe_dump({"nesting_list": [width]}),
                  torch.device("cpu"), batch_size=256, workers=2)


def peak_mb(n, width):
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder, "tree"), n, 16, different=10)      # the others are links to these
        time, peak, _ = watch([sys.executable, __file__, "--features", str(width), "--dump", folder])
        assert len(np.load(Path(folder, "1K_train_m-y.npy"))) == n
    print(f"{n:>8} images: peak {peak:7.1f} MB private, {time:5.1f} s", flush=True)
    return peak


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs=2, default=[20_000, 200_000])
    parser.add_argument("--features", type=int, default=512, help="per image (512)")
    parser.add_argument("--dump", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.dump:
        return dump(args.dump, args.features)
    print(machine())
    few, many = (peak_mb(n, args.features) for n in args.images)
    print(f"difference: {many - few:.1f} MB")


if __name__ == "__main__":
    main()
