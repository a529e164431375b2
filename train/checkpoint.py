"""The run folder: params.json, log, checkpoint.pt, final_weights.pt. Made by train_imagenet.py.

params.json       settings, what build_model needs ("model"), versions, git revision, command, and the run's own number,
                  which its checkpoints carry too. Read by mrl_models.load_model.
log               one JSON object an epoch.
checkpoint.pt     everything needed to go on. The new one takes the old one's place in one step, when it is complete.
final_weights.pt  the plain state dict. Read by inference/ and model_analysis/. With --training.ema that of the average
                  stands beside it, final_weights_ema.pt.
"""
import os
import platform
import subprocess
import sys
import uuid
import zipfile
from importlib.metadata import version
from pathlib import Path

import torch

from mrl_files import InputError, describe_error, locked, read_json, replacing, write_json

FORMAT = "MRL training checkpoint 1"
CURRENT = "checkpoint.pt"
WEIGHTS = {"": "final_weights.pt", "ema_": "final_weights_ema.pt"}
ANEW = "put a good copy there, or choose another --logging.name to begin anew"
# A continued run may differ from its beginning in these sections and settings: they do not change its result, if the
# data files are the same, moved elsewhere.
FREE = ("data", "logging", "validation.batch_size", "dist.address", "dist.port", "training.resume",
        "training.eval_only", "training.path")


def write_params(folder, settings, spec):
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": version("torchvision")}
    write_json(folder / "params.json", {"model": spec, "settings": settings, "versions": versions,
                                        "git": git_revision(), "command": " ".join(sys.argv), "run": uuid.uuid4().hex})


def git_revision():
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False,
                          cwd=Path(__file__).parent)
    return done.stdout.strip() or None


def saved_settings(folder):
    """-> the settings of a run folder, to continue it with."""
    path = Path(folder) / "params.json"
    settings = (read_json(path) or {}).get("settings")
    if not isinstance(settings, dict) or not all(isinstance(section, dict) for section in settings.values()):
        raise InputError(f"--training.resume={folder}: no run folder ({path.name} is missing or broken)")
    return settings


def check_same_run(folder, settings, defaults):
    """InputError where a setting that changes results differs from those the run began with. defaults: of settings that
    did not exist when it began, {"training.seed": 0, ...}."""
    began, now = defaults | flatten(saved_settings(folder)), defaults | flatten(settings)
    for key in sorted(began | now):
        if not key.startswith(FREE) and began.get(key) != now.get(key):
            raise InputError(f"{folder}: this run began with --{key}={began.get(key)}, now {now.get(key)}; "
                             "give the same, or another --logging.name")


def flatten(settings):
    return {f"{section}.{name}": value for section, values in settings.items() for name, value in values.items()}


def lock_folder(folder):
    """The context in which no second run trains in this folder."""
    return locked(folder / CURRENT, f"{folder}: another process trains in it; wait for its end, or choose another "
                                    "--logging.name")


def save(folder, state):
    """Write checkpoint.pt: at every moment a complete one is on the disk."""
    write_through({"format": FORMAT, "run": run_number(folder), **state}, folder / CURRENT)


def save_weights(folder, state, name):
    """Write final_weights.pt, whose being there says that the run is finished; of name "ema_", final_weights_ema.pt.
    On the CPU: torch.load on a machine without a GPU takes no tensor of one."""
    write_through({key: value.cpu() for key, value in state.items()}, folder / WEIGHTS[name])


def write_through(content, path):
    """torch.save; the file and its name are on the disk when this returns."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def run_number(folder):
    return (read_json(folder / "params.json") or {}).get("run")


def restore(folder):
    """-> the run's checkpoint, or None where none was made yet; InputError for one that is broken or of another run."""
    for killed in folder.glob(".checkpoint*.pt"):          # half written
        killed.unlink()
    path = folder / CURRENT
    return read_state(path, run_number(folder)) if path.exists() else None


def read_state(path, run):
    """-> the state that `save` was given; InputError for a truncated, damaged or foreign file."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{path}: truncated or no checkpoint ({describe_error(error)}); {ANEW}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path}: damaged, or not a training checkpoint of this repository; {ANEW}")
    if state.get("run") != run:
        raise InputError(f"{path}: a checkpoint of another run; {ANEW}")
    return state
