"""FFCV loaders: a .ffcv file -> batches of (images uint8 [B, 3, R, R] channels-last, labels int64 [B]).

Random crops and flips are drawn from (seed, epoch, image index): a run sees the same pixels whatever its number of
workers and processes, and after a restart. FFCV's own use a generator per thread, which cannot be seeded.
Read by train_imagenet.py; the files are made by write_imagenet.py.
"""
import os
from pathlib import Path

import numba
import numpy as np
import torch

from MRL import InputError

TORCH_THREADS = torch.get_num_threads()      # importing FFCV sets it to 1
# ruff: noqa: E402
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import IMAGE_MODES, CenterCropRGBImageDecoder, ResizedCropRGBImageDecoder
from ffcv.libffcv import imdecode, resize_crop
from ffcv.loader import Loader, OrderOption
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.memory_managers import OSCacheManager
from ffcv.pipeline.compiler import Compiler
from ffcv.reader import Reader
from ffcv.transforms import ToDevice, ToTensor
from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, HeaderType

torch.set_num_threads(TORCH_THREADS)

VALIDATION_RATIO = 224 / 256           # the centre crop's share of the shorter side
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def _numba_threads(cls, number):
    cls.num_threads = number
    numba.set_num_threads(number)


# FFCV's version also sets PyTorch's threads, in the middle of training and for the whole process.
Compiler.set_num_threads = classmethod(_numba_threads)


def train_loader(path, batch_size, num_workers, in_memory, resolution, seed, device, distributed=False, indices=None):
    """Shuffled random crops, the last incomplete batch dropped. Iterate with `loader.epoch(e)`.

    Order as in the original: random over all processes when distributed, else quasi-random (reads pages in turn);
    with `indices`, those images in that order.
    """
    order = OrderOption.RANDOM if distributed else OrderOption.QUASI_RANDOM
    return TrainLoader(str(path), batch_size, workers(num_workers), os_cache=bool(in_memory), seed=seed,
                       order=order if indices is None else OrderOption.SEQUENTIAL, indices=indices,
                       distributed=distributed, pipelines=pipelines(SeededCrop((resolution, resolution)), device))


def val_loader(path, batch_size, num_workers, resolution, device, rank=0, world_size=1):
    """Centre crops in file order; process `rank` reads images rank, rank + world_size, ...: each image exactly once."""
    mine = np.arange(Reader(str(path)).num_samples, dtype=np.uint64)[rank::world_size]
    batch_size = min(batch_size, max(1, len(mine)))      # FFCV holds memory for whole batches
    crop = CenterCropRGBImageDecoder((resolution, resolution), VALIDATION_RATIO)
    return Loader(str(path), batch_size, workers(num_workers), os_cache=True, order=OrderOption.SEQUENTIAL,
                  indices=mine, drop_last=False, pipelines=pipelines(crop, device))


def pipelines(image_decoder, device):
    """The one place where FFCV's stages are put in order: compiled decoders, then ToTensor, then the copy to a GPU.

    Normalisation is not among them: `normalise` does it on the device. A compiled operation after ToTensor would make
    FFCV's planner loop for ever.
    """
    copy = [ToDevice(torch.device(device), non_blocking=True)] if torch.device(device).type != "cpu" else []
    return {"image": [image_decoder, ToTensor(), *copy], "label": [IntDecoder(), ToTensor(), *copy]}


def normalise(images, mean, std):
    """FFCV's uint8 [B, R, R, 3] -> float32 [B, 3, R, R], channels last; mean, std: [3] in 0..255, on the device."""
    return (images.permute(0, 3, 1, 2).float() - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def workers(asked):
    """Threads for decoding; numba starts no more of them than the machine has cores."""
    available = numba.config.NUMBA_NUM_THREADS
    if asked > available and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"data.num_workers={asked}: this machine has {available} cores, using {available}")
    return min(asked, available) if asked > 0 else available


def _compile_reader(self):
    """FFCV's way to read a stored image: the bytes at an address of the memory map."""
    mapped, table = numba.types.Array(numba.uint8, 1, "C", readonly=True), numba.uint64[::1]

    def read(address, state):
        size = state[2][np.searchsorted(state[1], address)]
        return state[0][address:address + size]

    return Compiler.compile(read, mapped(numba.uint64, numba.types.Tuple([mapped, table, table])))


# FFCV's own makes numba's shared uint8[::1] read-only in place, which breaks the tables of functions compiled before
# and ends in tracebacks from their finalisers.
OSCacheManager.compile_reader = _compile_reader


class TrainLoader(Loader):
    """FFCV's loader with one more column in the image metadata: the key that an image's crop is drawn from."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        old = self.reader.metadata
        image = np.dtype([*old.dtype["f0"].descr, ("key", "<u8")])
        new = np.zeros(len(old), np.dtype([("f0", image), ("f1", old.dtype["f1"])]))
        for name in old.dtype["f0"].names:
            new["f0"][name] = old["f0"][name]
        new["f1"] = old["f1"]
        self.reader.metadata = new
        self.pages = getattr(self.traversal_order, "page_to_samples_array", np.empty(0)).copy()

    def epoch(self, epoch, first_batch=0):
        """Iterator over the batches of an epoch, from `first_batch` on (where an interrupted run continues)."""
        if self.pages.size:      # FFCV's quasi-random order shuffles its table in place; each epoch starts afresh
            self.traversal_order.page_to_samples_array = self.pages.copy()
        self.next_epoch = epoch
        self.reader.metadata["f0"]["key"] = image_keys(self.seed, epoch, len(self.reader.metadata))
        order = self.next_traversal_order()[first_batch * self.batch_size:len(self) * self.batch_size]
        return EpochIterator(self, order)

    def set_resolution(self, resolution):
        self.pipeline_specs["image"].decoder.output_size = (resolution, resolution)


def image_keys(seed, epoch, n):
    """-> [n] uint64, one key for each image of an epoch."""
    with np.errstate(over="ignore"):
        start = mix(mix(np.uint64(seed)) + np.uint64(epoch))
        return mix(start + np.arange(n, dtype=np.uint64))


GOLDEN, FIRST, SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
S30, S27, S31, S11 = (np.uint64(bits) for bits in (30, 27, 31, 11))


def mix(x):
    """SplitMix64's finaliser: neighbouring integers -> unrelated ones. Plain numpy, compiled below."""
    x = x + GOLDEN
    x = (x ^ (x >> S30)) * FIRST
    x = (x ^ (x >> S27)) * SECOND
    return x ^ (x >> S31)


_mix = numba.njit(mix)


@numba.njit
def uniform(key, draw, low, high):
    """The draw-th number of a key, uniform in [low, high)."""
    bits = _mix(key + np.uint64(draw) * GOLDEN)
    return low + (high - low) * (np.float64(bits >> S11) / 9007199254740992.0)


@numba.njit
def random_crop(key, height, width):
    """-> top, left, height, width: area and log aspect ratio uniform, as torchvision and FFCV draw them."""
    for attempt in range(10):
        area = height * width * uniform(key, 4 * attempt, SCALE[0], SCALE[1])
        aspect = np.exp(uniform(key, 4 * attempt + 1, np.log(RATIO[0]), np.log(RATIO[1])))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(uniform(key, 4 * attempt + 2, 0, height - h + 1))
            left = int(uniform(key, 4 * attempt + 3, 0, width - w + 1))
            return top, left, h, w
    w = min(width, round(height * RATIO[1]))      # no crop fitted: the largest centred one of a legal ratio
    h = min(height, round(width / RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w


@numba.njit
def mirror(image):
    """Flip an image [H, W, 3] left to right, in place."""
    last = image.shape[1] - 1
    for row in range(image.shape[0]):
        for col in range(image.shape[1] // 2):
            for c in range(3):
                image[row, col, c], image[row, last - col, c] = image[row, last - col, c], image[row, col, c]


class SeededCrop(ResizedCropRGBImageDecoder):
    """Random resized crop and flip of an image, drawn from the key in its metadata."""

    scale, ratio, get_crop_generator = SCALE, RATIO, None      # asked for by the base class, unused here

    def generate_code(self):
        read, jpg, images = self.memory_read, IMAGE_MODES["jpg"], Compiler.get_iterator()
        decode_jpeg, resize = Compiler.compile(imdecode), Compiler.compile(resize_crop)

        def decode(batch_indices, memory, metadata, storage_state):
            batch, scratch = memory
            for b in images(len(batch_indices)):
                record = metadata[batch_indices[b]]
                stored = read(record["data_ptr"], storage_state)
                height, width = np.int64(record["height"]), np.int64(record["width"])
                if record["mode"] == jpg:
                    decode_jpeg(stored, scratch[b], height, width, height, width, 0, 0, 1, 1, False, False)
                    stored = scratch[b][:height * width * 3]
                top, left, h, w = random_crop(record["key"], height, width)
                resize(stored.reshape(height, width, 3), top, top + h, left, left + w, batch[b])
                if uniform(record["key"], 40, 0.0, 1.0) < 0.5:
                    mirror(batch[b])
            return batch[:len(batch_indices)]

        decode.is_parallel = True
        return decode


def pixels_are_there(images, table, size):
    """Does each image begin where the table says that one is stored, of its size if raw, and within the file?"""
    table = table[np.argsort(table["ptr"])]
    stored = table[np.searchsorted(table["ptr"], images["data_ptr"]).clip(max=len(table) - 1)]
    pixels = 3 * images["height"].astype(np.uint64) * images["width"]
    return ((stored["ptr"] == images["data_ptr"]) & (stored["ptr"] + stored["size"] <= size) & (pixels > 0)
            & ((images["mode"] == IMAGE_MODES["jpg"]) | (stored["size"] == pixels))).all()


def check_file(path, num_classes):
    """-> number of images of a complete .ffcv file with labels below num_classes; InputError otherwise."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; write_imagenet.sh makes it")
    size = path.stat().st_size
    header = np.fromfile(path, HeaderType, count=1)
    if not len(header) or header["version"][0] != CURRENT_VERSION:
        raise InputError(f"{path}: not an .ffcv file; write_imagenet.sh makes one")
    table = int(header["alloc_table_ptr"][0])
    images = int(header["num_samples"][0])
    # FFCV writes the table last, one row per stored image, so a file that lacks some of it was cut off.
    if table == 0 or size - table < images * ALLOC_TABLE_TYPE.itemsize:
        raise InputError(f"{path}: truncated or not finished writing; run write_imagenet.sh again")
    try:
        reader = Reader(str(path))
        fields = {name: type(handler) for name, handler in reader.handlers.items()}
    except Exception:                      # whatever FFCV makes of other bytes
        raise InputError(f"{path}: damaged; run write_imagenet.sh again") from None
    if fields != {"image": RGBImageField, "label": IntField} or not images:
        raise InputError(f"{path}: has fields {list(fields)} and {images} images, expected an image and a label")
    if not pixels_are_there(reader.metadata["f0"], reader.alloc_table, size):
        raise InputError(f"{path}: damaged (images lie outside the file); run write_imagenet.sh again")
    labels = reader.metadata["f1"]
    if labels.min() < 0 or labels.max() >= num_classes:
        raise InputError(f"{path}: labels run from {labels.min()} to {labels.max()}, model.num_classes={num_classes}")
    return images
