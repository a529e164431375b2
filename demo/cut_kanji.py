"""The demo's atlas of characters -> ImageNet-style folder trees, which write_imagenet.sh reads.

    python cut_kanji.py FOLDER [--atlas kanji.png]

makes FOLDER/images/train and images/val (typefaces that training does not see) and, of brush, pixel and display
typefaces, images_odd/val. A folder for each character, named by its code point (u4e00); a picture for each typeface.
"""
import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from mrl_files import InputError, command_line, file_path

HERE = Path(__file__).resolve().parent
FOLDERS = {"train": "images/train", "val": "images/val", "odd": "images_odd/val"}      # of each role in typefaces.tsv


def read_typefaces():
    """-> a data frame: role (a key of FOLDERS), file, package, licence, name."""
    return pd.read_csv(HERE / "typefaces.tsv", sep="\t")


def read_atlas(path):
    """-> (the characters, a string of N; cells [N, typefaces, 32, 32] uint8) of a picture that make_kanji.py drew.

    InputError for another picture, or one with other typefaces than typefaces.tsv."""
    files = list(read_typefaces().file)
    with Image.open(path) as image:
        if image.info.get("typefaces", "").split("\n") != files:
            raise InputError(f"{path}: not drawn from this typefaces.tsv; draw it again with make_kanji.py")
        characters = image.info["characters"]
        pixels = np.asarray(image.convert("L"))
    return characters, pixels.reshape(len(characters), -1, len(files), pixels.shape[1] // len(files)).swapaxes(1, 2)


def write_pictures(root, characters, cells):
    typefaces = read_typefaces()
    for character, row in zip(characters, cells, strict=True):
        for role, file, cell in zip(typefaces.role, typefaces.file, row, strict=True):
            folder = root / FOLDERS[role] / f"u{ord(character):04x}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(cell).save(folder / f"{Path(file).stem}.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=file_path, help="where to make images/ and images_odd/")
    parser.add_argument("--atlas", type=file_path, default=HERE / "kanji.png", help="of make_kanji.py (%(default)s)")
    args = parser.parse_args()
    characters, cells = read_atlas(args.atlas)
    write_pictures(Path(args.folder), characters, cells)
    n = read_typefaces().role.value_counts()
    print(f"{len(characters)} characters in {n.train} typefaces to train on, {n.val} others to validate, {n.odd} odd")


if __name__ == "__main__":
    command_line(main)
