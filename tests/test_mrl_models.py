"""mrl_models.py against the original's numbers (tests/golden), and the files it reads or refuses."""
import gzip
import io
import json
import lzma
import os
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fill
from PIL import Image
from sklearn.metrics import log_loss, top_k_accuracy_score

import MRL
from mrl_files import InputError
from mrl_models import (
    autocast,
    build_model,
    check_nesting_list,
    classifier,
    classify_in_float32,
    count,
    default_nesting_list,
    load_model,
    model_name,
    read_state_dict,
    stack_logits,
)

HEADS = {"mrl": "mrl", "mrl_e": "mrl_e", "ff512": "ff512", "ff2048": "ff2048"}


def tiny(head="mrl", **spec):
    """A small model with reproducible weights."""
    torch.manual_seed(0)
    return build_model("resnet18", head, num_classes=5, **spec)


def saved(model, folder, params=False, state=None):
    path = folder / "final_weights.pt"
    torch.save(model.state_dict() if state is None else state, path)
    if params:
        (folder / "params.json").write_text(json.dumps({"model": model.spec}))
    return path


# ---- golden: the original's own numbers

def golden_logits(model):
    x = torch.from_numpy(np.random.default_rng(3).standard_normal((2, 3, 64, 64)).astype(np.float32))
    with torch.inference_mode():
        return stack_logits(model.eval()(x))[..., :20].squeeze(0).numpy()


@pytest.mark.parametrize("kind", HEADS)
def test_whole_model_equals_the_original(golden, kind):
    numbers, arrays = golden("model")
    model = build_model(head=HEADS[kind])
    state = model.state_dict()
    assert list(state) == list(numbers[f"resnet50_{kind}_state_dict"])      # keys in the original's order
    assert {k: list(v.shape) for k, v in state.items()} == numbers[f"resnet50_{kind}_state_dict"]
    model.load_state_dict(fill(state, 5))
    np.testing.assert_allclose(golden_logits(model), arrays[f"resnet50_{kind}_logits_first20"], atol=2e-6)


@pytest.mark.parametrize("kind, head, sizes", [("mrl_old", "mrl", None), ("mrl_e_old", "mrl_e", MRL.NESTING_LIST)])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_released_layouts_load(golden, tmp_path, kind, head, sizes, prefix):
    numbers, arrays = golden("model")
    empty = {k: torch.zeros(shape, dtype=torch.long if "num_batches" in k else None)
             for k, shape in numbers[f"resnet50_{kind}_state_dict"].items()}
    blurred = {k: v for k, v in build_model(head=head).state_dict().items() if k.endswith("blur_filter")}
    state = fill(empty, 5) | blurred
    torch.save({prefix + k: state[k] for k in empty}, tmp_path / "old.pt")
    model = load_model(tmp_path / "old.pt", "resnet50", head, sizes, old_ckpt=True)
    np.testing.assert_allclose(golden_logits(model), arrays[f"resnet50_{kind}_logits_first20"], atol=2e-6)


# ---- logits

def test_count_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    logits, y = rng.standard_normal((3, 200, 12)), rng.integers(0, 12, 200)
    top1, top5, loss = (count(torch.tensor(logits), torch.tensor(y)) / 200).tolist()
    for g in range(3):
        probabilities = np.exp(logits[g]) / np.exp(logits[g]).sum(1, keepdims=True)
        assert top1[g] == pytest.approx(top_k_accuracy_score(y, logits[g], k=1))
        assert top5[g] == pytest.approx(top_k_accuracy_score(y, logits[g], k=5))
        assert loss[g] == pytest.approx(log_loss(y, probabilities, labels=range(12)))


def test_counts_by_hand():
    logits = torch.tensor([[[3., 1, 2, 0, -1, -2, -3], [1, 2, 3, 4, 5, 6, 7]],
                           [[0., 1, 2, 3, 4, 5, 6], [7, 6, 5, 4, 3, 2, 1]]])      # two sizes, two images, seven classes
    top1, top5, loss = count(logits, torch.tensor([0, 1]))
    assert top1.tolist() == [1, 0] and top5.tolist() == [1, 1]
    assert loss[0].item() == pytest.approx(F.cross_entropy(logits[0], torch.tensor([0, 1]), reduction="sum").item())
    top1, top5, _ = count(torch.tensor([[[3., 2, 1], [3, 2, 1]]]), torch.tensor([0, 2]))      # fewer than five
    assert (top1.item(), top5.item()) == (1, 2)


def test_default_sizes():
    assert default_nesting_list(2048) == MRL.NESTING_LIST
    assert default_nesting_list(2048, 4)[0] == 16
    assert default_nesting_list(768) == [8, 16, 32, 64, 128, 256, 512, 768]
    assert default_nesting_list(8) == [8]
    with pytest.raises(InputError):
        default_nesting_list(8, 4)


@pytest.mark.parametrize("sizes", [[], [8, 8], [16, 8], [0, 8], [8.5]])
def test_sizes_must_increase(sizes):
    with pytest.raises(InputError, match="increasing positive integers"):
        check_nesting_list(sizes)


@pytest.mark.parametrize("head", ["mrl", "mrl_e", "ff16"])
def test_the_classifier_in_float32(head):
    """Under autocast, in evaluation only: float32 logits of the rounded features; compiled once for all."""
    model, x, graphs = tiny(head), torch.randn(2, 3, 32, 32), []
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = stack_logits(model.eval()(x))
        classify_in_float32(model)
        whole, again = stack_logits(model(x)), [stack_logits(compiled(x)) for _ in range(2)][1]
        training = stack_logits(model.train()(x))
    assert (half.dtype, whole.dtype, training.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    torch.testing.assert_close(half.float(), whole, rtol=0.02, atol=0.02)
    torch.testing.assert_close(again, whole)
    assert not torch.equal(half.float(), whole) and len(graphs) == 1


def test_fp32_is_float32(monkeypatch):
    """What PyTorch allows by default on a GPU, TF32 in convolutions, is not what fp32 says."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with autocast("cpu", "fp16"):
        assert torch.backends.cudnn.allow_tf32
    with autocast("cpu", "fp32"):
        assert not torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"


# ---- models

@pytest.mark.parametrize("arch, name, width", [("resnet18", "fc", 512), ("convnext_tiny", "classifier.2", 768),
                                               ("efficientnet_b0", "classifier.1", 1280),
                                               ("vit_b_16", "heads.head", 768), ("densenet121", "classifier", 1024)])
def test_any_torchvision_classifier(arch, name, width):
    with torch.device("meta"):
        model = build_model(arch, "mrl", num_classes=3)
    found, head = classifier(model)
    assert (found, head.nesting_list[-1], head.num_classes) == (name, width, 3)


@pytest.mark.parametrize("arguments, said", [({"arch": "resnet51"}, "unknown architecture 'resnet51'"),
                                             ({"head": "mlr"}, "unknown head 'mlr'"),
                                             ({"head": "ff4096"}, "more than the 2048 features"),
                                             ({"head": "ff8", "nesting_list": [16]}, "one size 8"),
                                             ({"nesting_list": []}, "increasing positive integers"),
                                             ({"arch": "squeezenet1_0"}, "does not end in a linear classifier")])
def test_what_cannot_be_built(arguments, said):
    with torch.device("meta"), pytest.raises(InputError, match=said):
        build_model(**arguments)


def test_names():
    names = [model_name(tiny(head).spec) for head in ("mrl", "mrl_e", "ff16")]
    assert names == ["mrl1_e0_ff512", "mrl1_e1_ff512", "mrl0_e0_ff16"]


# ---- reading checkpoints

@pytest.mark.parametrize("head", ["mrl", "mrl_e", "ff16"])
@pytest.mark.parametrize("prefix, wrapper", [("", None), ("module.", "model"), ("_orig_mod.module.", "state_dict")])
def test_a_run_needs_only_its_path(tmp_path, head, prefix, wrapper):
    model = tiny(head, nesting_list=None if head == "ff16" else [4, 512])
    state = {prefix + k: v for k, v in model.state_dict().items()}
    loaded = load_model(saved(model, tmp_path, params=True, state={wrapper: state} if wrapper else state))
    assert loaded.spec == model.spec and not loaded.training
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


@pytest.mark.parametrize("wrap", [
    lambda state: {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {"m": {"fc.bias": state["fc.bias"]}}},
    lambda state: {"net": state, "acc": 71.3}, lambda state: {"state_dict": {"network": state}},
    lambda state: {"model": {"name": "r18"}, "weights": state}, lambda state: {"ema": state, "decay": 0.99},
    lambda state: {"model": state, "ema": {k: v + 1 for k, v in state.items()}},
    lambda state: {"state_dict": {f"model.{k}": v for k, v in state.items()}, "pytorch-lightning_version": "2"},
    lambda state: {f"module.model._orig_mod.{k}": v for k, v in state.items()},
    lambda state: {"n_averaged": torch.tensor(3)} | {f"module.{k}": v for k, v in state.items()},
    lambda state: {f"_fsdp_wrapped_module.{k.replace('.', '._fsdp_wrapped_module.', 1)}": v for k, v in state.items()},
    lambda state: {k.replace("layer1.0.", "layer1.0._checkpoint_wrapped_module._orig_mod."): v
                   for k, v in state.items()},
], ids=["model_state_dict", "net", "two", "another name", "ema", "model goes before ema", "lightning", "ddp", "swa",
        "fsdp", "within"])
def test_wrappers_and_prefixes_that_are_unmistakable(tmp_path, wrap):
    state = tiny("ff16").state_dict()
    torch.save(wrap(state), tmp_path / "w.pt")
    found = read_state_dict(tmp_path / "w.pt")
    assert list(found) == list(state) and all(torch.equal(found[k], state[k]) for k in state)


def test_what_is_not_unmistakable_is_named(tmp_path):
    state = tiny("ff16").state_dict()
    for content, said in ({"step": 1, "student": state, "teacher": state}, "no state dict.* step, student, teacher"), \
                         ({"epoch": 3, **state}, "no state dict.*beside tensors: epoch"), ([1, 2], "a list"), \
                         ({f"{k[0]}.{k}": v for k, v in state.items()},
                          "c.conv1.weight, b.bn1.weight ... are no names of resnet18: it has conv1.weight"):
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(InputError, match=rf"w.pt: .*{said}"):
            load_model(tmp_path / "w.pt", arch="resnet18")


def test_a_regnet_loads(tmp_path):
    """It computes with tensors while it is built, which the meta device has no numbers for."""
    model = build_model("regnet_y_400mf", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    assert load_model(tmp_path / "w.pt", "regnet_y_400mf").spec == model.spec


def test_shapes_show_sizes_classes_and_blurpool(tmp_path):
    model = tiny("mrl", nesting_list=[4, 512], blurpool=False)
    assert load_model(saved(model, tmp_path), arch="resnet18").spec == model.spec


def test_a_bare_nested_file_of_one_size(tmp_path):
    model = tiny("mrl", nesting_list=[512])
    path = saved(model, tmp_path)
    assert load_model(path, arch="resnet18", head="mrl", nesting_list=[512]).spec["head"] == "mrl"
    with pytest.raises(InputError, match="give nesting_list"):
        load_model(path, arch="resnet18")


@pytest.mark.parametrize("head, given, said", [
    ("mrl", {}, "give arch"),
    ("mrl_e", {"arch": "resnet18"}, "give nesting_list"),
    ("mrl", {"arch": "resnet18", "head": "ff512"}, "head=ff512 was asked for, the file holds mrl"),
    ("mrl", {"arch": "resnet18", "nesting_list": [8]}, "was asked for, the file holds"),
    ("mrl", {"arch": "resnet34"}, r"weights.pt: does not fit resnet34 .*; for another network give arch"),
    ("mrl", {"arch": "resnet999"}, r"weights.pt: unknown architecture 'resnet999'"),
    ("ff16", {"arch": "resnet18", "nesting_list": [8]}, r"weights.pt: head ff16 has the one size 16"),
    ("ff16", {"arch": "resnet18", "old_ckpt": True}, r"weights.pt: .*give head"),
    ("ff16", {"arch": "resnet18", "head": "mrl_e", "nesting_list": [8, 512]}, "give old_ckpt"),
])
def test_what_a_bare_file_leaves_open_is_an_error(tmp_path, head, given, said):
    with pytest.raises(InputError, match=said):
        load_model(saved(tiny(head), tmp_path), **given)


def test_flags_that_contradict_params_json(tmp_path):
    with pytest.raises(InputError, match=r"params.json beside it says mrl"):
        load_model(saved(tiny(), tmp_path, params=True), head="mrl_e")


def zipped(name, content):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(name, content)
    return archive.getvalue()


def picture(kind):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, kind)
    return file.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
FOREIGN = {
    "a git-LFS pointer.* git lfs pull": POINTER, "a web page .*download the file itself again": b"\n<!DOCTYPE html>",
    "packed .gzip.*unpack it": gzip.compress(b"weights"), "packed .*unpack": lzma.compress(b"weights"),
    "a zip archive of run/w.pt": zipped("run/w.pt", b"weights"), "truncated": zipped("w/data.pkl", b"x" * 500)[:200],
    "a TorchScript archive": zipped("w/constants.pkl", b""), "a tar archive": b"w.pt".ljust(257, b"\0") + b"ustar",
    "a safetensors file": (60).to_bytes(8, "little") + b'{"fc.weight":{"dtype":"F32"}}',      # 60 is a "<"
    "an image": picture("PNG"), "(an image)": picture("JPEG"), "a NumPy array": b"\x93NUMPY\1\0",
    "a JSON text": b'{"error": "Invalid credentials"}', "a text": b"Entry not found", "empty": b"",
    "zeros .*unfinished": bytes(5000),
}


@pytest.mark.parametrize("said", FOREIGN)
def test_what_is_no_checkpoint_is_told_by_its_first_bytes(tmp_path, said):
    path = tmp_path / "w.pt"
    path.write_bytes(FOREIGN[said])
    with pytest.raises(InputError, match=rf"w.pt: is {said}"):
        load_model(path, arch="resnet18")


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile_was_here",)


def test_files_that_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny()
    whole = saved(model, tmp_path).read_bytes()
    broken = {k: v * float("nan") if k == "conv1.weight" else v for k, v in model.state_dict().items()}
    cases = {"code.pt": ({"a": Hostile()}, "pickled code"), "nan.pt": (broken, "conv1.weight holds NaN"),
             "empty_dict.pt": ({}, "no state dict")}
    for name, (content, said) in cases.items():
        torch.save(content, name)
        with pytest.raises(InputError, match=said):
            load_model(name, arch="resnet18")
    for name, content in {"cut.pt": whole[:len(whole) // 2], "empty.pt": b"", "text.pt": b"hello"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            load_model(name, arch="resnet18")
    with pytest.raises(InputError, match="No such file"):
        load_model("missing.pt")
    assert not (tmp_path / "hostile_was_here").exists()


