"""Settings: every key of the YAML files is declared with the original's defaults; bad values stop with one line."""
import os
import re
import subprocess
import sys

import pytest
import write_imagenet
import yaml
from conftest import ROOT
from settings import PATH, as_dict, describe_settings, read_settings
from train_imagenet import CONFIG

from mrl_files import InputError

REQUIRED = ["--data.train_dataset=a", "--data.val_dataset=b", "--data.num_workers=1", "--data.in_memory=1",
            "--logging.folder=c"]
YAMLS = [*sorted((ROOT / "train").glob("*_configs/*.yaml")), ROOT / "demo/kanji.yaml"]


def read(monkeypatch, *words, required=REQUIRED):
    monkeypatch.setattr(sys, "argv", ["train_imagenet.py", *required, *map(str, words)])
    return read_settings(CONFIG, "")


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.name)
def test_yaml_files_are_read(monkeypatch, path):
    settings = as_dict(read(monkeypatch, "--config-file", path))
    for section, values in sections(path).items():
        for key, value in values.items():
            if f"--{section}.{key}" not in " ".join(REQUIRED):
                assert settings[section][key] == value, f"{section}.{key}"


def sections(path):
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {name: values for name, values in content.items() if name != "base"}


@pytest.mark.parametrize("epochs, ramp", [(16, (11, 13)), (24, (17, 20)), (32, (23, 27)), (40, (29, 34)),
                                          (56, (41, 48)), (88, (65, 76))])
@pytest.mark.parametrize("name, rate, batch, processes, decay", [("50", 1.7, 512, 8, 1e-4), ("18", 0.5, 1024, 1, 5e-5)])
def test_ffcvs_recipes(monkeypatch, name, rate, batch, processes, decay, epochs, ramp):
    """All that differs between FFCV's files; the rest is in test_the_40_epoch_file_holds_the_originals_values."""
    s = read(monkeypatch, "--config-file", ROOT / f"train/rn{name}_configs/rn{name}_{epochs}_epochs.yaml")
    assert s.lr.lr == (0.2125 if (name, epochs) == ("50", 40) else rate)      # the original's, see there
    assert (s.model.arch, s.training.batch_size, s.dist.world_size) == (f"resnet{name}", batch, processes)
    assert (s.training.weight_decay, s.training.epochs, s.training.use_blurpool) == (decay, epochs, 1)
    assert (s.resolution.start_ramp, s.resolution.end_ramp, s.resolution.max_res) == (*ramp, 192)


def test_yaml_may_have_numbers_and_lists_for_texts(monkeypatch, tmp_path):
    (tmp_path / "a.yaml").write_text(
        "model: {nesting_list: [8, 16], relative_importance: [1, 0.5], trainable: [fc, a]}\n"
        "dist: {port: 12356}\nlogging: {name: 1.5}\n")
    s = read(monkeypatch, "--config-file", tmp_path / "a.yaml")
    assert (s.model.nesting_list, s.model.relative_importance, s.model.trainable) == ("8,16", "1,0.5", "fc,a")
    assert (s.dist.port, s.logging.name) == ("12356", "1.5")
    (tmp_path / "a.yaml").write_text("dist: {port: {a: 1}}\n")
    with pytest.raises(InputError, match=r"--dist.port={'a': 1}: expected a text"):
        read(monkeypatch, "--config-file", tmp_path / "a.yaml")


def test_a_file_goes_before_its_base(monkeypatch, tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\nlr: {lr: 3}\n")
    (tmp_path / "b.yaml").write_text("lr: {lr: 2, lr_peak_epoch: 5}\ntraining: {epochs: 7}\n")
    s = read(monkeypatch, "--config-file", tmp_path / "a.yaml")
    assert (s.lr.lr, s.lr.lr_peak_epoch, s.training.epochs) == (3, 5, 7)


def test_the_40_epoch_file_holds_the_originals_values(monkeypatch):
    settings = read(monkeypatch, "--config-file", ROOT / "train/rn50_configs/rn50_40_epochs.yaml")
    s = {f"{a}.{b}": v for a, values in as_dict(settings).items() for b, v in values.items()}
    expected = {"dist.world_size": 8, "lr.lr": 0.2125, "lr.lr_schedule_type": "cyclic", "model.arch": "resnet50",
                "resolution.min_res": 160, "resolution.max_res": 192, "resolution.start_ramp": 29,
                "resolution.end_ramp": 34, "training.batch_size": 512, "training.bn_wd": 0, "training.distributed": 1,
                "training.epochs": 40, "training.label_smoothing": 0.1, "training.momentum": 0.9,
                "training.weight_decay": 1e-4, "training.use_blurpool": 1, "validation.lr_tta": 1,
                "validation.resolution": 256}
    assert {key: s[key] for key in expected} == expected


def test_defaults_are_the_originals(monkeypatch):
    s = read(monkeypatch)
    assert vars(s.lr) == {"lr": 0.5, "lr_schedule_type": "cyclic", "lr_peak_epoch": 2, "step_ratio": 0.1,
                          "step_length": 30, "warmup_epochs": None}
    assert vars(s.resolution) == {"min_res": 160, "max_res": 160, "start_ramp": 0, "end_ramp": 0}
    assert vars(s.validation) == {"batch_size": 512, "resolution": 224, "lr_tta": 1}
    assert (s.model.arch, s.model.mrl, s.model.efficient, s.model.nesting_start) == ("resnet18", 0, 0, 3)
    t = s.training
    assert (t.batch_size, t.epochs, t.weight_decay, t.momentum, t.label_smoothing) == (512, 30, 4e-5, 0.9, 0.1)
    assert (s.dist.world_size, s.dist.address, s.dist.port, s.logging.log_level) == (1, "localhost", "12355", 1)


def test_the_command_line_goes_before_the_file(monkeypatch):
    path = ROOT / "train/rn50_configs/rn50_40_epochs.yaml"
    assert read(monkeypatch, "--config-file", path, "--lr.lr=0.425").lr.lr == 0.425


@pytest.mark.parametrize("words, said", [
    (["--training.optimizer=adam"], "--training.optimizer=adam: expected"),
    (["--training.epochs=many"], "--training.epochs=many: expected an int"),
    (["--model.mrl=2"], "--model.mrl=2"), (["--training.device=tpu"], "--training.device=tpu"),
    (["--training.accumulate=0"], "--training.accumulate=0"), (["--training.mixup=-1"], "--training.mixup=-1"),
    (["--training.ema=1.5"], "--training.ema=1.5"), (["--lr.lr_schedule_type=linear"], "linear"),
    (["--training.batch_size=0"], "batch_size=0"),
    (["--lr.lr_peak_epoch=-3"], "--lr.lr_peak_epoch=-3"), (["--resolution.end_ramp=-1"], "--resolution.end_ramp=-1")])
def test_bad_values(monkeypatch, words, said):
    with pytest.raises(InputError, match=said):
        read(monkeypatch, *words)


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(InputError, match=r"--data.val_dataset: required"):
        read(monkeypatch, required=REQUIRED[:1])


@pytest.mark.parametrize("content, said", [("training:\n  epoch: 3\n", r"unknown setting training.epoch"),
                                           ("train: 3\n", "expected sections"), ("- 1\n", "expected sections"),
                                           ("a: [", "not YAML"), ("training:\n  epochs: 1.5\n", "training.epochs=1.5"),
                                           ("base: a.yaml\n", "a.yaml: expected sections")])
def test_bad_yaml(monkeypatch, tmp_path, content, said):
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(InputError, match=said):
        read(monkeypatch, "--config-file", tmp_path / "a.yaml")


def test_the_users_home_in_every_path(monkeypatch, tmp_path):
    """As flags and in a file; the file's own path too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("data:\n  train_dataset: ~/a\ntraining:\n  path: ~/b\n")
    flags = [f"--{name}=~/{name}" for name in ("data.val_dataset", "logging.folder", "model.init_from",
                                               "training.resume")]
    s = read(monkeypatch, *flags, "--config-file", "~/a.yaml", required=REQUIRED[2:4])
    assert (s.data.train_dataset, s.training.path) == (f"{tmp_path}/a", f"{tmp_path}/b")
    assert [s.data.val_dataset, s.logging.folder, s.model.init_from, s.training.resume] == \
        [f"{tmp_path}/{flag.partition('=~/')[2]}" for flag in flags]


def test_settings_that_are_paths_are_declared_so():
    """In both scripts, by their names."""
    for config in (CONFIG, write_imagenet.CONFIG):
        for (section, name), param in config.entries.items():
            named = re.search(r"^(folder|path|resume|init_from)$|_(dir|path|dataset)$", name)
            assert bool(named) == (param.checker is PATH), f"{section}.{name}"


def test_yaml_is_utf8_whatever_the_locale(tmp_path):
    """In a process of its own: the locale is Python's from its start."""
    (tmp_path / "a.yaml").write_text("logging:\n  folder: /läufe/日本  # é\n", encoding="utf-8")
    program = ("import sys, settings, train_imagenet; sys.argv = ['t', '--config-file', sys.argv[1], *sys.argv[2:]]\n"
               "print(ascii(settings.read_settings(train_imagenet.CONFIG, '').logging.folder))")
    done = subprocess.run([sys.executable, "-X", "utf8=0", "-c", program, tmp_path / "a.yaml", *REQUIRED[:4]],
                          env=os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}, cwd=ROOT / "train",
                          capture_output=True, text=True)
    assert done.stdout == ascii("/läufe/日本") + "\n", done.stderr


def test_an_unknown_flag_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        read(monkeypatch, "--model.mlr=1")
    assert "unrecognized arguments: --model.mlr=1" in capsys.readouterr().err


def test_help_is_plain_and_fits_a_terminal():
    """Also in a pager or a file; what is required stands first."""
    lines = describe_settings(CONFIG).splitlines()
    assert max(map(len, lines)) <= 100 and "\x1b" not in "".join(lines)
    words = " ".join(line.split()[0] for line in lines if line.startswith("  --"))
    assert all(f"--{'.'.join(path)}" in words for path in CONFIG.entries)
    assert words.index("--data.train_dataset") < words.index("--logging.folder") < words.index("--model.arch")
