"""timm/<name> as the backbone: built, read back, evaluated with its own statistics, explained, exported."""
import json
import sys

import export
import gradcam
import pytest
import pytorch_inference
import torch
import torch.nn.functional as F
from image_trees import make_run, make_tree
from torchvision.transforms.functional import normalize

from mrl_files import InputError
from mrl_models import (
    build_from_spec,
    build_model,
    check_image_size,
    classifier,
    load_model,
    preparation,
    stack_logits,
)

TINY = {"timm/test_resnet": "fc", "timm/test_convnext": "head.fc", "timm/test_vit": "head"}      # and their classifiers


@pytest.mark.parametrize("head", ["mrl", "mrl_e", "ff16"])
@pytest.mark.parametrize("arch", TINY)
def test_a_run_needs_only_its_path(tmp_path, arch, head):
    sizes, x = None if head == "ff16" else [8, 64], torch.randn(2, 3, 32, 32)
    loaded = load_model(make_run(tmp_path, head, 5, arch, nesting_list=sizes))
    torch.manual_seed(0)
    model = build_model(arch, head, sizes, 5).eval()
    assert loaded.spec == model.spec == json.loads((tmp_path / "params.json").read_text())["model"]
    assert (loaded.spec["mean"], loaded.spec["crop_pct"]) == ([0.5, 0.5, 0.5], 0.95)
    assert classifier(loaded)[0] == TINY[arch]
    with torch.inference_mode():
        assert torch.equal(stack_logits(loaded(x)), stack_logits(model(x)))


def test_what_was_recorded_stands():
    """timm may change its mind; a trained network's images do not."""
    spec = build_model("timm/test_vit").spec | {"mean": [0.1, 0.2, 0.3], "crop_pct": 0.8}
    again = build_from_spec(spec).spec
    assert again == spec and preparation(again, crop=160) == (200, 160, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    assert preparation(again, 170, 160)[0] == 170 and preparation({})[:2] == (256, 224)
    assert preparation({}, crop=32)[0] == 37      # the paper's share


def test_each_checkpoint_sees_its_own_images(tmp_path, monkeypatch):
    """One command, two networks: resized and normalised as each was trained. The images are of one colour."""
    make_tree(tmp_path / "data/val", [str(i) for i in range(10)])
    runs = [make_run(tmp_path / arch, arch=arch, nesting_list=[8, 64]) for arch in ("timm/test_vit", "resnet18")]
    words = f"--workers 0 --device cpu --crop 32 --data_root {tmp_path}/data --output {tmp_path}".split()
    monkeypatch.setattr("sys.argv", ["pytorch_inference.py", "--path", *map(str, runs), *words])
    pytorch_inference.main()
    figures = [json.loads(path.read_text()) for path in tmp_path.glob("*_accuracy_*.json")]
    assert {run["spec"]["arch"]: run["resize"] for run in figures} == {"timm/test_vit": 33, "resnet18": 37}
    assert "resize" not in json.loads((tmp_path / "accuracy_dataset=V1_tta=False.json").read_text())
    x = torch.zeros(10, 3, 32, 32)
    x[:, 1] = torch.arange(10).view(10, 1, 1) / 255
    for run in figures:
        model, (_, _, mean, std) = load_model(run["path"]), preparation(run["spec"])
        with torch.inference_mode():
            logits = stack_logits(model(normalize(x, mean, std)))
        expected = [F.cross_entropy(one, torch.arange(10)).item() for one in logits]
        assert run["loss"] == pytest.approx(expected, rel=1e-4)


def test_the_round_trip_of_an_export(tmp_path, monkeypatch):
    path = make_run(tmp_path / "run", arch="timm/test_convnext")
    monkeypatch.setattr("sys.argv", ["export.py", "--path", str(path), "--output", str(tmp_path / "shared")])
    export.main()
    trained, shared = load_model(path), load_model(tmp_path / "shared")
    assert shared.spec == trained.spec
    torch.testing.assert_close(dict(shared.state_dict()), dict(trained.state_dict()), rtol=0, atol=0)
    card = (tmp_path / "shared/README.md").read_text()
    assert "normalised by mean (0.5, 0.5, 0.5) and" in card and "pip install timm" in card


@pytest.mark.parametrize("arch, layer", [("timm/test_convnext", "stages.3"), ("timm/test_vit", "blocks.5.norm1")])
def test_where_grad_cam_looks(arch, layer):
    """Maps of the last stage; of a transformer, its tokens without the class token's, as a map."""
    model, x, kept = build_model(arch, "mrl", [8, 64], 5).eval(), torch.randn(2, 3, 64, 64), []
    maps, logits = gradcam.grad_cam(model, x)
    model.get_submodule(layer).register_forward_hook(lambda *call: kept.append(call[-1].requires_grad_()) or None)
    scores = stack_logits(model(x)).amax(-1).sum(1)
    assert torch.equal(scores, logits.amax(-1).sum(1)) and maps.max() > 0
    for score, found in zip(scores, maps, strict=True):
        values = torch.stack([*torch.autograd.grad(score, kept[0], retain_graph=True), kept[0]])
        if arch == "timm/test_vit":
            values = values[:, :, 1:].mT.reshape(2, 2, -1, 4, 4)
        gradient, output = values
        torch.testing.assert_close(found, (gradient.mean((2, 3), keepdim=True) * output).sum(1).relu())


def test_maps_in_any_layout():
    maps = torch.randn(2, 8, 3, 3)
    for output, prefix in ((maps, 1), (maps.movedim(1, -1), 1), (maps.flatten(2).mT, 0),
                           (torch.cat([torch.zeros(2, 5, 8), maps.flatten(2).mT], 1), 5)):
        assert torch.equal(gradcam.as_maps(output, prefix), maps)
    with pytest.raises(InputError, match="11 tokens are not 1 and a square of patches: name another layer"):
        gradcam.as_maps(torch.zeros(2, 11, 8), 1)


@pytest.mark.parametrize("arch, said", [
    ("timm/convnext_tny", "unknown architecture 'timm/convnext_tny': near it: timm/convnext_tiny, timm/"),
    ("timm/vit_tiny_patch16_224.mine", "'timm/vit_tiny_patch16_224.mine': near it: timm/vit_tiny_patch16_224"),
    ("timm/zzzz", r"see timm.list_models\(\)"),
    ("timm/deit_tiny_distilled_patch16_224", "does not end in a linear classifier")])
def test_names_that_are_none(arch, said):
    with torch.device("meta"), pytest.raises(InputError, match=said):
        build_model(arch)


def test_sizes_that_patches_do_not_divide():
    with torch.device("meta"):
        model = build_model("timm/test_vit")
    check_image_size(model, 48, "crop")
    with pytest.raises(InputError, match=r"--crop=40: timm/test_vit does not take images of this size: .*divisible"):
        check_image_size(model, 40, "crop")


def test_timm_is_missing(tmp_path, monkeypatch):
    path = make_run(tmp_path, arch="timm/test_vit")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"the architecture timm/test_vit needs a package: pip install timm$"):
        load_model(path)
