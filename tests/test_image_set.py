"""Images of any kind become (x, y) in their order; unreadable ones keep their place."""
import numpy as np
import pytest
import torch
from image_set import ImageSet, Preparation, make_loader
from image_trees import SIZE, make_tree, write_image
from PIL import Image
from torchvision.datasets import ImageFolder

from mrl_images import describe_unreadable

PREPARATION = Preparation(SIZE, SIZE)


def opened(folder, classes):
    return ImageSet(folder, classes, subset=None, transform=PREPARATION)


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "RGBA", "I;16"])
def test_other_colour_modes_become_rgb(tmp_path, mode):
    make_tree(tmp_path, ["a"])
    Image.new("L", (9, 9), 255).convert(mode).save(tmp_path / "a" / "a_0.JPEG", format="PNG")
    x, y = opened(tmp_path, ["a"])[0]
    assert y == 0 and x.shape == (3, SIZE, SIZE)


def test_grey_of_16_bits_is_scaled(tmp_path):
    levels = np.array([0, 257, 20_000, 65_535], np.uint16)
    make_tree(tmp_path, ["a"])
    for i, level in enumerate(levels):
        Image.fromarray(np.full((9, 9), level)).save(tmp_path / "a" / f"a_{i}.JPEG", format="PNG")
    expected = torch.stack([PREPARATION(Image.new("RGB", (9, 9), (grey,) * 3)) for grey in (0, 1, 77, 255)])
    assert torch.stack([x for x, _ in opened(tmp_path, ["a"])]).equal(expected)


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    make_tree(tmp_path, ["a"])
    red = Image.new("RGB", (9, 9), (255, 0, 0))
    expected = PREPARATION(red)
    red.convert("CMYK").save(tmp_path / "a" / "a_0.JPEG", format="JPEG", quality=100)
    x, _ = opened(tmp_path, ["a"])[0]
    assert (x - expected).abs().max() < 0.15


def test_preparation_is_the_originals():
    """Resize 256, crop 224, ImageNet's mean and deviation, on a gradient whose centre is known."""
    image = Image.fromarray(np.tile(np.arange(512, dtype=np.uint8)[:, None, None] // 2, (1, 512, 3)))
    x = Preparation()(image)
    assert x.shape == (3, 224, 224)
    red = x[0] * 0.229 + 0.485
    assert red[0].mean().item() * 255 == pytest.approx(16, abs=0.6)     # row 16 of 256 rows


def test_unreadable_images_keep_their_place(tmp_path):
    make_tree(tmp_path, ["a", "b"], per_class=2)
    whole = (tmp_path / "a" / "a_1.JPEG").read_bytes()
    (tmp_path / "a" / "a_1.JPEG").write_bytes(whole[:len(whole) // 2])
    images = opened(tmp_path, ["a", "b"])
    assert [images[i][1] for i in range(4)] == [0, -1, 1, 1]
    assert "a_1.JPEG (" in describe_unreadable(images.path(1))


def test_images_come_in_imagefolders_order(tmp_path):
    """Of a class's subfolders and links too, whatever else lies there."""
    for name in ("2.png", "10.PNG", "sub/1.jpeg", "sub.x/0.png", "é/3.webp"):
        write_image(tmp_path / "a" / name, 0)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    write_image(tmp_path / "b" / "4.png", 0)
    (tmp_path / "a" / "link").symlink_to(tmp_path / "b")
    images = opened(tmp_path, ["a", "b"])
    assert [str(images.path(i)) for i in range(len(images))] == [path for path, _ in ImageFolder(tmp_path).samples]
    assert len(images) == 7


def test_sample_is_seeded_sorted_and_keeps_labels(tmp_path):
    classes = [f"{i:03}" for i in range(50)]
    make_tree(tmp_path, classes)
    one, two = opened(tmp_path, classes), opened(tmp_path, classes)
    assert one.digest() == two.digest()
    one.sample(20)
    two.sample(20)
    assert one.digest() == two.digest() and len(one) == 20
    assert one.labels.tolist() == sorted(one.labels.tolist()) == [int(one.path(i).parent.name) for i in range(20)]


def test_batches_by_number(tmp_path):
    write_image(tmp_path / "0" / "x.png", 0)
    classes = [str(i) for i in range(7)]
    make_tree(tmp_path, classes)
    images = opened(tmp_path, classes)
    assert [len(y) for _, y in make_loader(images, 3, 0)] == [3, 3, 2]
    assert [y.tolist() for _, y in make_loader(images, 3, 0, batches=[2, 0])] == [[5, 6], [0, 0, 1]]
