"""What happens to a training image: a random crop and a flip. The place to change augmentation.

All random numbers of an image come from (seed, epoch, image index), so that a run sees the same pixels whatever its
number of workers and processes, and after a restart. FFCV's own crop draws from a generator per thread, which cannot
be seeded. Here each image of an epoch has a key of 64 bits, which loaders.py puts into the image's metadata;
`uniform(key, draw, ...)` is its draw-th number. A new operation goes into `SeededCrop.generate_code`, with draws of its
own above FLIP; what works on whole batches can also stand in `loaders.normalise`, on the device.
"""
import ffcv_repairs  # noqa: F401
import numba
import numpy as np
from ffcv.fields.rgb_image import IMAGE_MODES, ResizedCropRGBImageDecoder
from ffcv.libffcv import imdecode, resize_crop
from ffcv.pipeline.compiler import Compiler

SCALE, RATIO = 0.08, (3 / 4, 4 / 3)             # least area of a crop, the image's being 1; of its width to its height
ATTEMPTS = 10                                   # to fit a crop into the image; each uses four draws of the key
FLIP = 4 * ATTEMPTS                             # the number of the draw that decides on the flip


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
    return low + (high - low) * (np.float64(bits >> S11) / 9007199254740992.0)      # 53 bits over 2**53


@numba.njit
def random_crop(key, height, width, scale=SCALE):
    """-> top, left, height, width: area and log aspect ratio uniform, as torchvision and FFCV draw them."""
    for attempt in range(ATTEMPTS):
        area = height * width * uniform(key, 4 * attempt, scale, 1.0)
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
    """Random resized crop and flip of an image, drawn from the key in its metadata.

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
                if uniform(record["key"], FLIP, 0.0, 1.0) < flip_below:
                    mirror(batch[b])
            return batch[:len(batch_indices)]

        decode.is_parallel = True
        return decode
