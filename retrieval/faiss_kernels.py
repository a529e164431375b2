"""FAISS, imported with matrix products made for this processor: `from faiss_kernels import faiss`."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch

AVX2_KERNELS = {"Haswell", "Zen", "Excavator", "SkylakeX", "Cooperlake", "SapphireRapids"}


def load_faiss():
    """The wheel of faiss-cpu carries an OpenBLAS of 2021, which takes newer processors for one of 2004 and multiplies
    five times slower. Where it does not know an AVX2 or AVX-512 processor, the kernels are named to it.
    """
    kernels = {"AVX512": "SkylakeX", "AVX2": "Haswell"}.get(torch.backends.cpu.get_cpu_capability())
    known = openblas_kernels()
    if kernels and known and known not in AVX2_KERNELS and "faiss" not in sys.modules:
        os.environ.setdefault("OPENBLAS_CORETYPE", kernels)
    import faiss
    # FAISS multiplies matrices only from queries * dimensions = 128,000 on, and compares one by one below: five times
    # slower for 2,000 queries at 16 dimensions, and no faster for a single one.
    faiss.cvar.distance_compute_blas_threshold = 0
    return faiss


def openblas_kernels():
    """-> the kernels that FAISS's own OpenBLAS would choose here; None where the wheel does not carry one.

    Asked in a process of its own: the library chooses once, when it is loaded.
    """
    libraries = Path(importlib.util.find_spec("faiss").origin).parents[1] / "faiss_cpu.libs"
    found = sorted(libraries.glob("libopenblas*.so*"))
    if not found:
        return None
    ask = (f"import ctypes; name = ctypes.CDLL({str(found[0])!r}).openblas_get_corename; "
           "name.restype = ctypes.c_char_p; print(name().decode())")
    answer = subprocess.run([sys.executable, "-ISE", "-c", ask], capture_output=True, text=True,
                            env={**os.environ, "LD_LIBRARY_PATH": str(libraries)})
    return answer.stdout.strip() or None


faiss = load_faiss()
