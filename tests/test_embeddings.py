"""Dumps are exact and resumable: killed and restarted, the bytes are the same. (Two processes: the commands' tests.)"""
import json
import resource
import signal
import time
from pathlib import Path

import embeddings
import numpy as np
import pytest
import torch
from embeddings import Files, describe_dump, dump, remove_head
from forked import Forked, fork, statuses
from image_set import ImageSet, Preparation
from image_trees import SIZE, ColourReader, make_tree

from mrl_files import InputError
from mrl_models import build_model

CPU = torch.device("cpu")
ABOUT = {"checkpoint": "0f", "nesting_list": [2, 4], "dataset": "4K", "split": "val"}


class Features(torch.nn.Module):
    """x [N, 3, H, W] -> 6 features, positive, different for each colour."""

    def forward(self, x):
        return torch.cat([x.mean((2, 3)), x.amax((2, 3)) ** 2], dim=1).exp()


def image_set(folder, classes=7, per_class=3):
    names = [f"n{i:08}" for i in range(classes)]
    if not folder.exists():
        make_tree(folder, names, per_class)
    return ImageSet(folder, names, None, Preparation(SIZE, SIZE))


def write(images, stem, batch_size=4, about=ABOUT, model=None, storage="fp32", **options):
    return dump(model or Features(), images, stem, describe_dump(about, storage=storage), CPU, batch_size=batch_size,
                workers=0, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_are_the_first_features_and_labels_are_int64(tmp_path):
    images = image_set(tmp_path / "tree")
    about = write(images, tmp_path / "out" / "4K_val_m")
    X, y = (np.load(tmp_path / "out" / f"4K_val_m-{end}.npy", mmap_mode="r") for end in "Xy")
    with torch.no_grad():
        expected = Features()(torch.stack([images[i][0] for i in range(21)]))[:, :4].numpy()
    assert (X.dtype, y.dtype) == (np.float32, np.int64)
    np.testing.assert_allclose(X, expected, rtol=1e-6)
    assert y.tolist() == [i // 3 for i in range(21)]
    assert about == json.loads((tmp_path / "out" / "4K_val_m-X.json").read_text())
    assert (about["n"], about["dim"], about["dtype"], about["complete"]) == (21, 4, "float32", True)
    assert sorted(contents(tmp_path / "out")) == ["4K_val_m-X.json", "4K_val_m-X.npy", "4K_val_m-y.npy"]


def test_embeddings_are_what_the_head_reads():
    torch.manual_seed(0)
    model = build_model("resnet18", "mrl", num_classes=5).eval()
    x, head, seen = torch.randn(2, 3, 32, 32), model.fc, []
    head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(x)
        assert remove_head(model)(x).equal(seen[0])


def test_labels_to_4201_survive(tmp_path):
    """4,202 classes, of which the last hundred are there: float16 would merge every second one."""
    names = [f"n{i:08}" for i in range(4202)]
    folder = make_tree(tmp_path / "tree", names[4100:])
    images = ImageSet(folder, names, None, Preparation(SIZE, SIZE), found=names[4100:])
    write(images, tmp_path / "4K_val_m", batch_size=32)
    assert np.load(tmp_path / "4K_val_m-y.npy").tolist() == list(range(4100, 4202))


def test_fp16_storage(tmp_path):
    images = image_set(tmp_path / "tree")
    assert write(images, tmp_path / "a", storage="fp16")["dtype"] == "float16"
    write(images, tmp_path / "b")
    half, full = np.load(tmp_path / "a-X.npy"), np.load(tmp_path / "b-X.npy")
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, full.astype(np.float16))


def test_last_batch_of_one_image_keeps_its_axis(tmp_path):
    images = image_set(tmp_path / "tree", classes=5, per_class=1)
    assert write(images, tmp_path / "m", batch_size=4)["n"] == 5
    assert np.load(tmp_path / "m-X.npy").shape == (5, 4)


def test_unreadable_images_stop_or_are_left_out(tmp_path):
    images = image_set(tmp_path / "tree")
    write(images, tmp_path / "whole" / "m")
    for i in (0, 4, 20):
        images.path(i).write_bytes(b"broken")
    with pytest.raises(InputError, match=r"1 unreadable image\(s\) in this batch: .*n00000000_0.JPEG"):
        write(images, tmp_path / "m")
    about = write(images, tmp_path / "m", skip_bad_images=True)
    kept = [i for i in range(21) if i not in (0, 4, 20)]
    assert about["n"] == 18 and about["skipped"] == [str(images.path(i)) for i in (0, 4, 20)]
    np.testing.assert_array_equal(np.load(tmp_path / "m-X.npy"), np.load(tmp_path / "whole" / "m-X.npy")[kept])
    assert np.load(tmp_path / "m-y.npy").tolist() == [i // 3 for i in kept]


def test_a_repaired_image_is_taken_up(tmp_path):
    """Not by the command that left it out; without the flag, or with --overwrite, it is missed."""
    images, stem = image_set(tmp_path / "tree"), tmp_path / "out" / "m"
    whole = images.path(4).read_bytes()
    images.path(4).write_bytes(b"broken")
    write(images, stem, skip_bad_images=True)
    with pytest.raises(InputError, match=r"m-X.npy: made without 1 unreadable image\(s\), .*n00000001_1.JPEG: "
                                         "pass --skip_bad_images .* or --overwrite"):
        write(images, stem)
    assert write(images, stem, model=ColourReader(), skip_bad_images=True)["n"] == 20     # would fail if it were run
    images.path(4).write_bytes(whole)
    assert write(images, stem, overwrite=True)["n"] == 21
    assert write(images, stem, model=ColourReader(), overwrite=True)["skipped"] == []     # complete: not made again
    write(images, tmp_path / "whole" / "m")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_stopped_dump_tries_unreadable_images_again(tmp_path, monkeypatch):
    images, stem = image_set(tmp_path / "tree"), tmp_path / "out" / "m"
    whole = images.path(4).read_bytes()
    images.path(4).write_bytes(b"broken")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(embeddings, "finish", interrupt)
        write(images, stem, skip_bad_images=True)
    with pytest.raises(InputError, match=r"unreadable image\(s\) in this batch: .*n00000001_1.JPEG"):
        write(images, stem)
    images.path(4).write_bytes(whole)
    assert write(images, stem)["n"] == 21
    write(images, tmp_path / "whole" / "m")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def interrupt(*_):
    raise KeyboardInterrupt


def test_arrays_of_the_original_are_not_replaced(tmp_path):
    images, stem = image_set(tmp_path / "tree"), tmp_path / "m"
    np.save(f"{stem}-y.npy", np.ones((3, 1), np.float16))
    with pytest.raises(InputError, match=r"m-y.npy: nothing beside it says .*\(no m-X.json\).*--overwrite"):
        write(images, stem)
    assert np.load(f"{stem}-y.npy").shape == (3, 1)
    write(images, stem, overwrite=True)
    assert np.load(f"{stem}-y.npy").shape == (21,)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_command_for_the_same_dump_is_refused(tmp_path, workers):
    """While the first one runs, and not after it was stopped: its workers hold no lock of their own."""
    images, stem = image_set(tmp_path / "tree"), tmp_path / "out" / "m"
    begun = {}

    def a_second():
        with pytest.raises(InputError, match=r"m-X.npy: another process writes it"):
            write(images, stem)

    class Asks(Features):
        def forward(self, x):
            assert statuses([fork(a_second)]) == [0]
            begun.update(contents(tmp_path / "out"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dump(Asks(), images, stem, describe_dump(ABOUT), CPU, batch_size=4, workers=workers)
    assert ".m-X.npy.lock" in begun and ".m-X.npy.lock" not in contents(tmp_path / "out")
    assert write(images, stem)["n"] == 21


def test_complete_dump_is_not_made_again_and_another_run_does_not_replace_it(tmp_path):
    images = image_set(tmp_path / "tree")
    write(images, tmp_path / "out" / "m")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    write(images, tmp_path / "out" / "m", model=ColourReader())          # would fail if it were run
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    other = {**ABOUT, "checkpoint": "1e"}
    with pytest.raises(InputError, match="checkpoint=0f, not 1e"):
        write(images, tmp_path / "out" / "m", about=other)
    assert write(images, tmp_path / "out" / "m", about=other, overwrite=True)["checkpoint"] == "1e"


def test_stopped_dump_goes_on_where_it_stopped(tmp_path):
    images = image_set(tmp_path / "tree")
    write(images, tmp_path / "whole" / "m")

    class Stops(Features):
        batches = 0

        def forward(self, x):
            self.batches += 1
            if self.batches == 4:
                raise KeyboardInterrupt
            return super().forward(x)

    with pytest.raises(KeyboardInterrupt):
        write(images, tmp_path / "out" / "m", model=Stops())
    assert not (tmp_path / "out" / "m-X.npy").exists()
    counting = Stops()
    write(images, tmp_path / "out" / "m", model=counting)
    assert counting.batches == 3                                          # 6 batches, 3 of them done before
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("step", ["replace", "write_json", "unlink"])
def test_a_dump_stopped_in_its_last_steps_is_only_finished(tmp_path, monkeypatch, step):
    """Before the rows have their name, the companion is there, the plan is gone: no image is read again."""
    images = image_set(tmp_path / "tree")
    write(images, tmp_path / "whole" / "m")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in_finish(patch, step)
        write(images, tmp_path / "out" / "m")
    write(images, tmp_path / "out" / "m", model=ColourReader(), overwrite=True)          # would fail if it were run
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def stop_in_finish(patch, step):
    owner, finish = {"replace": embeddings.os, "write_json": embeddings, "unlink": Path}[step], embeddings.finish
    real = getattr(owner, step)

    def interrupted(path, *args, **options):
        if "partial" in str(path) or step == "write_json":
            raise KeyboardInterrupt
        return real(path, *args, **options)

    def stopping(*args):
        patch.setattr(owner, step, interrupted)
        finish(*args)
    patch.setattr(embeddings, "finish", stopping)


def test_rows_that_nobody_wrote_are_no_complete_dump(tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "fill", lambda *_: None)
    with pytest.raises(InputError, match="21 rows are missing"):
        write(image_set(tmp_path / "tree"), tmp_path / "out" / "m")


class Slow(Features):
    def forward(self, x):
        time.sleep(0.3)
        return super().forward(x)


def write_slowly(tree, stem):
    write(image_set(tree, 20, 3), stem, model=Slow())


def test_killed_dump_restarted_equals_an_uninterrupted_one(tmp_path):
    tree, stem = tmp_path / "tree", tmp_path / "out" / "m"
    write(image_set(tree, 20, 3), tmp_path / "whole" / "m")
    files = Files(stem)
    process = Forked(write_slowly, tree, stem)
    try:
        deadline = time.time() + 60
        while time.time() < deadline and not (files.begun.exists() and np.load(files.state).sum() >= 12):
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 12 <= np.load(files.state).sum() < 60 and not files.X.exists()      # some of the 60 images are done
    write(image_set(tree, 20, 3), stem)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_full_disk_is_one_line_before_any_work(tmp_path):
    """A limit on the size of files stands for a full disk: both are an error of the same call."""
    images = image_set(tmp_path / "tree")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(InputError, match=r"m-X.partial.npy: 0.00 GB are needed: File too large"):
            write(images, tmp_path / "out" / "m", model=ColourReader())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path / "out") == {}
