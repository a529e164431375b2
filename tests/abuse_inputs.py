"""What the commands of the abuse table are given: good input in places with odd names, and what spoils a copy of it.

A spoiler is a function of the row's `place`: it writes under place.here, the row's own folder. test_abuse.py says which
spoiler goes with which command, and what must come of it.
"""
import gzip
import io
import json
import os
import shlex
import shutil
import sys
import tarfile
import zlib
from types import SimpleNamespace

import checkpoint
import numpy as np
import pytest
import retrieval_world
import settings
import torch
import train_imagenet
import write_imagenet
from conftest import FFCV
from image_trees import make_run, make_tree
from PIL import Image
from test_outputs import save as save_output

from mrl_models import build_model

NET = "shufflenet_v2_x0_5"      # the smallest of torchvision's networks
DIGITS = [str(i) for i in range(10)]
SIZES = [8, 16, 32]
CLASSES = ["n00000001", "n00000002"]
SOFTMAX = "mrl=True_efficient=False_ff=32_dataset=V1_tta=False_softmax"
ARRAYS = "1K_{}_mrl1_e0_ff32-{}"


# ------------------------------------------------------------------------------------------------ the places

def make_places(root, image_tree):
    """Good input for all commands -> a place. Rows share it and may only read it: what they spoil is a copy."""
    place = SimpleNamespace(images=root / "images", ffcv=root / "ffcv", runs=root / "runs", data=root / "data",
                            arrays=root / "arrays", saved=root / "saved", source=root / "imagenet 21k")
    shutil.copytree(image_tree, place.images)
    if FFCV:
        write_ffcv(place)
    make_run(place.runs / "mrl", "mrl", arch=NET, nesting_list=[8, 16, 1024])
    make_run(place.runs / "ff", "ff16", arch=NET)
    for split in ("train", "val"):
        make_tree(place.data / split, DIGITS)
    retrieval_world.write(place.arrays, retrieval_world.world(300, 40, 32, classes=10), nesting_list=SIZES)
    save_outputs(place.saved)
    for name in CLASSES:
        make_tree(place.source, {name: 0}, per_class=6)
    (place.source / "classes.txt").write_text("\n".join(CLASSES))
    return place


def write_ffcv(place):
    place.ffcv.mkdir()
    write_imagenet.write(SimpleNamespace(
        dataset="imagenet", split="train", data_dir=f"{place.images}/train", write_mode="smart", max_resolution=64,
        write_path=f"{place.ffcv}/train.ffcv", num_workers=2, chunk_size=100, jpeg_quality=90, subset=-1,
        compress_probability=None))


def save_outputs(folder):
    """Softmax and true classes as inference leaves them."""
    softmax = np.random.default_rng(0).dirichlet(np.ones(10), (3, 40)).astype(np.float32)
    save_output(folder, SOFTMAX, softmax, nesting_list=SIZES, num_classes=10, checkpoint="c0ffee", images="12",
                classes=DIGITS, dataset="V1", tta=False)
    save_output(folder, "gt_dataset=V1", np.arange(40) % 10)


def words_of(command, place):
    """-> [folder/script, words ...], the {places} filled in."""
    return [word.format(**vars(place)) for word in shlex.split(command)]


# ------------------------------------------------------------------------------------------------ what spoils

def holding(name, content):
    """A file `name` here, of bytes, text or something that is written as JSON."""
    def spoil(place):
        text = content if isinstance(content, (bytes, str)) else json.dumps(content)
        path = place.here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return spoil


def folder_named(name):
    """A folder where a file is expected, with something in it."""
    return holding(f"{name}/something", "of value")


def torch_file(name, make):
    """What torch.save makes of make(place)."""
    def spoil(place):
        (place.here / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(make(place), place.here / name)
    return spoil


def copied(source, change=lambda copy: None):
    """A copy here of place.<source>, then change(copy)."""
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


def halve(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def halved(name):
    """What is here under this name loses its second half."""
    return lambda place: halve(place.here / name)


def locked(name, mode=0):
    """Nobody may read what `name` names here; mode 0o555: nobody may write into the folder, made if need be."""
    def spoil(place):
        path = place.here / name
        if not path.exists():
            path.mkdir(parents=True)
        path.chmod(mode)
    return spoil


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
    from ffcv.types import FieldDescType, HeaderType
    content[HeaderType.itemsize + FieldDescType.itemsize] = 0           # the type of the second field: floats


def pointer_past_the_end(content):
    from ffcv.types import FieldDescType, HeaderType
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


def pictures(**sizes):
    """tree/a/*.png of these sizes, and one good picture."""
    def spoil(place):
        make_tree(place.here / "tree", ["a"])
        for name, size in sizes.items():
            Image.new("RGB", size).save(place.here / "tree/a" / f"{name}.png")
    return spoil


def bomb(place):
    """A PNG of 100 bytes that says it is 60,000 x 60,000 pixels large."""
    make_tree(place.here / "tree", ["a"])
    held = io.BytesIO()
    Image.new("RGB", (1, 1)).save(held, "PNG")
    raw = bytearray(held.getvalue())
    raw[16:24] = (60_000).to_bytes(4, "big") * 2
    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
    (place.here / "tree/a/bomb.png").write_bytes(raw)


def run_folder(command, changes=None, checkpoint_of=None):
    """out/run: what --training.resume could continue, of this training command. changes: to its params.json."""
    def spoil(place):
        folder = place.here / "out" / "run"
        folder.mkdir(parents=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words_of(command, place))
            checkpoint.write_params(folder, settings.as_dict(settings.read_settings(train_imagenet.CONFIG, "")), {})
        params = json.loads((folder / "params.json").read_text())
        if changes:
            (folder / "params.json").write_text(json.dumps(changes(params)))
        if checkpoint_of:
            torch.save({"run": params.get("run")} | checkpoint_of(place), folder / checkpoint.CURRENT)
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
    tar = place.here / "source" / f"{CLASSES[1]}.tar"
    tar.write_bytes(gzip.compress(tar.read_bytes())[:200])


def tensors_without_numbers(place):
    with torch.device("meta"):
        return build_model(NET, "ff16", num_classes=10).state_dict()


# ------------------------------------------------------------------------------------------------ what takes long

def many_slow_images(place):
    """-> a folder of val/0 ... 9: 400 links to one picture that takes a while to read."""
    root = place.here.parent
    pixels = np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "one.png")
    for i in range(400):
        folder = root / "mäny/val" / str(i % 10)
        folder.mkdir(parents=True, exist_ok=True)
        os.link(root / "one.png", folder / f"{i}.png")
    return root / "mäny"


def many_queries(place):
    """-> a folder of embeddings whose search takes 10 seconds or more on one thread."""
    rng, n, q = np.random.default_rng(0), 20_000, 1_000_000
    xb, xq = (rng.standard_normal((rows, 8), np.float32).astype(np.float16) for rows in (n, q))
    return retrieval_world.write(place.here.parent / "mäny", (xb, np.zeros(n, int), xq, np.zeros(q, int)))


def many_classes(place):
    """-> a folder of 2,000 classes, all of them links to one, and their list."""
    root = place.here.parent / "mäny"
    root.mkdir()
    names = [f"n{i:08}" for i in range(2000)]
    for name in names:
        (root / name).symlink_to(place.source / CLASSES[0])
    (root / "classes.txt").write_text("\n".join(names))
    return root
