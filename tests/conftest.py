"""What several test files share: the repository's root, the golden numbers, and running a command as a user would."""
import importlib.util
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path

import kill_and_resume
import nbformat
import numpy as np
import pytest
import torch
from forked import WARNINGS, Forked, end_all
from nbclient import NotebookClient
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
DISK = 4 << 30      # bytes; 2.3 GB were in use at most
FFCV = importlib.util.find_spec("ffcv") is not None
NEED_FFCV = ["test_ffcv_loader", "test_late_streams", "test_gpu_rehearsal", "test_write_imagenet"]
collect_ignore = [] if FFCV else [f"{name}.py" for name in NEED_FFCV]


# Begun first, the slowest of them first, so that `--dist loadfile` does not end with one of them alone.
SLOW = ["test_resume", "test_train_commands", "test_benchmarks", "test_trainer", "test_gpu_rehearsal", "test_abuse",
        "test_inference_commands", "test_analysis_notebooks", "test_write_imagenet", "test_retrieve",
        "test_ffcv_loader", "test_loaders"]


def pytest_configure(config):
    """A shell makes what it starts in the background deaf to Ctrl-C, and so what that starts: the tests send it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.option.loadscopereorder = False      # xdist would begin with the files that have the most tests


def pytest_report_header():
    return [] if FFCV else f"FFCV is not installed: left out are {', '.join(NEED_FFCV)}, and other tests are skipped"


def pytest_collection_modifyitems(items):
    rank = {name: i for i, name in enumerate(SLOW)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(SLOW)))


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no GPU")


def pytest_sessionstart():
    """Half of the tests failing on a full disk says less than this."""
    folder = tempfile.gettempdir()
    if shutil.disk_usage(folder).free < DISK:
        pytest.exit(f"the tests need {DISK >> 30} GB of disk in {folder}: make room, or set TMPDIR", returncode=4)


@pytest.fixture(scope="session", autouse=True)
def temporary_files(tmp_path_factory):
    """What commands leave in the temporary folder (torchrun its logs) goes with the tests' own files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))
        patch.setattr(tempfile, "tempdir", None)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left():
    yield
    end_all()


@pytest.fixture(scope="session")
def golden():
    """golden("model") -> (numbers of golden_model.json, arrays of golden_model.npz, if there are any)."""
    def read(name):
        arrays = ROOT / "tests/golden" / f"golden_{name}.npz"
        numbers = json.loads(arrays.with_suffix(".json").read_text())
        return numbers, dict(np.load(arrays)) if arrays.exists() else {}
    return read


@pytest.fixture(scope="session")
def run():
    """run("train", "train_imagenet.py --help") -> CompletedProcess of `python <command>` started in that folder."""
    def start(folder, command, check=True, **environment):
        script, *words = words_of(command)
        process = Forked(f"{folder}/{script}", *words, **environment)
        out, err = process.communicate()
        assert not check or process.returncode == 0, err[-4000:]
        return subprocess.CompletedProcess(words, process.returncode, out, err)
    return start


@pytest.fixture(scope="session")
def run_here(tmp_path_factory):
    """run_here("train", "train_imagenet.py --help"): as `run`, but in this process, which has imported and compiled
    what a new one needs ten seconds for. The script is `__main__`, all its output is caught; warnings are pytest's."""
    said = tmp_path_factory.mktemp("said")

    def start(folder, command, check=True):
        script, *words = words_of(command)
        with output_to(said / "stdout", said / "stderr"):
            status = exit_status(start_here(f"{folder}/{script}", *words))
        out, err = ((said / name).read_text(errors="replace") for name in ("stdout", "stderr"))
        assert not check or status == 0, err[-4000:]
        return subprocess.CompletedProcess([script, *words], status, out, err)
    return start


def start_here(script, *words):
    """Run a script as `__main__` in its folder. -> what it gives to sys.exit."""
    path = ROOT / script
    with pytest.MonkeyPatch.context() as patch, signals_and_threads_kept():
        patch.chdir(path.parent)
        patch.setattr(sys, "argv", [path.name, *words])
        patch.setattr(sys, "path", [str(path.parent), *sys.path])
        patch.setattr(sys, "unraisablehook", sys.unraisablehook)      # as it was, at the end
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            return end.code
    return None


def exit_status(code):
    """What Python makes of what sys.exit is given: a text goes to stderr."""
    if isinstance(code, str):
        print(code, file=sys.stderr)
        return 1
    return code or 0


@contextmanager
def signals_and_threads_kept():
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


@contextmanager
def output_to(*paths):
    """What this process, libraries below Python and processes that it starts write to stdout and stderr goes to two
    files."""
    kept = [os.dup(number) for number in (1, 2)]
    out, err = (open(path, "w", buffering=1, errors=errors)
                for path, errors in zip(paths, ("strict", "backslashreplace"), strict=True))      # as Python's own
    with out, err, redirect_stdout(out), redirect_stderr(err):
        for number, file in ((1, out), (2, err)):
            os.dup2(file.fileno(), number)
        try:
            yield
        finally:
            for number, before in zip((1, 2), kept, strict=True):
                os.dup2(before, number)
                os.close(before)


def words_of(command):
    return command.split() if isinstance(command, str) else [str(word) for word in command]


@pytest.fixture(scope="session")
def refused(run_here):
    """refused("train", command) -> the one line of stderr with which a command must refuse bad input."""
    def start(folder, command):
        done = run_here(folder, command, check=False)
        assert done.returncode != 0, f"accepted: {done.stdout[-500:]}"
        assert "Traceback" not in done.stderr, done.stderr[-3000:]
        lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert len(lines) == 1, done.stderr[-3000:]
        return lines[0]
    return start


@pytest.fixture(scope="session")
def notebook():
    """notebook("retrieval/faiss_nn", k=5) -> the outputs of its cells, run with these settings in its folder. All
    notebooks run in one kernel, which is emptied before each: PyTorch is imported once."""
    client = NotebookClient(nbformat.v4.new_notebook(), timeout=300)

    def execute(name, **settings):
        path = ROOT / f"{name}.ipynb"
        client.nb = parameterize_notebook(load_notebook_node(str(path)), settings)
        client.nb.cells.insert(0, nbformat.v4.new_code_cell(f"%reset -f\n%cd -q {path.parent}"))
        for i, cell in enumerate(client.nb.cells):
            client.execute_cell(cell, i)
        return [output for cell in client.nb.cells for output in cell.get("outputs", [])]
    with client.setup_kernel():
        yield execute


@pytest.fixture(scope="session")
def image_tree(tmp_path_factory):
    """Folder with train/ (3 classes of 20 pictures) and val/ (11, 11 and 12), JPEG and PNG, of many shapes."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, counts in {"train": (20, 20, 20), "val": (11, 11, 12)}.items():
        for label, count in enumerate(counts):
            (root / split / f"class{label}").mkdir(parents=True)
            for i in range(count):
                blocks = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
                blocks[label::3] = 255      # something to learn
                height, width = rng.integers(40, 72, 2)
                image = Image.fromarray(np.kron(blocks, np.ones((12, 12, 1), np.uint8))[:height, :width])
                image.save(root / split / f"class{label}" / f"{i}.{'png' if i % 2 else 'jpg'}")
    return root


@pytest.fixture(scope="session")
def noise(run_here, tmp_path_factory):
    """noise(24) -> a folder with images/ of two classes, so many pictures of noise, and data.ffcv made of them."""
    pytest.importorskip("ffcv")

    @cache
    def make(n):
        folder = tmp_path_factory.mktemp(f"noise{n}")
        kill_and_resume.make_images(folder, n)
        run_here("train", kill_and_resume.writer(folder))
        return folder
    return make


@pytest.fixture(scope="session")
def ffcv_folder(image_tree, run_here, tmp_path_factory):
    """What write_imagenet.sh makes of `image_tree`: the two files that training reads."""
    pytest.importorskip("ffcv")
    folder, program = tmp_path_factory.mktemp("ffcv"), tmp_path_factory.mktemp("bin")
    python_that_notes(program)
    env = with_python(IMAGENET_DIR=str(image_tree), WRITE_DIR=str(folder), WORKERS="2")
    subprocess.run(["./write_imagenet.sh", "500", "0.50", "90"], cwd=ROOT / "train", check=True,
                   env=env | {"PATH": f"{program}:{env['PATH']}"})
    for words in (program / "words").read_text().split("\n\n")[:-1]:
        run_here("train", words.splitlines())
    return folder


def python_that_notes(folder):
    """A `python` for shell scripts that writes its words down, into `words` beside it: a line each."""
    (folder / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@" "" >> "$(dirname "$0")/words"\n')
    (folder / "python").chmod(0o755)


def with_python(**variables):
    """The environment, with this Python first on the path (shell scripts call `python`), warnings as errors."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONWARNINGS": WARNINGS, **variables}


def fill(state_dict, seed):
    """Parameters drawn as tests/golden/README.md says: sorted keys, one generator, scaled by fan-in."""
    rng, filled = np.random.default_rng(seed), dict(state_dict)
    for key in sorted(state_dict):
        value = state_dict[key]
        if not value.is_floating_point() or key.endswith("blur_filter"):
            continue
        z = rng.standard_normal(tuple(value.shape)).astype(np.float32)
        if z.ndim >= 2:
            z = z / np.sqrt(np.prod(z.shape[1:])).astype(np.float32)
        elif key.endswith("running_var"):
            z = 1 + 0.1 * np.abs(z)
        else:
            z = 0.1 * z + key.endswith("weight")
        filled[key] = torch.from_numpy(z.astype(np.float32))
    return filled
