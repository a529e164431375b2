"""The README's commands on tiny trees: what they print, what they leave, and what they refuse."""
import json
import os
import re
import signal
from functools import cache
from types import SimpleNamespace

import image_set
import numpy as np
import pandas as pd
import processes
import pytest
import pytorch_inference
import torch
import which_model
from eval_sets import read_synsets
from forked import fork_ranks
from image_set import ImageSet, Preparation
from image_trees import make_run, make_tree
from PIL import Image
from pytorch_inference import parse_arguments
from torch.utils.data import dataloader

from mrl_files import InputError
from mrl_models import build_model, load_model

SMALL = ["--resize", "8", "--crop", "8", "--workers", "0", "--batch_size", "64", "--device", "cpu"]
DIGITS = [str(i) for i in range(10)]
DIGITS_1000 = [str(i) for i in range(1000)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained("mrl") -> final_weights.pt of a run with that head, made once."""
    return cache(lambda head, **settings: make_run(tmp_path_factory.mktemp(head), head, **settings))


@pytest.fixture
def root(tmp_path):
    """A data root with the train and val folders of a user's own 10 classes."""
    make_tree(tmp_path / "data" / "val", DIGITS, per_class=2)
    make_tree(tmp_path / "data" / "train", DIGITS, per_class=3)
    return tmp_path / "data"


@pytest.fixture
def command(monkeypatch, root, tmp_path):
    """command("--tta") runs main() in this process, writing to tmp_path/out."""
    def start(*words, data_root=root):
        to = [] if {"--retrieval", "--output"} & set(words) else ["--output", str(tmp_path / "out")]
        monkeypatch.setattr("sys.argv", ["pytorch_inference.py", *SMALL, "--data_root", str(data_root), *to,
                                         *map(str, words)])
        pytorch_inference.main()
        return tmp_path / "out"
    return start


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_general_command_of_the_readme(tmp_path, monkeypatch, capsys):
    """A bare MRL file with DDP's prefix, on ImageNet's 1,000 true folders."""
    state = build_model("resnet18", "mrl").state_dict()
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "final_weights.pt")
    make_tree(tmp_path / "sketch", read_synsets("imagenet_synsets.txt"))
    monkeypatch.setenv("IMAGENET_ROOT", str(tmp_path))
    words = (f"--path {tmp_path}/final_weights.pt --dataset Sketch --mrl --tta --arch resnet18 --save_logits "
             f"--save_softmax --save_gt --save_predictions --output {tmp_path}/out").split()
    monkeypatch.setattr("sys.argv", ["pytorch_inference.py", *words, *SMALL])
    pytorch_inference.main()
    note, header = capsys.readouterr().out.splitlines()[:2]
    assert note == f"note: ImageNet-Sketch has 50889 images, {tmp_path}/sketch holds 1000"
    assert header == "Sketch: 1000 images, 1000 classes, tta True, mrl1_e0_ff512"
    assert [name.rsplit("_")[-1] for name in names(tmp_path / "out") if name.endswith(".pth")] == \
        ["dataset=Sketch.pth", "logits.pth", "predictions.pth", "softmax.pth"]


def test_one_checkpoint_saves_everything(command, trained, capsys):
    path = trained("mrl")
    out = command("--path", path, "--tta", "--save_logits", "--save_softmax", "--save_gt", "--save_predictions")
    stem = "mrl=True_efficient=False_ff=512_dataset=V1_tta=True"
    saved = {what: torch.load(out / f"{stem}_{what}.pth", mmap=True, weights_only=True)
             for what in ("logits", "softmax", "predictions")}
    gt = torch.load(out / "gt_dataset=V1.pth", mmap=True, weights_only=True)
    assert (saved["logits"].shape, saved["logits"].dtype) == ((7, 20, 10), torch.float32)
    assert (saved["predictions"].shape, saved["predictions"].dtype, gt.dtype) == ((7, 20), torch.int64, torch.int64)
    torch.testing.assert_close(saved["softmax"], saved["logits"].softmax(-1))
    assert gt.tolist() == [i // 2 for i in range(20)]

    result = json.loads(next(out.glob("*accuracy*.json")).read_text())
    companion = json.loads((out / f"{stem}_softmax.json").read_text())
    assert result["top1"] == (saved["logits"].argmax(-1) == gt).double().mean(1).tolist()
    assert result["checkpoint"] == companion["checkpoint"] and len(companion["checkpoint"]) == 16
    assert {key: companion[key] for key in ("nesting_list", "dataset", "tta", "n", "num_classes", "classes")} == {
        "nesting_list": [8, 16, 32, 64, 128, 256, 512], "dataset": "V1", "tta": True, "n": 20, "num_classes": 10,
        "classes": DIGITS}
    about_gt = json.loads((out / "gt_dataset=V1.json").read_text())
    assert about_gt["checkpoint"] is None and about_gt["images"] == companion["images"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "V1: 20 images, 10 classes, tta True, mrl1_e0_ff512"
    assert [line.split()[0] for line in printed[-8:-1]] == ["8", "16", "32", "64", "128", "256", "512"]
    assert printed[-1] == f"figures, logits, softmax, gt, predictions written to {out}/"


def test_mirrored_images_and_precision_reach_the_network(command, trained, root, tmp_path):
    """Images whose halves differ; what is saved against the network on x and on x mirrored."""
    rng = np.random.default_rng(0)
    for path in (root / "val").rglob("*.JPEG"):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path, format="PNG")
    path = trained("ff8")
    x, y = map(torch.stack, zip(*[(image, torch.tensor(label)) for image, label in
                                  ImageSet(root / "val", DIGITS, None, Preparation(8, 8))], strict=True))
    with torch.no_grad():
        plain, mirrored = (load_model(path)(images) for images in (x, x.flip(3)))
    assert not torch.allclose(plain, mirrored, rtol=0.1)
    found = {}
    for name, words in {"plain": [], "tta": ["--tta"], "bf16": ["--precision", "bf16"]}.items():
        command("--path", path, "--save_logits", "--output", tmp_path / name, *words)
        logits = torch.load(next((tmp_path / name).glob("*_logits.pth")), weights_only=True)[0]
        found[name] = logits, json.loads(next((tmp_path / name).glob("*_accuracy_*.json")).read_text())
    torch.testing.assert_close(found["plain"][0], plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["tta"][0], plain + mirrored, rtol=1e-4, atol=1e-5)
    loss = torch.nn.functional.cross_entropy((plain + mirrored) / 2, y).item()      # of the mean, as in training's log
    assert found["tta"][1]["loss"] == [pytest.approx(loss, rel=1e-4)]
    rounding = (found["bf16"][0] - plain).abs().max()
    assert 1e-5 < rounding < 0.1 and found["bf16"][1]["precision"] == "bf16"
    half = found["bf16"][0].bfloat16().float()
    assert (found["bf16"][0] != half).float().mean() > 0.9           # the ranking is not that of rounded logits


def test_ff_models_beside_mrl_and_mrl_e(command, trained, capsys):
    """Fixed-feature models of two sizes, MRL and MRL-E in one command: one table, one CSV file, one plot."""
    heads = ["ff8", "ff512", "mrl", "mrl_e"]
    paths = [trained(head) for head in heads]
    out = command("--path", *paths[:2], "--path", *paths[2:])
    assert "accuracy_dataset=V1_tta=False.png" in names(out) and len(names(out)) == 4 + 3
    table = pd.read_csv(out / "accuracy_dataset=V1_tta=False.csv")
    assert table.groupby("model", sort=False).size().to_dict() == {"FF": 2, "MRL": 7, "MRL-E": 7}
    for path in out.glob("*_accuracy_*.json"):
        run = json.loads(path.read_text())
        rows = table[table.checkpoint == run["checkpoint"]]
        assert rows["size"].tolist() == run["nesting_list"] and rows.top1.tolist() == pytest.approx(run["top1"])
    assert capsys.readouterr().out.splitlines()[1].split() == ["model", "FF", "MRL", "MRL-E"]


def test_outputs_of_two_ff_sizes_stand_side_by_side(command, trained):
    for head in ("ff8", "ff512"):
        out = command("--path", trained(head), "--save_softmax")
    assert [name for name in names(out) if name.endswith(".pth")] == [
        f"mrl=False_efficient=False_ff={size}_dataset=V1_tta=False_softmax.pth" for size in (512, 8)]


def test_outputs_of_another_checkpoint_are_not_overwritten(command, trained):
    one, other = (trained("ff8", seed=seed) for seed in (0, 1))
    out = command("--path", one, "--save_predictions")
    before = (out / "mrl=False_efficient=False_ff=8_dataset=V1_tta=False_predictions.pth").read_bytes()
    with pytest.raises(InputError, match=r"checkpoint=.*--overwrite"):
        command("--path", other, "--save_predictions")
    assert (out / "mrl=False_efficient=False_ff=8_dataset=V1_tta=False_predictions.pth").read_bytes() == before
    with pytest.raises(InputError, match=r"--path: two of them would write .*logits.pth; give them an --output each"):
        command("--path", one, other, "--save_logits", "--overwrite")     # both of one name in one command
    assert len(list(out.glob("*accuracy*.json"))) == 1                    # before any work
    command("--path", one, "--save_predictions")                          # the same one may be repeated
    command("--path", other, "--save_predictions", "--overwrite")
    assert len(list(out.glob("*accuracy*.json"))) == 2                    # figures of both are kept


def test_figures_of_other_settings_or_images_are_not_replaced(command, trained, root, tmp_path):
    path = trained("ff8")
    out = command("--path", path)
    figures = next(out.glob("*_accuracy_*.json"))
    before = json.loads(figures.read_text())
    for words, key in ((["--resize", 9], "resize"), (["--precision", "bf16"], "precision")):
        with pytest.raises(InputError, match=f"{figures.name} says .*{key}=.*--overwrite"):
            command("--path", path, *words)
    make_tree(tmp_path / "other" / "val", DIGITS, per_class=3)
    with pytest.raises(InputError, match="images="):
        command("--path", path, data_root=tmp_path / "other")
    assert json.loads(figures.read_text()) == before
    command("--path", path)                                                # the same again
    command("--path", path, "--overwrite", data_root=tmp_path / "other")
    assert json.loads(figures.read_text())["n"] == 30


def test_a_table_of_other_checkpoints_is_not_replaced(command, trained):
    one, two, other = (trained(head) for head in ("ff8", "ff16", "ff32"))
    out = command("--path", one, two)
    table = out / "accuracy_dataset=V1_tta=False.csv"
    before = table.read_bytes()
    with pytest.raises(InputError, match=r"accuracy_dataset=V1_tta=False.json says .*checkpoints="):
        command("--path", one, other)
    command("--path", one, two)                                            # the same again
    assert table.read_bytes() == before
    table.with_suffix(".json").unlink()
    with pytest.raises(InputError, match=r"accuracy_dataset=V1_tta=False.csv: nothing beside it"):
        command("--path", one, two)


def test_files_of_the_original_are_not_replaced(command, trained, tmp_path):
    path, gt = trained("ff8"), tmp_path / "out" / "gt_dataset=V1.pth"
    gt.parent.mkdir()
    torch.save(torch.zeros(3), gt)
    with pytest.raises(InputError, match=r"gt_dataset=V1.pth: nothing beside it says"):
        command("--path", path, "--save_gt")
    assert torch.load(gt).equal(torch.zeros(3))
    command("--path", path, "--save_gt", "--overwrite")
    assert len(torch.load(gt)) == 20


def test_all_checkpoints_are_checked_before_the_first_is_evaluated(command, trained, tmp_path):
    paths = [trained(head) for head in ("ff8", "mrl")]
    with pytest.raises(InputError, match=r"nope.pt: No such file"):
        command("--path", *paths, tmp_path / "nope.pt")
    with pytest.raises(InputError, match=r"10 class folders, the checkpoint 9"):
        command("--path", *paths, trained("ff8", num_classes=9))
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"two of them would write .*mrl0_e0_ff8; give them an --retrieval_array_path"):
        command("--path", paths[0], trained("ff8", seed=1), "--retrieval",
                "--retrieval_array_path", tmp_path / "arrays")
    assert not (tmp_path / "arrays").exists()


def test_restricted_set(command, trained, tmp_path):
    """ImageNet-A: softmax [G, N, 200], and the labels are positions among the 200."""
    wnids = read_synsets("imagenet_a_synsets.txt")
    make_tree(tmp_path / "sets" / "imagenet-a", wnids)
    out = command("--path", trained("ff8", num_classes=1000), "--dataset", "a", "--save_softmax",
                  "--save_gt", data_root=tmp_path / "sets")
    softmax = torch.load(out / "mrl=False_efficient=False_ff=8_dataset=A_tta=False_softmax.pth", weights_only=True)
    assert softmax.shape == (1, 200, 200)
    torch.testing.assert_close(softmax.sum(-1), torch.ones(1, 200))
    assert torch.load(out / "gt_dataset=A.pth", weights_only=True).tolist() == list(range(200))
    assert json.loads((out / "gt_dataset=A.json").read_text())["classes"] == wnids


def test_some_of_imagenets_classes_for_a_checkpoint_of_all(command, trained, tmp_path, capsys):
    """Imagenette: outputs over all 1,000 logits, true classes and embeddings' labels as positions among the 1,000."""
    wnids = read_synsets("imagenet_synsets.txt")[5:1000:100]
    for split in ("train", "val"):
        make_tree(tmp_path / "imagenette" / split, wnids)
    path, arrays = trained("ff8", num_classes=1000), tmp_path / "arrays"
    out = command("--path", path, "--save_gt", "--save_logits", data_root=tmp_path / "imagenette")
    assert f"note: {tmp_path}/imagenette/val holds 10 of 1,000 classes" in capsys.readouterr().out.splitlines()
    logits, gt = (torch.load(next(out.glob(name)), weights_only=True) for name in ("*_logits.pth", "gt_*.pth"))
    assert logits.shape == (1, 10, 1000) and gt.tolist() == list(range(5, 1000, 100))
    command("--path", path, "--retrieval", "--retrieval_array_path", arrays, data_root=tmp_path / "imagenette")
    for split in ("train", "val"):
        assert np.load(arrays / f"1K_{split}_mrl0_e0_ff8-y.npy").tolist() == gt.tolist()


def test_unreadable_image_is_named_or_left_out(command, trained, root, tmp_path, capsys):
    (root / "val" / "3" / "3_0.JPEG").unlink()
    (root / "val" / "3" / os.fsdecode(b"3_\xff.JPEG")).write_bytes(b"no image")      # nor is its name UTF-8
    path = trained("ff8")
    with pytest.raises(InputError, match=r"3/3_\\xff.JPEG"):
        command("--path", path)
    out = command("--path", path, "--skip_bad_images", "--save_gt")
    command("--path", path, "--skip_bad_images", "--retrieval", "--retrieval_array_path", tmp_path / "arrays")
    said = re.findall(r"^1 unreadable image\(s\) left out: .*3/3_\\xff.JPEG", capsys.readouterr().out, re.M)
    assert len(said) == 2
    result = json.loads(next(out.glob("*accuracy*.json")).read_text())
    assert result["n"] == 19 and result["skipped"][0].startswith(str(root / "val" / "3" / r"3_\xff.JPEG"))
    assert {"1K_train_mrl0_e0_ff8-X.npy", "1K_val_mrl0_e0_ff8-X.npy"} <= set(names(tmp_path / "arrays"))
    assert len(torch.load(out / "gt_dataset=V1.pth", weights_only=True)) == 19


def test_retrieval_writes_database_and_queries(command, trained, tmp_path, capsys):
    path, arrays = trained("mrl_e"), tmp_path / "arrays"
    command("--path", path, "--retrieval", "--dataset", "1k", "--retrieval_array_path", arrays)
    assert names(arrays) == [f"1K_{split}_mrl1_e1_ff512-{end}" for split in ("train", "val")
                             for end in ("X.json", "X.npy", "y.npy")]
    X, y = (np.load(arrays / f"1K_train_mrl1_e1_ff512-{end}.npy") for end in "Xy")
    assert (X.shape, X.dtype, y.dtype) == ((30, 512), np.float32, np.int64)
    assert y.tolist() == [i // 3 for i in range(30)]
    about = json.loads((arrays / "1K_val_mrl1_e1_ff512-X.json").read_text())
    assert {key: about[key] for key in ("dataset", "split", "n", "dim", "dtype", "complete")} == {
        "dataset": "1K", "split": "val", "n": 20, "dim": 512, "dtype": "float32", "complete": True}
    assert "1K_train_mrl1_e1_ff512-X.npy: 30 x 512 float32" in capsys.readouterr().out


def test_ff16_embeddings_are_16_wide(command, trained, tmp_path):
    command("--path", trained("ff16"), "--retrieval", "--retrieval_array_path", tmp_path / "arrays")
    assert np.load(tmp_path / "arrays" / "1K_val_mrl0_e0_ff16-X.npy").shape == (20, 16)


def test_random_sample_of_database_and_queries(command, trained, tmp_path):
    """Of both, as the original; a split that has no more is embedded whole."""
    path = trained("ff8")
    for n, sizes in ((12, [12, 12]), (25, [25, 20])):
        arrays = tmp_path / str(n)
        command("--path", path, "--retrieval", "--random_sample_dim", n, "--storage", "fp16", "--retrieval_array_path",
                arrays)
        found = [np.load(arrays / f"1K_{split}_mrl0_e0_ff8-X.npy") for split in ("train", "val")]
        assert [X.shape for X in found] == [(size, 8) for size in sizes] and found[0].dtype == np.float16


def test_v2_has_queries_only(command, trained, tmp_path):
    """A random sample of them, as the original."""
    make_tree(tmp_path / "sets" / "imagenetv2-matched-frequency-format-val", DIGITS_1000)
    command("--path", trained("ff8"), "--retrieval", "--dataset", "V2", "--random_sample_dim", 7,
            "--retrieval_array_path", tmp_path / "arrays", data_root=tmp_path / "sets")
    assert names(tmp_path / "arrays") == [f"V2_val_mrl0_e0_ff8-{end}" for end in ("X.json", "X.npy", "y.npy")]
    assert np.load(tmp_path / "arrays" / "V2_val_mrl0_e0_ff8-X.npy").shape == (7, 8)


@pytest.mark.parametrize("head, flags", [("mrl", ["--mrl"]), ("mrl_e", ["--mrl", "--efficient"])])
def test_rep_size_cuts_a_nested_models_embeddings(command, trained, tmp_path, head, flags):
    """The first 64 numbers, named ff64, as the original wrote them."""
    path, arrays = trained(head), tmp_path / "arrays"
    command("--path", path, "--retrieval", "--retrieval_array_path", arrays)
    command("--path", path, *flags, "--rep_size", 64, "--retrieval", "--retrieval_array_path", arrays)
    name = f"1K_val_mrl1_e{len(flags) - 1}_ff"
    whole, first = (np.load(arrays / f"{name}{size}-X.npy") for size in (512, 64))
    assert whole.shape == (20, 512) and first.tobytes() == whole[:, :64].tobytes()
    about = json.loads((arrays / f"{name}64-X.json").read_text())
    assert (about["dim"], about["nesting_list"]) == (64, [8, 16, 32, 64])


def test_embeddings_are_cut_between_two_sizes_too_but_not_past_the_last(command, trained, tmp_path):
    path, words = trained("mrl"), ["--retrieval", "--retrieval_array_path", tmp_path / "arrays"]
    command("--path", path, "--rep_size", 20, *words)
    about = json.loads((tmp_path / "arrays" / "1K_train_mrl1_e0_ff20-X.json").read_text())
    assert (about["dim"], about["nesting_list"]) == (20, [8, 16, 20])
    with pytest.raises(InputError, match="--rep_size 513 was asked for, the file holds sizes up to 512"):
        command("--path", path, "--rep_size", 513, *words)


def test_rep_size_does_not_cut_a_nested_models_accuracies(command, trained, capsys):
    path = trained("mrl")
    out = command("--path", path, "--mrl", "--rep_size", 64)
    assert json.loads(next(out.glob("*accuracy*.json")).read_text())["nesting_list"][-1] == 512
    assert f"warning: --rep_size 64 does nothing here: {path} is evaluated" in capsys.readouterr().err
    command("--path", path, "--mrl", "--rep_size", 512)
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("arch, crop", [("vit_b_16", 192), ("alexnet", 32)])
def test_a_crop_that_the_network_does_not_take(command, monkeypatch, arch, crop):
    """The line of training, before any image is read; the network is not built with weights, which takes seconds."""
    with torch.device("meta"):
        model = build_model(arch, "ff8", num_classes=10)
    monkeypatch.setattr(which_model, "open_checkpoint", lambda *_: (model, {}))
    for words in ([], ["--retrieval"]):
        with pytest.raises(InputError, match=f"--crop={crop}: {arch} does not take images of this size: "):
            command("--path", "w.pt", "--resize", 256, "--crop", crop, *words)


def test_a_worker_that_the_system_ends_is_one_line(command, trained, tmp_path, monkeypatch):
    """As the kernel does where memory is short."""
    monkeypatch.setattr(image_set, "read_rgb", lambda _: os.kill(os.getpid(), signal.SIGKILL))
    # how often DataLoader looks after its workers; its default is 5 s
    monkeypatch.setattr(dataloader._MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))
    path = trained("ff8")
    said = r"was ended, most often because memory ran out \(.*fewer --workers \(or 0\), or a"
    for words in ([], ["--retrieval", "--retrieval_array_path", tmp_path / "arrays"]):
        with pytest.raises(InputError, match=said):
            command("--path", path, "--workers", 1, *words)
    assert not list((tmp_path / "arrays").glob("*-X.npy"))


@pytest.mark.parametrize("flag, rank, current", [
    ("cuda", None, []), ("cuda:1", None, ["cuda:1"]), ("cuda", 1, ["cuda:1"]), ("cuda", 3, ["cuda:1"]), ("cpu", 1, [])])
def test_the_chosen_gpu_is_the_current_one(monkeypatch, flag, rank, current):
    """The thread that pins memory goes to the current GPU. Two GPUs, which are not there."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    monkeypatch.setattr(processes, "find_device", torch.device)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    if rank is not None:
        monkeypatch.setenv("WORLD_SIZE", "4")
        monkeypatch.setenv("LOCAL_RANK", str(rank))
    processes.start_device(SimpleNamespace(device=flag))
    assert chosen == current


def test_database_and_queries_must_have_the_same_classes(command, trained, root):
    (root / "train" / "9").rename(root / "train" / "nine")
    with pytest.raises(InputError, match=r"train has no class folder 9, .*val has one \(2 such"):
        command("--path", trained("ff8"), "--retrieval")


@pytest.mark.parametrize("words, message", [
    (["--dataset", "V3"], "--dataset V3: unknown here; one of V1, V2, V2-threshold-0.7, V2-top-images, A, R, Sketch"),
    (["--dataset", "4K"], "--dataset 4K: unknown here; one of V1"),
    (["--dataset", "A", "--retrieval"], "--dataset A: unknown here; one of 1K, V2, 4K"),
    (["--device", "gpu"], "--device gpu"),
    (["--mrl"], "head=mrl was asked for, params.json beside it says ff8"),
    (["--resize", "7"], "--resize 7 is smaller than --crop 8"),
    (["--retrieval", "--rep_size", "16"], "head=ff16 was asked for, params.json beside it says ff8"),
    (["--nesting_list", "8,16"], r"nesting_list=\[8, 16\] was asked for, params.json beside it says \[8\]"),
])
def test_bad_flags(command, trained, words, message):
    with pytest.raises(InputError, match=message):
        command("--path", trained("ff8"), *words)


@pytest.mark.parametrize("words, says", [
    (["--retrieval_array_path", "a"], "--retrieval_array_path does nothing without --retrieval"),
    (["--storage", "fp32"], "--storage does nothing without --retrieval"),
    (["--random_sample_dim", "7"], "--random_sample_dim does nothing without --retrieval"),
    (["--output", "a", "--retrieval"], "--output does nothing with --retrieval"),
    (["--save_gt", "--retrieval"], "--save_gt does nothing with --retrieval"),
])
def test_flags_that_do_nothing_are_warned_of(command, trained, tmp_path, capsys, words, says):
    """The original ran on."""
    arrays = ["--retrieval_array_path", tmp_path / "arrays"] if "--retrieval" in words else []
    command("--path", trained("ff8"), *words, *arrays)
    assert [line for line in capsys.readouterr().err.splitlines() if "warning" in line] == [f"warning: {says}"]
    assert names(tmp_path / ("arrays" if arrays else "out")) and not (tmp_path / "a").exists()


def test_sizes_are_spelled_as_train_spells_them(monkeypatch):
    monkeypatch.setattr("sys.argv", ["pytorch_inference.py", "--path", "w.pt", "--nesting_list", "8,16"])
    assert parse_arguments().nesting_list == [8, 16]


def test_defaults(monkeypatch):
    """The original's, and what the README says."""
    monkeypatch.setattr("sys.argv", ["pytorch_inference.py", "--path", "w.pt"])
    args = parse_arguments()
    assert (args.resize, args.crop, args.batch_size, args.precision, args.storage) == (None, 224, 256, None, None)
    assert not (args.tta or args.skip_bad_images or args.overwrite or args.retrieval or args.old_ckpt)


def test_amp_is_fp16(monkeypatch):
    monkeypatch.setattr("sys.argv", ["pytorch_inference.py", "--path", "w.pt", "--amp"])
    assert parse_arguments().precision == "fp16"


@pytest.mark.parametrize("words", [["--amp", "--precision", "fp32"], ["--nesting_list", "8,x"]])
def test_flags_that_argparse_refuses(monkeypatch, capsys, words):
    monkeypatch.setattr("sys.argv", ["pytorch_inference.py", "--path", "w.pt", *words])
    with pytest.raises(SystemExit):
        parse_arguments()
    assert words[0] in capsys.readouterr().err.splitlines()[-1]


# ------------------------------------------------------------------------------------------------ as a user runs them

def test_two_processes_write_the_same_files_as_one(trained, command, root, tmp_path):
    """As torchrun starts them, gloo, images in batches of 4: the bytes of a run of one process."""
    path, flags = trained("mrl"), ["--retrieval", "--batch_size", 4, "--retrieval_array_path"]
    command("--path", path, *flags, tmp_path / "one")
    both = fork_ranks(2, "inference/pytorch_inference.py", *SMALL, "--data_root", root, "--path", path, *flags,
                      tmp_path / "two")
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    for name in names(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert names(tmp_path / "one") == names(tmp_path / "two")


def test_what_stops_one_process_stops_all_and_one_says_why(trained, tmp_path, root):
    """The first of two finds the arrays of another checkpoint."""
    arrays = tmp_path / "arrays"
    arrays.mkdir()
    (arrays / "1K_val_mrl0_e0_ff8-X.json").write_text('{"checkpoint": "of another"}')
    both = fork_ranks(2, "inference/pytorch_inference.py", *SMALL, "--data_root", root, "--path", trained("ff8"),
                      "--retrieval", "--retrieval_array_path", arrays)
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [1, 1]
    complaints = re.findall("^error: .*", said[0] + said[1], re.M)
    assert len(complaints) == 1 and "checkpoint=of another" in complaints[0] and "Traceback" not in said[0] + said[1]


def test_torchrun_is_refused_for_classification(command, trained, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(InputError, match="torchrun splits the images for --retrieval only"):
        command("--path", trained("ff8"))


@pytest.mark.gpu
def test_inference_on_a_gpu_is_inference_on_the_cpu(command, trained, tmp_path):
    """float32 to its rounding; half precision to its own; the same labels."""
    path, found = trained("mrl"), {}
    for device, precision in (("cpu", "fp32"), ("cuda", "fp32"), ("cuda", "fp16")):
        out = tmp_path / f"{device} {precision}"
        command("--path", path, "--save_logits", "--device", device, "--precision", precision, "--output", out)
        command("--path", path, "--retrieval", "--device", device, "--precision", precision,
                "--retrieval_array_path", out)
        logits = torch.load(next(out.glob("*_logits.pth")), weights_only=True)
        found[device, precision] = logits, torch.from_numpy(np.load(next(out.glob("1K_val*-X.npy"))))
    for precision, tolerance in (("fp32", 1e-4), ("fp16", 2e-2)):
        torch.testing.assert_close(found["cuda", precision], found["cpu", "fp32"], rtol=tolerance, atol=tolerance)
