"""The abuse table: every command with input that is broken, hostile, absurd or contradictory.

A row is a command, what spoils its input (abuse_inputs.py), and what the one line of complaint must name. Whatever is
wrong: one line `error: ...` (argparse: its usage, then that line), a status that is not 0, no traceback, no Python
warning; nothing is left behind, and what was there stays as it was. Code hidden in a file must not run: it would make a
folder `ran`. All input lies under paths with spaces and letters beyond ASCII. Most commands run in this process, as
scripts; those that start processes of their own, or are interrupted, run as a user's would.

One row for each kind of fault in each place: what the same reader or the same range check refuses has no second row.
"""
import ctypes
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import checkpoint
import conftest
import embeddings
import numpy as np
import pytest
import torch
from abuse_inputs import (
    ARRAYS,
    NET,
    SIZES,
    SOFTMAX,
    Code,
    bad_json,
    bomb,
    both,
    checkpoint_of_another_network,
    copied,
    edited_ffcv,
    folder_named,
    halve,
    halved,
    holding,
    locked,
    make_places,
    many_classes,
    many_queries,
    many_slow_images,
    nan_weights,
    npy,
    other_label_type,
    pictures,
    pointer_past_the_end,
    run_folder,
    second_half_gone,
    tar_cut_in_its_gzip,
    tar_with_a_link,
    tensors_without_numbers,
    torch_file,
    with_nan,
    words_of,
)
from conftest import ROOT, exit_status, output_to, python_that_notes, start_here, with_python
from forked import Forked, wait_for


class Row(NamedTuple):
    name: str
    command: str                        # folder/script and its words; {places} are filled in
    says: str = ""                      # pattern that the line must hold
    spoil: object = lambda place: None
    file_limit: int = -1                # bytes that a file may have: a disk that fills up
    leaves: tuple = ()                  # patterns of what may be left in `here`: finished files, folders
    makes: str = ""                     # of a command that works: pattern of a file that it must write


def row_name(row):
    return f"{row.command.split()[0]}-{row.name}".replace(" ", "_")


@pytest.fixture(scope="module")
def shared_input(tmp_path_factory, image_tree):
    return make_places(tmp_path_factory.mktemp("päth with späces"), image_tree)


@pytest.fixture
def place(shared_input, tmp_path):
    here = tmp_path / "bäd day"
    here.mkdir()
    yield SimpleNamespace(**vars(shared_input), here=here)
    for folder, names, _ in os.walk(here):      # what a row locked, so that it can be removed
        for name in names:
            if not os.path.islink(f"{folder}/{name}"):
                os.chmod(f"{folder}/{name}", 0o755)


def made_by(command, stopped_in=None):
    """What a good command leaves; or leaves that is interrupted in a function: (module, name)."""
    def spoil(place):
        with pytest.MonkeyPatch.context() as patch:
            if stopped_in:
                patch.setattr(*stopped_in, interrupt)
            status, stderr = run_here(command, place)
        assert status == (130 if stopped_in else 0), stderr
    return spoil


def interrupt(*_):
    raise KeyboardInterrupt


# ------------------------------------------------------------------------------------------------ the commands

WRITE = ("train/write_imagenet.py --cfg.split=train --cfg.data_dir={images}/val --cfg.write_path={here}/out.ffcv "
         "--cfg.max_resolution=64 --cfg.num_workers=2")
TRAIN = ("train/train_imagenet.py --training.device=cpu --model.arch=" + NET + " --model.mrl=1 --model.num_classes=3 "
         "--resolution.min_res=32 --resolution.max_res=32 --validation.resolution=32 --training.batch_size=8 "
         "--training.epochs=1 --data.num_workers=1 --data.in_memory=1 --logging.folder={here}/out "
         "--data.train_dataset={images}/train --data.val_dataset={images}/val")
TWO = " --training.distributed=1 --dist.world_size=2"
FFCV = "--data.train_dataset={here}/data.ffcv"
RESUME = "train/train_imagenet.py --training.resume={here}/out/run"
SETS = "--data_root {data} --resize 8 --crop 8 --workers 0 --device cpu"
EMBED = ("inference/pytorch_inference.py --path {runs}/mrl/final_weights.pt --retrieval "
         "--retrieval_array_path {here}/out " + SETS)
SETS += " --output {here}/out"
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
LOCK = "out/neighbors/mrl/.*.lock"      # empty, and taken by nobody

TABLE = [
    # -- images -> .ffcv
    Row("a file for a folder", WRITE + " --cfg.data_dir={here}/file", "/file", holding("file", "")),
    Row("an empty class folder", WRITE + " --cfg.data_dir={here}/tree", "data_dir=.*tree.* b",
        both(pictures(), lambda place: (place.here / "tree/b").mkdir())),
    Row("a folder in the file's place", WRITE, r"out\.ffcv.*folder", folder_named("out.ffcv")),
    Row("a million processes", WRITE + " --cfg.num_workers=1000000", "--cfg.num_workers=1000000"),
    Row("a bomb", WRITE + " --cfg.data_dir={here}/tree", r"tree: 1 of 2 images", bomb),
    Row("disk full", WRITE, r"out\.ffcv", file_limit=100_000),

    # -- training
    Row("an unknown key", TRAIN + " --config-file={here}/a.yaml", r"a\.yaml: unknown setting training\.epoch\b",
        holding("a.yaml", "training:\n  epoch: 3\n")),
    Row("not UTF-8", TRAIN + " --config-file={here}/a.yaml", r"a\.yaml: not YAML", holding("a.yaml", b"a: \xff\xfe")),
    Row("a list for a number", TRAIN + " --config-file={here}/a.yaml", r"lr\.lr=\[1, 2\]",
        holding("a.yaml", "lr:\n  lr: [1, 2]\n")),
    Row("an unknown flag", TRAIN + " --model.mlr=1", "--model.mlr=1"),
    Row("sizes without a nested model", TRAIN + " --model.mrl=0 --model.nesting_list=8,16", "--model.nesting_list"),
    Row("a million billion classes", TRAIN + f" --model.num_classes={10 ** 15} --logging.name=run", "not enough memory",
        leaves=("out", "out/run", "out/run/params.json")),
    Row("NaN for a rate", TRAIN + " --lr.lr=nan", "--lr.lr=nan"),
    Row("a batch of a billion", TRAIN + " --training.batch_size=1000000000", "--training.batch_size"),
    Row("a seed past 64 bits", TRAIN + f" --training.seed={10 ** 30}", "--training.seed=1000"),
    Row("a peak after the end", TRAIN + " --lr.lr_peak_epoch=9", "--lr.lr_peak_epoch=9: .*--training.epochs=1"),
    Row("a name that leads out of the folder", TRAIN + " --logging.name=../../evil", r"--logging.name=\.\./\.\./evil"),
    Row("fewer classes than folders", TRAIN + " --model.num_classes=2", "train: has 3 class folders"),
    Row("fewer classes than labels", TRAIN + " --model.num_classes=2 " + FFCV, "labels run from 0 to 2",
        edited_ffcv(lambda content: None)),
    Row("a folder without images", TRAIN + " --data.val_dataset={here}/tree", "1 class folder.* hold no images: b",
        both(pictures(), lambda place: (place.here / "tree/b").mkdir())),
    Row("a broken picture", TRAIN + " --logging.name=run --model.num_classes=4 --training.batch_size=2"
        " --data.train_dataset={here}/tree --data.val_dataset={here}/tree", r"a/bad\.png .* cannot be read; repair it",
        both(pictures(), holding("tree/a/bad.png", "no image")),
        leaves=("out", "out/run", "out/run/params.json", "out/run/log")),
    Row("no such weights to validate", TRAIN + " --training.eval_only=1 --training.path={here}/w.pt",
        r"w\.pt: No such file"),
    Row("half a file", TRAIN + " " + FFCV, r"data\.ffcv: truncated", edited_ffcv(second_half_gone)),
    Row("labels that are floats", TRAIN + " " + FFCV, r"data\.ffcv", edited_ffcv(other_label_type)),
    Row("pointers past the end", TRAIN + " " + FFCV, r"data\.ffcv: .*damaged", edited_ffcv(pointer_past_the_end)),
    Row("a file for the log folder", TRAIN, "/out/.*: Not a directory", holding("out", "of value")),
    Row("code in the backbone's file", TRAIN + " --model.init_from={here}/w.pt", r"w\.pt: holds more than tensors",
        torch_file("w.pt", lambda place: {"fc.weight": Code(place)})),
    Row("a flag without =", "train/train_imagenet.py --training.resume {here}/nothing", "--training.resume=.*nothing"),
    Row("settings of another kind", RESUME, r"--training.resume=.*params\.json",
        run_folder(TRAIN, lambda params: params | {"settings": {"training": 5}})),
    Row("another length", RESUME + " --training.epochs=2", "--training.epochs=1, now 2", run_folder(TRAIN)),
    Row("code in the checkpoint", RESUME, "out/run/checkpoint.pt: truncated or no checkpoint",
        run_folder(TRAIN, checkpoint_of=lambda place: {"format": checkpoint.FORMAT, "model": Code(place)})),
    Row("another network's checkpoint", RESUME, r"checkpoint\.pt",
        run_folder(TRAIN, checkpoint_of=checkpoint_of_another_network)),
    Row("disk full at the checkpoint", TRAIN + " --logging.name=run", r"checkpoint\.pt could not be written",
        file_limit=500_000, leaves=("out", "out/run", "out/run/params.json", "out/run/log")),

    # -- inference
    Row("a folder for a checkpoint", BARE + " {here}", "bäd day.*this folder has no model"),
    Row("no such checkpoint", BARE + " {here}/w.pt", r"w\.pt: No such file"),
    Row("half a checkpoint", BARE + " {here}/runs/ff/final_weights.pt", r"ff/final_weights\.pt: .*truncated",
        copied("runs", lambda runs: halve(runs / "ff/final_weights.pt"))),
    Row("code in the checkpoint", BARE + " {here}/w.pt", r"w\.pt: holds more than tensors",
        torch_file("w.pt", lambda place: {"a": Code(place)})),
    Row("keys that are numbers", BARE + " {here}/w.pt", r"w\.pt: holds no state dict",
        torch_file("w.pt", lambda place: {1: torch.zeros(2, 2)})),
    Row("NaN weights", BARE + " {here}/w.pt", r"w\.pt: conv1\.0\.weight holds NaN", torch_file("w.pt", nan_weights)),
    Row("tensors without numbers", BARE + " {here}/w.pt", r"w\.pt",
        torch_file("w.pt", tensors_without_numbers)),
    *(Row(f"params.json: {name}", "inference/pytorch_inference.py " + SETS + " --path {here}/runs/mrl/final_weights.pt",
          says, copied("runs", bad_json("mrl/params.json", content)))
      for name, content, says in (
          ("cut", '{"model": {', r"params\.json"),
          ("other words", {"model": {"arch": NET, "hat": 1}}, r"params\.json"),
          ("a billion classes", {"model": {"arch": NET, "head": "ff8", "num_classes": 10 ** 9}}, r"does not fit"))),
    Row("flags that contradict the run", INFER + " --efficient", "head=mrl_e was asked for"),
    Row("an unknown set", INFER + " --dataset imagenet", "--dataset imagenet"),
    Row("no data", INFER + " --data_root {here}/nothing", "/nothing/val"),
    Row("an empty class folder", INFER + " --data_root {here}/data", "1 class folder.* hold no images: 3",
        copied("data", lambda data: shutil.rmtree(data / "val/3") or (data / "val/3").mkdir())),
    Row("other classes in train", EMBED + " --data_root {here}/data", "(train|val) has no class folder (3|cat), ",
        copied("data", lambda data: (data / "train/3").rename(data / "train/cat"))),
    Row("an empty image", INFER + " --data_root {here}/data", r"3_0\.JPEG",
        copied("data", lambda data: (data / "val/3/3_0.JPEG").write_bytes(b"")), leaves=("out",)),
    Row("a device without numbers", INFER + " --device meta", "--device meta"),
    Row("a file for the output", INFER, "/out", holding("out", "of value")),
    Row("broken notes of an earlier run", INFER + " --save_gt", r"gt_dataset=V1\.json: not a JSON file",
        holding("out/gt_dataset=V1.json", "{")),
    Row("disk full", INFER + " --save_logits", r"logits\.pth could not be written", file_limit=2000,
        leaves=("out", "out/*_accuracy_*.json")),
    Row("half of what an interrupted run left", EMBED, r"X\.partial\.npy",
        both(made_by(EMBED, stopped_in=(embeddings, "finish")),
             halved("out/1K_val_mrl1_e0_ff1024-X.partial.npy"))),

    # -- baselines
    Row("code in an array", "inference/baselines.py lp " + HERE, r"val_mrl1_e0_ff32-y\.npy",
        lambda place: copied("arrays", npy(ARRAYS.format("val", "y.npy"), np.array([Code(place)] * 40, object),
                                           allow_pickle=True))(place)),
    Row("half an array", "inference/baselines.py lp " + HERE, r"train_mrl1_e0_ff32-X\.npy",
        copied("arrays", lambda arrays: halve(arrays / ARRAYS.format("train", "X.npy")))),
    Row("NaN in the database", "inference/baselines.py lp " + HERE, r"train_mrl1_e0_ff32-X\.npy.*NaN",
        copied("arrays", with_nan(ARRAYS.format("train", "X.npy")))),
    Row("NaN for a rate", "inference/baselines.py lp --lr nan " + BASE, "--lr: nan"),
    Row("more shots than images", "inference/baselines.py ncm --shots 1000000000000 " + BASE,
        "--shots 1000000000000: needs more"),
    Row("another model's classifier", "inference/baselines.py svd --path {runs}/ff/final_weights.pt --sizes 8 " + BASE,
        r"ff/final_weights\.pt"),

    # -- retrieval
    Row("no command", "retrieval/retrieve.py", "command"),
    Row("an unknown index", "retrieval/retrieve.py search --index hnsw16 " + FIND, "hnsw16"),
    Row("a trillion neighbours", "retrieval/retrieve.py search --sizes 8 --k 1000000000000 " + FIND, "k=1000000000000"),
    Row("NaN gigabytes", "retrieval/retrieve.py search --sizes 8 --memory_gb nan " + FIND, "memory_gb"),
    Row("code in the embeddings", "retrieval/retrieve.py search --sizes 8 " + FOUND, r"train_mrl1_e0_ff32-X\.npy",
        lambda place: copied("arrays", npy(ARRAYS.format("train", "X.npy"), np.array([[Code(place)]], object),
                                           allow_pickle=True))(place)),
    Row("NaN in the queries", "retrieval/retrieve.py search --sizes 8 " + FOUND, "the queries: row 3 is .*not finite",
        copied("arrays", with_nan(ARRAYS.format("val", "X.npy"))),
        leaves=("out", "out/index_files*", "out/neighbors", "out/neighbors/mrl", LOCK)),
    Row("notes of another kind", "retrieval/retrieve.py search " + FOUND, r"train_mrl1_e0_ff32-X\.json",
        copied("arrays", bad_json(ARRAYS.format("train", "X.json"), [1]))),
    Row("a list of letters", "retrieval/retrieve.py metrics {here}/exactl2_8dim_2shortlist_1K.csv " + FIND,
        r"exactl2_8dim_2shortlist_1K\.csv: not a CSV of integers",
        holding("exactl2_8dim_2shortlist_1K.csv", "1,2\n" * 39 + "1,cat\n")),
    Row("a list of huge numbers", "retrieval/retrieve.py metrics {here}/exactl2_8dim_2shortlist_1K.csv " + FIND,
        r"exactl2_8dim_2shortlist_1K\.csv", holding("exactl2_8dim_2shortlist_1K.csv", f"1,{10 ** 12}\n" * 40)),
    Row("no such list", "retrieval/retrieve.py metrics {here}/exactl2_8dim_2shortlist_1K.npy " + FIND,
        r"exactl2_8dim_2shortlist_1K\.npy: no such file"),
    Row("another set's list", "retrieval/retrieve.py metrics {here}/exactl2_8dim_2shortlist_V2.csv " + FIND,
        r"exactl2_8dim_2shortlist_V2\.csv.*V2", holding("exactl2_8dim_2shortlist_V2.csv", "1,2\n" * 40)),
    Row("a shortlist of none", "retrieval/retrieve.py rerank --retrieval_dim 8 --rerank_dims 32 --shortlist 0 " + FIND,
        "--shortlist: 0"),
    Row("a shortlist past the list", "retrieval/retrieve.py rerank --retrieval_dim 8 --rerank_dims 32 --shortlist 9 "
        "--k 8 " + FIND, "k=8: .* shorter than the shortlist, 9"),
    Row("a size past the width, the last of several", "retrieval/retrieve.py search --sizes 8 64 " + FIND,
        "size 64 is past"),
    Row("a file for the output", "retrieval/retrieve.py search --sizes 8 " + FIND, "/out", holding("out", "of value")),
    Row("half an index", "retrieval/retrieve.py search --sizes 8 --k 6 " + FIND,
        r"8dim_exactl2\.index: not a complete FAISS index",
        both(made_by("retrieval/retrieve.py search --sizes 8 --k 5 " + FIND),
             halved("out/index_files/mrl/1K_8dim_exactl2.index")), leaves=(LOCK,)),
    Row("disk full", "retrieval/retrieve.py search --sizes 8 --k 100 " + FIND, "8dim", file_limit=8000,
        leaves=("out", "out/neighbors", "out/neighbors/mrl", "out/index_files", "out/index_files/mrl", LOCK)),

    # -- ImageNet-4K
    Row("classes not in UTF-8", BUILD + " --classes {here}/classes.txt", r"classes\.txt",
        holding("classes.txt", b"n\xff\n")),
    Row("a class twice", BUILD + " --classes {here}/classes.txt", r"classes\.txt.*n00000001",
        holding("classes.txt", "n00000001\nn00000001\n")),
    Row("a class outside", BUILD + " --classes {here}/classes.txt", r"classes\.txt.*\.\./evil",
        holding("classes.txt", "../evil\n")),
    Row("a trillion images", BUILD + " --train 1000000000000", "fewer than 1000000000002 images"),
    Row("a compressed archive, cut", BUILD + " --source {here}/source", r"n00000002\.tar", tar_cut_in_its_gzip),
    Row("a file for the output", BUILD, "/out", holding("out", "of value")),

    # -- analysis
    Row("an unknown head", LEARN + " {saved} --head mlr", "--head.*mlr"),
    Row("NaN of the images", LEARN + " {saved} --fraction nan", "nan"),
    Row("code in the softmax", LEARN + " {here}/saved", SOFTMAX,
        lambda place: copied("saved", lambda folder: torch.save(Code(place), folder / f"{SOFTMAX}.pth"))(place)),
    Row("NaN in the softmax", LEARN + " {here}/saved", "softmax holds other numbers than probabilities",
        copied("saved", lambda folder: torch.save(torch.full((3, 40, 10), torch.nan), folder / f"{SOFTMAX}.pth"))),
    Row("a folder for the policy", LEARN + " {saved}", r"policy\.json.*folder", folder_named("policy.json")),
    Row("a policy of NaN", APPLY, r"policy\.json", holding("policy.json", POLICY | {"thresholds": [np.nan, 0.5]})),
    Row("disk full", LEARN + " {saved}", r"policy\.json", file_limit=10),

    # -- the demo's own
    Row("no folder named", "demo/cut_kanji.py", "required"),
    Row("another picture for the atlas", "demo/cut_kanji.py {here}/out --atlas {images}/val/class0/0.jpg",
        "not drawn from this typefaces.tsv"),
    Row("no fonts", "demo/make_kanji.py --fonts {here} --output {here}/out.png",
        r"ipaexg\.ttf.*apt-get install fonts-aoyagi-kouzan-t .*fonts-yusei-magic$"),
    Row("nothing to draw", "demo/pictures.py {here}", r"bäd day/figures"),
]


@pytest.mark.parametrize("row", TABLE, ids=row_name)
def test_one_line_and_nothing_lost(row, place):
    assert_refused(row, place)


# ------------------------------------------------------------------------------------------------ not ours to read

UNREADABLE = [
    Row("a folder in a class", WRITE + " --cfg.data_dir={here}/tree", "tree/a/deep: Permission denied",
        both(pictures(), locked("tree/a/deep"))),
    Row("the training file", TRAIN + " " + FFCV, r"data\.ffcv: Permission denied",
        both(edited_ffcv(lambda content: None), locked("data.ffcv"))),
    Row("a log folder that may not be written", TRAIN, "/out/.*: Permission denied", locked("out", 0o555)),
    Row("an image", INFER + " --data_root {here}/data", r"3_0\.JPEG .*Permission denied",
        both(copied("data"), locked("data/val/3/3_0.JPEG")), leaves=("out",)),
    Row("an array", "inference/baselines.py lp " + HERE, r"train_mrl1_e0_ff32-X\.npy: Permission denied",
        both(copied("arrays"), locked("arrays/" + ARRAYS.format("train", "X.npy")))),
    Row("the embeddings", "retrieval/retrieve.py search --sizes 8 " + FOUND, r"val.*-X\.npy: Permission denied",
        both(copied("arrays"), locked("arrays/" + ARRAYS.format("val", "X.npy")))),
    Row("a class of ImageNet-21K", BUILD + " --source {here}/source", "n00000001: Permission denied",
        both(copied("source"), locked("source/n00000001"))),
    Row("the softmax", LEARN + " {here}/saved", f"{SOFTMAX}.*Permission denied",
        both(copied("saved"), locked(f"saved/{SOFTMAX}.pth"))),
]


@pytest.mark.parametrize("row", UNREADABLE, ids=row_name)
def test_what_may_not_be_read_or_written_is_named(row, place):
    assert_refused(row, place, without_the_right_to_read_all)


# ------------------------------------------------------------------------------------------------ absurd, but it works

WORKS = [
    Row("images of any name", WRITE, makes="out.ffcv"),
    Row("more than there is", TRAIN + " --validation.batch_size=1000000000 --data.num_workers=1000000",
        makes="out/*/final_weights.pt"),
    Row("a batch of a billion", INFER + " --batch_size 1000000000 --save_softmax", makes="out/mrl=*_softmax.pth"),
    Row("a trillion images", EMBED + " --random_sample_dim 1000000000000", makes="out/1K_train_*-X.npy"),
    Row("a flag that does nothing", EMBED + " --tta", makes="out/1K_train_*-X.npy"),
    Row("lists as CSV", "retrieval/retrieve.py search --sizes 8 --csv " + FIND, makes="out/neighbors/mrl/*.csv"),
    Row("a shortlist of a trillion", "retrieval/retrieve.py report --shortlist 1000000000000 " + FIND,
        makes="out/report/*_cost.png"),
    Row("a link in a tar file", BUILD + " --source {here}/source", spoil=tar_with_a_link,
        makes="out/train/n00000002/0.JPEG"),
    Row("a policy", LEARN + " {saved}", makes="policy.json"),
]


@pytest.mark.parametrize("row", WORKS, ids=row_name)
def test_paths_with_spaces_and_absurd_settings_that_fit(row, place):
    row.spoil(place)
    shared = stamps(place)
    status, stderr = run_here(row.command, place)
    assert status == 0 and not re.search("error|Warning", stderr), stderr
    assert [path for path in place.here.glob(row.makes) if not path.is_symlink()] and stamps(place) == shared


def test_the_shell_script_keeps_paths_whole(place):
    """write_imagenet.sh with a `python` that writes its words down."""
    program = place.here / "bin"
    program.mkdir()
    python_that_notes(program)
    folder = place.here / "a new folder"
    subprocess.run(["./write_imagenet.sh", "500", "0.50", "90"], cwd=ROOT / "train", check=True,
                   env={**os.environ, "PATH": f"{program}:{os.environ['PATH']}", "HOME": str(place.here),
                        "WRITE_DIR": "~/a new folder", "IMAGENET_DIR": str(place.images)})
    words = (program / "words").read_text().splitlines()
    assert f"--cfg.write_path={folder}/train_500_0.50_90.ffcv" in words
    assert f"--cfg.data_dir={place.images}/val" in words


def test_the_demo_removes_nothing_in_a_folder_that_it_did_not_make(place):
    """demo.sh alone, beside a set-up that sets nothing up: it must stop before it needs one."""
    shutil.copy(ROOT / "demo.sh", place.here)
    (place.here / "setup.sh").touch()
    holding("my work/images/0.png", "of value")(place)
    before = contents(place)
    done = subprocess.run(["bash", "demo.sh", "my work"], cwd=place.here, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and re.fullmatch("error: .*/my work is not empty.*\n", done.stderr), done.stderr
    assert contents(place) == before


@pytest.mark.parametrize("reader", ["/dev/full", "a closed pipe"])
def test_output_that_nobody_takes(place, reader):
    """`> a file` on a full disk, and `| head`: the work is done, what it says is lost, and one line says so."""
    script, *words = words_of("retrieval/retrieve.py search --sizes 8 " + FIND, place)
    end, pipe = os.pipe()
    os.close(end)
    with open("/dev/full" if reader == "/dev/full" else pipe, "wb") as stdout:
        done = subprocess.run([sys.executable, Path(script).name, *words], cwd=(ROOT / script).parent, stdout=stdout,
                              stderr=subprocess.PIPE, text=True, check=False,
                              env=with_python(OMP_NUM_THREADS="1", PYTHONUNBUFFERED=""))
    assert done.returncode == 1 and re.search("standard output: (No space|Broken pipe)", the_line(done.stderr))
    assert list(place.here.glob("out/neighbors/mrl/*.npy"))


# ------------------------------------------------------------------------------------------------ interrupted

class Stopped(NamedTuple):
    command: str                        # with {large}, the folder that `large` makes of a place
    large: object
    begun: str                          # pattern of stderr: the work has begun
    signum: int
    leaves: tuple = ()                  # finished files, and what the next run goes on with


INTERRUPTED = [
    Stopped(WRITE + " --cfg.data_dir={large}/val", many_slow_images, "0/400", signal.SIGINT),
    Stopped(WRITE + " --cfg.data_dir={large}/val", many_slow_images, "0/400", signal.SIGTERM),
    Stopped(INFER + " --save_softmax --workers 2 --batch_size 8 --data_root {large} --output {here}", many_slow_images,
            "1/50", signal.SIGINT),
    Stopped("inference/baselines.py lp --epochs 1000000 " + BASE, lambda place: place.arrays, "epoch 2/",
            signal.SIGTERM),
    Stopped("retrieval/retrieve.py search --sizes 8 --k 10 --device cpu --embeddings {large} --output {here}",
            many_queries, "8dim", signal.SIGINT, ("index_files*", "neighbors", "neighbors/mrl", "neighbors/mrl/.*")),
    Stopped(BUILD + " --source {large} --classes {large}/classes.txt", many_classes, "building: +[1-9]", signal.SIGINT,
            ("out", "out/train", "out/val", "out/*/n0000????", "out/*/n0000????/n*.JPEG")),
]


@pytest.mark.parametrize("stopped", INTERRUPTED,
                         ids=lambda stopped: f"{stopped.command.split()[0]}-{stopped.signum.name}")
def test_interrupted_work_leaves_no_half_file_and_no_process(stopped, place):
    """Ctrl-C reaches all processes of a command, `kill` the first one only."""
    place.large = stopped.large(place)
    before = contents(place)
    script, *words = words_of(stopped.command, place)
    process = Forked(script, *words)
    stderr = process.output[1]
    try:
        wait_for(lambda: (stderr.exists() and re.search(stopped.begun, stderr.read_text()))
                 or process.poll() is not None)
        os.kill(process.pid if stopped.signum == signal.SIGTERM else -process.pid, stopped.signum)
        assert process.wait(120) == 128 + stopped.signum, stderr.read_text()
        wait_for(lambda: no_process_in_group(process.pid))
    finally:
        if not no_process_in_group(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not re.search("Traceback|Warning|leaked", stderr.read_text())
    assert_kept(before, place, stopped.leaves)


def no_process_in_group(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


# ------------------------------------------------------------------------------------------------ running a row

def assert_refused(row, place, rights=nullcontext):
    """Run a row's command and assert what the table promises."""
    if not conftest.FFCV and re.search(r"write_imagenet|\.ffcv", row.command):
        pytest.skip("FFCV is not installed")
    row.spoil(place)
    before, shared = contents(place), stamps(place)
    with rights():
        status, stderr = run_here(row.command, place, row.file_limit)
    assert status != 0, "accepted"
    assert re.search(row.says, the_line(stderr)), stderr
    assert_kept(before, place, row.leaves)
    assert stamps(place) == shared


def assert_kept(before, place, leaves):
    """What was there is as it was, and nothing else but `leaves` is there now."""
    after = contents(place)
    assert {name: after.get(name) for name in before} == before, "what was there has changed"
    left = [name for name in after.keys() - before if not any(fnmatch(name, pattern) for pattern in leaves)]
    assert not left, "something was left behind"


def run_here(command, place, file_limit=-1):
    """-> (exit status, stderr) of a command, run as a script in this process."""
    said = place.here.parent / "stderr"
    with output_to(os.devnull, said), warnings_to_stderr():
        with largest_file(file_limit):
            code = start_here(*words_of(command, place))
        status = exit_status(code)
    return status, said.read_text()


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
def without_the_right_to_read_all():
    """For root too, a file that nobody may read cannot be read: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH are put down.
    (Of this thread and what it starts, and until the end: a right that is only not in effect can be taken up again.)"""
    libc, header, rights = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, rights) == 0
    in_effect = rights[0]
    rights[0] &= ~0b110
    assert libc.capset(header, rights) == 0
    try:
        yield
    finally:
        rights[0] = in_effect
        libc.capset(header, rights)


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
    def content(path):
        return path.read_bytes() if path.is_file() and os.access(path, os.R_OK) else None

    return {str(path.relative_to(place.here)): content(path) for path in place.here.rglob("*")}


def stamps(place):
    """-> {path: size and time} of the input that rows share."""
    folders = [folder for name, folder in vars(place).items() if name != "here"]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for folder in folders for path in folder.rglob("*")}


def the_line(stderr):
    """The one line of complaint; nothing else may be there but argparse's usage, notes and progress bars."""
    lines = [line for line in re.split(r"[\r\n]+", stderr) if line.strip()]
    complaints = [line for line in lines if re.match(r"(\S+\.py( \w+)?: )?error: ", line)]
    assert len(complaints) == 1 and lines[-1] == complaints[0], stderr
    assert not re.search(r"Traceback|Warning|Exception", stderr), stderr
    allowed = r"usage: |  +|unreadable: |warning: |note: |writing failed: |.*(%\||it/s|\?it)"
    assert all(re.match(allowed, line) for line in lines[:-1]), stderr
    return complaints[0]


