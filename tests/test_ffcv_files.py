"""Which .ffcv files are refused, and with which words."""
import shutil

import pytest
from ffcv.reader import Reader
from ffcv_files import check_file, check_files, companion

from mrl_files import InputError


def test_files_that_are_refused(ffcv_folder, tmp_path):
    train_file = ffcv_folder / "train_500_0.50_90.ffcv"
    assert check_file(train_file, 3) == Reader(str(train_file)).num_samples == 60
    whole = train_file.read_bytes()
    for name, content, said in [("cut.ffcv", whole[:-100], "truncated"), ("half.ffcv", whole[:10 ** 7], "truncated"),
                                ("head.ffcv", whole[:20], "not an .ffcv"), ("empty.ffcv", b"", "not an .ffcv"),
                                ("text.ffcv", b"hello" * 100, "not an .ffcv")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=said):
            check_file(tmp_path / name, 3)
    with pytest.raises(InputError, match="no such file"):
        check_file(tmp_path / "missing.ffcv", 3)
    with pytest.raises(InputError, match=r"labels run from 0 to 2, model.num_classes=2"):
        check_file(train_file, 2)


def test_two_files_of_one_data_set(ffcv_folder):
    assert check_files(ffcv_folder / "train_500_0.50_90.ffcv", ffcv_folder / "val_500_uncompressed.ffcv", 3) == 60


def test_class_names_of_another_file_are_refused(ffcv_folder, tmp_path):
    """Its own were lost, or it was put in the other's place."""
    train, val = ffcv_folder / "train_500_0.50_90.ffcv", tmp_path / "val.ffcv"
    shutil.copy(ffcv_folder / "val_500_uncompressed.ffcv", val)
    shutil.copy(companion(train), companion(val))
    with pytest.raises(InputError, match=r"val.ffcv: has 34 images, but val.ffcv.json beside it says 60; remove"):
        check_files(train, val, 3)
