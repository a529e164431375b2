"""Python runs this at every start of a process with this folder on its PYTHONPATH: of spawned ones and torchrun's too.

test_gpu_rehearsal.py puts it there.
"""
import sys

if not any("resource_tracker" in word for word in sys.orig_argv):      # multiprocessing's helper computes nothing
    import lines_run  # noqa: F401
    import stand_in_gpus  # noqa: F401
