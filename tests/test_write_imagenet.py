"""write_imagenet: what its files hold, and what it refuses."""
import os
import shutil
import subprocess
from types import SimpleNamespace

import ffcv_loader
import numpy as np
import pytest
import torch
import write_imagenet
from conftest import ROOT, with_python
from ffcv.fields.rgb_image import IMAGE_MODES
from ffcv.reader import Reader
from loaders import check_data
from PIL import Image

from mrl_files import InputError

ARGUMENTS = "write_imagenet.py --cfg.split=train --cfg.max_resolution=64 --cfg.num_workers=2"


def test_the_two_files_of_the_readme(ffcv_folder):
    assert sorted(p.name for p in ffcv_folder.glob("*.ffcv")) == ["train_500_0.50_90.ffcv", "val_500_uncompressed.ffcv"]
    train, val = (Reader(str(path)).metadata for path in sorted(ffcv_folder.glob("*.ffcv")))
    np.testing.assert_array_equal(train["f1"], np.repeat([0, 1, 2], 20))
    np.testing.assert_array_equal(val["f1"], np.repeat([0, 1, 2], [11, 11, 12]))
    jpegs = (train["f0"]["mode"] == IMAGE_MODES["jpg"]).mean()
    assert 0.3 < jpegs < 0.7 and (val["f0"]["mode"] == IMAGE_MODES["raw"]).all()


@pytest.fixture
def write(image_tree, tmp_path):
    """write(**changes) -> FFCV's metadata of what `write_imagenet.write` makes of a copy of val/, a few images each."""
    def start(**changes):
        settings = {"dataset": "imagenet", "split": "val", "data_dir": f"{image_tree}/val", "subset": -1,
                    "write_path": f"{tmp_path}/a.ffcv", "write_mode": "raw", "max_resolution": 64, "num_workers": 1,
                    "chunk_size": 100, "jpeg_quality": 90, "compress_probability": None, **changes}
        write_imagenet.write(SimpleNamespace(**settings))
        return Reader(settings["write_path"]).metadata
    return start


def paint(path, colour=0, size=(40, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 0, 0)).save(path)


def test_a_class_that_one_split_lacks_is_named(write, tmp_path):
    """Sorted places would give all classes after it another label, in silence."""
    for name in "abc":
        paint(tmp_path / "train" / name / "0.png")
    (tmp_path / "val").mkdir()
    write(split="train", data_dir=f"{tmp_path}/train", write_path=f"{tmp_path}/early.ffcv")      # val/ is still to come
    for name in "ac":
        paint(tmp_path / "val" / name / "0.png")
    for split in ("train", "val"):
        with pytest.raises(InputError, match=r"val has no class folder b, .*train has one"):
            write(split=split, data_dir=f"{tmp_path}/{split}/")
    assert not (tmp_path / "a.ffcv").exists()


def test_training_compares_the_classes_of_its_files(write, tmp_path):
    """Written from folders that do not lie side by side."""
    for folder, names in {"here": "abc", "there": "acd"}.items():
        for name in names:
            paint(tmp_path / folder / name / "0.png")
        write(data_dir=f"{tmp_path}/{folder}", write_path=f"{tmp_path}/{folder}.ffcv")
    with pytest.raises(InputError, match=r"there.ffcv has no class folder b"):
        check_data(tmp_path / "here.ffcv", tmp_path / "there.ffcv", 3)
    assert check_data(tmp_path / "here.ffcv", tmp_path / "here.ffcv", 3) == 3
    (tmp_path / "there.ffcv.json").unlink()      # a file of the original
    assert check_data(tmp_path / "here.ffcv", tmp_path / "there.ffcv", 3) == 3


def test_class_folders_that_are_numbers_are_the_labels(write, tmp_path):
    for label in range(12):
        paint(tmp_path / "images" / str(label) / "0.png", label)
    paint(tmp_path / "images/.ipynb_checkpoints/0.png")
    metadata = write(data_dir=f"{tmp_path}/images")
    np.testing.assert_array_equal(metadata["f1"], range(12))
    stored = np.memmap(tmp_path / "a.ffcv", np.uint8, "r")
    assert [stored[int(at)] for at in metadata["f0"]["data_ptr"]] == list(range(12))


def test_images_of_any_shape_are_written_and_read(write, tmp_path):
    """FFCV's centre crop of one pixel is empty, and OpenCV ended the run after its first epoch."""
    sizes = [(1, 1), (1, 40), (40, 1), (1, 64), (2, 2), (200, 200), (2, 128)]
    for i, size in enumerate(sizes):
        paint(tmp_path / "images/a" / f"{i}.png", 10 * i, size)
    stored = write(data_dir=f"{tmp_path}/images")["f0"]
    assert list(zip(stored["width"], stored["height"], strict=True)) == [*sizes[:5], (64, 64), (1, 64)]
    val = ffcv_loader.val_loader(tmp_path / "a.ffcv", 7, 1, 8, "cpu")
    train = ffcv_loader.train_loader(tmp_path / "a.ffcv", 7, 1, 1, 8, 0, "cpu")
    train.next_traversal_order = lambda: np.arange(7)
    for (images, _), in (val, train.epoch(0)):
        assert (images[..., 0] == 10 * torch.arange(7)[:, None, None]).all()


def test_16_bits_are_written_as_they_look(write, tmp_path):
    (tmp_path / "images/a").mkdir(parents=True)
    grey = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    Image.fromarray(grey).save(tmp_path / "images/a/0.png")
    at = int(write(data_dir=f"{tmp_path}/images")["f0"]["data_ptr"][0])
    stored = np.memmap(tmp_path / "a.ffcv", np.uint8, "r")[at:at + 3 * 32 * 32].reshape(32, 32, 3)
    np.testing.assert_array_equal(stored, (grey // 257).astype(np.uint8)[..., None].repeat(3, 2))


def test_paths_are_relative_to_where_the_user_stands(tmp_path):
    """A `python` in the real one's place writes down the script's path, its flags and the folder that it runs in."""
    program = tmp_path / "bin/python"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$PWD" "$@" >> out/words\n')
    program.chmod(0o755)
    env = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "IMAGENET_DIR": "images", "WRITE_DIR": "out"}
    subprocess.run([ROOT / "train/write_imagenet.sh", "16", "0.50", "90"], cwd=tmp_path, env=env, check=True)
    words = (tmp_path / "out/words").read_text().splitlines()
    assert {str(tmp_path), str(ROOT / "train/write_imagenet.py"), "--cfg.data_dir=images/val",
            "--cfg.write_path=out/val_16_uncompressed.ffcv"} <= set(words)


def test_which_images_become_jpegs_does_not_change(image_tree, run_here, tmp_path):
    modes = []
    for name in ("a.ffcv", "b.ffcv"):
        run_here("train", f"{ARGUMENTS} --cfg.data_dir={image_tree}/train --cfg.write_path={tmp_path}/{name} "
                          "--cfg.write_mode=proportion --cfg.compress_probability=0.3 --cfg.subset=30")
        modes.append(Reader(f"{tmp_path}/{name}").metadata["f0"]["mode"])
    assert len(modes[0]) == 30
    np.testing.assert_array_equal(*modes)


def test_an_unreadable_image_is_named_and_nothing_written(image_tree, run_here, tmp_path):
    shutil.copytree(image_tree / "val", tmp_path / "images")
    (tmp_path / "images/class1/0.jpg").write_bytes(b"no image")
    done = run_here("train", f"{ARGUMENTS} --cfg.data_dir={tmp_path}/images --cfg.write_path={tmp_path}/a.ffcv",
                    check=False)
    assert done.returncode == 1 and "class1/0.jpg" in done.stderr and "Traceback" not in done.stderr
    assert "error: --cfg.data_dir" in done.stderr and "1 of 34 images cannot be read" in done.stderr
    assert not list(tmp_path.glob("*.ffcv")) + list(tmp_path.glob(".*.ffcv"))


def test_bad_settings(image_tree, refused, tmp_path):
    line = refused("train", f"{ARGUMENTS} --cfg.data_dir={image_tree}/val --cfg.write_path={tmp_path}/a.ffcv "
                            "--cfg.write_mode=bmp --cfg.jpeg_quality=101")
    assert "--cfg.write_mode=bmp: expected" in line and "--cfg.jpeg_quality=101: expected" in line


@pytest.mark.parametrize("change, said", [({"data_dir": "/nowhere"}, "--cfg.data_dir=/nowhere"),
                                          ({"write_path": "/nowhere/a.ffcv"}, "/nowhere")])
def test_bad_paths(image_tree, tmp_path, change, said):
    settings = {"dataset": "imagenet", "split": "val", "data_dir": f"{image_tree}/val", "subset": 2,
                "write_path": f"{tmp_path}/a.ffcv", "write_mode": "raw", "max_resolution": 64, "num_workers": 1,
                "chunk_size": 100, "jpeg_quality": 90, "compress_probability": None, **change}
    with pytest.raises((InputError, OSError), match=said):
        write_imagenet.write(SimpleNamespace(**settings))


@pytest.mark.parametrize("arguments, unset", [(["500"], None), (["500", "0.5", "90"], "IMAGENET_DIR"),
                                              (["500", "0.5", "90"], "WRITE_DIR")])
def test_the_script_says_how_to_use_it(arguments, unset, tmp_path):
    env = with_python(IMAGENET_DIR=str(tmp_path), WRITE_DIR=str(tmp_path))
    env.pop(unset, None)
    done = subprocess.run(["./write_imagenet.sh", *arguments], cwd=ROOT / "train", env=env,
                          capture_output=True, text=True)
    assert done.returncode != 0 and "usage" in done.stderr and (unset is None or unset in done.stderr)
