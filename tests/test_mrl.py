"""MRL.py against the original's numbers (tests/golden) and against plain loops."""
import errno
import json
import os
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fill
from sklearn.metrics import log_loss, top_k_accuracy_score

import MRL
from MRL import InputError, Matryoshka_CE_Loss, MRL_Linear_Layer, build_model, load_model, stack_logits

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

@pytest.mark.parametrize("kind", ["mrl", "mrl_e"])
def test_head_equals_the_original(golden, kind):
    numbers, arrays = golden("model")
    head = MRL_Linear_Layer(MRL.NESTING_LIST, 10, efficient=kind == "mrl_e")
    assert {k: list(v.shape) for k, v in head.state_dict().items()} == numbers[f"head_{kind}_state_dict"]
    head.load_state_dict(fill(head.state_dict(), 11))
    rng = np.random.default_rng(7)
    x = torch.from_numpy(rng.standard_normal((6, 2048)).astype(np.float32)).requires_grad_()
    y = torch.from_numpy(rng.integers(0, 10, 6))
    logits = head(x)
    assert isinstance(logits, tuple) and len(logits) == 9
    np.testing.assert_allclose(torch.stack(logits).detach(), arrays[f"head_{kind}_logits"], atol=2e-6)
    loss = Matryoshka_CE_Loss(label_smoothing=0.1)(logits, y)
    loss.backward()
    assert loss.item() == pytest.approx(float(arrays[f"head_{kind}_loss"]), rel=3e-7)
    np.testing.assert_allclose(x.grad, arrays[f"head_{kind}_grad_x"], atol=1e-7)
    weighted = Matryoshka_CE_Loss(range(1, 10), label_smoothing=0.1)(logits, y)
    assert weighted.item() == pytest.approx(float(arrays[f"head_{kind}_loss_weighted_1to9"]), rel=3e-7)


def test_fixed_feature_layer_equals_the_original(golden):
    _, arrays = golden("model")
    head = MRL.FixedFeatureLayer(512, 10)
    head.load_state_dict(fill(head.state_dict(), 11))
    x = torch.from_numpy(np.random.default_rng(7).standard_normal((6, 2048)).astype(np.float32))
    np.testing.assert_allclose(head(x).detach(), arrays["head_ff512_logits"], atol=1e-6)


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


# ---- the layer and the loss, against plain computations

def test_mrl_e_is_one_matrix_read_to_each_size():
    head = MRL_Linear_Layer([2, 3, 8], 4, efficient=True)
    x = torch.randn(5, 10)
    weight, bias = head.nesting_classifier_0.weight, head.nesting_classifier_0.bias
    for size, logits in zip([2, 3, 8], head(x), strict=True):
        torch.testing.assert_close(logits, x[:, :size] @ weight[:, :size].T + bias)


@pytest.mark.parametrize("efficient", [False, True])
def test_one_size_is_a_plain_linear_layer(efficient):
    head = MRL_Linear_Layer([8], 4, efficient=efficient)
    x = torch.randn(5, 8)
    (logits,) = head(x)
    torch.testing.assert_close(logits, head.nesting_classifier_0(x))


def test_no_bias_means_none():
    assert [k for k in MRL_Linear_Layer([2, 4], 3, bias=False).state_dict() if "bias" in k] == []


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", ["none", "features", "weights"])
def test_the_shared_heads_gradient_is_autograds(bias, frozen):
    """Width 11 above the largest size; of the sizes, the loss uses two."""
    head, x = MRL_Linear_Layer([2, 5, 9], 4, efficient=True, bias=bias).double(), torch.randn(6, 11).double()
    x.requires_grad_(frozen != "features")
    head.requires_grad_(frozen != "weights")
    layer, wanted = head.nesting_classifier_0, [t for t in (x, *head.parameters()) if t.requires_grad]
    results = []
    for logits in (head(x), MRL.nested_logits(x, layer.weight, layer.bias, [2, 5, 9])):
        results.append((*logits, *torch.autograd.grad((logits[0] ** 2).sum() + (logits[2] ** 3).sum(), wanted)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", ["mrl", "mrl_e"])
def test_heads_in_autocast_compiled_and_on_no_device(kind):
    head, x = MRL_Linear_Layer([2, 5, 9], 4, efficient=kind == "mrl_e"), torch.randn(6, 9)
    whole = torch.stack(head(x))
    with torch.autocast("cpu", torch.bfloat16):
        half = head(x)
    assert {logits.dtype for logits in half} == {torch.bfloat16}
    torch.testing.assert_close(torch.stack(half).float(), whole, rtol=0.05, atol=0.05)
    sum(logits.float().sum() for logits in half).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in head.parameters())
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.stack(compiled(x)), whole)
    assert head.to("meta")(x.to("meta"))[2].shape == (6, 4)


@pytest.mark.parametrize("kwargs", [{}, {"label_smoothing": 0.1}, {"weight": torch.tensor([1., 2., 3., 4.])},
                                    {"ignore_index": 2}, {"reduction": "sum"},
                                    {"weight": torch.tensor([1., 2., 3., 4.]), "ignore_index": 2}])
@pytest.mark.parametrize("importance", [None, [1, 2, 0.5]])
@pytest.mark.parametrize("ignored", [0, 2])
def test_loss_equals_the_loop_over_sizes(kwargs, importance, ignored):
    target, logits = torch.tensor([0, 1, 2, 3, 2, 1]), [torch.randn(6, 4, requires_grad=True) for _ in range(3)]
    target[:ignored] = kwargs.get("ignore_index", -100)
    loop = sum(c * F.cross_entropy(x, target, **kwargs) for c, x in zip(importance or [1, 1, 1], logits, strict=True))
    expected = torch.autograd.grad(loop, logits)
    for given in (tuple(logits), torch.stack(logits)):
        loss = Matryoshka_CE_Loss(importance, **kwargs)(given, target)
        torch.testing.assert_close(loss, loop)
        torch.testing.assert_close(torch.autograd.grad(loss, logits), expected)


def test_loss_takes_probabilities_as_targets():
    logits, target = torch.randn(3, 6, 4), torch.rand(6, 4).softmax(1)
    torch.testing.assert_close(Matryoshka_CE_Loss()(logits, target), sum(F.cross_entropy(x, target) for x in logits))


def test_relative_importance_is_a_buffer_and_checked():
    assert dict(Matryoshka_CE_Loss([1, 2]).named_buffers())["relative_importance"].tolist() == [1, 2]
    assert Matryoshka_CE_Loss([1, 2]).to("meta").relative_importance.is_meta      # follows the device
    for weights in ([-1, 1], [0, 0], [float("nan"), 1], 3):
        with pytest.raises(InputError):
            Matryoshka_CE_Loss(weights)
    with pytest.raises(ValueError, match="2 weights, the model 3 sizes"):
        Matryoshka_CE_Loss([1, 2])(torch.randn(3, 6, 4), torch.zeros(6, dtype=torch.long))


def test_count_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    logits, y = rng.standard_normal((3, 200, 12)), rng.integers(0, 12, 200)
    top1, top5, loss = (MRL.count(torch.tensor(logits), torch.tensor(y)) / 200).tolist()
    for g in range(3):
        probabilities = np.exp(logits[g]) / np.exp(logits[g]).sum(1, keepdims=True)
        assert top1[g] == pytest.approx(top_k_accuracy_score(y, logits[g], k=1))
        assert top5[g] == pytest.approx(top_k_accuracy_score(y, logits[g], k=5))
        assert loss[g] == pytest.approx(log_loss(y, probabilities, labels=range(12)))


def test_counts_by_hand():
    logits = torch.tensor([[[3., 1, 2, 0, -1, -2, -3], [1, 2, 3, 4, 5, 6, 7]],
                           [[0., 1, 2, 3, 4, 5, 6], [7, 6, 5, 4, 3, 2, 1]]])      # two sizes, two images, seven classes
    top1, top5, loss = MRL.count(logits, torch.tensor([0, 1]))
    assert top1.tolist() == [1, 0] and top5.tolist() == [1, 1]
    assert loss[0].item() == pytest.approx(F.cross_entropy(logits[0], torch.tensor([0, 1]), reduction="sum").item())
    top1, top5, _ = MRL.count(torch.tensor([[[3., 2, 1], [3, 2, 1]]]), torch.tensor([0, 2]))      # fewer than five
    assert (top1.item(), top5.item()) == (1, 2)


def test_default_sizes():
    assert MRL.default_nesting_list(2048) == MRL.NESTING_LIST
    assert MRL.default_nesting_list(2048, 4)[0] == 16
    assert MRL.default_nesting_list(768) == [8, 16, 32, 64, 128, 256, 512, 768]
    assert MRL.default_nesting_list(8) == [8]
    with pytest.raises(InputError):
        MRL.default_nesting_list(8, 4)


@pytest.mark.parametrize("sizes", [[], [8, 8], [16, 8], [0, 8], [8.5]])
def test_sizes_must_increase(sizes):
    with pytest.raises(InputError):
        MRL_Linear_Layer(sizes)


def test_features_that_are_too_few():
    with pytest.raises(ValueError, match="4 dimensions, the classifier reads 8"):
        MRL_Linear_Layer([2, 8], 3)(torch.randn(1, 4))


# ---- models

@pytest.mark.parametrize("arch, name, width", [("resnet18", "fc", 512), ("convnext_tiny", "classifier.2", 768),
                                               ("efficientnet_b0", "classifier.1", 1280),
                                               ("vit_b_16", "heads.head", 768), ("densenet121", "classifier", 1024)])
def test_any_torchvision_classifier(arch, name, width):
    with torch.device("meta"):
        model = build_model(arch, "mrl", num_classes=3)
    found, head = MRL.classifier(model)
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
    names = [MRL.model_name(tiny(head).spec) for head in ("mrl", "mrl_e", "ff16")]
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
    ("mrl", {"arch": "resnet34"}, r"weights.pt: does not fit resnet34 .*; for another network: give arch"),
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


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile_was_here",)


def test_files_that_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny()
    whole = saved(model, tmp_path).read_bytes()
    broken = {k: v * float("nan") if k == "conv1.weight" else v for k, v in model.state_dict().items()}
    cases = {"code.pt": ({"a": Hostile()}, "pickled code"), "nan.pt": (broken, "conv1.weight holds NaN"),
             "list.pt": ([1, 2], "no state dict"), "empty_dict.pt": ({}, "no state dict")}
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


def test_replacing_leaves_nothing_half_written(tmp_path):
    target = tmp_path / "a.npy"
    target.write_text("old")
    with pytest.raises(RuntimeError), MRL.replacing(target) as path:
        path.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
    with MRL.replacing(target) as path:
        path.write_text("new")
    assert target.read_text() == "new" and list(tmp_path.iterdir()) == [target]


# ---- files

def test_locked_lets_one_in_at_a_time(tmp_path, capsys):
    """The first one removes the lock's file while others wait for it: they take turns all the same."""
    path, inside, most = tmp_path / "made/list.npy", [], []

    def work():
        with MRL.locked(path):
            inside.append(None)
            most.append(len(inside))
            time.sleep(0.1)
            inside.pop()

    others = [threading.Thread(target=work) for _ in range(4)]
    with MRL.locked(path):
        with pytest.raises(InputError, match="in use"), MRL.locked(path, "in use"):
            pass
        for other in others:
            other.start()
        while capsys.readouterr().err.count("list.npy: waiting for the process that makes it\n") < 1:
            time.sleep(0.01)
        assert not most
    for other in others:
        other.join()
    assert most == [1, 1, 1, 1] and not any(path.parent.iterdir())


def test_locked_on_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def none_here(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none_here)
    with MRL.locked(tmp_path / "list.npy"):
        assert "list.npy: no locks on this file system" in capsys.readouterr().err


def test_json(tmp_path):
    assert MRL.read_json(tmp_path / "a.json") is None
    MRL.write_json(tmp_path / "a.json", {"sizes": [8, 16]})
    assert MRL.read_json(tmp_path / "a.json") == {"sizes": [8, 16]}
    assert MRL.json_says(tmp_path / "a.json", {"sizes": (8, 16)}) and MRL.json_says(tmp_path / "a.json", {})
    assert not MRL.json_says(tmp_path / "a.json", {"sizes": [8]}) and not MRL.json_says(tmp_path / "b.json", {})
    for content in (b"", b"{", b"\xff\xfe"):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(InputError, match=r"a.json: not a JSON file"):
            MRL.read_json(tmp_path / "a.json")


def test_embeddings_stay_on_disk(tmp_path):
    np.save(tmp_path / "a-X.npy", np.ones((5, 4), np.float16))
    X = MRL.read_embeddings(tmp_path / "a-X.npy")
    assert isinstance(X, np.memmap) and X.shape == (5, 4) and X.dtype == np.float16


@pytest.mark.parametrize("X, note, complaint", [
    (np.zeros((5, 4)), {}, r"is float64 \[5, 4\]"), (np.zeros(5, np.float32), {}, r"is float32 \[5\]"),
    (np.zeros((0, 4), np.float32), {}, r"\[0, 4\]"),
    (np.ones((5, 4), np.float32), {"complete": False}, "unfinished"),
    (np.ones((5, 4), np.float32), {"n": 6, "dim": 4}, r"is \[5, 4\], but a-X.json says \[6, 4\]")])
def test_embeddings_that_are_not_whole_are_refused(tmp_path, X, note, complaint):
    np.save(tmp_path / "a-X.npy", X)
    (tmp_path / "a-X.json").write_text(json.dumps(note))
    with pytest.raises(InputError, match=complaint):
        MRL.read_embeddings(tmp_path / "a-X.npy")


def test_a_truncated_file_is_refused(tmp_path):
    np.save(tmp_path / "a-X.npy", np.ones((50, 4), np.float32))
    whole = (tmp_path / "a-X.npy").read_bytes()
    for length in (0, 40, len(whole) - 8):
        (tmp_path / "a-X.npy").write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"not a complete .npy file"):
            MRL.read_embeddings(tmp_path / "a-X.npy")


@pytest.mark.parametrize("y", [np.arange(5), np.arange(5.0), np.arange(5, dtype=np.float16)[:, None],
                               np.arange(5, dtype=np.uint16), np.array([4201, 0, 1, 2, 3], np.float32)])
def test_labels_of_any_kind_are_read_exactly(tmp_path, y):
    np.save(tmp_path / "y.npy", y)
    labels = MRL.read_labels(tmp_path / "y.npy", 5)
    assert labels.dtype == np.int64 and labels.tolist() == y.ravel().tolist()


@pytest.mark.parametrize("y, complaint", [
    (np.array([0, 1, 4201], np.float16)[:, None], "merged classes"), (np.array([0, 0.5, 1]), "whole numbers"),
    (np.array([0, 1]), r"\[2\] labels do not fit 3 embeddings"), (np.zeros((3, 2)), r"\[3, 2\] labels do not fit")])
def test_labels_that_are_not_certain_are_refused(tmp_path, y, complaint):
    np.save(tmp_path / "y.npy", y)
    with pytest.raises(InputError, match=complaint):
        MRL.read_labels(tmp_path / "y.npy", 3)


def test_labels_of_any_kind_are_exact_or_refused():
    true = np.arange(4202)
    for stored in (true, true.astype(np.float32), true.astype(np.uint16)):
        labels = MRL.exact_labels(stored, "y.npy")
        assert labels.dtype == np.int64 and labels.tolist() == true.tolist()
    assert MRL.exact_labels(np.arange(2048).astype(np.float16)[:, None], "y.npy").shape == (2048, 1)
    merged = true.astype(np.float16)
    assert (merged.astype(int) != true).sum() == 1103                   # what the original's format lost
    with pytest.raises(InputError, match=r"y.npy: float16 labels up to 4200, .*merged classes"):
        MRL.exact_labels(merged, "y.npy")
    for wrong in (0.5, -1, np.nan, np.inf, "cat"):
        with pytest.raises(InputError, match="whole numbers"):
            MRL.exact_labels(np.array([0, wrong] if wrong != "cat" else ["cat"]), "y.npy")
