"""Accuracy on superclasses of ImageNet (section 5, appendix J): coarse distinctions need few dimensions.

    wnids = superclass.choose(30)                        # the paper's 30 superclasses, 467 of the 1,000 classes
    result = superclass.evaluate(softmax, gt, wnids)     # softmax [G, N, 1000] and gt [N], from outputs.py

A superclass is a WordNet synset with ImageNet classes below it. The hierarchy is imagenet1k_hierarchy.tsv: each of the
1,000 synsets and their ancestors with one parent, the last that ImageNet's is-a file lists, as the original keeps it.
Read by Custom_SuperClass_Performance.ipynb. Letters: G sizes, N images, C = 1,000 classes, S superclasses.
"""
import csv
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np

from mrl_files import InputError

HIERARCHY = Path(__file__).with_name("imagenet1k_hierarchy.tsv")


# ------------------------------------------------------------------------------------------------ the hierarchy

@cache
def synsets():
    """-> {wnid: row of the hierarchy}, most classes below first, then most synsets, then as ImageNet's is-a file lists
    them: the order in which the original considers them. class_index is "" above the 1,000 classes."""
    with HIERARCHY.open(encoding="utf-8") as file:
        return {row["wnid"]: row for row in csv.DictReader(file, delimiter="\t")}


def ancestors(wnid):
    """-> the synsets above one, nearest first, up to the root."""
    above = []
    while wnid := synsets()[wnid]["parent_wnid"]:
        above.append(wnid)
    return above


@cache
def classes():
    """-> the wnids of the 1,000 classes, in class order."""
    leaves = [wnid for wnid, row in synsets().items() if row["class_index"]]
    return sorted(leaves, key=lambda wnid: int(synsets()[wnid]["class_index"]))


@cache
def members(wnid):
    """-> class indices [m] of the ImageNet classes that a synset covers, ascending."""
    if wnid not in synsets():
        raise InputError(f"{wnid} is not an ImageNet class or an ancestor of one: see {HIERARCHY.name}")
    return np.array([i for i, leaf in enumerate(classes()) if wnid in (leaf, *ancestors(leaf))])


def name(wnid):
    """-> the first of a synset's names that no other synset has ("watercraft"), or else the first ("crane")."""
    own = synsets()[wnid]["name"].split(", ")
    return next((one for one in own if name_counts()[one] == 1), own[0])


def class_names(ids):
    """-> readable names of class folders: a synset's own, any other as it is."""
    return [name(one) if one in synsets() else one for one in ids]


@cache
def name_counts():
    return Counter(one for row in synsets().values() for one in row["name"].split(", "))


def choose(n=30):
    """-> n wnids that cover no class twice, the original's for n up to 80 (30: the paper's table 24), in its order.

    In the hierarchy's order, each synset above a class is added and takes the place of an ancestor chosen before,
    until there are n.
    """
    chosen = []
    for wnid in (wnid for wnid, row in synsets().items() if int(row["n_imagenet_descendants"])):
        chosen = [other for other in chosen if other not in ancestors(wnid)] + [wnid]
        if len(chosen) == n:
            return chosen
    raise InputError(f"{n} superclasses cannot be chosen: give a number from 1 to {len(chosen)}")


# ------------------------------------------------------------------------------------------------ accuracy

def assignment(wnids):
    """-> [1000]: each class's superclass, 1 ... S in the order given, or 0, the reject class. They must be disjoint."""
    of_class = np.zeros(len(classes()), int)
    for i, wnid in enumerate(wnids, 1):
        taken = of_class[members(wnid)]
        if taken.any():
            raise InputError(f"superclasses {wnids[taken.max() - 1]} and {wnid} share classes: give disjoint ones")
        of_class[members(wnid)] = i
    return of_class


def evaluate(softmax, gt, wnids):
    """softmax [G, N, 1000], gt [N], S disjoint superclasses -> dict of fractions:

    superclass [G]: right superclass or rightly rejected, all images ("31-way" for 30; images of the classes outside
    count as right when any class outside is predicted); superclass_covered [G]: right superclass, images of the
    superclasses only; restricted [G]: right class among all 1,000, images of the superclasses only;
    within [G, S]: right class among those of the image's own superclass, NaN for a superclass without images;
    confusion [G, S+1, S+1]: rows are true superclasses and sum to 1, reject first (0 for one without images).
    And images [S], how many each superclass has: a part of ImageNet leaves some without.
    """
    softmax, gt = np.asarray(softmax), np.asarray(gt)
    of_class = assignment(wnids)
    check_arrays(softmax, gt, wnids, of_class)
    predictions = softmax.argmax(-1)                                          # [G, N]
    truth, guess = of_class[gt], of_class[predictions]
    covered = truth > 0
    return {"images": np.bincount(truth, minlength=len(wnids) + 1)[1:],
            "superclass": (guess == truth).mean(1),
            "superclass_covered": (guess == truth)[:, covered].mean(1),
            "restricted": (predictions == gt)[:, covered].mean(1),
            "within": np.stack([within(softmax, gt, members(wnid)) for wnid in wnids], axis=1),
            "confusion": np.stack([confusion(truth, row, len(wnids) + 1) for row in guess])}


def check_arrays(softmax, gt, wnids, of_class):
    if softmax.ndim != 3 or gt.shape != softmax.shape[1:2] or softmax.shape[2] != len(of_class):
        raise InputError(f"softmax {list(softmax.shape)} and gt {list(gt.shape)} must be [G, N, {len(of_class)}] and "
                         "[N]: superclasses are those of ImageNet-1K's classes")
    if not of_class[gt].any():
        raise InputError(f"none of the {len(wnids)} superclasses has an image: run inference on a set that holds them")


def check_classes(names):
    """InputError unless a model's class names, where they are known, are ImageNet's 1,000 in order (or 0 ... 999)."""
    if names not in (None, classes(), [str(i) for i in range(len(classes()))]):
        raise InputError(f"the model's {len(names)} classes are not ImageNet's 1,000 in order (first: {names[0]}): "
                         "superclasses need those")


def within(softmax, gt, columns):
    """-> [G]: accuracy on the images of these classes when only these classes can be predicted; NaN without images."""
    rows = np.flatnonzero(np.isin(gt, columns))
    if not len(rows):
        return np.full(len(softmax), np.nan)
    return np.array([(columns[one[np.ix_(rows, columns)].argmax(1)] == gt[rows]).mean() for one in softmax])


def confusion(truth, guess, n):
    """-> [n, n]: row t holds the shares of truth t's images that were taken for 0 ... n-1."""
    counts = np.bincount(truth * n + guess, minlength=n * n).reshape(n, n)
    return counts / counts.sum(1, keepdims=True).clip(1)
