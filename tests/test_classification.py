"""Figures of every head against plain PyTorch; saved tensors; unreadable images."""
import pytest
import torch
from classification import Outputs, evaluate
from image_set import ImageSet, Preparation, make_loader
from image_trees import SIZE, ColourReader, make_tree, write_image

from mrl_files import InputError
from mrl_models import build_model, compute_logits

CPU = torch.device("cpu")


@pytest.fixture
def tree(tmp_path):
    """5 classes of 3 images, and their ImageSet."""
    classes = ["a", "b", "c", "d", "e"]
    folder = make_tree(tmp_path / "val", classes, per_class=3)
    return lambda: ImageSet(folder, classes, None, Preparation(SIZE, SIZE))


def run(images, model, batch_size=4, workers=0, **options):
    return evaluate(model, images, make_loader(images, batch_size, workers), CPU, **options)


@pytest.mark.parametrize("head, sizes", [("ff16", 1), ("mrl", 7), ("mrl_e", 7)])
def test_all_heads_are_one_path(tree, head, sizes):
    """Figures of a real network equal those of a plain loop, batches of 4 with a last one of 3."""
    torch.manual_seed(0)
    model, images = build_model("resnet18", head, num_classes=5).eval(), tree()
    keep = Outputs(sizes, 15, 5, ["logits", "gt", "predictions"])
    result = run(images, model, keep=keep)
    with torch.no_grad():
        x, y = map(torch.stack, zip(*[(image, torch.tensor(label)) for image, label in images], strict=True))
        output = model(x)
    logits = torch.stack(output) if isinstance(output, tuple) else output[None]
    saved = dict(keep.tensors())
    assert saved["logits"].shape == (sizes, 15, 5)
    torch.testing.assert_close(saved["logits"], logits, rtol=1e-4, atol=1e-5)
    assert saved["gt"].equal(y) and saved["gt"].dtype == torch.int64
    assert saved["predictions"].equal(saved["logits"].argmax(-1))
    assert result["top1"] == (saved["predictions"] == y).double().mean(1).tolist()
    expected = [torch.nn.functional.cross_entropy(one, y).item() for one in logits]
    assert result["loss"] == pytest.approx(expected, rel=1e-4)


def test_tta_adds_the_mirrored_images_logits():
    torch.manual_seed(0)
    model, x = build_model("resnet18", "mrl", num_classes=5).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = torch.stack(model(x)) + torch.stack(model(x.flip(3)))
        assert compute_logits(model, x, tta=True).equal(expected)


def test_softmax_takes_the_place_of_logits_only_after_they_were_given(tree):
    keep = Outputs(2, 15, 5, ["logits", "softmax", "gt", "predictions"])
    run(tree(), ColourReader(5), keep=keep)
    names, logits = [], None
    for name, tensor in keep.tensors():
        names.append(name)
        logits = tensor.clone() if name == "logits" else logits
        if name == "softmax":
            torch.testing.assert_close(tensor, logits.softmax(-1))
    assert names == ["gt", "predictions", "logits", "softmax"]


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_stop_or_are_left_out(tree, workers):
    images = tree()
    for i in (2, 13):
        images.path(i).write_bytes(images.path(i).read_bytes()[:40])
    with pytest.raises(InputError, match=r"1 unreadable image\(s\) in this batch: .*a_2.JPEG \(.*--skip_bad_images"):
        run(images, ColourReader(5), workers=workers)
    keep = Outputs(2, 15, 5, ["logits", "gt"])
    result = run(images, ColourReader(5), workers=workers, keep=keep, skip_bad_images=True)
    assert result["n"] == 13 and result["top1"] == [1.0, 0.0]
    assert ["a_2.JPEG" in result["skipped"][0], "e_1.JPEG" in result["skipped"][1]] == [True, True]
    saved = dict(keep.tensors())
    assert saved["gt"].tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4]
    assert saved["logits"].shape == (2, 13, 5) and saved["logits"].is_contiguous()


def test_all_unreadable(tmp_path):
    write_image(tmp_path / "a" / "a.png", 0)
    (tmp_path / "a" / "a.png").write_text("not an image")
    images = ImageSet(tmp_path, ["a"], None, Preparation(SIZE, SIZE))
    with pytest.raises(InputError, match="none of the 1 images can be read"):
        run(images, ColourReader(1), skip_bad_images=True)


def test_logits_that_overflow_are_refused(tree):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIZE * SIZE, 5))
    model[1].weight.data.fill_(torch.inf)
    with pytest.raises(InputError, match="not finite; try --precision fp32"):
        run(tree(), model)


def test_bf16_is_used_and_close(tree):
    torch.manual_seed(0)
    model = build_model("resnet18", "ff512", num_classes=5).eval()
    exact, rounded = run(tree(), model), run(tree(), model, precision="bf16")
    assert rounded["loss"] != exact["loss"]
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=0.05)
