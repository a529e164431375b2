"""Matryoshka Representation Learning (arXiv 2205.13147): the method. It needs PyTorch alone and is meant to be copied.

    head = MRL_Linear_Layer([8, 16, 32, 64], num_classes=1000)     # in the place of a network's last linear layer
    loss = Matryoshka_CE_Loss(label_smoothing=0.1)                 # the sum of the sizes' cross-entropies
    loss(head(features), labels).backward()                        # features [N, 64]
    Matryoshka_Loss(F.triplet_margin_loss, [8, 16, 32, 64])(anchors, positives, negatives)      # of any embedding loss

Letters used for shapes: N images, D features, C classes, G granularities (nested sizes).
"""
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

NESTING_LIST = [8, 16, 32, 64, 128, 256, 512, 1024, 2048]      # the paper's, for a ResNet50


class MRL_Linear_Layer(nn.Module):
    """The nested classifiers (section 3; Algorithm 2): one linear classifier on each prefix of the features.

    nesting_list: G increasing prefix sizes. num_classes: C. kwargs: what nn.Linear takes (bias, device, dtype).
    efficient: False is MRL, G matrices `nesting_classifier_{i}` [C, size_i];
               True is MRL-E, one matrix `nesting_classifier_0` [C, largest], of which a size reads its first columns.
    forward: x [..., D >= largest] -> tuple of G tensors [..., C].
    """

    def __init__(self, nesting_list, num_classes=1000, efficient=False, **kwargs):
        super().__init__()
        self.nesting_list, self.num_classes, self.efficient = list(nesting_list), num_classes, efficient
        if not self.nesting_list or any(small >= large for small, large in pairwise([0, *self.nesting_list])):
            raise ValueError(f"nesting_list must hold increasing positive integers, got {self.nesting_list}")
        for i, size in enumerate(self.nesting_list[-1:] if efficient else self.nesting_list):
            setattr(self, f"nesting_classifier_{i}", nn.Linear(size, num_classes, **kwargs))

    def reset_parameters(self):
        for layer in self.children():
            layer.reset_parameters()

    def forward(self, x):
        if self.efficient:
            return nested_logits(x, self.nesting_classifier_0.weight, self.nesting_classifier_0.bias, self.nesting_list)
        return tuple(layer(first(x, size)) for layer, size in zip(self.children(), self.nesting_list, strict=True))

    def extra_repr(self):
        return f"nesting_list={self.nesting_list}, num_classes={self.num_classes}, efficient={self.efficient}"


def nested_logits(x, weight, bias, sizes):
    """MRL-E's logits. Those of a size = those of the size before + the next slice's product: one layer's work for all.

    x [..., D >= largest], weight [C, largest], bias [C] or None -> tuple of G [..., C].
    """
    widths = [large - small for small, large in pairwise([0, *sizes])]
    # split, not slicing: the gradient of each slice would be a matrix of full size, and G of them would be added
    slices, weights = first(x, sizes[-1]).split(widths, -1), weight.split(widths, 1)
    logits = [F.linear(slices[0], weights[0], bias)]
    for x_slice, w_slice in zip(slices[1:], weights[1:], strict=True):
        logits.append(logits[-1] + F.linear(x_slice, w_slice))
    return tuple(logits)


class FixedFeatureLayer(nn.Linear):
    """The FF baseline (section 4): a classifier on the first `in_features` numbers. x [..., D] -> [..., C]."""

    def forward(self, x):
        return super().forward(first(x, self.in_features))


def first(x, size):
    """x [..., D >= size] -> [..., size]."""
    if x.shape[-1] < size:
        raise ValueError(f"features have {x.shape[-1]} dimensions, {size} are needed")
    return x[..., :size]


def truncate(x, dim):
    """Embeddings cut to a size, then at length 1 (cosines and distances need that order). x [..., D] -> [..., dim]."""
    return F.normalize(first(x, dim), dim=-1)


class NestedLoss(nn.Module):
    """Sum over the G sizes of c_g * the size's loss (Eq. 1). relative_importance: the weights c_g (all 1 when None)."""

    def __init__(self, relative_importance=None):
        super().__init__()
        weights = None if relative_importance is None else torch.as_tensor(relative_importance, dtype=torch.float32)
        self.register_buffer("relative_importance", weights, persistent=False)

    def weighted_sum(self, losses):
        """[G, ...] losses -> [...]."""
        if self.relative_importance is None:
            return losses.sum(0)
        if len(self.relative_importance) != len(losses):
            raise ValueError(f"{len(self.relative_importance)} weights of relative_importance for {len(losses)} sizes")
        return torch.tensordot(self.relative_importance.to(losses.dtype), losses, 1)


class Matryoshka_CE_Loss(NestedLoss):
    """The sizes' cross-entropies. kwargs, and other shapes of logits and target: what nn.CrossEntropyLoss takes.

    forward: G logits [N, C] as a tuple or a tensor [G, N, C], or one [N, C] of fixed features; target [N] -> scalar.
    """

    def __init__(self, relative_importance=None, **kwargs):
        super().__init__(relative_importance)
        self.criterion = nn.CrossEntropyLoss(**kwargs)

    def forward(self, output, target):
        return self.weighted_sum(self.per_size(output, target))

    def per_size(self, output, target):
        """-> [G] losses, before weighting ([G, N] with reduction="none")."""
        outputs = output[None] if torch.is_tensor(output) and output.dim() == 2 else output      # one: fixed features
        return torch.stack([self.criterion(logits, target) for logits in outputs])


class Matryoshka_Loss(NestedLoss):
    """Any loss of embeddings, on their first numbers at each of the G sizes; normalize: each cut to length 1.

    forward: the loss's embeddings [N, D] by position, what is not cut (labels, weights) by name -> what the loss gives.
    """

    def __init__(self, loss, nesting_list, relative_importance=None, normalize=False):
        super().__init__(relative_importance)
        self.loss, self.nesting_list, self.cut = loss, list(nesting_list), truncate if normalize else first

    def forward(self, *embeddings, **others):
        cuts = [[self.cut(x, size) for x in embeddings] for size in self.nesting_list]
        return self.weighted_sum(torch.stack([self.loss(*prefixes, **others) for prefixes in cuts]))
