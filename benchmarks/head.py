"""Forward + backward of the heads with their loss, against one plain linear layer and the plain per-size recipe.

    python benchmarks/head.py                      1,000 and 4,202 classes, batch 256, 2048 features, on the CPU
    python benchmarks/head.py --device cuda

The plain recipe: one linear layer and one cross-entropy per size on slices of the features; for MRL-E, slices of the
one weight matrix. All contestants take turns in each round; the ratios are within a round, shown as median (min–max).
Targets on a CPU: plain / ours at least 1.0 for MRL and 1.5 for MRL-E. By the products alone, MRL costs as much as
sum(sizes) / 2048 = 2.0 plain layers and MRL-E 1.0.
"""
import argparse

import torch
import torch.nn.functional as F
from measure import machine, spread, take_turns
from torch import nn

from MRL import NESTING_LIST, FixedFeatureLayer, Matryoshka_CE_Loss, MRL_Linear_Layer

SMOOTHING = 0.1


class PlainSeparate(nn.ModuleList):
    """MRL as one writes it first."""

    def __init__(self, sizes, classes):
        super().__init__(nn.Linear(size, classes) for size in sizes)

    def forward(self, x):
        return [layer(x[:, :layer.in_features]) for layer in self]


class PlainShared(nn.Linear):
    """MRL-E as one writes it first."""

    def __init__(self, sizes, classes):
        super().__init__(sizes[-1], classes)
        self.sizes = sizes

    def forward(self, x):
        return [F.linear(x[:, :size], self.weight[:, :size], self.bias) for size in self.sizes]


def plain_loss(outputs, labels):
    return sum(F.cross_entropy(logits, labels, label_smoothing=SMOOTHING) for logits in outputs)


def contestants(sizes, classes):
    """-> {name: (head, loss)}; the first is what the others are compared with."""
    ours, width = Matryoshka_CE_Loss(label_smoothing=SMOOTHING), sizes[-1]
    return {"one layer": (nn.Linear(width, classes), lambda logits, labels: plain_loss([logits], labels)),
            "FF": (FixedFeatureLayer(width, classes), ours),
            "MRL": (MRL_Linear_Layer(sizes, classes), ours),
            "MRL plain": (PlainSeparate(sizes, classes), plain_loss),
            "MRL-E": (MRL_Linear_Layer(sizes, classes, efficient=True), ours),
            "MRL-E plain": (PlainShared(sizes, classes), plain_loss)}


def step(head, loss, x, labels):
    """One forward and backward, gradients of features and weights included."""
    x.grad = None
    head.zero_grad(set_to_none=True)
    loss(head(x), labels).backward()


def check(heads, x, labels):
    """Both ways of MRL, and of MRL-E, give the same loss and feature gradient from the same weights."""
    for name in ("MRL", "MRL-E"):
        (ours, _), (plain, _) = heads[name], heads[f"{name} plain"]
        plain.load_state_dict(dict(zip(plain.state_dict(), ours.state_dict().values(), strict=True)))
        results = []
        for head, loss in (heads[name], heads[f"{name} plain"]):
            value = loss(head(x), labels)
            results.append((value, *torch.autograd.grad(value, x)))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def compare(classes, args):
    x = torch.randn(args.batch_size, args.sizes[-1], device=args.device, requires_grad=True)
    labels = torch.randint(classes, (args.batch_size,), device=args.device)
    heads = {name: (head.to(args.device), loss) for name, (head, loss) in contestants(args.sizes, classes).items()}
    check(heads, x, labels)
    steps = {name: lambda head=head, loss=loss: step(head, loss, x, labels) for name, (head, loss) in heads.items()}
    take_turns(steps, 1, args.device)      # warm-up
    show(classes, take_turns(steps, args.rounds, args.device, args.repeat))


def show(classes, times):
    print(f"\n{classes} classes\n{'':12s}{'ms':>26s}{'ratio to one layer':>26s}{'plain / ours':>26s}")
    for name, values in times.items():
        columns = [1e3 * values, values / times["one layer"]]
        if f"{name} plain" in times:
            columns.append(times[f"{name} plain"] / values)
        print(f"{name:12s}" + "".join(f"{spread(column):>26s}" for column in columns), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[1000, 4202])
    parser.add_argument("--sizes", type=int, nargs="+", default=NESTING_LIST)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeat", type=int, default=3, help="steps in each measurement")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("highest")      # a container may have allowed TF32
    torch.manual_seed(0)
    products = sum(args.sizes) / args.sizes[-1]
    print(f"{machine(args.device)}; fp32, N={args.batch_size}, sizes {args.sizes[0]}..{args.sizes[-1]}; "
          f"products alone: MRL {products:.2f}, MRL-E 1")
    for classes in args.classes:
        compare(classes, args)


if __name__ == "__main__":
    main()
