"""FFCV loaders: a .ffcv file -> batches of (images uint8 [B, 3, R, R] channels-last, labels int64 [B]).

Random crops and flips are drawn from (seed, epoch, image index): a run sees the same pixels whatever its number of
workers and processes, and after a restart. The files are made by write_imagenet.py. Used by train_imagenet.py and
trainer.py.
"""
import os

import ffcv_repairs  # noqa: F401
import numba
import numpy as np
import torch
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.reader import Reader
from ffcv.transforms import ToDevice, ToTensor
from seeded_crop import SeededCrop, image_keys

from mrl_models import MEAN, STD

VALIDATION_RATIO = 224 / 256           # the centre crop's share of the shorter side


def train_loader(path, batch_size, num_workers, in_memory, resolution, seed, device, *, distributed=False, indices=None,
                 **crop):
    """Shuffled random crops, the last incomplete batch dropped. Iterate with `loader.epoch(e)`.

    crop: scale and flip of SeededCrop. Order as in the original: random over all processes when distributed, else
    quasi-random (reads pages in turn); with `indices`, those images in that order.
    """
    order = OrderOption.RANDOM if distributed else OrderOption.QUASI_RANDOM
    decoder = SeededCrop((resolution, resolution), **crop)
    return TrainLoader(str(path), batch_size, workers(num_workers), os_cache=bool(in_memory), seed=seed,
                       order=order if indices is None else OrderOption.SEQUENTIAL, indices=indices,
                       distributed=distributed, pipelines=pipelines(decoder, device))


def val_loader(path, batch_size, num_workers, resolution, device, rank=0, world_size=1):
    """Centre crops in file order; process `rank` reads images rank, rank + world_size, ...: each image exactly once."""
    mine = np.arange(Reader(str(path)).num_samples, dtype=np.uint64)[rank::world_size]
    batch_size = min(batch_size, max(1, len(mine)))      # FFCV holds memory for whole batches
    crop = CentreCrop((resolution, resolution), VALIDATION_RATIO)
    return Loader(str(path), batch_size, workers(num_workers), os_cache=True, order=OrderOption.SEQUENTIAL,
                  indices=mine, drop_last=False, pipelines=pipelines(crop, device))


class CentreCrop(CenterCropRGBImageDecoder):
    """FFCV's, but never empty: of an image one pixel wide FFCV takes nothing, and OpenCV aborts."""

    @property
    def get_crop_generator(self):
        return centre_crop


def centre_crop(height, width, _, ratio):
    side = max(1, int(ratio * min(height, width)))
    return (height - side) // 2, (width - side) // 2, side, side


def pipelines(image_decoder, device):
    """The one place where FFCV's stages are put in order: compiled decoders, then ToTensor, then the copy to a GPU.

    Normalisation is not among them: `normalise` does it on the device. A compiled operation after ToTensor would make
    FFCV's planner loop for ever.
    """
    copy = [ToDevice(torch.device(device), non_blocking=True)] if torch.device(device).type != "cpu" else []
    return {"image": [image_decoder, ToTensor(), *copy], "label": [IntDecoder(), ToTensor(), *copy]}


def pixel_statistics(device):
    """-> mean, std [3] of ImageNet's pixels in 0..255, for `normalise`."""
    return [torch.tensor([255 * value for value in values], device=device) for values in (MEAN, STD)]


def normalise(images, mean, std):
    """FFCV's uint8 [B, R, R, 3] -> float32 [B, 3, R, R], channels last; mean, std: [3] in 0..255, on the device."""
    return (images.permute(0, 3, 1, 2).float() - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def workers(asked):
    """Threads for decoding; numba starts no more of them than the machine has cores."""
    available = numba.config.NUMBA_NUM_THREADS
    if asked > available and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"data.num_workers={asked}: this machine has {available} cores, using {available}")
    return min(asked, available) if asked > 0 else available


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
