"""A data set is a folder or an .ffcv file: who reads it, what is refused, and the same images, crops and flips."""
import sys
from types import SimpleNamespace

import folder_loader
import loaders
import numpy as np
import pytest
import torch
import write_imagenet
from PIL import Image

from mrl_files import InputError


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A folder of 20 pictures in which a pixel's red says where it is from left to right, green from top to bottom, and
    the .ffcv file of it."""
    pytest.importorskip("ffcv")
    root, rng = tmp_path_factory.mktemp("both"), np.random.default_rng(0)
    for i in range(20):
        height, width = rng.integers(100, 128, 2)
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[..., 0], pixels[..., 1], pixels[..., 2] = 2 * np.arange(width), 2 * np.arange(height)[:, None], 12 * i
        (root / "images" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / "images" / "ab"[i % 2] / f"{i}.png")
    write_imagenet.write(SimpleNamespace(
        dataset="imagenet", split="train", data_dir=f"{root}/images", subset=-1, write_path=f"{root}/data.ffcv",
        write_mode="raw", max_resolution=128, num_workers=1, chunk_size=99, jpeg_quality=90, compress_probability=None))
    return root / "images", root / "data.ffcv"


def assert_same(*sides):
    """The same labels; pixels that differ by what two ways of resizing make of a slope."""
    for (x, y), (other, labels) in zip(*sides, strict=True):
        assert x.dtype == other.dtype == torch.uint8 and y.dtype == labels.dtype == torch.int64
        assert x.stride() == other.stride() and torch.equal(y, labels)
        assert (x.float() - other.float()).abs().max() <= 4


def test_a_folder_gives_the_crops_and_flips_of_its_ffcv_file(both, monkeypatch):
    """The same images in the same order, at two resolutions; the second of two processes."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    sides = [loaders.train_loader(path, 4, 1, 1, 32, 7, "cpu", distributed=True) for path in both]
    for epoch, resolution in ((0, 32), (3, 24)):
        for loader in sides:
            loader.set_resolution(resolution)
            assert len(loader) == 2 and loader.resolution == resolution
        batches = [[(x.clone(), y.clone()) for x, y in loader.epoch(epoch)] for loader in sides]
        assert len(batches[0]) == 2 and batches[0][0][0].shape == (4, resolution, resolution, 3)
        assert_same(*batches)


def test_a_folder_is_validated_as_its_ffcv_file(both):
    sides = [loaders.val_loader(path, 4, 1, 32, "cpu", 1, 2) for path in both]
    assert_same(*[[(x.clone(), y.clone()) for x, y in side] for side in sides])
    assert [len(side) for side in sides] == [3, 3]


def test_two_parts_of_one_data_set(both, image_tree):
    """Of either kind: their classes are compared."""
    folder, file = both
    assert loaders.check_data(folder, file, 2) == loaders.check_data(file, folder, 3) == 20
    with pytest.raises(InputError, match=r"val has no class folder a, .*data.ffcv has one \(5 such"):
        loaders.check_data(file, image_tree / "val", 3)


def test_a_head_of_more_classes_than_folders_is_noted(image_tree, capsys):
    """ImageNet's 1,000 are the default: training works, and the evaluation would refuse the checkpoint."""
    data = image_tree / "train", image_tree / "val"
    loaders.check_data(*data, 3)
    assert not capsys.readouterr().err
    loaders.check_data(*data, 1000)
    assert "has 3 classes, the head 1000: --model.num_classes=3 makes one" in capsys.readouterr().err


def test_what_is_no_data_set(tmp_path, image_tree, monkeypatch):
    with pytest.raises(InputError, match=r"nothing: no such file; give a folder of class folders, or an .ffcv file"):
        loaders.find_reader(tmp_path / "nothing")
    with pytest.raises(InputError, match="holds no class folders"):
        loaders.check_data(tmp_path, tmp_path, 3)
    with pytest.raises(InputError, match=r"train: has 3 class folders, model.num_classes=2"):
        loaders.check_data(image_tree / "train", image_tree / "val", 2)


def test_without_ffcv_a_folder_is_read_and_a_file_is_not(tmp_path, image_tree, monkeypatch):
    (tmp_path / "data.ffcv").touch()
    for name in ("ffcv", "ffcv_loader", "ffcv_writer", "ffcv_repairs"):
        monkeypatch.setitem(sys.modules, name, None)
    said = r"data.ffcv: .ffcv files need FFCV \(.*\): ./setup.sh installs it, or says what it lacks"
    with pytest.raises(InputError, match=said):
        loaders.find_reader(tmp_path / "data.ffcv")
    with pytest.raises(InputError, match=said):
        write_imagenet.write(SimpleNamespace(write_path=f"{tmp_path}/data.ffcv"))
    assert loaders.find_reader(image_tree / "train") is folder_loader
    assert loaders.check_data(image_tree / "train", image_tree / "val", 3) == 60


def test_normalise():
    pixels = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
    mean, std = torch.tensor([1., 2., 3.]), torch.tensor([2., 4., 8.])
    out = loaders.normalise(pixels, mean, std)
    assert out.is_contiguous(memory_format=torch.channels_last) and out.dtype == torch.float32
    torch.testing.assert_close(out[1, 2, 3, 0], (pixels[1, 3, 0, 2].float() - 3) / 8)
