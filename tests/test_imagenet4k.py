"""The class list, and building the folders from class folders and tar files at a tiny size."""
import os
import re
import tarfile
from pathlib import Path

import build_imagenet4k as b
import pytest
from conftest import ROOT

CLASSES = ["n00000002", "n00000001"]          # like the true list, not sorted
COUNTS = {"train": 3, "val": 2}


@pytest.fixture
def source(tmp_path):
    """Two classes of 6 images: one folder, one tar file."""
    folder = tmp_path / "source" / CLASSES[0]
    folder.mkdir(parents=True)
    for i in (10, 9, 2, 11, 1, 3):
        (folder / f"{CLASSES[0]}_{i}.JPEG").write_text(f"{i}")
    (folder / "notes.txt").write_text("no image")
    with tarfile.open(tmp_path / "source" / f"{CLASSES[1]}.tar", "w") as tar:
        for i in (4, 3, 6, 5, 1, 2):
            image = tmp_path / f"{CLASSES[1]}_{i}.JPEG"
            image.write_text(f"{i}")
            tar.add(image, arcname=image.name)
    return tmp_path / "source"


@pytest.fixture
def command(tmp_path, source, monkeypatch):
    """command("--copy") runs the script on the tiny source. -> the output folder."""
    (tmp_path / "classes.txt").write_text("".join(f"{name} -> a name: a definition\n" for name in CLASSES))

    def start(*words):
        monkeypatch.setattr("sys.argv", list(map(str, [
            "build_imagenet4k.py", "--source", source, "--output", tmp_path / "4k",
            "--classes", tmp_path / "classes.txt", "--train", 3, "--val", 2, *words])))
        b.main()
        return tmp_path / "4k"
    return start


def built(folder):
    return {split: {name: sorted(os.listdir(folder / split / name)) for name in os.listdir(folder / split)}
            for split in ("train", "val")}


BY_RULE = {"train": {CLASSES[0]: [f"{CLASSES[0]}_{i}.JPEG" for i in (1, 10, 11)],         # sorted as text
                     CLASSES[1]: [f"{CLASSES[1]}_{i}.JPEG" for i in (1, 2, 3)]},
           "val": {CLASSES[0]: [f"{CLASSES[0]}_{i}.JPEG" for i in (2, 3)],
                   CLASSES[1]: [f"{CLASSES[1]}_{i}.JPEG" for i in (4, 5)]}}


def test_hidden_files_and_folders_are_neither_images_nor_classes(command, source):
    """macOS leaves ._0.JPEG beside 0.JPEG, in folders and tar files; file browsers and notebooks leave folders."""
    (source / CLASSES[0] / "._0.JPEG").write_text("no image")
    with tarfile.open(source / f"{CLASSES[1]}.tar", "a") as tar:
        tar.add(source / CLASSES[0] / "._0.JPEG", arcname="._0.JPEG")
    folder = command()
    assert built(folder) == BY_RULE
    for hidden in (folder / "val" / CLASSES[0] / ".thumbnails", folder / "val/.ipynb_checkpoints"):
        hidden.mkdir()
    command()


def test_class_list():
    ids = b.class_ids()
    lines = (ROOT / "imagenet-4k" / "IDtoClass.txt").read_text().splitlines()
    assert len(ids) == len(set(ids)) == len(lines) == 4202
    assert all(re.fullmatch(r"n\d{8} -> [^:]+: .+", line) for line in lines)
    assert sorted(ids) == sorted((ROOT / "inference" / "imagenet4k_synsets.txt").read_text().split())
    assert not set(ids) & set((ROOT / "inference" / "imagenet_synsets.txt").read_text().split())
    assert lines[0] == "n00005787 -> benthos: organisms (plants and animals) that live at or near the bottom of a sea"


@pytest.mark.parametrize("flag", [[], ["--copy"]])
def test_first_by_sorted_name_and_again(command, flag, capsys):
    folder = command(*flag)
    assert built(folder) == BY_RULE
    assert "2 classes, 6 database images (train), 4 query images (val)" in capsys.readouterr().out
    linked = folder / "train" / CLASSES[0] / f"{CLASSES[0]}_10.JPEG"
    assert linked.is_symlink() == (flag == []) and linked.read_text() == "10"
    assert (folder / "val" / CLASSES[1] / f"{CLASSES[1]}_5.JPEG").read_text() == "5"

    before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*.JPEG")}
    lost = folder / "val" / CLASSES[1] / f"{CLASSES[1]}_4.JPEG"
    lost.unlink()
    lost.with_name(".half.JPEG").write_text("of a run that was killed")
    command(*flag)                                             # only what is missing is made
    assert built(folder) == BY_RULE
    assert {path: path.lstat().st_mtime_ns for path in before if path != lost} == \
           {path: time for path, time in before.items() if path != lost}


def test_copies_take_the_place_of_links(command):
    folder = command()
    command("--copy")
    linked = [path for path in folder.rglob("*.JPEG") if path.is_symlink()]
    assert built(folder) == BY_RULE and linked == []


def test_a_name_twice_in_a_tar_file_is_one_image(command, source, tmp_path):
    """Appended again, as `tar -r` does: the counts are of names, not of entries."""
    with tarfile.open(source / f"{CLASSES[1]}.tar", "a") as tar:
        tar.add(tmp_path / f"{CLASSES[1]}_1.JPEG", arcname=f"{CLASSES[1]}_1.JPEG")
    assert built(command()) == BY_RULE


def test_empty_files_are_named(command, source, tmp_path):
    image = source / CLASSES[0] / f"{CLASSES[0]}_10.JPEG"
    image.write_text("")
    with pytest.raises(b.InputError, match=r"n00000002/n00000002_10.JPEG is empty; get it again"):
        command()
    image.write_text("10")
    with tarfile.open(source / f"{CLASSES[1]}.tar", "w") as tar:
        for i in range(6):
            tar.addfile(tarfile.TarInfo(f"{CLASSES[1]}_{i}.JPEG"))
    with pytest.raises(b.InputError, match=r"n00000001.tar: n00000001_0.JPEG is empty"):
        command()


def test_given_list(command, tmp_path):
    lines = [f"{split}/{name}/{name}_{i}.JPEG" for name, numbers in zip(CLASSES, [(9, 1, 2, 3, 11), (6, 5, 4, 3, 2)],
                                                                        strict=True)
             for split, i in zip(["train"] * 3 + ["val"] * 2, numbers, strict=True)]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n")
    folder = command("--list", tmp_path / "list.txt")
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.JPEG")) == sorted(lines)


@pytest.mark.parametrize("change, message", [
    (lambda lines: lines[:-1], r"1 class\(es\) without 3 train and 2 val images, all different: n00000001"),
    (lambda lines: [*lines[:-1], lines[-2]], r"1 class\(es\) without .* n00000001"),
    (lambda lines: [*lines, "n00000001/x.JPEG"], r"line 11: 'n00000001/x.JPEG' is not train/<class>/<file>"),
    (lambda lines: [*lines, "val/n99999999/x.JPEG"], "line 11: .*with a class of the list"),
    (lambda lines: [*lines[:-1], "val/n00000001/x.JPEG"], r"x.JPEG is not in it \(1 file"),
    (lambda lines: ["train/n00000002/x.JPEG", *lines[1:]], "n00000002/x.JPEG is not there"),
])
def test_lists_that_do_not_fit(command, tmp_path, change, message):
    lines = [f"{split}/{name}/{file}" for split in BY_RULE for name in CLASSES for file in BY_RULE[split][name]]
    (tmp_path / "list.txt").write_text("\n".join(change(lines)))
    with pytest.raises(b.InputError, match=message):
        command("--list", tmp_path / "list.txt")


def test_classes_with_too_few_images_are_named_and_nothing_is_made(command, source, tmp_path):
    for i in (9, 10):
        (source / CLASSES[0] / f"{CLASSES[0]}_{i}.JPEG").unlink()
    with pytest.raises(b.InputError, match=r"1 class\(es\) with fewer than 5 images: n00000002 \(4\)"):
        command()
    assert not (tmp_path / "4k").exists()


def test_missing_class_and_broken_tar(command, source):
    archive = source / f"{CLASSES[1]}.tar"
    archive.write_text("no tar file")
    with pytest.raises(b.InputError, match=r"n00000001.tar: not a tar file"):
        command()
    archive.unlink()
    with pytest.raises(b.InputError, match=r"neither n00000001/ nor n00000001.tar"):
        command()


@pytest.mark.parametrize("length", [512 * 5 + 100, 512 * 11 + 1])         # in a header; in the last image
def test_truncated_tar_is_named(command, source, length):
    archive = source / f"{CLASSES[1]}.tar"
    archive.write_bytes(archive.read_bytes()[:length])
    with pytest.raises(b.InputError, match=r"n00000001.tar: not a tar file, or truncated"):
        command()


def test_foreign_files_in_the_result_are_noticed(command):
    folder = command()
    (folder / "val" / CLASSES[0] / "other.JPEG").write_text("")
    Path(folder, "train", "n12345678").mkdir()
    with pytest.raises(b.InputError, match=r"train: 1 folder\(s\) hold other files .* n12345678; remove them"):
        command()
    Path(folder, "train", "n12345678").rmdir()
    with pytest.raises(b.InputError, match=r"val: 1 folder\(s\) hold other files .* n00000002"):
        command()


def test_the_command(run_here, refused, source, tmp_path):
    """The README's command, with a small class list: built, then refused for the true 4,202 classes."""
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    words = ["build_imagenet4k.py", "--source", source, "--output", tmp_path / "4k"]
    run_here("imagenet-4k", [*words, "--classes", tmp_path / "classes.txt", "--train", 3, "--val", 2])
    assert built(tmp_path / "4k") == BY_RULE
    assert "neither n00005787/ nor n00005787.tar is there" in refused("imagenet-4k", words)
