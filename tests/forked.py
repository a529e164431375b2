"""Processes of their own for the tests' commands that need not import PyTorch, which takes 5 s: forks of one that has.

    process = Forked("train/train_imagenet.py", *words)                         # as subprocess.Popen
    first, second = fork_ranks(2, "inference/pytorch_inference.py", *words)     # as torchrun starts them
    agent = Forked(run_torchrun, settings, "train/train_imagenet.py", *words)   # torchrun itself: restarts, nodes

What they start by spawning is forked too. Processes that begin with Python: test_gpu_rehearsal.py, test_launch.py.
"""
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch.multiprocessing
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

ROOT = Path(__file__).resolve().parent.parent
# For processes that are started; the exceptions are those of pyproject.toml.
WARNINGS = ("error,ignore:The distutils package is deprecated:DeprecationWarning,"
            "ignore:This process:DeprecationWarning,ignore:Implicitly cleaning up:ResourceWarning")
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["torch.distributed.launcher.api", "torchvision.models", "torchvision.transforms",
                                   "numba", "pandas", "faiss", "matplotlib.figure", "tqdm"])


class Forked:
    """A script started in its folder with its words, or a function with its arguments; in a session of its own, its
    output in files. returncode: None while it runs; -9 after SIGKILL."""

    def __init__(self, begin, *words, **environment):
        self.output = [Path(tempfile.mkdtemp(), name) for name in ("stdout", "stderr")]
        if not callable(begin):
            begin, words = run_script, (begin, *words)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONWARNINGS", WARNINGS)
            multiprocessing.forkserver.ensure_running()
        environment = {**os.environ, "PYTHONWARNINGS": WARNINGS, **environment}
        self.process = FORKSERVER.Process(target=run_in_child, args=(self.output, environment, begin, words))
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.returncode

    def send_signal(self, signum):
        if self.returncode is None:
            os.kill(self.pid, signum)

    def wait(self, timeout=300):
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.returncode

    def communicate(self, timeout=300):
        """-> what it wrote to stdout, and to stderr."""
        self.wait(timeout)
        return tuple(path.read_text(errors="backslashreplace") for path in self.output)


def fork_ranks(n, script, *words):
    """-> n processes, each of which knows what torchrun would tell it."""
    group = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "GROUP_WORLD_SIZE": 1, "MASTER_ADDR": "localhost",
             "MASTER_PORT": free_port(), "TORCHELASTIC_RUN_ID": "run", "TORCHELASTIC_RESTART_COUNT": 0,
             "TORCHELASTIC_MAX_RESTARTS": 0}
    return [Forked(script, *words, **{key: str(value) for key, value in group.items()}, RANK=str(i), LOCAL_RANK=str(i))
            for i in range(n)]


def run_torchrun(settings, script, *words):
    """settings: of torch.distributed.launcher.api.LaunchConfig."""
    elastic_launch(LaunchConfig(**settings, start_method="fork"), run_script)(script, *words)


def end_all():
    """End what failed tests left running: at its own end Python would wait for it, for a training of 500 epochs too."""
    for process in multiprocessing.active_children():
        if isinstance(process, FORKSERVER.Process):
            process.kill()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def run_in_child(output, environment, begin, words):
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(":"))
    for number, path in enumerate(output, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    torch.seed()      # as in a new Python: forks would draw alike, and hide that a command forgot its seed
    multiprocessing.set_start_method(None, force=True)      # the default again: not the server that began this process
    start = torch.multiprocessing.start_processes
    torch.multiprocessing.start_processes = lambda *given, **named: start(*given, **{**named, "start_method": "fork"})
    begin(*words)


def run_script(script, *words):
    """As `python script words` in the script's folder."""
    path = ROOT / script
    os.chdir(path.parent)
    sys.argv = [path.name, *map(str, words)]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


def free_port():
    """-> a port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def fork(work):
    """Do it in a process of its own, which inherits all that is here. -> its number, for `statuses`."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def statuses(pids):
    """-> how each has ended; waits for that."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def wait_for(condition, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)
