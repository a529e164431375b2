"""Time of steps and of the waits between them."""
import torch
from stopwatch import Stopwatch


def test_waits_are_what_lies_between_the_steps(monkeypatch):
    moments = iter([10, 11, 14, 16, 16.5, 18])      # steps of 1, 2 and 1.5 s
    monkeypatch.setattr("time.perf_counter", lambda: next(moments))
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(3):
        watch.start()
        watch.stop()
    assert watch.summary() == (8, 3.5)
