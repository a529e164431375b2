"""The demo's data: the atlas that is shipped, what it is cut into, how it is drawn from fonts; the study's tables."""
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from cut_kanji import FOLDERS, read_atlas, read_typefaces, write_pictures
from make_kanji import CELL, draw, draw_atlas, find_fonts, list_characters, save_atlas
from PIL import Image, ImageFont
from study_tables import fill, list_tables, markdown

from mrl_files import InputError, write_json
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


# ------------------------------------------------------------------------------------------------ the study

@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """-> (a folder with a little of what study.sh leaves, its tables)."""
    folder = tmp_path_factory.mktemp("study")
    for run, sizes, top1 in (("mrl", [8, 16], [0.5, 0.75]), ("ff8", [8], [0.25]), ("ff16", [16], [0.5]),
                             ("mrl_seed1", [8, 16], [0.25, 0.25]), ("boost8", [8, 16], [0.875, 0.5])):
        (folder / "figures" / run).mkdir(parents=True)
        write_json(folder / f"figures/{run}/mrl=_accuracy_0.json", {"nesting_list": sizes, "top1": top1})
    report = folder / "retrieval/report/1K_mrl_report.csv"
    report.parent.mkdir(parents=True)
    report.write_text("method,retrieval_dim,rerank_dims,mflops,top1,mAP@10\nsingle-shot,8,,4,0.25,0.125\n"
                      "single-shot,16,,8,0.5,0.25\nadaptive,8,16,5,,0.375\n\"funnel\",8,\"12,16\",4.5,,0.5\n")
    (folder / "outputs").mkdir()
    for size in (9, 11):
        (folder / f"outputs/cascade{size}.txt").write_text(
            f"mrl on 2 images\nlargest size   top-1 (%)   expected size   asked\n  16   50.0   {size}.0   1\n")
    torch.save(torch.tensor([[0, 0, 2, 3], [0, 1, 0, 0]]), folder / "outputs/mrl=True_predictions.pth")
    torch.save(torch.tensor([0, 1, 2, 4]), folder / "outputs/gt_dataset=V1.pth")
    return folder, list_tables(folder)


def test_the_study_sets_the_papers_figures_beside_ours(studied):
    _, tables = studied
    top1 = tables["Top-1 (Table 1)"]
    assert top1.loc[8, ["MRL, paper", "MRL, here", "FF, here"]].tolist() == [66.63, 50, 25]
    assert top1.loc[16, "FF, here"] == 50 and np.isnan(top1.loc[2048, "MRL, here"])
    assert tables["1-NN (Table 2)"].loc[16, ["MRL, paper", "MRL, here"]].tolist() == [67.91, 50]
    assert tables["Adaptive retrieval, here"].loc[8, 16] == 37.5
    assert tables["Funnels, here"].to_numpy().tolist() == [["", 100, 25], ["12, 16", 56.25, 50]]
    assert tables["Seeds"].loc[8, "MRL, mean of 2"] == 37.5
    assert tables["Cascades (Table 3)"].loc[16].tolist() == [13.57, 10, 73.79, 50]
    assert tables["Loss weights (Table 27)"].loc[8, ["MRL-8boost, paper", "MRL-8boost, here"]].tolist() == [69.53, 87.5]
    assert tables["Oracle"]["here"].tolist() == [50, 75]


def test_a_pages_tables_are_replaced(studied):
    _, tables = studied
    page = "## Oracle\n\nnot run\n\nIts text.\n\n## Seeds\n\n| old |\n| table |\n\nMore.\n"
    filled = fill(page, tables)
    assert filled == (f"## Oracle\n\n{markdown(tables['Oracle'])}\n\nIts text.\n\n"
                      f"## Seeds\n\n{markdown(tables['Seeds'])}\n\nMore.\n")
    assert fill(filled, tables) == filled


def test_the_study_says_what_was_not_run(studied, tmp_path):
    _, tables = studied
    first, *_ = markdown(tables["Top-1 (Table 1)"][["MRL, here", "MRL-E, here"]]).splitlines()[2:]
    assert first == "| 8 | 50.00 | not run |"
    assert all("not run" in markdown(table) for title, table in list_tables(tmp_path).items()
               if not title.endswith(("paper (Table 11)", "paper (Table 13)")))
