"""FFCV loaders: the same pixels from the same seed, the distribution of crops, files that are refused."""
import hashlib

import loaders
import numpy as np
import pytest
import torch
from ffcv.reader import Reader

from MRL import InputError


@pytest.fixture(scope="module")
def train_file(ffcv_folder):
    return ffcv_folder / "train_500_0.50_90.ffcv"


def batches(path, epoch, workers=1, seed=7, first_batch=0, **options):
    loader = loaders.train_loader(path, 8, workers, 1, 32, seed, "cpu", **options)
    return [(x.clone(), y.clone()) for x, y in loader.epoch(epoch, first_batch)]


def digest(epoch_batches):
    return hashlib.sha256(b"".join(t.numpy().tobytes() for batch in epoch_batches for t in batch)).hexdigest()


def test_same_seed_same_pixels(train_file):
    first = batches(train_file, 0)
    assert len(first) == 7 and first[0][0].shape == (8, 32, 32, 3) and first[0][0].dtype == torch.uint8      # 60 // 8
    assert digest(batches(train_file, 0, workers=2)) == digest(first)      # two workers, and a second start
    assert digest(batches(train_file, 1)) != digest(first)
    assert digest(batches(train_file, 0, seed=8)) != digest(first)


def test_an_epoch_does_not_depend_on_those_before(train_file):
    loader = loaders.train_loader(train_file, 8, 1, 1, 32, 7, "cpu")
    runs = [digest([(x.clone(), y.clone()) for x, y in loader.epoch(epoch)]) for epoch in (0, 1, 0)]
    assert runs[0] == runs[2] != runs[1]


def test_an_epoch_can_go_on_from_any_batch(train_file):
    assert digest(batches(train_file, 3, first_batch=4)) == digest(batches(train_file, 3)[4:])


def test_pixels_belong_to_the_image_not_to_its_place(train_file):
    forward, backward = (batches(train_file, 0, indices=order) for order in (np.arange(8), np.arange(8)[::-1].copy()))
    assert torch.equal(forward[0][0], backward[0][0].flip(0)) and torch.equal(forward[0][1], backward[0][1].flip(0))


def test_the_resolution_changes(train_file):
    loader = loaders.train_loader(train_file, 8, 1, 1, 32, 7, "cpu")
    loader.set_resolution(64)
    assert next(iter(loader.epoch(0)))[0].shape == (8, 64, 64, 3)


def test_crops_have_the_usual_distribution():
    """Area uniform in 0.08..1 and log aspect uniform in 3/4..4/3 where they fit: compare with torchvision's own."""
    from torchvision.transforms import RandomResizedCrop
    height, width, n = 300, 400, 4000
    ours = np.array([loaders.random_crop(key, height, width) for key in loaders.image_keys(0, 0, n)])
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(n)])
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all() and (ours >= 0).all()
    for column in range(4):
        quantiles = [np.quantile(x[:, column], np.linspace(0.1, 0.9, 9)) for x in (ours, theirs)]
        np.testing.assert_allclose(*quantiles, atol=15)
    flips = np.mean([loaders.uniform(key, 40, 0.0, 1.0) < 0.5 for key in loaders.image_keys(0, 0, n)])
    assert abs(flips - 0.5) < 0.03


def test_mirror():
    image = np.arange(2 * 5 * 3, dtype=np.uint8).reshape(2, 5, 3)
    expected = image[:, ::-1].copy()
    loaders.mirror(image)
    np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_reads_each_image_once(ffcv_folder, world_size):
    path = ffcv_folder / "val_500_uncompressed.ffcv"
    labels = [torch.cat([y.flatten().clone() for _, y in loaders.val_loader(path, 8, 1, 32, "cpu", rank, world_size)])
              for rank in range(world_size)]
    assert [len(part) for part in labels] == [len(range(rank, 34, world_size)) for rank in range(world_size)]
    assert torch.cat(labels).bincount().tolist() == [11, 11, 12]


def test_normalise():
    pixels = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
    mean, std = torch.tensor([1., 2., 3.]), torch.tensor([2., 4., 8.])
    out = loaders.normalise(pixels, mean, std)
    assert out.is_contiguous(memory_format=torch.channels_last) and out.dtype == torch.float32
    torch.testing.assert_close(out[1, 2, 3, 0], (pixels[1, 3, 0, 2].float() - 3) / 8)


def test_no_compiled_operation_comes_after_to_tensor():
    """FFCV's planner loops for ever on such a pipeline."""
    for device in ("cpu", "cuda"):
        names = [type(op).__name__ for op in loaders.pipelines(loaders.SeededCrop((32, 32)), device)["image"]]
        assert names == ["SeededCrop", "ToTensor", "ToDevice"][:2 + (device == "cuda")]


def test_files_that_are_refused(train_file, tmp_path):
    assert loaders.check_file(train_file, 3) == Reader(str(train_file)).num_samples == 60
    whole = train_file.read_bytes()
    for name, content, said in [("cut.ffcv", whole[:-100], "truncated"), ("half.ffcv", whole[:10 ** 7], "truncated"),
                                ("head.ffcv", whole[:20], "not an .ffcv"), ("empty.ffcv", b"", "not an .ffcv"),
                                ("text.ffcv", b"hello" * 100, "not an .ffcv")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=said):
            loaders.check_file(tmp_path / name, 3)
    with pytest.raises(InputError, match="no such file"):
        loaders.check_file(tmp_path / "missing.ffcv", 3)
    with pytest.raises(InputError, match=r"labels run from 0 to 2, model.num_classes=2"):
        loaders.check_file(train_file, 2)
