"""The abuse table: every command with input that is broken, hostile, absurd or contradictory.

A row is a command, what spoils its input, and what the one line of complaint must name. Whatever is wrong: one line
`error: ...` (argparse: its usage, then that line), a status that is not 0, no traceback, no Python warning; nothing is
left behind, and what was there stays as it was. Code hidden in a file must not run: it would make a folder `ran`.
All input lies under paths with spaces and letters beyond ASCII. Most commands run in this process, as scripts; those
that start processes of their own, or are interrupted, run as a user's would.
"""
import gzip
import io
import json
import os
import re
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import warnings
import zlib
from contextlib import contextmanager, redirect_stderr
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import checkpoint
import features
import numpy as np
import pytest
import retrieval_world
import settings
import torch
import train_imagenet
from conftest import ROOT, with_python
from ffcv.types import FieldDescType, HeaderType
from image_trees import make_run, make_tree
from PIL import Image
from test_outputs import save as save_output

from MRL import build_model

NET = "shufflenet_v2_x0_5"      # the smallest of torchvision's networks
DIGITS = [str(i) for i in range(10)]
SIZES = [8, 16, 32]
CLASSES = ["n00000001", "n00000002"]
SOFTMAX = "mrl=True_efficient=False_ff=32_dataset=V1_tta=False_softmax"
ARRAYS = "1K_{}_mrl1_e0_ff32-{}"


class Row(NamedTuple):
    name: str
    command: str                        # folder/script and its words; {places} are filled in
    says: str                           # pattern that the line must hold
    spoil: object = lambda place: None
    file_limit: int = -1                # bytes that a file may have: a disk that fills up
    leaves: tuple = ()                  # patterns of what may be left in `here`: finished files, folders


# ------------------------------------------------------------------------------------------------ the places

@pytest.fixture(scope="module")
def given(tmp_path_factory, image_tree):
    """Good input for all commands, read only: what each row spoils is a copy."""
    root = tmp_path_factory.mktemp("päth with späces")
    place = SimpleNamespace(images=root / "images", ffcv=root / "ffcv", runs=root / "runs", data=root / "data",
                            arrays=root / "arrays", saved=root / "saved", source=root / "imagenet 21k")
    place.here = root / "here"
    place.ffcv.mkdir()
    shutil.copytree(image_tree, place.images)
    for split in ("train", "val"):
        status, said = run(WRITE + f" --cfg.data_dir={{images}}/{split} --cfg.write_path={{ffcv}}/{split}.ffcv", place)
        assert status == 0, said
    make_run(place.runs / "mrl", "mrl", arch=NET, nesting_list=[8, 16, 1024])
    make_run(place.runs / "ff", "ff16", arch=NET)
    for split in ("train", "val"):
        make_tree(place.data / split, DIGITS)
    retrieval_world.write(place.arrays, retrieval_world.world(300, 40, 32, classes=10), nesting_list=SIZES)
    softmax = np.random.default_rng(0).dirichlet(np.ones(10), (3, 40)).astype(np.float32)
    save_output(place.saved, SOFTMAX, softmax, nesting_list=SIZES, num_classes=10, checkpoint="c0ffee", images="12",
                classes=DIGITS, dataset="V1", tta=False)
    save_output(place.saved, "gt_dataset=V1", np.arange(40) % 10)
    for name in CLASSES:
        make_tree(place.source, {name: 0}, per_class=6)
    (place.source / "classes.txt").write_text("\n".join(CLASSES))
    return place


@pytest.fixture
def place(given, tmp_path):
    here = tmp_path / "bäd day"
    here.mkdir()
    return SimpleNamespace(**vars(given) | {"here": here})


# ------------------------------------------------------------------------------------------------ what spoils

def holding(name, content):
    """A file `name` here, of bytes, text or something that is written as JSON."""
    def spoil(place):
        text = content if isinstance(content, (bytes, str)) else json.dumps(content)
        path = place.here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return spoil


def folder(name):
    """A folder where a file is expected, with something in it."""
    return holding(f"{name}/something", "of value")


def saved(name, make):
    """What torch.save makes of make(place)."""
    def spoil(place):
        (place.here / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(make(place), place.here / name)
    return spoil


def copied(source, change):
    """A copy here of given.<source>, then change(copy)."""
    def spoil(place):
        shutil.copytree(getattr(place, source), place.here / source)
        change(place.here / source)
    return spoil


def both(*spoils):
    def spoil(place):
        for one in spoils:
            one(place)
    return spoil


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, place):
        self.path = str(place.here / "ran")

    def __reduce__(self):
        return os.mkdir, (self.path,)


def cut(path, share=0.5):
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])


def edited_ffcv(change):
    """data.ffcv: a copy of the training file, its bytes changed."""
    def spoil(place):
        content = bytearray((place.ffcv / "train.ffcv").read_bytes())
        change(content)
        (place.here / "data.ffcv").write_bytes(content)
    return spoil


def second_half_gone(content):
    del content[len(content) // 2:]


def other_label_type(content):
    content[HeaderType.itemsize + FieldDescType.itemsize] = 0           # the type of the second field: floats


def pointer_past_the_end(content):
    start = HeaderType.itemsize + 2 * FieldDescType.itemsize
    content[start:start + 64] = b"\xff" * 64


def bad_json(name, content):
    return lambda folder: (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def npy(name, array, **options):
    return lambda folder: np.save(folder / name, array, **options)


def with_nan(name):
    def change(folder):
        X = np.load(folder / name)
        X[3, 5] = np.nan
        np.save(folder / name, X)
    return change


def nan_weights(place):
    state = torch.load(place.runs / "mrl/final_weights.pt", weights_only=True)
    return {k: v * torch.nan if k == "conv1.0.weight" else v for k, v in state.items()}


def saved_partial(place):
    """out: the embeddings of a run that was interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "finish", interrupt)
        assert run(INFER + " --retrieval", place)[0] == 130


def interrupt(*_):
    raise KeyboardInterrupt


def pictures(**sizes):
    """tree/a/*.png of these sizes, and one good picture."""
    def spoil(place):
        make_tree(place.here / "tree", ["a"])
        for name, size in sizes.items():
            Image.new("RGB", size).save(place.here / "tree/a" / f"{name}.png")
    return spoil


def archive(path):
    with open(path, "wb") as file:
        np.savez(file, X=np.ones(3))


def bomb(place):
    """A PNG of 100 bytes that says it is 60,000 x 60,000 pixels large."""
    make_tree(place.here / "tree", ["a"])
    held = io.BytesIO()
    Image.new("RGB", (1, 1)).save(held, "PNG")
    raw = bytearray(held.getvalue())
    raw[16:24] = (60_000).to_bytes(4, "big") * 2
    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
    (place.here / "tree/a/bomb.png").write_bytes(raw)


def run_folder(changes=None, checkpoint_of=None):
    """A run folder that --training.resume could continue. changes: to its params.json."""
    def spoil(place):
        run = place.here / "out" / "run"
        run.mkdir(parents=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", fill(TRAIN, place))
            checkpoint.write_params(run, settings.as_dict(settings.read_settings(train_imagenet.CONFIG, "")), {})
        if changes:
            params = json.loads((run / "params.json").read_text())
            (run / "params.json").write_text(json.dumps(changes(params)))
        if checkpoint_of:
            torch.save(checkpoint_of(place), run / checkpoint.CURRENT)
    return spoil


def checkpoint_of_another_network(place):
    model = build_model("resnet18", "ff8", num_classes=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return {"format": checkpoint.FORMAT, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": {},
            "rng": [{"cpu": torch.get_rng_state()}], "losses": torch.zeros(1), "epoch": 0, "step": 1, "elapsed": 0.0}


def tar_with_a_link(place):
    """source: a class as a tar file, with a link of an image's name that leads out of it."""
    shutil.copytree(place.source, place.here / "source")
    shutil.rmtree(place.here / "source" / CLASSES[1])
    with tarfile.open(place.here / "source" / f"{CLASSES[1]}.tar", "w") as tar:
        link = tarfile.TarInfo("../../evil/0.JPEG")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for i in range(6):
            tar.add(place.source / CLASSES[1] / f"{CLASSES[1]}_{i}.JPEG", f"{i}.JPEG")


def tar_cut_in_its_gzip(place):
    tar_with_a_link(place)
    archive = place.here / "source" / f"{CLASSES[1]}.tar"
    archive.write_bytes(gzip.compress(archive.read_bytes())[:200])


# ------------------------------------------------------------------------------------------------ the table

WRITE = ("train/write_imagenet.py --cfg.split=train --cfg.data_dir={images}/val --cfg.write_path={here}/out.ffcv "
         "--cfg.max_resolution=64 --cfg.num_workers=2")
TRAIN = ("train/train_imagenet.py --training.device=cpu --model.arch=" + NET + " --model.mrl=1 --model.num_classes=3 "
         "--resolution.min_res=32 --resolution.max_res=32 --validation.resolution=32 --training.batch_size=8 "
         "--training.epochs=1 --data.num_workers=1 --data.in_memory=1 --logging.folder={here}/out "
         "--data.train_dataset={ffcv}/train.ffcv --data.val_dataset={ffcv}/val.ffcv")
TWO = " --training.distributed=1 --dist.world_size=2"
FFCV = "--data.train_dataset={here}/data.ffcv"
RESUME = "train/train_imagenet.py --training.resume={here}/out/run"
SETS = ("--data_root {data} --output {here}/out --retrieval_array_path {here}/out --resize 8 --crop 8 --workers 0 "
        "--device cpu")
INFER = "inference/pytorch_inference.py --path {runs}/mrl/final_weights.pt " + SETS
BARE = "inference/pytorch_inference.py " + SETS + " --arch " + NET + " --path"
BASE = "--arrays {arrays} --model mrl1_e0_ff32 --output {here}/out --device cpu"
HERE = BASE.replace("{arrays}", "{here}/arrays")
FIND = "--embeddings {arrays} --output {here}/out"
FOUND = "--embeddings {here}/arrays --output {here}/out"
BUILD = ("imagenet-4k/build_imagenet4k.py --source {source} --output {here}/out --classes {source}/classes.txt "
         "--train 4 --val 2")
LEARN = "model_analysis/cascades.py learn --policy {here}/policy.json --folder"
APPLY = "model_analysis/cascades.py apply --folder {saved} --policy {here}/policy.json"
POLICY = {"thresholds": [0.5, 0.5], "n": 40, "fraction": 0.2, "seed": 0, "head": "mrl", "nesting_list": SIZES,
          "checkpoint": "c0ffee", "dataset": "V1", "images": "12", "tta": False}

TABLE = [
    # -- images -> .ffcv
    Row("a file for a folder", WRITE + " --cfg.data_dir={here}/file", "/file", holding("file", "")),
    Row("an empty class folder", WRITE + " --cfg.data_dir={here}/tree", "data_dir=.*tree.* b",
        both(pictures(), lambda place: (place.here / "tree/b").mkdir())),
    Row("a folder in the file's place", WRITE, r"out\.ffcv.*folder", folder("out.ffcv")),
    Row("a million processes", WRITE + " --cfg.num_workers=1000000", "--cfg.num_workers=1000000"),
    Row("no image at all", WRITE + " --cfg.subset=0", "--cfg.subset=0"),
    Row("NaN of the images", WRITE + " --cfg.compress_probability=nan", "--cfg.compress_probability=nan"),
    Row("a bomb", WRITE + " --cfg.data_dir={here}/tree", r"tree: 1 of 2 images", bomb),
    Row("too thin to shrink", WRITE + " --cfg.data_dir={here}/tree", r"tree: 1 of 2 images", pictures(thin=(1, 3000))),
    Row("disk full", WRITE, r"out\.ffcv", file_limit=100_000),

    # -- training
    Row("an unknown key", TRAIN + " --config-file={here}/a.yaml", r"a\.yaml: unknown setting training\.epoch\b",
        holding("a.yaml", "training:\n  epoch: 3\n")),
    Row("not UTF-8", TRAIN + " --config-file={here}/a.yaml", r"a\.yaml: not YAML", holding("a.yaml", b"a: \xff\xfe")),
    Row("a date that is none", TRAIN + " --config-file={here}/a.yaml", r"a\.yaml: not YAML",
        holding("a.yaml", "lr:\n  lr: 2023-13-45\n")),
    Row("a deep nest", TRAIN + " --config-file={here}/a.yaml", r"a\.yaml: not YAML", holding("a.yaml", "[" * 10_000)),
    Row("a list for a number", TRAIN + " --config-file={here}/a.yaml", r"lr\.lr=\[1, 2\]",
        holding("a.yaml", "lr:\n  lr: [1, 2]\n")),
    Row("an unknown flag", TRAIN + " --model.mlr=1", "--model.mlr=1"),
    Row("sizes of letters", TRAIN + " --model.nesting_list=8,x", "--model.nesting_list=8,x"),
    Row("sizes without a nested model", TRAIN + " --model.mrl=0 --model.nesting_list=8,16", "--model.nesting_list"),
    Row("an endless power of two", TRAIN + " --model.nesting_start=1000000000", "nesting_start=1000000000"),
    Row("a million billion classes", TRAIN + f" --model.num_classes={10 ** 15} --logging.name=run", "not enough memory",
        leaves=("out", "out/run", "out/run/params.json")),
    Row("NaN for a rate", TRAIN + " --lr.lr=nan", "--lr.lr=nan"),
    Row("momentum below 0", TRAIN + " --training.momentum=-1", "--training.momentum=-1"),
    Row("weights of NaN", TRAIN + " --model.relative_importance=nan,1,1,1,1,1,1,1", "relative_importance"),
    Row("a port of letters", TRAIN + TWO + " --dist.port=http", "--dist.port=http"),
    Row("a port past the last", TRAIN + TWO + " --dist.port=99999", "--dist.port=99999"),
    Row("a batch of a billion", TRAIN + " --training.batch_size=1000000000", "--training.batch_size"),
    Row("a seed past 64 bits", TRAIN + f" --training.seed={10 ** 30}", "--training.seed=1000"),
    Row("images of a billion pixels a side", TRAIN + " --validation.resolution=1000000000", "--validation.resolution"),
    Row("fewer classes than labels", TRAIN + " --model.num_classes=2", "labels run from 0 to 2"),
    Row("only weights to validate, and none", TRAIN + " --training.eval_only=1", "--training.path"),
    Row("half a file", TRAIN + " " + FFCV, r"data\.ffcv: truncated", edited_ffcv(second_half_gone)),
    Row("labels that are floats", TRAIN + " " + FFCV, r"data\.ffcv", edited_ffcv(other_label_type)),
    Row("pointers past the end", TRAIN + " " + FFCV, r"data\.ffcv: .*damaged", edited_ffcv(pointer_past_the_end)),
    Row("a file for the log folder", TRAIN, "--logging.folder", holding("out", "of value")),
    Row("code in the backbone's file", TRAIN + " --model.init_from={here}/w.pt", r"w\.pt: holds more than tensors",
        saved("w.pt", lambda place: {"fc.weight": Code(place)})),
    Row("NaN in the weights to validate", TRAIN + " --training.eval_only=1 --training.path={here}/w.pt "
        "--training.use_blurpool=1 --model.num_classes=10 --model.nesting_list=8,16,1024", r"w\.pt: conv1.* holds NaN",
        saved("w.pt", nan_weights)),
    Row("no such part", TRAIN + " --model.trainable=fc,layer9", "--model.trainable: layer9"),
    Row("no such run", "train/train_imagenet.py --training.resume={here}/nothing", "--training.resume=.*nothing"),
    Row("a flag without =", "train/train_imagenet.py --training.resume {here}/nothing", "--training.resume=.*nothing"),
    Row("settings that are a list", RESUME, r"params\.json", run_folder(lambda params: [params])),
    Row("settings of another kind", RESUME, r"--training.resume=.*params\.json",
        run_folder(lambda params: params | {"settings": {"training": 5}})),
    Row("another length", RESUME + " --training.epochs=2", "--training.epochs=1, now 2", run_folder()),
    Row("code in the checkpoint", RESUME, "none of its checkpoints can be read",
        run_folder(checkpoint_of=lambda place: {"format": checkpoint.FORMAT, "model": Code(place)})),
    Row("another network's checkpoint", RESUME, r"checkpoint\.pt",
        run_folder(checkpoint_of=checkpoint_of_another_network)),
    Row("disk full at the checkpoint", TRAIN + " --logging.name=run", r"checkpoint\.pt could not be written",
        file_limit=50_000, leaves=("out", "out/run", "out/run/params.json", "out/run/log")),

    # -- inference
    Row("no path", BARE + " ''", "No such file"),
    Row("a folder for a checkpoint", BARE + " {here}", "bäd day.*directory"),
    Row("code in the checkpoint", BARE + " {here}/w.pt", r"w\.pt: holds more than tensors",
        saved("w.pt", lambda place: {"a": Code(place)})),
    Row("keys that are numbers", BARE + " {here}/w.pt", r"w\.pt: holds no state dict",
        saved("w.pt", lambda place: {1: torch.zeros(2, 2)})),
    Row("NaN weights", BARE + " {here}/w.pt", r"w\.pt: conv1\.0\.weight holds NaN", saved("w.pt", nan_weights)),
    Row("tensors without numbers", BARE + " {here}/w.pt", r"w\.pt",
        saved("w.pt", lambda place: build_on_meta().state_dict())),
    *(Row(f"params.json: {name}", "inference/pytorch_inference.py " + SETS + " --path {here}/runs/mrl/final_weights.pt",
          says, copied("runs", bad_json("mrl/params.json", content)))
      for name, content, says in (
          ("cut", '{"model": {', r"params\.json"), ("no model", {}, r"params\.json"),
          ("other words", {"model": {"arch": NET, "hat": 1}}, r"params\.json"),
          ("a head that is a number", {"model": {"arch": NET, "head": 7, "num_classes": 10}}, r"params\.json"),
          ("a billion classes", {"model": {"arch": NET, "head": "ff8", "num_classes": 10 ** 9}}, r"does not fit"))),
    Row("flags that contradict the run", INFER + " --rep_size 16", "head=ff16 was asked for"),
    Row("a flag that would do nothing", INFER + " --retrieval --tta", "--tta .* with --retrieval"),
    Row("an unknown set", INFER + " --dataset imagenet", "--dataset imagenet"),
    Row("no data", INFER + " --data_root {here}/nothing", "/nothing/val"),
    Row("an empty class folder", INFER + " --data_root {here}/data", "1 class folder.* hold no images: 3",
        copied("data", lambda data: shutil.rmtree(data / "val/3") or (data / "val/3").mkdir())),
    Row("other classes in train", INFER + " --retrieval --data_root {here}/data", "different class folders: 3, cat",
        copied("data", lambda data: (data / "train/3").rename(data / "train/cat"))),
    Row("an empty image", INFER + " --data_root {here}/data", r"3_0\.JPEG",
        copied("data", lambda data: (data / "val/3/3_0.JPEG").write_bytes(b"")), leaves=("out",)),
    Row("a million workers", INFER + " --workers 1000000", "--workers: 1000000"),
    Row("images of a billion pixels a side", INFER + " --resize 1000000000 --crop 1000000000", "--resize"),
    Row("a device without numbers", INFER + " --device meta", "--device meta"),
    Row("sizes below 1", BARE + " {runs}/mrl/final_weights.pt --nesting_list 0 8", r"nesting_list"),
    Row("a file for the output", INFER, "/out", holding("out", "of value")),
    Row("broken notes of an earlier run", INFER + " --save_gt", r"gt_dataset=V1\.json: not a JSON file",
        holding("out/gt_dataset=V1.json", "{")),
    Row("notes of another kind", INFER + " --save_gt", r"gt_dataset=V1\.json: not a JSON file",
        holding("out/gt_dataset=V1.json", [1])),
    Row("disk full", INFER + " --save_logits", r"logits\.pth could not be written", file_limit=2000,
        leaves=("out", "out/*_accuracy_*.json")),
    Row("disk full for the embeddings", INFER + " --retrieval", r"X\.partial\.npy.*GB are needed", file_limit=10_000,
        leaves=("out",)),
    Row("half of what an interrupted run left", INFER + " --retrieval", r"X\.partial\.npy",
        both(saved_partial, lambda place: cut(place.here / "out/1K_val_mrl1_e0_ff1024-X.partial.npy"))),

    # -- baselines
    Row("code in an array", "inference/baselines.py knn " + HERE, r"val_mrl1_e0_ff32-y\.npy",
        lambda place: copied("arrays", npy(ARRAYS.format("val", "y.npy"), np.array([Code(place)] * 40, object),
                                           allow_pickle=True))(place)),
    Row("half an array", "inference/baselines.py knn " + HERE, r"train_mrl1_e0_ff32-X\.npy",
        copied("arrays", lambda arrays: cut(arrays / ARRAYS.format("train", "X.npy")))),
    Row("labels of letters", "inference/baselines.py knn " + HERE, r"val_mrl1_e0_ff32-y\.npy",
        copied("arrays", npy(ARRAYS.format("val", "y.npy"), np.array(["cat"] * 40)))),
    Row("NaN in the database", "inference/baselines.py knn " + HERE, r"train_mrl1_e0_ff32-X\.npy.*NaN",
        copied("arrays", with_nan(ARRAYS.format("train", "X.npy")))),
    Row("notes of another kind", "inference/baselines.py knn " + HERE, r"train_mrl1_e0_ff32-X\.json",
        copied("arrays", bad_json(ARRAYS.format("train", "X.json"), [1]))),
    Row("no epochs", "inference/baselines.py lp --epochs 0 " + BASE, "--epochs: 0"),
    Row("NaN for a rate", "inference/baselines.py lp --lr nan " + BASE, "--lr: nan"),
    Row("no shots", "inference/baselines.py ncm --shots 0 " + BASE, "--shots: 0"),
    Row("more shots than images", "inference/baselines.py ncm --shots 1000000000000 " + BASE, "1000000000000 shots"),
    Row("another model's classifier", "inference/baselines.py svd --path {runs}/ff/final_weights.pt --sizes 8 " + BASE,
        r"ff/final_weights\.pt"),
    Row("a device that is none", "inference/baselines.py knn " + BASE + " --device tpu", "--device tpu"),

    # -- retrieval
    Row("no command", "retrieval/retrieve.py", "command"),
    Row("an unknown index", "retrieval/retrieve.py search --index hnsw16 " + FIND, "hnsw16"),
    Row("a trillion neighbours", "retrieval/retrieve.py search --sizes 8 --k 1000000000000 " + FIND, "k=1000000000000"),
    Row("NaN gigabytes", "retrieval/retrieve.py search --sizes 8 --memory_gb nan " + FIND, "memory_gb"),
    Row("code in the embeddings", "retrieval/retrieve.py search --sizes 8 " + FOUND, r"train_mrl1_e0_ff32-X\.npy",
        lambda place: copied("arrays", npy(ARRAYS.format("train", "X.npy"), np.array([[Code(place)]], object),
                                           allow_pickle=True))(place)),
    Row("NaN in the queries", "retrieval/retrieve.py search --sizes 8 " + FOUND, "the queries: row 3 is .*not finite",
        copied("arrays", with_nan(ARRAYS.format("val", "X.npy"))), leaves=("out", "out/index_files*")),
    Row("a notebook's archive for an array", "retrieval/retrieve.py search --sizes 8 " + FOUND, r"ff32-X\.npy",
        copied("arrays", lambda arrays: archive(arrays / ARRAYS.format("val", "X.npy")))),
    Row("notes of another kind", "retrieval/retrieve.py search " + FOUND, r"train_mrl1_e0_ff32-X\.json",
        copied("arrays", bad_json(ARRAYS.format("train", "X.json"), [1]))),
    Row("labels of letters", "retrieval/retrieve.py metrics {here}/exactl2_8dim_2shortlist_1K.csv " + FOUND, r"y\.npy",
        both(copied("arrays", npy(ARRAYS.format("train", "y.npy"), np.array(["cat"] * 300))),
             holding("exactl2_8dim_2shortlist_1K.csv", "1,2\n" * 40))),
    Row("a list of letters", "retrieval/retrieve.py metrics {here}/exactl2_8dim_2shortlist_1K.csv " + FIND,
        r"exactl2_8dim_2shortlist_1K\.csv: not a CSV of integers",
        holding("exactl2_8dim_2shortlist_1K.csv", "1,2\n" * 39 + "1,cat\n")),
    Row("a list of huge numbers", "retrieval/retrieve.py metrics {here}/exactl2_8dim_2shortlist_1K.csv " + FIND,
        r"exactl2_8dim_2shortlist_1K\.csv", holding("exactl2_8dim_2shortlist_1K.csv", f"1,{10 ** 12}\n" * 40)),
    Row("an empty list", "retrieval/retrieve.py metrics {here}/exactl2_8dim_2shortlist_1K.npy " + FIND,
        r"exactl2_8dim_2shortlist_1K\.npy",
        lambda place: np.save(place.here / "exactl2_8dim_2shortlist_1K.npy", np.empty((40, 0), np.int32))),
    Row("no such list", "retrieval/retrieve.py metrics {here}/exactl2_8dim_2shortlist_1K.npy " + FIND,
        r"exactl2_8dim_2shortlist_1K\.npy: no such file"),
    Row("another set's list", "retrieval/retrieve.py metrics {here}/exactl2_8dim_2shortlist_V2.csv " + FIND,
        r"exactl2_8dim_2shortlist_V2\.csv.*V2", holding("exactl2_8dim_2shortlist_V2.csv", "1,2\n" * 40)),
    Row("a shortlist of none", "retrieval/retrieve.py rerank --retrieval_dim 8 --rerank_dims 32 --shortlist 0 " + FIND,
        "--shortlist: 0"),
    Row("k below 1", "retrieval/retrieve.py rerank --retrieval_dim 8 --rerank_dims 32 --shortlist 9 --k 0 " + FIND,
        "--k: 0"),
    Row("a report without a shortlist", "retrieval/retrieve.py report --shortlist -1 " + FIND, "--shortlist: -1"),
    Row("an index of a trillion candidates", "retrieval/retrieve.py index --retrieval_dim 8 --index hnsw32 "
        "--shortlist 1000000000000 " + FIND, "1000000000000"),
    Row("a file for the output", "retrieval/retrieve.py search --sizes 8 " + FIND, "/out", holding("out", "of value")),
    Row("disk full", "retrieval/retrieve.py search --sizes 8 --k 100 " + FIND, "8dim", file_limit=8000,
        leaves=("out", "out/neighbors", "out/neighbors/mrl", "out/index_files", "out/index_files/mrl")),

    # -- ImageNet-4K
    Row("classes not in UTF-8", BUILD + " --classes {here}/classes.txt", r"classes\.txt",
        holding("classes.txt", b"n\xff\n")),
    Row("no classes", BUILD + " --classes {here}/classes.txt", r"classes\.txt", holding("classes.txt", "\n")),
    Row("a class twice", BUILD + " --classes {here}/classes.txt", r"classes\.txt.*n00000001",
        holding("classes.txt", "n00000001\nn00000001\n")),
    Row("a class outside", BUILD + " --classes {here}/classes.txt", r"classes\.txt.*\.\./evil",
        holding("classes.txt", "../evil\n")),
    Row("a list not in UTF-8", BUILD + " --list {here}/list.txt", r"list\.txt", holding("list.txt", b"train/\xff\n")),
    Row("fewer images than none", BUILD + " --train -1", "--train: -1"),
    Row("a trillion images", BUILD + " --train 1000000000000", "fewer than 1000000000002 images"),
    Row("a compressed archive, cut", BUILD + " --source {here}/source", r"n00000002\.tar", tar_cut_in_its_gzip),
    Row("a file for the output", BUILD, "/out", holding("out", "of value")),

    # -- analysis
    Row("an unknown head", LEARN + " {saved} --head mlr", "--head.*mlr"),
    Row("NaN of the images", LEARN + " {saved} --fraction nan", "nan"),
    Row("a seed below 0", LEARN + " {saved} --seed -1", "--seed.*-1"),
    Row("code in the softmax", LEARN + " {here}/saved", SOFTMAX,
        lambda place: copied("saved", lambda folder: torch.save(Code(place), folder / f"{SOFTMAX}.pth"))(place)),
    Row("NaN in the softmax", LEARN + " {here}/saved", "softmax holds other numbers than probabilities",
        copied("saved", lambda folder: torch.save(torch.full((3, 40, 10), torch.nan), folder / f"{SOFTMAX}.pth"))),
    Row("notes of another kind", LEARN + " {here}/saved", rf"{SOFTMAX}\.json",
        copied("saved", bad_json(f"{SOFTMAX}.json", [1]))),
    Row("a folder for the policy", LEARN + " {saved}", r"policy\.json.*folder", folder("policy.json")),
    Row("a policy of NaN", APPLY, r"policy\.json", holding("policy.json", POLICY | {"thresholds": [np.nan, 0.5]})),
    Row("a policy of letters", APPLY, r"policy\.json", holding("policy.json", POLICY | {"fraction": "x", "seed": -1})),
    Row("disk full", LEARN + " {saved}", r"policy\.json", file_limit=10),

    # -- the demo's own
    Row("no folder named", "demo/prepare.py", "required"),
    Row("a file for the folder", "demo/prepare.py {here}/out", "/out", holding("out", "of value")),
    Row("nothing to draw", "demo/pictures.py {here}", r"bäd day/figures"),
]


def build_on_meta():
    with torch.device("meta"):
        return build_model(NET, "ff16", num_classes=10)


# ------------------------------------------------------------------------------------------------ running a row

def name(row):
    return f"{row.command.split()[0]}-{row.name}".replace(" ", "_")


def fill(command, place):
    """-> [folder/script, words ...]"""
    return [word.format(**vars(place)) for word in shlex.split(command)]


def run(command, place, file_limit=-1):
    """-> (exit status, stderr) of a command, run as a script in this process."""
    script, *words = fill(command, place)
    said = place.here.parent / "stderr"
    with pytest.MonkeyPatch.context() as patch, signals_kept(), stderr_to(said), warnings_to_stderr():
        patch.chdir((ROOT / script).parent)
        patch.setattr(sys, "argv", [Path(script).name, *words])
        try:
            with largest_file(file_limit):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code or 0
        if isinstance(status, str):
            print(status, file=sys.stderr)
    return int(status != 0) if isinstance(status, str) else status, said.read_text()


@contextmanager
def signals_kept():
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def warnings_to_stderr():
    """Those that Python shows users; pytest would keep them for itself."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.resetwarnings()
        for hidden in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", hidden)
        yield
    for warning in warned:
        print(f"Warning: {warning.message}", file=sys.stderr)


@contextmanager
def stderr_to(path):
    """What this process, libraries below Python and processes that it starts write to stderr goes to a file."""
    kept = os.dup(2)
    with open(path, "w", buffering=1) as file, redirect_stderr(file):
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


@contextmanager
def largest_file(size):
    """No file may grow past so many bytes (-1: no limit): writing fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(place):
    """-> {path: its bytes, or None} of all that is under `here`."""
    return {str(path.relative_to(place.here)): path.read_bytes() if path.is_file() else None
            for path in place.here.rglob("*")}


def written(place):
    """-> {path: size and time} of the input that rows share."""
    folders = [folder for name, folder in vars(place).items() if name != "here"]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for folder in folders for path in folder.rglob("*")}


def the_line(stderr):
    """The one line of complaint; nothing else may be there but argparse's usage, notes and progress bars."""
    lines = [line for line in re.split(r"[\r\n]+", stderr) if line.strip()]
    complaints = [line for line in lines if re.match(r"(\S+\.py( \w+)?: )?error: ", line)]
    assert len(complaints) == 1 and lines[-1] == complaints[0], stderr
    assert not re.search(r"Traceback|Warning|Exception", stderr), stderr
    allowed = r"usage: |  +|unreadable: |warning: |writing failed: |.*(%\||it/s|\?it)"
    assert all(re.match(allowed, line) for line in lines[:-1]), stderr
    return complaints[0]


@pytest.mark.parametrize("row", TABLE, ids=name)
def test_one_line_and_nothing_lost(row, place):
    row.spoil(place)
    before, shared = contents(place), written(place)
    status, stderr = run(row.command, place, row.file_limit)
    assert status != 0, "accepted"
    assert re.search(row.says, the_line(stderr)), stderr
    after = contents(place)
    assert {name: after.get(name) for name in before} == before, "what was there has changed"
    left = [name for name in after.keys() - before if not any(fnmatch(name, pattern) for pattern in row.leaves)]
    assert not left, "something was left behind"
    assert written(place) == shared


# ------------------------------------------------------------------------------------------------ absurd, but it works

WORKS = [      # here `says` is the pattern of a file that must be there
    Row("images of any name", WRITE, "out.ffcv"),
    Row("more than there is", TRAIN + " --validation.batch_size=1000000000 --data.num_workers=1000000",
        "out/*/final_weights.pt"),
    Row("a batch of a billion", INFER + " --batch_size 1000000000 --save_softmax", "out/mrl=*_softmax.pth"),
    Row("a trillion images", INFER + " --retrieval --random_sample_dim 1000000000000", "out/1K_train_*-X.npy"),
    Row("nearest neighbours", "inference/baselines.py knn " + BASE, "out/knn_*.json"),
    Row("lists as CSV", "retrieval/retrieve.py search --sizes 8 --csv " + FIND, "out/neighbors/mrl/*.csv"),
    Row("a shortlist of a trillion", "retrieval/retrieve.py report --shortlist 1000000000000 " + FIND,
        "out/report/*_cost.png"),
    Row("a link in a tar file", BUILD + " --source {here}/source", "out/train/n00000002/0.JPEG", tar_with_a_link),
    Row("a policy", LEARN + " {saved}", "policy.json"),
]


@pytest.mark.parametrize("row", WORKS, ids=name)
def test_paths_with_spaces_and_absurd_settings_that_fit(row, place):
    row.spoil(place)
    shared = written(place)
    status, stderr = run(row.command, place)
    assert status == 0 and not re.search("error|Warning", stderr), stderr
    assert [path for path in place.here.glob(row.says) if not path.is_symlink()] and written(place) == shared


def test_the_shell_script_keeps_paths_whole(place):
    """write_imagenet.sh with a `python` that writes its words down."""
    program = place.here / "bin" / "python"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@" >> "$WRITE_DIR/words"\n')
    program.chmod(0o755)
    folder = place.here / "a new folder"
    subprocess.run(["./write_imagenet.sh", "500", "0.50", "90"], cwd=ROOT / "train", check=True,
                   env={**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "WRITE_DIR": str(folder),
                        "IMAGENET_DIR": str(place.images)})
    words = (folder / "words").read_text().splitlines()
    assert f"--cfg.write_path={folder}/train_500_0.50_90.ffcv" in words
    assert f"--cfg.data_dir={place.images}/val" in words


# ------------------------------------------------------------------------------------------------ interrupted

INTERRUPTED = [
    (WRITE + " --cfg.data_dir={many}/val", "0/400", signal.SIGINT),
    (WRITE + " --cfg.data_dir={many}/val", "0/400", signal.SIGTERM),
    (INFER + " --save_softmax --workers 2 --batch_size 8 --data_root {many} --output {here}", "1/50", signal.SIGINT),
    ("inference/baselines.py lp --epochs 1000000 " + BASE, "epoch 2/", signal.SIGTERM),
]


@pytest.mark.parametrize("command, begun, signum", INTERRUPTED, ids=lambda value: str(value).split()[0])
def test_interrupted_work_leaves_no_half_file_and_no_process(command, begun, signum, place):
    """Ctrl-C reaches all processes of a command, `kill` the first one only."""
    place.many = many_slow_images(place.here.parent)
    before, stderr = contents(place), place.here.parent / "stderr"
    process = start(command, place, stderr)
    try:
        wait_for(lambda: re.search(begun, stderr.read_text()) or process.poll() is not None)
        os.kill(process.pid if signum == signal.SIGTERM else -process.pid, signum)
        assert process.wait(120) == 128 + signum, stderr.read_text()
        wait_for(lambda: no_process_in_group(process.pid))
    finally:
        if not no_process_in_group(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not re.search("Traceback|Warning|leaked", stderr.read_text())
    assert contents(place) == before


def start(command, place, stderr):
    """A process of its own, and the first of its group. Not a fork of this one: its PyTorch has threads, which a fork
    loses and then waits for."""
    script, *words = fill(command, place)
    with open(stderr, "w") as file:
        return subprocess.Popen([sys.executable, Path(script).name, *words], cwd=(ROOT / script).parent, stderr=file,
                                stdout=subprocess.DEVNULL, env=with_python(), start_new_session=True)


def many_slow_images(root):
    """-> a folder of val/0 ... 9: 400 links to one picture that takes a while to read."""
    pixels = np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "one.png")
    for i in range(400):
        folder = root / "mäny/val" / str(i % 10)
        folder.mkdir(parents=True, exist_ok=True)
        os.link(root / "one.png", folder / f"{i}.png")
    return root / "mäny"


def wait_for(condition, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def no_process_in_group(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False
