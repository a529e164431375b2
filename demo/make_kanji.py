"""Fonts -> the demo's atlas: one picture of many characters, each drawn in every typeface of typefaces.tsv.

    python make_kanji.py                                                  draws kanji.png, which cut_kanji.py cuts up
    python make_kanji.py --characters 1000 --output kanji1000.png         a larger one

The fonts are Debian's packages; what is missing is named with its package (installed, or unpacked to --fonts with
dpkg -x). The characters are spaced evenly over the 2,965 of JIS X 0208's first level: a row of cells each. A column for
each typeface, 4 bits of grey.
"""
import argparse
from pathlib import Path

import numpy as np
from cut_kanji import HERE, read_typefaces
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from mrl_files import InputError, command_line, file_path, replacing

CELL, DRAWN, POINTS = 32, 96, 80      # pixels of a cell; of the square it is drawn on, at so many pixels an em
GREYS = 16


def list_characters(n):
    """-> n characters of JIS X 0208's first level (rows 16 to 47), evenly spaced."""
    level = [bytes([0xA0 + row, 0xA0 + cell]).decode("euc_jp") for row in range(16, 48)
             for cell in range(1, 95) if row < 47 or cell <= 51]
    if not 1 <= n <= len(level):
        raise InputError(f"--characters {n}: give 1 to {len(level)}")
    return [level[i] for i in np.linspace(0, len(level) - 1, n).round().astype(int)]


def find_fonts(folder, typefaces):
    """-> the font of each typeface. InputError names all that are missing, and their packages."""
    there = {path.name: path for path in Path(folder).rglob("*.[to]t[fc]")}
    missing = typefaces[~typefaces.file.isin(there)]
    if len(missing):
        raise InputError(f"--fonts {folder}: {', '.join(missing.file)} not there; "
                         f"apt-get install {' '.join(sorted(set(missing.package)))}")
    return [ImageFont.truetype(str(there[file]), POINTS) for file in typefaces.file]


def draw(character, font):
    """-> [CELL, CELL] uint8: black on white, centred by the glyph's box. InputError for a glyph without ink."""
    image = Image.new("L", (DRAWN, DRAWN), 255)
    pen = ImageDraw.Draw(image)
    left, top, right, bottom = pen.textbbox((0, 0), character, font=font)
    pen.text(((DRAWN - left - right) / 2, (DRAWN - top - bottom) / 2), character, font=font, fill=0)
    cell = np.asarray(image.resize((CELL, CELL), Image.Resampling.LANCZOS))
    if cell.min() == 255:
        raise InputError(f"{font.path}: draws nothing for {character} (U+{ord(character):04X})")
    return cell


def draw_atlas(characters, fonts):
    """-> [characters * CELL, fonts * CELL] uint8 in GREYS steps."""
    rows = [np.concatenate([draw(character, font) for font in fonts], axis=1)
            for character in tqdm(characters, desc="characters")]
    return (np.concatenate(rows) / 255 * (GREYS - 1)).round().astype(np.uint8)


def save_atlas(atlas, characters, files, path):
    """A PNG of 4 bits a pixel; its text says which characters its rows are, and its columns which fonts' files."""
    image = Image.fromarray(atlas).convert("P")
    image.putpalette([grey for step in range(GREYS) for grey in [255 * step // (GREYS - 1)] * 3])
    text = PngInfo()
    text.add_itxt("characters", "".join(characters))
    text.add_itxt("typefaces", "\n".join(files))
    with replacing(path) as temporary:
        image.save(temporary, bits=4, optimize=True, pnginfo=text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fonts", type=file_path, default="/usr/share/fonts", help="where they lie (%(default)s)")
    parser.add_argument("--characters", type=int, default=300, help="how many (%(default)s)")
    parser.add_argument("--output", type=file_path, default=HERE / "kanji.png", help="the atlas (%(default)s)")
    args = parser.parse_args()
    characters, typefaces = list_characters(args.characters), read_typefaces()
    atlas = draw_atlas(characters, find_fonts(args.fonts, typefaces))
    save_atlas(atlas, characters, typefaces.file, args.output)
    print(f"{args.output}: {len(characters)} characters, {Path(args.output).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    command_line(main)
