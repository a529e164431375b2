"""The benchmarks of inference run at tiny size; their claims are measured at full size, on a quiet machine."""
import re


def test_eval_speed(run):
    done = run("benchmarks", "eval_speed.py --images 24 --crop 32 --batch_size 8 --workers 0 --rounds 3",
               env={"PYTHONPATH": "../inference"})
    low, high = map(float, re.search(r"ratio: [\d.]+ \(([\d.]+)-([\d.]+)\)", done.stdout).groups())
    assert 0 < low <= high
    assert re.search(r"plain loop: +[\d.]+ images/s", done.stdout)


def test_memory_of_a_dump_does_not_grow_with_the_number_of_images(run):
    """At a fortieth of the claim's sizes, with a fifth of its margin."""
    done = run("benchmarks", "dump_memory.py --images 500 5000", env={"PYTHONPATH": "../inference"})
    assert len(re.findall(r"images: peak +[\d.]+ MB private", done.stdout)) == 2
    assert float(re.search(r"difference: (-?[\d.]+) MB", done.stdout)[1]) < 20
