"""Forks behave as new processes of Python do."""
import signal
import time

import torch
from forked import Forked, end_all


def draw():
    print(torch.rand(2).tolist())


def test_each_draws_its_own_random_numbers():
    first, second = (Forked(draw).communicate()[0] for _ in range(2))
    assert first.startswith("[0.") and first != second


def test_what_is_left_running_is_ended():
    left = Forked(time.sleep, 60)
    end_all()
    assert left.wait(30) == -signal.SIGKILL
