"""faiss_kernels.py: FAISS multiplies with kernels for this processor, and a choice of the user's stays."""
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from faiss_kernels import AVX2_KERNELS, openblas_kernels

pytestmark = pytest.mark.skipif(openblas_kernels() is None, reason="this FAISS has no OpenBLAS of its own")


def kernels_in_a_new_process(**environment):
    ask = "import faiss_kernels as f, os; print(os.environ.get('OPENBLAS_CORETYPE')); print(f.openblas_kernels())"
    others = {k: v for k, v in os.environ.items() if k != "OPENBLAS_CORETYPE"}
    return subprocess.run([sys.executable, "-c", ask], cwd=ROOT / "retrieval", env=others | environment, check=True,
                          capture_output=True, text=True).stdout.split()


def test_matrix_products_fit_the_processor():
    chosen, used = kernels_in_a_new_process()
    assert (used in AVX2_KERNELS) == (torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"))
    assert chosen in ("None", used)


def test_a_choice_in_the_environment_stays():
    assert kernels_in_a_new_process(OPENBLAS_CORETYPE="Nehalem") == ["Nehalem", "Nehalem"]
