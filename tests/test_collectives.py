"""What processes settle together, with gloo processes."""
from types import SimpleNamespace

import collectives
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import free_port

WORLD = 3      # the first number for which the order of a sum matters


def test_a_start_between_two_steps_changes_no_bit(tmp_path):
    """DDP deals gradients into buckets anew after a start's first step; the mean must not depend on it."""
    mp.start_processes(trained, (free_port(), tmp_path / "weights.pt"), nprocs=WORLD, start_method="spawn")
    found = torch.load(tmp_path / "weights.pt")
    assert torch.equal(found["in one go"], found["in two"])
    torch.testing.assert_close(found["in one go"], found["DDP's own mean"])


def test_an_error_of_an_all_reduce_is_not_lost(monkeypatch):
    """Else a process whose peer was killed would take a step with its own gradients, and save it."""
    broken = torch.futures.Future()
    broken.set_exception(RuntimeError("closed by peer"))
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: SimpleNamespace(get_future=lambda: broken))
    bucket = SimpleNamespace(gradients=lambda: [torch.ones(2)], buffer=lambda: torch.ones(2))
    with pytest.raises(RuntimeError, match="closed by peer"):
        collectives.mean_of_each(2, bucket).wait()


def trained(rank, port, path):
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=WORLD)
    weights = {"in one go": after(rank, [range(5)]), "in two": after(rank, [range(2), range(2, 5)]),
               "DDP's own mean": after(rank, [range(5)], hook=False)}
    if rank == 0:
        torch.save(weights, path)
    dist.destroy_process_group()


def after(rank, starts, hook=True):
    """-> the weights after the steps of all starts, as a vector."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(100, 100) for _ in range(4)])
    for steps in starts:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        if hook:
            parallel.register_comm_hook(WORLD, collectives.mean_of_each)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for step in steps:
            optimizer.zero_grad()
            x = torch.randn(4, 100, generator=torch.Generator().manual_seed(100 * rank + step))
            parallel(x).square().mean().backward()
            optimizer.step()
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()
