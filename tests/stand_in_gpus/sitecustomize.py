"""Python runs this at every start of a process with this folder on its PYTHONPATH: of spawned ones and torchrun's too.

test_gpu_rehearsal.py puts it there. Lines that run are counted, then the CPU stands in for GPUs.
"""
import coverage

coverage.process_startup()

import stand_in_gpus  # noqa: E402, F401
