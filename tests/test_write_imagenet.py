"""write_imagenet: what its files hold, and what it refuses."""
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import write_imagenet
from conftest import ROOT, with_python
from ffcv.fields.rgb_image import IMAGE_MODES
from ffcv.reader import Reader

from mrl_files import InputError

ARGUMENTS = "write_imagenet.py --cfg.split=train --cfg.max_resolution=64 --cfg.num_workers=2"


def test_the_two_files_of_the_readme(ffcv_folder):
    assert sorted(p.name for p in ffcv_folder.iterdir()) == ["train_500_0.50_90.ffcv", "val_500_uncompressed.ffcv"]
    train, val = (Reader(str(path)).metadata for path in sorted(ffcv_folder.iterdir()))
    np.testing.assert_array_equal(train["f1"], np.repeat([0, 1, 2], 20))
    np.testing.assert_array_equal(val["f1"], np.repeat([0, 1, 2], [11, 11, 12]))
    jpegs = (train["f0"]["mode"] == IMAGE_MODES["jpg"]).mean()
    assert 0.3 < jpegs < 0.7 and (val["f0"]["mode"] == IMAGE_MODES["raw"]).all()


def test_which_images_become_jpegs_does_not_change(image_tree, run, tmp_path):
    modes = []
    for name in ("a.ffcv", "b.ffcv"):
        run("train", f"{ARGUMENTS} --cfg.data_dir={image_tree}/train --cfg.write_path={tmp_path}/{name} "
                     "--cfg.write_mode=proportion --cfg.compress_probability=0.3 --cfg.subset=30")
        modes.append(Reader(f"{tmp_path}/{name}").metadata["f0"]["mode"])
    assert len(modes[0]) == 30
    np.testing.assert_array_equal(*modes)


def test_an_unreadable_image_is_named_and_nothing_written(image_tree, run, tmp_path):
    shutil.copytree(image_tree / "val", tmp_path / "images")
    (tmp_path / "images/class1/0.jpg").write_bytes(b"no image")
    done = run("train", f"{ARGUMENTS} --cfg.data_dir={tmp_path}/images --cfg.write_path={tmp_path}/a.ffcv", check=False)
    assert done.returncode == 1 and "class1/0.jpg" in done.stderr and "Traceback" not in done.stderr
    assert "error: --cfg.data_dir" in done.stderr and "1 of 34 images cannot be read" in done.stderr
    assert not list(tmp_path.glob("*.ffcv")) + list(tmp_path.glob(".*.ffcv"))


def test_bad_settings(image_tree, refused, tmp_path):
    line = refused("train", f"{ARGUMENTS} --cfg.data_dir={image_tree}/val --cfg.write_path={tmp_path}/a.ffcv "
                            "--cfg.write_mode=bmp --cfg.jpeg_quality=101")
    assert "--cfg.write_mode=bmp: expected" in line and "--cfg.jpeg_quality=101: expected" in line


@pytest.mark.parametrize("change, said", [({"data_dir": "/nowhere"}, "--cfg.data_dir=/nowhere"),
                                          ({"write_path": "/nowhere/a.ffcv"}, "/nowhere")])
def test_bad_paths(image_tree, tmp_path, change, said):
    settings = {"dataset": "imagenet", "split": "val", "data_dir": f"{image_tree}/val", "subset": 2,
                "write_path": f"{tmp_path}/a.ffcv", "write_mode": "raw", "max_resolution": 64, "num_workers": 1,
                "chunk_size": 100, "jpeg_quality": 90, "compress_probability": None, **change}
    with pytest.raises((InputError, OSError), match=said):
        write_imagenet.write(SimpleNamespace(**settings))


@pytest.mark.parametrize("arguments, unset", [(["500"], None), (["500", "0.5", "90"], "IMAGENET_DIR"),
                                              (["500", "0.5", "90"], "WRITE_DIR")])
def test_the_script_says_how_to_use_it(arguments, unset, tmp_path):
    env = with_python(IMAGENET_DIR=str(tmp_path), WRITE_DIR=str(tmp_path))
    env.pop(unset, None)
    done = subprocess.run(["./write_imagenet.sh", *arguments], cwd=ROOT / "train", env=env,
                          capture_output=True, text=True)
    assert done.returncode != 0 and "usage" in done.stderr and (unset is None or unset in done.stderr)
