"""The benchmarks run, at tiny size on the CPU: their tables have the rows, and every number can be.

Their claims are measured at full size, on a quiet machine; see benchmarks/RESULTS.md.
"""
import json
import math
import re
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT
from forked import Forked

NUMBER = r"[-+.\d]+(?:e[-+]?\d+)?|nan|inf"


def rows(text, names):
    """-> {name: [(median, low, high) of each column]} of the lines that begin with one of the names."""
    found = {}
    for line in text.splitlines():
        name = next((n for n in sorted(names, key=len, reverse=True) if line.lstrip().startswith(n)), None)
        cells = re.findall(rf"({NUMBER}) \(({NUMBER})–({NUMBER})\)", line)
        if name and cells:
            found.setdefault(name, []).append([tuple(map(float, cell)) for cell in cells])
    return found


def plausible(cells, positive=True):
    for median, low, high in cells:
        assert all(map(math.isfinite, (median, low, high))) and low <= median <= high
        assert low > 0 or not positive


@pytest.fixture
def forks(monkeypatch):
    """What a benchmark starts as `python script words` is a fork, which need not import PyTorch."""
    def start(command, cwd=".", **_):
        return Forked(Path(cwd, command[1]).resolve(), *command[2:])

    def run(command, **given):
        process = start(command, **given)
        return subprocess.CompletedProcess(command, process.wait(), *process.communicate())
    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(subprocess, "run", run)


def test_head(run_here):
    done = run_here("benchmarks", "head.py --classes 10 12 --sizes 4 8 32 --batch_size 6 --rounds 3 --repeat 1 "
                                  "--threads 1")
    names = ["one layer", "FF", "MRL", "MRL plain", "MRL-E", "MRL-E plain"]
    tables = rows(done.stdout, names)
    assert list(tables) == names and done.stdout.count(" classes\n") == 2
    for name, found in tables.items():
        assert [len(cells) for cells in found] == [3 if name in ("MRL", "MRL-E") else 2] * 2
        for cells in found:
            plausible(cells)
    assert tables["one layer"][0][1] == (1, 1, 1)      # its ratio to itself
    assert "products alone: MRL 1.38, MRL-E 1" in done.stdout


def test_train_step(run_here):
    done = run_here("benchmarks", "train_step.py --device cpu --arch resnet18 --batch_size 2 --classes 5 "
                                  "--resolutions 32 40 --rounds 2 --repeat 1 --warmup 1")
    tables = rows(done.stdout, ["FF", "MRL", "MRL-E"])
    assert list(tables) == ["FF", "MRL", "MRL-E"] and re.findall(r"^(\d+) px", done.stdout, re.M) == ["32", "40"]
    for found in tables.values():
        assert [len(cells) for cells in found] == [4, 4]
        for cells in found:
            plausible(cells)


def test_train_epoch(run_here, forks):
    pytest.importorskip("ffcv")
    done = run_here("benchmarks", "train_epoch.py --device cpu --arch resnet18 --batch_size 4 --resolution 32 "
                                  "--count 20 --pixels 48 --epochs 2 --workers 1 --rounds 2 --repeat 1 --warmup 1")
    (cells,) = rows(done.stdout, ["1 "])["1 "]
    speed, waiting, alone, folder_alone = cells
    plausible([speed, alone, folder_alone])
    plausible([waiting], positive=False)
    assert 0 <= waiting[0] <= 100
    for side in ("our", "plain"):
        (steps,) = rows(done.stdout, [f"data on the device, {side} step"]).values()
        plausible(steps[0])
    assert len(re.findall(r"^cores to wait less than 5 % with .* step: [1-9]\d*$", done.stdout, re.M)) == 2


def test_train_epoch_names_what_is_wrong(refused, tmp_path):
    assert "--epochs" in refused("benchmarks", "train_epoch.py --epochs 1")
    assert "no such folder" in refused("benchmarks", f"train_epoch.py --images {tmp_path}/missing")


def test_eval_speed(run_here):
    done = run_here("benchmarks", "eval_speed.py --images 24 --crop 32 --batch_size 8 --workers 0 --rounds 3")
    tables = rows(done.stdout, ["plain loop:", "evaluate:", "ratio:"])
    assert list(tables) == ["plain loop:", "evaluate:", "ratio:"]
    for (cells,) in tables.values():
        plausible(cells)


def test_memory_of_a_dump_does_not_grow_with_the_number_of_images(run_here, monkeypatch):
    """At a fortieth of the claim's sizes, with features so wide that keeping them would take 147 MB.

    The C library is told to give large blocks back when they are freed: else holes between them come and go.
    """
    monkeypatch.setenv("PYTHONPATH", "../inference")      # of the processes that it starts
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")
    done = run_here("benchmarks", "dump_memory.py --images 500 5000 --features 8192")
    assert len(re.findall(r"images: peak +[\d.]+ MB private", done.stdout)) == 2
    assert float(re.search(r"difference: (-?[\d.]+) MB", done.stdout)[1]) < 50


def test_retrieval_speed(run_here):
    """It asserts that the plain loops find the same neighbours and give the same numbers."""
    shown = run_here("benchmarks", "retrieval_speed.py --n 2500 --queries 20 --classes 30 --rounds 1").stdout
    ratios = re.findall(rf"^(\S.*?)  +({NUMBER}) +({NUMBER}) +({NUMBER}) \(", shown, re.M)
    assert len(ratios) == 11
    for name, *numbers in ratios:
        assert all(float(number) > 0 for number in numbers), name
    assert float(re.search(rf"overlap@10 .*: ({NUMBER})", shown)[1]) > 0.9


def test_retrieval_scale(run_here, forks):
    shown = run_here("benchmarks", "retrieval_scale.py --n 3000 --queries 20").stdout
    assert [float(gb) < 1 for gb in re.findall(rf"peak private memory ({NUMBER}) GB", shown)] == [True] * 5
    assert re.search(r"the index's file: .* bytes a vector", shown)


def test_analysis(run_here):
    shown = run_here("benchmarks", "analysis.py --images 1000 --rounds 1").stdout
    names = ["cascades, 30 seeds, all caps", "oracle", "superclasses", "together"]
    tables = rows(shown, names)
    assert list(tables) == names
    for (cells,) in tables.values():
        plausible(cells)
    assert re.search(r"^private memory: \d+ MB before, \d+ MB at most$", shown, re.M)


def run_gpu(run, tmp_path, words, **replaced):
    """gpu.py at a tiny size, with other modules in the place of some -> (done, {what: figure} of its table)."""
    for module, text in replaced.items():
        (tmp_path / f"{module}.py").write_text(text)
    done = run("benchmarks", f"gpu.py --tiny --device cpu --output {tmp_path}/gpu.json {words}", check=False,
               PYTHONPATH=f"{tmp_path}:../train:../inference:../retrieval")
    table = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    kept = json.loads((tmp_path / "gpu.json").read_text())["rows"] if (tmp_path / "gpu.json").exists() else []
    assert [row[0] for row in table] == [row[0] for row in kept]
    return done, {row[0]: " | ".join(row[1:]) for row in kept}


def test_gpu_goes_on_after_a_part_that_fails(run, tmp_path):
    """Its epochs are those of train_epoch.py, which take too long to be run twice."""
    done, table = run_gpu(run, tmp_path, "--parts embeddings steps", embeddings="raise RuntimeError('broken')")
    assert done.returncode == 1 and "RuntimeError: broken" in done.stderr
    assert table.pop("embeddings").startswith("FAILED: exit status 1")
    steps = {name: row for name, row in table.items() if name.startswith("step, 32 px, compile=0: ")}
    assert [name.split(": ")[1] for name in steps] == ["FF", "MRL", "MRL-E", "MRL's time",
                                                       "peak memory of a step, without weights"]
    for row in list(steps.values())[:3]:
        assert re.match(rf"(?:{NUMBER}) \(.*\) images/s \| (?:{NUMBER}) \(.*\) x usual \| 1.4 or more", row)


def test_gpu_compares_neighbours(run_here):
    shown = run_here("benchmarks", "gpu.py --tiny --device cpu --part search").stdout
    (row,) = re.findall("^row (.*FAISS.*)$", shown, re.M)
    name, _, ratio, aim = json.loads(row)
    assert name == "exact search, 20 queries in 500 x 64, FAISS" and aim == "1.0000 of the neighbours"
    assert ratio.endswith("; 1.0000 of the neighbours are the same")


def test_gpu_ends_in_time(run, tmp_path):
    """A part that takes too long is stopped; one that finds no time left is not begun."""
    start = time.monotonic()
    done, table = run_gpu(run, tmp_path, "--parts steps search --minutes 0.07", launch="import time; time.sleep(60)")
    assert table == {"steps": "STOPPED: its 3 s were over |  | ", "search": "NOT RUN: time |  | "}
    assert done.returncode == 1 and time.monotonic() - start < 30


def test_gpu_without_a_gpu_is_one_line(refused):
    assert "--device cuda:99" in refused("benchmarks", "gpu.py --device cuda:99")


def test_made_up_pictures_are_drawn_once(monkeypatch, tmp_path):
    """Drawing the 8,192 of gpu.py took 77 s of its ten minutes."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from measure import make_images
    make_images(tmp_path, 25, 16, different=10)
    files = {int(path.stem): path for path in tmp_path.glob("*/*.jpeg")}
    assert sorted(files) == list(range(25)) and all(path.parent.name == str(i % 10) for i, path in files.items())
    assert len({path.read_bytes() for path in files.values()}) == 10
    assert len({path.stat().st_ino for path in files.values()}) == 10
