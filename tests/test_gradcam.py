"""Grad-CAM of every size against captum, one size at a time; images and classes as the notebook reads them."""
import gradcam
import numpy as np
import pytest
import superclass
import torch
from captum.attr import LayerGradCam
from conftest import fill
from PIL import Image
from torchvision.transforms.functional import normalize

from mrl_files import InputError
from mrl_models import MEAN, STD, build_model, load_model


@pytest.fixture(scope="module")
def x():
    return torch.from_numpy(np.random.default_rng(0).standard_normal((3, 3, 64, 64)).astype(np.float32))


def model_of(head):
    model = build_model("resnet18", head, num_classes=5)
    model.load_state_dict(fill(model.state_dict(), seed=1))
    return model.eval()


def captums(model, layer, x, classes):
    """Grad-CAM of each size by captum -> [G, N, h, w]; classes [G, N]."""
    model.requires_grad_(True)
    module = gradcam.find_layer(model, layer)
    maps = []
    for g, target in enumerate(classes):
        def one_size(images, g=g):
            output = model(images)
            return output if torch.is_tensor(output) else output[g]
        maps.append(LayerGradCam(one_size, module).attribute(x, target=target, relu_attributions=True)[:, 0].detach())
    return torch.stack(maps)


@pytest.mark.parametrize("head, sizes, arch, layer", [
    ("mrl", [8, 64, 512], "resnet18", None), ("mrl_e", [8, 64, 512], "resnet18", None),
    ("ff64", [64], "resnet18", None), ("mrl", [8, 512], "resnet18", "layer3"), ("mrl", [8, 1024], "densenet121", None)])
def test_equals_captum(x, head, sizes, arch, layer):
    """DenseNet's `features` are followed by a ReLU in place."""
    model = build_model(arch, head, sizes, num_classes=5).eval()
    maps, logits = gradcam.grad_cam(model, x, layer=layer)
    with torch.no_grad():
        output = model(x)
    assert torch.equal(logits, output[None] if torch.is_tensor(output) else torch.stack(output))
    assert logits.shape == (len(sizes), 3, 5) and maps.shape[:2] == (len(sizes), 3) and maps.max() > 0
    expected = captums(model, layer, x, logits.argmax(-1))
    assert torch.allclose(maps, expected, rtol=1e-5, atol=1e-6 * expected.max())


def test_a_given_class(x):
    model, target = model_of("mrl"), torch.tensor([4, 0, 2])
    maps, _ = gradcam.grad_cam(model, x, target)
    assert torch.allclose(maps, captums(model, None, x, target.expand(7, -1)), rtol=1e-5, atol=1e-6)


def test_released_layout(tmp_path, x):
    """A released MRL-E file keeps its matrix under fc.weight: the maps are those of the same model of ours."""
    model = model_of("mrl_e")
    names = {"fc.nesting_classifier_0.weight": "fc.weight", "fc.nesting_classifier_0.bias": "fc.bias"}
    torch.save({names.get(k, k): v for k, v in model.state_dict().items()}, tmp_path / "r18_mrl1_e1_ff512.pt")
    released = load_model(tmp_path / "r18_mrl1_e1_ff512.pt", "resnet18", "mrl_e", [8 << i for i in range(7)], True)
    assert torch.equal(gradcam.grad_cam(released, x)[0], gradcam.grad_cam(model, x)[0])


def test_networks_without_a_known_stage(x):
    model = build_model("shufflenet_v2_x0_5", "mrl", num_classes=5)
    with pytest.raises(InputError, match="neither layer4 nor features"):
        gradcam.grad_cam(model, x)
    assert gradcam.grad_cam(model, x, layer="conv5")[0].shape == (8, 3, 2, 2)
    with pytest.raises(InputError, match="no module 'conv9'; it has conv1"):
        gradcam.grad_cam(model, x, layer="conv9")
    with pytest.raises(InputError, match="gives neither maps nor tokens"):
        gradcam.grad_cam(model, x, layer="fc")


# ------------------------------------------------------------------------------------------------ images

@pytest.fixture
def tree(tmp_path):
    """Three images in each of two class folders."""
    rng = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (50, 40, 3), dtype=np.uint8)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "ant/notes.txt").write_text("no image")
    return tmp_path


def test_files_in_batches_equal_one_batch(tree, monkeypatch):
    model, paths = model_of("mrl"), gradcam.image_paths(tree)
    x = normalize(torch.stack([gradcam.picture(path, 32, 32) for path in paths]), MEAN, STD)
    for target in (None, torch.tensor([0, 1, 0, 1, 0, 1])):
        monkeypatch.setattr(gradcam, "BATCH", 4)
        maps, logits = gradcam.explain(model, paths, target, "layer2", 32, 32)
        expected, its_logits = gradcam.grad_cam(model, x, target, "layer2")
        assert torch.allclose(maps, expected, atol=1e-6) and torch.allclose(logits, its_logits, atol=1e-5)


def test_paths_and_their_classes(tree):
    paths = gradcam.image_paths(tree)
    assert [f"{p.parent.name}/{p.name}" for p in paths] == [f"{c}/{i}.png" for c in ("ant", "bee") for i in range(3)]
    assert gradcam.image_paths(tree / "bee/1.png") == [tree / "bee/1.png"]
    ids = gradcam.class_ids(2, tree)
    assert ids == ["ant", "bee"] and superclass.class_names(ids) == ids
    assert gradcam.true_classes(paths, ids).tolist() == [0, 0, 0, 1, 1, 1]
    assert gradcam.true_classes(paths, ["cat", "dog"]) is None
    assert superclass.class_names(gradcam.class_ids(1000))[62] == "rock python"
    assert gradcam.spread(paths, 2) == [paths[0], paths[3]] and gradcam.spread(paths, 9) == paths


def test_imagenet_v2s_folders_are_integers(tmp_path):
    paths = [tmp_path / "10/a.jpeg", tmp_path / "2/b.jpeg"]
    assert gradcam.true_classes(paths, superclass.classes()).tolist() == [10, 2]


def test_picture_is_what_the_network_sees(tmp_path):
    """The shorter side to 20, then the central 10 x 10: the right half of this image is white."""
    pixels = np.zeros((40, 80), np.uint8)
    pixels[:, 40:] = 255
    Image.fromarray(pixels).save(tmp_path / "grey.png")
    image = gradcam.picture(tmp_path / "grey.png", 20, 10)
    assert image.shape == (3, 10, 10) and image[:, :, :4].max() == 0 and image[:, :, 6:].min() == 1


def test_overlay_is_brightest_where_the_heat_is():
    heat = torch.zeros(4, 4)
    heat[1, 2] = 5.0
    shown = gradcam.overlay(torch.full((3, 40, 40), 0.5), heat)
    assert shown.shape == (40, 40, 3) and 0 <= shown.min() and shown.max() <= 1
    brightest = np.unravel_index(shown.sum(-1).argmax(), (40, 40))
    assert 10 <= brightest[0] < 20 and 20 <= brightest[1] < 30
    assert np.isfinite(gradcam.overlay(torch.rand(3, 8, 8), torch.zeros(2, 2))).all()


@pytest.mark.parametrize("call, words", [
    (lambda tree: gradcam.image_paths(tree / "nowhere"), "no such image"),
    (lambda tree: gradcam.picture(tree / "ant/notes.txt"), "not a readable image"),
    (lambda tree: gradcam.class_ids(3, tree), "3 classes, .* has 2"),
    (lambda tree: gradcam.class_ids(10), "10 classes, ImageNet has 1000"),
    (lambda tree: gradcam.class_ids(2, tree / "nowhere"), "no such folder"),
    (lambda tree: gradcam.true_classes(gradcam.image_paths(tree), ["ant", "cat"]), "none of the 2 classes"),
    (lambda tree: gradcam.choose_target("true", None), "not known"),
    (lambda tree: gradcam.choose_target("best", None), "give \"predicted\" or \"true\""),
])
def test_refusals(tree, call, words):
    with pytest.raises(InputError, match=words):
        call(tree)


def test_the_class_to_explain():
    truth = torch.tensor([1])
    assert gradcam.choose_target("true", truth) is truth and gradcam.choose_target("predicted", truth) is None


def test_pictures_that_are_too_large_end_in_one_line(tmp_path, monkeypatch):
    """Pillow refuses pictures that would take gigabytes: 60,000 x 60,000 pixels fit in a small file."""
    Image.new("L", (40, 40)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match=r"a.png: not a readable image \(Image size \(1600 pixels\) exceeds limit"):
        gradcam.picture(tmp_path / "a.png")


def test_16_bits_look_as_8_do(tmp_path):
    grey = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    torch.testing.assert_close(*(gradcam.picture(tmp_path / f"{bits}.png", 8, 8) for bits in (8, 16)), rtol=0, atol=0)


def test_hidden_files_are_no_images_and_links_are_followed_once(tmp_path):
    for name in ("set/a/0.png", "set/a/._0.png", "set/.ipynb_checkpoints/1.png", "elsewhere/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        Image.new("L", (8, 8)).save(tmp_path / name)
    (tmp_path / "set/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/up").symlink_to(tmp_path)
    assert gradcam.image_paths(tmp_path / "set") == [tmp_path / "set/a/0.png", tmp_path / "set/b/2.png"]
