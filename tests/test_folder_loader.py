"""The folder's loader: the same pixels from the same seed, each image once in validation, broken images named."""
import hashlib
import re

import folder_loader
import numpy as np
import pytest
import torch
from torchvision.transforms.functional import resized_crop

from mrl_files import InputError
from mrl_images import read_rgb


def batches(folder, epoch, workers=1, seed=7, first_batch=0, **options):
    loader = folder_loader.train_loader(folder, 8, workers, 1, 32, seed, "cpu", **options)
    return list(loader.epoch(epoch, first_batch))


def unshuffled_batch(folder, **options):
    loader = folder_loader.train_loader(folder, 8, 1, 1, 32, 7, "cpu", **options)
    loader.order.shuffled = lambda: np.arange(loader.order.n)
    return next(loader.epoch(0))


def digest(epoch_batches):
    return hashlib.sha256(b"".join(t.numpy().tobytes() for batch in epoch_batches for t in batch)).hexdigest()


def test_same_seed_same_pixels(image_tree):
    train = image_tree / "train"
    first = batches(train, 3)
    assert len(first) == 7 and first[0][0].shape == (8, 32, 32, 3) and first[0][0].dtype == torch.uint8      # 60 // 8
    assert digest(batches(train, 3, workers=2)) == digest(first)      # two workers, and a second start
    assert digest(batches(train, 3, first_batch=4)) == digest(first[4:])
    assert len({digest(first), digest(batches(train, 1)), digest(batches(train, 3, seed=8))}) == 3


def test_an_epoch_does_not_depend_on_those_before(image_tree):
    """Nor on one that was left in its middle; and training's random numbers are its own."""
    loader, state = folder_loader.train_loader(image_tree / "train", 8, 2, 1, 32, 7, "cpu"), torch.get_rng_state()
    whole = digest(loader.epoch(0))
    stopped = loader.epoch(1)
    next(stopped)
    stopped.close()
    assert digest(loader.epoch(0)) == whole and torch.equal(torch.get_rng_state(), state)


def test_a_crop_is_torchvisions(image_tree):
    """The same box through torchvision's own cutting; then the whole picture, not mirrored."""
    images = folder_loader.ClassFolders(image_tree / "train")
    keys = folder_loader.image_keys(7, 0, len(images))
    crops, labels = unshuffled_batch(image_tree / "train", flip=False)
    for i in range(8):
        image = images[i][0]
        box = folder_loader.random_crop(keys[i], image.height, image.width, 0.08)
        np.testing.assert_array_equal(crops[i], resized_crop(image, *box, [32, 32]))
    assert labels.tolist() == images.labels[:8, None].tolist()
    gentle, _ = unshuffled_batch(image_tree / "train", flip=False, scale=1)
    assert not torch.equal(gentle, crops)


@pytest.mark.parametrize("world_size", [1, 3])
def test_validation_reads_each_image_once(image_tree, world_size):
    labels = [torch.cat([y for _, y in folder_loader.val_loader(image_tree / "val", 8, 2, 32, "cpu", rank, world_size)])
              for rank in range(world_size)]
    assert [len(part) for part in labels] == [len(range(rank, 34, world_size)) for rank in range(world_size)]
    assert torch.cat(labels).flatten().bincount().tolist() == [11, 11, 12]


def test_a_broken_image_is_named(image_tree, tmp_path):
    (tmp_path / "a").mkdir()
    for name, content in {"0.png": (image_tree / "val/class0/1.png").read_bytes(), "1.jpg": b"no image"}.items():
        (tmp_path / "a" / name).write_bytes(content)
    assert read_rgb(tmp_path / "a/0.png")
    val = iter(folder_loader.val_loader(tmp_path, 1, 1, 8, "cpu"))
    assert next(val)[1].tolist() == [[0]]
    said = re.escape(f"{tmp_path}/a/1.jpg (cannot identify") + ".* cannot be read; repair"
    with pytest.raises(InputError, match=said):
        next(val)
