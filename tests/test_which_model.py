"""Flags, names and shapes settle which model a file holds; golden logits come out of this script's own loading."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import fill
from image_trees import make_run
from which_model import check_checkpoint, open_by_flags, read_released_name

from MRL import NESTING_LIST
from mrl_files import InputError
from mrl_models import build_model, compute_logits, fill_model, find_weights

EVERY_SIZE = {"mrl": NESTING_LIST, "mrl_e": NESTING_LIST, "ff512": [512], "ff2048": [2048]}
FLAGS = {"arch": None, "mrl": False, "efficient": False, "rep_size": None, "nesting_list": None, "old_ckpt": False,
         "crop": 64}


def load(path, **flags):
    """By the flags of pytorch_inference.py."""
    args = SimpleNamespace(**FLAGS | flags)
    check_checkpoint(path, args)
    return fill_model(*open_by_flags(path, args))


@pytest.fixture(scope="module")
def blur_filters():
    """What fill leaves as built."""
    return {key: value for key, value in build_model("resnet50").state_dict().items() if key.endswith("blur_filter")}


@pytest.mark.parametrize("kind, file, prefix, flags", [
    ("mrl_old", "r50_mrl1_e0_ff2048.pt", "module.", {"old_ckpt": True}),
    ("mrl_e_old", "r50_mrl1_e1_ff2048.pt", "", {"old_ckpt": True}),
    ("mrl_e_old", "mine.pt", "module.", {"old_ckpt": True, "mrl": True, "efficient": True}),
    ("ff512", "r50_mrl0_e0_ff512.pt", "module.", {"old_ckpt": True}),
    ("ff2048", "mine.pt", "", {}),
    ("mrl", "mine.pt", "module.", {"mrl": True}),
    ("mrl_e", "mine.pt", "", {"efficient": True}),
])
def test_golden_layouts_give_golden_logits(golden, blur_filters, tmp_path, kind, file, prefix, flags):
    numbers, arrays = golden("model")
    shapes = numbers[f"resnet50_{kind}_state_dict"]
    integer = {key: torch.tensor(0) for key in shapes if key.endswith("num_batches_tracked")}
    blank = {key: torch.zeros(shape) for key, shape in shapes.items()} | integer | blur_filters
    torch.save({prefix + key: value for key, value in fill(blank, seed=5).items()}, tmp_path / file)
    model = load(tmp_path / file, **flags)
    assert model.spec["nesting_list"] == EVERY_SIZE[kind.removesuffix("_old")]
    x = torch.from_numpy(np.random.default_rng(3).standard_normal((2, 3, 64, 64)).astype(np.float32))
    with torch.no_grad():
        logits = compute_logits(model, x)[..., :20].numpy()
    expected = arrays[f"resnet50_{kind}_logits_first20"]
    np.testing.assert_allclose(logits.reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)        # measured: 7e-7


@pytest.mark.parametrize("path, says", [
    ("r50_mrl1_e0_ff2048.pt", ("resnet50", "mrl", None)),
    ("r50_mrl0_e0_ff256.pt", ("resnet50", "ff256", None)),
    ("r50_mrl1_e1_ff2048_16start.pt", ("resnet50", "mrl_e", NESTING_LIST[1:])),
    ("mrl_e_16start/r50_mrl1_e1_ff2048.pt", ("resnet50", "mrl_e", NESTING_LIST[1:])),
    ("r18_mrl1_e0_ff512.pt", ("resnet18", "mrl", None)),
    ("mrl/Imagenet1k_R50_mrl/final_weights.pt", ("resnet50", "mrl", None)),
    ("mrl/Imagenet1k_R50_mrl_16start/final_weights.pt", ("resnet50", "mrl", NESTING_LIST[1:])),
    ("mrl/Imagenet1k_R50_mrl_e/final_weights.pt", ("resnet50", "mrl_e", None)),
    ("mrl/Imagenet1k_R50_mrl_e_16start/final_weights.pt", ("resnet50", "mrl_e", NESTING_LIST[1:])),
    ("fixed-feature/Imagenet1k_R50_ff1024/final_weights.pt", ("resnet50", "ff1024", None)),
    ("resnet-family/resnet101_mrl/final_weights.pt", ("resnet101", "mrl", None)),
    ("resnet-family/resnet34-ff512/final_weights.pt", ("resnet34", "ff512", None)),
])
def test_released_names(path, says):
    assert tuple(read_released_name(path).values()) == says


@pytest.mark.parametrize("path", ["final_weights.pt", "resnet50/final_weights.pt", "resnet50_mine/final_weights.pt"])
def test_names_that_say_nothing(path):
    assert read_released_name(path) == {}


@pytest.mark.parametrize("head", ["mrl", "mrl_e"])
def test_16start_files_load_by_name(tmp_path, head):
    sizes = [16, 32, 64, 128, 256, 512]
    state = build_model("resnet18", head, nesting_list=sizes).state_dict()
    if head == "mrl_e":
        state = {key.replace("nesting_classifier_0.", ""): value for key, value in state.items()}
    path = tmp_path / f"r18_mrl1_e{int(head == 'mrl_e')}_ff512_16start.pt"
    torch.save(state, path)
    assert load(path, old_ckpt=True).spec["nesting_list"] == sizes


# As beside the authors' released files: the settings of the original's run, under dotted names.
ORIGINALS = {"model.arch": "resnet18", "model.use_blurpool": 1, "training.batch_size": 256, "logging.folder": "/logs"}


@pytest.mark.parametrize("folder, head, sizes", [
    ("mrl/Imagenet1k_R18_mrl", "mrl", NESTING_LIST[:7]), ("mrl/Imagenet1k_R18_mrl_16start", "mrl", NESTING_LIST[1:7]),
    ("mrl/Imagenet1k_R18_mrl_e", "mrl_e", NESTING_LIST[:7]), ("resnet-family/resnet18-ff512", "ff512", [512]),
    ("fixed-feature/Imagenet1k_R18_ff16", "ff16", [16]),
])
def test_folders_of_the_hub_load_by_their_names(tmp_path, folder, head, sizes):
    """Each holds final_weights.pt, log and params.json; a file or its folder is what --path takes."""
    model = build_model("resnet18", head, nesting_list=sizes)
    old = {f"module.{k.replace('fc.nesting_classifier_0', 'fc') if head == 'mrl_e' else k}": v
           for k, v in model.state_dict().items()}
    (tmp_path / folder).mkdir(parents=True)
    torch.save(old, tmp_path / folder / "final_weights.pt")
    (tmp_path / folder / "params.json").write_text(json.dumps(ORIGINALS))
    released = load(find_weights(tmp_path / folder), old_ckpt=True)
    assert released.spec == model.spec
    torch.testing.assert_close(released.state_dict(), model.state_dict(), rtol=0, atol=0)


def bare(tmp_path, **model):
    path = tmp_path / "weights.pt"
    torch.save(build_model("resnet18", num_classes=10, **model).state_dict(), path)
    return path


def test_a_run_needs_only_its_path(tmp_path):
    path = make_run(tmp_path / "run", "mrl_e", nesting_list=[4, 512])
    assert load(path).spec == json.loads((tmp_path / "run" / "params.json").read_text())["model"]


@pytest.mark.parametrize("flags, message", [
    ({"mrl": True}, "head=mrl was asked for, params.json beside it says mrl_e"),
    ({"arch": "resnet50"}, "arch=resnet50 was asked for"),
    ({"efficient": True, "nesting_list": [8, 512]}, "nesting_list"),
    ({"efficient": True, "rep_size": 2048}, "--rep_size 2048 was asked for, the file holds sizes up to 512"),
])
def test_flags_that_contradict_params_json(tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        load(make_run(tmp_path, "mrl_e"), **flags)


@pytest.mark.parametrize("head, flags, message", [
    ("mrl", {"mrl": True}, r"does not fit resnet50 with head mrl .*; for another network give arch \(--arch\)"),
    ("mrl_e", {"arch": "resnet18"}, r"do not show in a file: give nesting_list \(--efficient .*"),
    ("ff512", {"arch": "resnet18", "old_ckpt": True}, r"give head \(--mrl, --efficient or --rep_size\)"),
    ("ff512", {"arch": "resnet18", "efficient": True}, r"if it is a released MRL-E file: give old_ckpt \(--old_ckpt\)"),
])
def test_what_a_bare_file_leaves_open_is_an_error_that_names_file_and_flag(tmp_path, head, flags, message):
    path = bare(tmp_path, head=head)
    with pytest.raises(InputError, match=f"^{path}: .*{message}$"):
        load(path, **flags)


def test_of_a_nested_run_rep_size_says_nothing_of_the_head(tmp_path):
    """It is where embeddings are cut."""
    assert load(make_run(tmp_path, "mrl_e"), rep_size=8).spec["head"] == "mrl_e"


def test_shapes_show_the_head(tmp_path):
    assert load(bare(tmp_path, head="ff32"), arch="resnet18").spec["nesting_list"] == [32]
    with pytest.raises(InputError, match="head=ff64 was asked for, the file holds ff32"):
        load(bare(tmp_path, head="ff32"), arch="resnet18", rep_size=64)


def test_sizes_of_a_bare_mrl_e_file(tmp_path, capsys):
    path = bare(tmp_path, head="mrl_e")
    assert load(path, arch="resnet18", efficient=True).spec["nesting_list"] == NESTING_LIST[:7]
    assert "taking [8, 16, 32, 64, 128, 256, 512] (--nesting_list changes them)" in capsys.readouterr().out
    sizes = [2, 512]
    assert load(path, arch="resnet18", efficient=True, nesting_list=sizes).spec["nesting_list"] == sizes
    with pytest.raises(InputError, match="nesting_list"):
        load(path, arch="resnet18")


def test_flags_against_a_released_name(tmp_path):
    path = bare(tmp_path, head="ff256").rename(tmp_path / "r18_mrl0_e0_ff256.pt")
    with pytest.raises(InputError, match="the flags say head=mrl, the file's name ff256"):
        load(path, old_ckpt=True, mrl=True)


def test_pickled_modules_nan_and_truncated_files_are_refused(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(InputError, match="holds more than tensors"):
        load(path)
    model = build_model("resnet18", "ff512", num_classes=10)
    model.conv1.weight.data[0, 0, 0, 0] = torch.nan
    torch.save(model.state_dict(), path)
    with pytest.raises(InputError, match=r"conv1.weight holds NaN"):
        load(path, arch="resnet18")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="truncated"):
        load(path)


@pytest.mark.parametrize("noted, said", [
    ({"settings": {"validation": {"resolution": 32}}}, "trained for images of 32 pixels, here they have 64: --crop 32"),
    ({"settings": {"validation": {"resolution": 80}}}, ""), ({"settings": []}, ""), ({}, "")])
def test_a_run_for_other_images_is_warned_of(tmp_path, capsys, noted, said):
    path = make_run(tmp_path)
    about = path.with_name("params.json")
    about.write_text(json.dumps(json.loads(about.read_text()) | noted))
    load(str(path))
    assert said in capsys.readouterr().err if said else not capsys.readouterr().err
