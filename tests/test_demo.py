"""The demo's data: the atlas that is shipped, what it is cut into, and how it is drawn from fonts."""
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from cut_kanji import FOLDERS, read_atlas, read_typefaces, write_pictures
from make_kanji import CELL, draw, draw_atlas, find_fonts, list_characters, save_atlas
from PIL import Image, ImageFont

from mrl_files import InputError
from mrl_images import class_folders, list_images

ATLAS = ROOT / "demo/kanji.png"
FONTS = Path("/usr/share/fonts")
DEJAVU = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"      # matplotlib brings it


@pytest.fixture(scope="module")
def atlas():
    return read_atlas(ATLAS)


def test_the_atlas_is_of_these_characters_and_typefaces(atlas):
    characters, cells = atlas
    assert list(characters) == list_characters(300) and len(set(characters)) == 300
    assert cells.shape == (300, len(read_typefaces()), CELL, CELL)
    assert (cells.min((2, 3)) < 128).all() and (cells.max((2, 3)) > 200).all()      # each cell has ink and paper


def test_no_typeface_is_seen_twice(atlas):
    """Neither by name nor by its pixels: what is to be recognised was not trained on."""
    typefaces = read_typefaces()
    assert typefaces.file.is_unique and typefaces.name.is_unique and set(typefaces.role) == set(FOLDERS)
    drawn = atlas[1].swapaxes(0, 1).reshape(len(typefaces), -1) / 255
    train, others = (drawn[(typefaces.role == "train") == wanted] for wanted in (True, False))
    distance = np.sqrt(((others[:, None] - train) ** 2).mean(-1))
    assert distance.min() > 0.15      # 0.12 and less: the same design under another name


def test_the_notice_names_every_package_with_its_licence():
    lines = [line.split(maxsplit=1) for line in (ROOT / "demo/NOTICE").read_text(encoding="utf-8").splitlines()
             if line.startswith("fonts-")]
    said = {package: rest for package, rest in lines}
    typefaces = read_typefaces()
    assert said.keys() == set(typefaces.package)
    for row in typefaces.itertuples():
        assert said[row.package].startswith(row.licence), row.package


def test_it_is_cut_into_class_folders(tmp_path, atlas):
    characters, cells = atlas
    write_pictures(tmp_path, characters[:3], cells[:3])
    typefaces = read_typefaces()
    for role, folder in FOLDERS.items():
        classes = class_folders(tmp_path / folder)
        assert classes == sorted(f"u{ord(character):04x}" for character in characters[:3])
        _, labels = list_images(tmp_path / folder, classes)
        assert np.array_equal(np.bincount(labels), [(typefaces.role == role).sum()] * 3)
    column = list(typefaces.file).index("Konatu.ttf")
    with Image.open(tmp_path / "images/val" / f"u{ord(characters[1]):04x}" / "Konatu.png") as image:
        assert np.array_equal(image, cells[1, column])


def test_what_is_drawn_is_what_is_read(tmp_path, monkeypatch):
    """With a font that is always there, and Latin letters: make_kanji.py's file through cut_kanji.py's reader."""
    typefaces = pd.DataFrame({"role": ["train", "val"], "file": ["DejaVuSans.ttf"] * 2, "package": "fonts-dejavu"})
    fonts = find_fonts(DEJAVU.parent, typefaces)
    drawn = draw_atlas("MRL", fonts)
    save_atlas(drawn, "MRL", typefaces.file, tmp_path / "letters.png")
    monkeypatch.setattr("cut_kanji.read_typefaces", lambda: typefaces)
    characters, cells = read_atlas(tmp_path / "letters.png")
    assert characters == "MRL" and cells.shape == (3, 2, CELL, CELL)
    assert np.array_equal(cells[2, 1], drawn[2 * CELL:, CELL:] * 17)
    letter = draw("L", fonts[0])
    assert abs(letter.astype(int) - cells[2, 0]).max() <= 9      # half a step of grey, and rounding
    ink = np.argwhere(letter < 128)
    assert abs(ink.min(0) + ink.max(0) - (CELL - 1)).max() <= 2      # centred


def test_the_atlas_is_what_the_fonts_draw(atlas):
    """Where fonts of the table are installed: a few cells as they are shipped."""
    typefaces = read_typefaces()
    there = {path.name: path for path in FONTS.rglob("*.[to]t[fc]")}
    installed = typefaces[typefaces.file.isin(there)].head(3)
    if installed.empty:
        pytest.skip("no font of the demo is installed")
    characters, cells = atlas
    for column, file in installed.file.items():
        font = ImageFont.truetype(str(there[file]), 80)
        assert abs(draw(characters[0], font).astype(int) - cells[0, column]).max() <= 9


def test_a_glyph_without_ink():
    with pytest.raises(InputError, match=r"DejaVuSans\.ttf: draws nothing for .*U\+0020"):
        draw(" ", ImageFont.truetype(str(DEJAVU), 80))


def test_characters_are_of_jis_level_1():
    everything = list_characters(2965)
    assert (everything[0], everything[-1], len(set(everything))) == ("亜", "腕", 2965)
    with pytest.raises(InputError, match="--characters 2966"):
        list_characters(2966)
