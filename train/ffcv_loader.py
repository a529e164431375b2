"""FFCV's files and loaders: a .ffcv file of write_imagenet.py -> batches (see loaders.py).

Crops and flips are those of augmentation.py: FFCV's own draw from a generator per thread, which cannot be seeded.
`inspect` says whether a file is complete. Used through loaders.py, where an .ffcv file is given.
"""
from pathlib import Path

import ffcv_repairs  # noqa: F401
import numpy as np
import torch
from augmentation import RATIO, SCALE, VALIDATION_RATIO, augment, centre_crop, image_keys, random_crop
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import IMAGE_MODES, CenterCropRGBImageDecoder, ResizedCropRGBImageDecoder
from ffcv.libffcv import imdecode, resize_crop
from ffcv.loader import Loader, OrderOption
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.pipeline.compiler import Compiler
from ffcv.reader import Reader
from ffcv.transforms import ToDevice, ToTensor
from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, HeaderType
from loaders import companion

from mrl_files import InputError, read_json


def train_loader(path, batch_size, num_workers, in_memory, resolution, seed, device, *, distributed=False, **crop):
    """crop: scale and flip of SeededCrop. Order as in the original: random over all processes when distributed, else
    quasi-random (reads pages in turn).
    """
    order = OrderOption.RANDOM if distributed else OrderOption.QUASI_RANDOM
    decoder = SeededCrop((resolution, resolution), **crop)
    return TrainLoader(str(path), batch_size, num_workers, os_cache=bool(in_memory), seed=seed, order=order,
                       distributed=distributed, pipelines=make_pipelines(decoder, device))


def val_loader(path, batch_size, num_workers, resolution, device, rank=0, world_size=1, ratio=VALIDATION_RATIO):
    mine = np.arange(Reader(str(path)).num_samples, dtype=np.uint64)[rank::world_size]
    batch_size = min(batch_size, max(1, len(mine)))      # FFCV holds memory for whole batches
    crop = CentreCrop((resolution, resolution), ratio)
    return Loader(str(path), batch_size, num_workers, os_cache=True, order=OrderOption.SEQUENTIAL,
                  indices=mine, drop_last=False, pipelines=make_pipelines(crop, device))


class CentreCrop(CenterCropRGBImageDecoder):
    """FFCV's, with our box."""

    @property
    def get_crop_generator(self):
        return centre_crop


class SeededCrop(ResizedCropRGBImageDecoder):
    """Random resized crop of an image and `augment`, drawn from the key in its metadata.

    output_size: (height, width). scale: least share of the image's area. flip: mirror with chance 1/2.
    """

    ratio, get_crop_generator = RATIO, None      # asked for by the base class, unused here

    def __init__(self, output_size, scale=SCALE, flip=True):
        super().__init__(output_size)
        self.scale, self.flip_below = float(scale), 0.5 if flip else 0.0

    def generate_code(self):
        scale, flip_below = self.scale, self.flip_below
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
                top, left, h, w = random_crop(record["key"], height, width, scale)
                resize(stored.reshape(height, width, 3), top, top + h, left, left + w, batch[b])
                augment(batch[b], record["key"], flip_below)
            return batch[:len(batch_indices)]

        decode.is_parallel = True
        return decode


def make_pipelines(image_decoder, device):
    """The one place where FFCV's stages are put in order: compiled decoders, then ToTensor, then the copy to a GPU.

    Normalisation is not among them: `normalise` does it on the device. A compiled operation after ToTensor would make
    FFCV's planner loop for ever.
    """
    copy = [ToDevice(torch.device(device), non_blocking=True)] if torch.device(device).type != "cpu" else []
    return {"image": [image_decoder, ToTensor(), *copy], "label": [IntDecoder(), ToTensor(), *copy]}


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
        self.set_resolution(self.pipeline_specs["image"].decoder.output_size[0])
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
        self.resolution = resolution
        self.pipeline_specs["image"].decoder.output_size = (resolution, resolution)


# -------------------------------------------------------------------------------------------------- is the file right?

def inspect(path, num_classes):
    """-> number of images of a complete .ffcv file, names of its classes (None where none are kept); InputError for
    another file, and for labels that are not below num_classes."""
    check_complete(Path(path))
    reader = open_reader(path)
    if not pixels_are_there(reader.metadata["f0"], reader.alloc_table, Path(path).stat().st_size):
        raise InputError(f"{path}: damaged (images lie outside the file); run write_imagenet.sh again")
    labels = reader.metadata["f1"]
    if labels.min() < 0 or labels.max() >= num_classes:
        raise InputError(f"{path}: labels run from {labels.min()} to {labels.max()}, model.num_classes={num_classes}")
    return reader.num_samples, read_classes(path, reader.num_samples)


def read_classes(path, images):
    """-> the names of the classes of a file of so many images; None where none are kept, as beside the original's."""
    said = read_json(companion(path)) or {"n": images}
    if said.get("n") != images:
        raise InputError(f"{path}: has {images} images, but {companion(path).name} beside it says {said.get('n')}; "
                         "remove the .json of another file, or run write_imagenet.sh again")
    return said.get("classes")


def check_complete(path):
    """FFCV writes the table of stored images last, one row for each: a file that lacks some of it was cut off."""
    header = np.fromfile(path, HeaderType, count=1)
    if not len(header) or header["version"][0] != CURRENT_VERSION:
        raise InputError(f"{path}: not an .ffcv file; write_imagenet.sh makes one")
    table, images = (int(header[field][0]) for field in ("alloc_table_ptr", "num_samples"))
    if table == 0 or path.stat().st_size - table < images * ALLOC_TABLE_TYPE.itemsize:
        raise InputError(f"{path}: truncated or not finished writing; run write_imagenet.sh again")


def open_reader(path):
    """-> FFCV's reader of a file of images and labels."""
    try:
        reader = Reader(str(path))
        fields = {name: type(handler) for name, handler in reader.handlers.items()}
    except Exception:                      # whatever FFCV makes of other bytes
        raise InputError(f"{path}: damaged; run write_imagenet.sh again") from None
    if fields != {"image": RGBImageField, "label": IntField} or not reader.num_samples:
        raise InputError(f"{path}: has fields {list(fields)} and {reader.num_samples} images, "
                         "expected an image and a label")
    return reader


def pixels_are_there(images, table, size):
    """Does each image begin where the table says that one is stored, of its size if raw, and within the file?"""
    table = table[np.argsort(table["ptr"])]
    stored = table[np.searchsorted(table["ptr"], images["data_ptr"]).clip(max=len(table) - 1)]
    pixels = 3 * images["height"].astype(np.uint64) * images["width"]
    return ((stored["ptr"] == images["data_ptr"]) & (stored["ptr"] + stored["size"] <= size) & (pixels > 0)
            & ((images["mode"] == IMAGE_MODES["jpg"]) | (stored["size"] == pixels))).all()
