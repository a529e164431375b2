"""The crops and flips that training draws: distributed as the usual ones."""
import numpy as np
import torch
from augmentation import FLIP, image_keys, mirror, random_crop, uniform
from torchvision.transforms import RandomResizedCrop

from mrl_files import keep_compiled


def test_crops_have_the_usual_distribution():
    """Area uniform in 0.08..1 and log aspect uniform in 3/4..4/3 where they fit: compare with torchvision's own."""
    height, width, n = 300, 400, 4000
    ours = np.array([random_crop(key, height, width) for key in image_keys(0, 0, n)])
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(n)])
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all() and (ours >= 0).all()
    for column in range(4):
        quantiles = [np.quantile(x[:, column], np.linspace(0.1, 0.9, 9)) for x in (ours, theirs)]
        np.testing.assert_allclose(*quantiles, atol=15)
    flips = np.mean([uniform(key, FLIP, 0.0, 1.0) < 0.5 for key in image_keys(0, 0, n)])
    assert abs(flips - 0.5) < 0.03


def test_mirror():
    image = np.arange(2 * 5 * 3, dtype=np.uint8).reshape(2, 5, 3)
    expected = image[:, ::-1].copy()
    mirror(image)
    np.testing.assert_array_equal(image, expected)


def test_what_has_no_folder_for_compiled_code_is_compiled_anyway():
    """A function without a file: numba finds no place beside it, as in a read-only checkout without a home."""
    made = keep_compiled()(eval("lambda x: x + 1"))
    assert made(1) == 2 and not made.stats.cache_path
