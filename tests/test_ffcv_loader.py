"""FFCV loaders: the same pixels from the same seed, and each image once in validation."""
import gc
import hashlib
import shutil
import weakref
from itertools import islice

import ffcv_loader
import numpy as np
import pytest
import torch
from ffcv.fields.rgb_image import IMAGE_MODES
from ffcv.reader import Reader
from ffcv_loader import SeededCrop, inspect
from loaders import companion
from torchvision.transforms.functional import resize

from mrl_files import InputError


@pytest.fixture(scope="module")
def train_file(ffcv_folder):
    return ffcv_folder / "train_500_0.50_90.ffcv"


def batches(path, epoch, workers=1, seed=7, first_batch=0, in_memory=1, **options):
    loader = ffcv_loader.train_loader(path, 8, workers, in_memory, 32, seed, "cpu", **options)
    return [(x.clone(), y.clone()) for x, y in loader.epoch(epoch, first_batch)]


def batch_of(path, order, **crop):
    """The images of these numbers, in that order."""
    loader = ffcv_loader.train_loader(path, 8, 1, 1, 32, 7, "cpu", **crop)
    loader.next_traversal_order = lambda: order
    (x, y), = loader.epoch(0)
    return x.clone(), y.clone()


def digest(epoch_batches):
    return hashlib.sha256(b"".join(t.numpy().tobytes() for batch in epoch_batches for t in batch)).hexdigest()


def test_same_seed_same_pixels(train_file):
    first = batches(train_file, 0)
    assert len(first) == 7 and first[0][0].shape == (8, 32, 32, 3) and first[0][0].dtype == torch.uint8      # 60 // 8
    assert digest(batches(train_file, 0, workers=2)) == digest(first)      # two workers, and a second start
    assert digest(batches(train_file, 0, in_memory=0)) == digest(first)
    assert digest(batches(train_file, 1)) != digest(first)
    assert digest(batches(train_file, 0, seed=8)) != digest(first)


def test_an_epoch_does_not_depend_on_those_before(train_file):
    loader = ffcv_loader.train_loader(train_file, 8, 1, 1, 32, 7, "cpu")
    runs = [digest([(x.clone(), y.clone()) for x, y in loader.epoch(epoch)]) for epoch in (0, 1, 0)]
    assert runs[0] == runs[2] != runs[1]


def test_an_epoch_can_go_on_from_any_batch(train_file):
    assert digest(batches(train_file, 3, first_batch=4)) == digest(batches(train_file, 3)[4:])


def test_pixels_belong_to_the_image_not_to_its_place(train_file):
    (x, y), (x_back, y_back) = (batch_of(train_file, order) for order in (np.arange(8), np.arange(8)[::-1].copy()))
    assert torch.equal(x, x_back.flip(0)) and torch.equal(y, y_back.flip(0))


def test_crops_can_be_gentle(train_file):
    """The whole of each image, not mirrored: what a resize of the file's own pixels gives."""
    gentle, usual = (batch_of(train_file, np.arange(8), **crop)[0].float()
                     for crop in ({"scale": 1, "flip": False}, {}))
    reader = Reader(str(train_file))
    raw = [i for i in range(8) if reader.metadata["f0"]["mode"][i] == IMAGE_MODES["raw"]]
    assert raw
    for i in raw:
        record = reader.metadata["f0"][i]
        height, width = int(record["height"]), int(record["width"])
        stored = np.memmap(train_file, np.uint8, "r", int(record["data_ptr"]), (height, width, 3))
        side = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
        top, left = (height - side[0]) // 2, (width - side[1]) // 2
        crop = torch.from_numpy(stored[top:top + side[0], left:left + side[1]].copy()).permute(2, 0, 1)[None]
        expected = resize(crop, [32, 32], antialias=True)[0].permute(1, 2, 0).float()
        assert (gentle[i] - expected).abs().mean() < 12 < (usual[i] - expected).abs().mean()


def test_a_failure_in_ffcvs_thread_ends_the_epoch(train_file, monkeypatch):
    """FFCV's own waits for ever for the next batch: a broken GPU would never end a run."""
    def broken(iterator, number, *args, work=ffcv_loader.ffcv_repairs.run_pipeline):
        if number == 2:
            raise RuntimeError("CUDA error: an illegal memory access")
        return work(iterator, number, *args)

    monkeypatch.setattr(ffcv_loader.ffcv_repairs, "run_pipeline", broken)
    batches = ffcv_loader.train_loader(train_file, 8, 1, 1, 32, 7, "cpu").epoch(0)
    assert len(next(batches)) == len(next(batches)) == 2
    with pytest.raises(RuntimeError, match="FFCV could not make the next batch: CUDA error: an illegal memory access"):
        next(batches)


def test_the_resolution_changes(train_file):
    loader = ffcv_loader.train_loader(train_file, 8, 1, 1, 32, 7, "cpu")
    loader.set_resolution(64)
    assert next(iter(loader.epoch(0)))[0].shape == (8, 64, 64, 3)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_reads_each_image_once(ffcv_folder, world_size):
    path = ffcv_folder / "val_500_uncompressed.ffcv"
    loaders = [ffcv_loader.val_loader(path, 8, 1, 32, "cpu", rank, world_size) for rank in range(world_size)]
    labels = [torch.cat([y.flatten().clone() for _, y in loader]) for loader in loaders]
    assert [len(part) for part in labels] == [len(range(rank, 34, world_size)) for rank in range(world_size)]
    assert torch.cat(labels).bincount().tolist() == [11, 11, 12]


def test_no_compiled_operation_comes_after_to_tensor():
    """FFCV's planner loops for ever on such a pipeline."""
    for device in ("cpu", "cuda"):
        names = [type(op).__name__ for op in ffcv_loader.make_pipelines(SeededCrop((32, 32)), device)["image"]]
        assert names == ["SeededCrop", "ToTensor", "ToDevice"][:2 + (device == "cuda")]


@pytest.fixture
def no_collections():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_an_iterator_is_gone_after_its_epoch(train_file, no_collections):
    """With its buffers: at a batch of 512, hundreds of MB on the GPU and 2 GB of pinned memory. No cycle may hold it
    until the next full collection: numba leaves one where it compiles for several threads, for a loader's first batch.
    """
    train = ffcv_loader.train_loader(train_file, 8, 2, 1, 32, 7, "cpu")
    val = ffcv_loader.val_loader(train_file, 8, 2, 32, "cpu")
    last = len(train) - train.batches_ahead      # closed here, FFCV's queue is full and its thread has no more to read
    for start, batches in ((lambda: train.epoch(0), None), (lambda: train.epoch(1), 2), (lambda: train.epoch(2), last),
                           (lambda: iter(val), None), (lambda: iter(val), 1)):
        iterator = start()
        for _ in islice(iterator, batches):      # to its end, or closed in the middle
            pass
        iterator.close()
        iterator.join(10)
        alive = weakref.ref(iterator)
        del iterator
        assert alive() is None, batches


def test_files_that_are_refused(ffcv_folder, tmp_path):
    train_file = ffcv_folder / "train_500_0.50_90.ffcv"
    assert inspect(train_file, 3)[0] == Reader(str(train_file)).num_samples == 60
    whole = train_file.read_bytes()
    for name, content, said in [("cut.ffcv", whole[:-100], "truncated"), ("half.ffcv", whole[:10 ** 7], "truncated"),
                                ("head.ffcv", whole[:20], "not an .ffcv"), ("empty.ffcv", b"", "not an .ffcv"),
                                ("text.ffcv", b"hello" * 100, "not an .ffcv")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=said):
            inspect(tmp_path / name, 3)
    with pytest.raises(InputError, match=r"labels run from 0 to 2, model.num_classes=2"):
        inspect(train_file, 2)


def test_class_names_of_another_file_are_refused(ffcv_folder, tmp_path):
    """Its own were lost, or it was put in the other's place."""
    train, val = ffcv_folder / "train_500_0.50_90.ffcv", tmp_path / "val.ffcv"
    assert inspect(train, 3) == (60, ["class0", "class1", "class2"])
    shutil.copy(ffcv_folder / "val_500_uncompressed.ffcv", val)
    shutil.copy(companion(train), companion(val))
    with pytest.raises(InputError, match=r"val.ffcv: has 34 images, but val.ffcv.json beside it says 60; remove"):
        inspect(val, 3)
