"""What happens to a training image: a random crop and a flip. The place to change augmentation.

All random numbers of an image come from (seed, epoch, image index), so that a run sees the same pixels whatever its
number of workers and processes, and after a restart; from a folder and from an .ffcv file the boxes and the flips are
the same. Each image of an epoch has a key of 64 bits; `uniform(key, draw, ...)` is its draw-th number. A new operation
goes into `augment`, with draws of its own above FLIP; what works on whole batches can also stand in
`loaders.normalise`, on the device.
"""
import numpy as np

from mrl_files import keep_compiled

SCALE, RATIO = 0.08, (3 / 4, 4 / 3)             # least area of a crop, the image's being 1; of its width to its height
ATTEMPTS = 10                                   # to fit a crop into the image; each uses four draws of the key
FLIP = 4 * ATTEMPTS                             # the number of the draw that decides on the flip
VALIDATION_RATIO = 224 / 256                    # the centre crop's share of the shorter side


def image_keys(seed, epoch, n):
    """-> [n] uint64, one key for each image of an epoch."""
    with np.errstate(over="ignore"):
        start = scramble(scramble(np.uint64(seed)) + np.uint64(epoch))
        return scramble(start + np.arange(n, dtype=np.uint64))


GOLDEN, FIRST, SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
S30, S27, S31, S11 = (np.uint64(bits) for bits in (30, 27, 31, 11))


def scramble(x):
    """SplitMix64's finaliser: neighbouring integers -> unrelated ones. Plain numpy, compiled below."""
    x = x + GOLDEN
    x = (x ^ (x >> S30)) * FIRST
    x = (x ^ (x >> S27)) * SECOND
    return x ^ (x >> S31)


_scramble = keep_compiled()(scramble)


@keep_compiled()
def uniform(key, draw, low, high):
    """The draw-th number of a key, uniform in [low, high)."""
    bits = _scramble(key + np.uint64(draw) * GOLDEN)
    return low + (high - low) * (np.float64(bits >> S11) / 9007199254740992.0)      # 53 bits over 2**53


@keep_compiled()
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


def centre_crop(height, width, _, ratio):
    """-> top, left, height, width of validation's crop, in FFCV's way, but never empty: of an image one pixel wide FFCV
    takes nothing, and OpenCV aborts."""
    side = max(1, int(ratio * min(height, width)))
    return (height - side) // 2, (width - side) // 2, side, side


@keep_compiled()
def augment(image, key, flip_below):
    """What is done to a crop that has its final size, uint8 [R, R, 3], in place."""
    if uniform(key, FLIP, 0.0, 1.0) < flip_below:
        mirror(image)


@keep_compiled()
def mirror(image):
    """Flip an image [H, W, 3] left to right, in place."""
    last = image.shape[1] - 1
    for row in range(image.shape[0]):
        for col in range(image.shape[1] // 2):
            for c in range(3):
                image[row, col, c], image[row, last - col, c] = image[row, last - col, c], image[row, col, c]
