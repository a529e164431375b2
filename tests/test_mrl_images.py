"""mrl_images: pixels of every kind of file, and which folders and files count."""
import os
import re
import signal
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from torchvision.datasets import folder

from mrl_files import InputError
from mrl_images import (
    IMG_EXTENSIONS,
    check_same_classes,
    class_folders,
    image_path,
    label_order,
    leave_endings_to_the_first,
    list_images,
    printable,
    read_rgb,
)

GREY = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)


@pytest.mark.parametrize("stored, name", [(GREY, "a.png"), (GREY.astype(np.uint16) * 257, "a.png"),
                                          (GREY.astype(np.uint16) * 257, "a.tif")])
def test_grey_of_8_and_16_bits_is_the_same(tmp_path, stored, name):
    Image.fromarray(stored).save(tmp_path / name)
    np.testing.assert_array_equal(read_rgb(tmp_path / name), GREY[..., None].repeat(3, 2))


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pixels_of_32_bits_are_refused(tmp_path, kind):
    Image.fromarray(GREY.astype(kind)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="pixels of 32 bits: save it with 8 or 16"):
        read_rgb(tmp_path / "a.tif")


@pytest.mark.parametrize("mode", ["1", "LA", "P", "CMYK", "RGBA"])
def test_other_modes_are_converted_as_pillow_does(tmp_path, mode):
    image = Image.fromarray(GREY[..., None].repeat(3, 2)).convert(mode)
    image.save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.tif"), np.asarray(image.convert("RGB")))


def test_what_pillow_warns_of_is_read_without_a_word(tmp_path, monkeypatch):
    """A palette with transparency; more pixels than Pillow's limit. Above twice the limit it raises an error."""
    Image.fromarray(GREY).convert("P").save(tmp_path / "a.png", transparency=bytes(range(256)))
    for limit in (63, 32):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        np.testing.assert_array_equal(read_rgb(tmp_path / "a.png"), GREY[..., None].repeat(3, 2))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 31)
    with pytest.raises(Image.DecompressionBombError):
        read_rgb(tmp_path / "a.png")


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def test_hidden_files_and_folders_are_passed_over(tmp_path):
    make(tmp_path, "a/0.png", "a/._0.png", "a/.cache/1.png", "a/deep/2.JPEG", ".ipynb_checkpoints/0.png", "readme.txt")
    assert class_folders(tmp_path) == ["a"]
    files, labels = list_images(tmp_path, ["a"])
    assert files.tolist() == [b"0.png", b"deep/2.JPEG"] and labels.tolist() == [0, 0]


def test_each_real_folder_is_read_once(tmp_path):
    """A link that leads back up holds all classes; one that leads to a folder of its own is followed."""
    make(tmp_path, "set/a/0.png", "set/a/deep/1.png", "set/b/0.png", "elsewhere/2.png")
    for link, target in {"set/a/up": "set", "set/a/deep/self": "set/a/deep", "set/a/more": "elsewhere",
                         "set/a/again": "elsewhere", "set/c": "elsewhere", "set/self": "set", "set/up": "."}.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    assert class_folders(tmp_path / "set") == ["a", "b", "c"]
    files, labels = list_images(tmp_path / "set", ["a", "b", "c"])
    assert files.tolist() == [b"0.png", b"again/2.png", b"deep/1.png", b"0.png", b"2.png"]
    assert labels.tolist() == [0, 0, 0, 1, 2]


def test_numbers_are_labels_and_other_names_sorted():
    assert label_order([str(i) for i in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9, 11)], "x") == [str(i) for i in range(12)]
    assert label_order(["002", "000", "001"], "x") == ["000", "001", "002"]
    assert label_order(["b", "10", "a"], "x") == ["10", "a", "b"]
    for names in (["1", "2", "3"], ["0", "1", "01"]):
        with pytest.raises(InputError, match=r"x: class folders that are numbers are labels, 0 ... 2; . is missing"):
            label_order(names, "x")


def test_what_differs_is_named():
    check_same_classes("train", ["a", "b"], "val", ["b", "a"])
    with pytest.raises(InputError, match=r"val has no class folder b, train has one \(2 such"):
        check_same_classes("train", ["a", "b"], "val", ["a", "c"])


def test_a_class_without_images_is_named(tmp_path):
    make(tmp_path, "a/0.png", "b/readme.txt")
    with pytest.raises(InputError, match=r"1 class folder\(s\) hold no images: b"):
        list_images(tmp_path, ["a", "b"])


def test_the_endings_are_those_of_image_folder():
    assert IMG_EXTENSIONS == folder.IMG_EXTENSIONS


def test_names_that_are_not_utf8(tmp_path):
    make(tmp_path, os.fsdecode(b"a/\xff.png"))
    ((file,), _) = list_images(tmp_path, ["a"])
    path = image_path(tmp_path, "a", file)
    assert path.exists() and printable(path).endswith(r"a/\xff.png")


@pytest.mark.parametrize("folder", ["train", "inference", "model_analysis"])
def test_there_is_no_other_reader(folder):
    """Three readers gave the same 16-bit file three kinds of pixels, and hidden folders two kinds of labels."""
    for script in (ROOT / folder).glob("*.py"):
        text = script.read_text(encoding="utf-8")
        assert not re.search(r"Image\.open|ImageFolder\(|IMG_EXTENSIONS|find_classes", text), script


def test_a_worker_does_not_report_a_connection_that_the_first_process_left(monkeypatch):
    """Stopped while a batch was handed over, one Ctrl-C in some hundreds left the traceback of a broken pipe."""
    reported = []
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "excepthook", lambda kind, *_: reported.append(kind))
    leave_endings_to_the_first(0)
    for kind in (BrokenPipeError, ConnectionResetError, EOFError, ValueError):
        sys.excepthook(kind, kind(), None)
    assert reported == [ValueError]
