"""The paper's superclasses from the hierarchy, and every accuracy against one image at a time."""
import numpy as np
import pytest
import superclass
from conftest import ROOT

from mrl_files import InputError

TABLE_24 = ("insect, terrier, protective covering, garment, vessel, furniture, motor vehicle, snake, sporting dog, "
            "hound, fish, wader, even-toed ungulate, machine, watercraft, monkey, nutriment, tool, vegetable, "
            "measuring instrument, building, home appliance, electronic equipment, canine, game equipment, "
            "shepherd dog, lizard, wind instrument, oscine, mechanism").split(", ")
INSECT, SNAKE, TERRIER = "n02159955", "n01726692", "n02092468"


def hierarchical_world(sizes, images_per_class, noise=2.0, seed=0):
    """-> softmax [G, N, 1000], gt [N] of a made-up embedding whose geometry is ImageNet's hierarchy.

    A class's mean is a sum of random vectors, one for it and each of its ancestors; principal components come first,
    so small prefixes hold the coarse distinctions. Images are means with noise, classified by Bayes' rule per prefix.
    """
    rng = np.random.default_rng(seed)
    vectors = {wnid: rng.standard_normal(sizes[-1]) for wnid in sorted(superclass.synsets())}
    means = np.stack([sum(vectors[w] for w in (leaf, *superclass.ancestors(leaf))) for leaf in superclass.classes()])
    means -= means.mean(0)
    means = means @ np.linalg.svd(means, full_matrices=False)[2].T
    gt = np.repeat(np.arange(len(means)), images_per_class)
    x = means[gt] + noise * rng.standard_normal((len(gt), sizes[-1]))
    logits = np.stack([(x[:, :d] @ means[:, :d].T - (means[:, :d] ** 2).sum(1) / 2) / noise ** 2 for d in sizes])
    softmax = np.exp(logits - logits.max(-1, keepdims=True))
    return (softmax / softmax.sum(-1, keepdims=True)).astype(np.float32), gt


@pytest.fixture(scope="module")
def world():
    return hierarchical_world([4, 16], images_per_class=1)


# ------------------------------------------------------------------------------------------------ the choice

def test_the_papers_thirty_superclasses():
    wnids = superclass.choose()
    names = [superclass.synsets()[wnid]["name"].split(", ") for wnid in wnids]
    assert [paper in own for paper, own in zip(TABLE_24, names, strict=True)] == [True] * 30
    assert (superclass.assignment(wnids) > 0).sum() == sum(len(superclass.members(w)) for w in wnids) == 467
    assert len({superclass.name(wnid) for wnid in wnids}) == 30


def test_the_originals_superclasses_for_every_number():
    """From the original's order alone: of the synsets considered so far, those that have no other below."""
    order = (ROOT / "tests/golden/superclass_order.txt").read_text(encoding="utf-8").split()
    assert sorted(order) == sorted(superclass.synsets())
    sets = {}
    for i in range(200):
        above = {one for wnid in order[:i + 1] for one in superclass.ancestors(wnid)}
        lowest = set(order[:i + 1]) - above
        sets.setdefault(len(lowest), lowest)
    assert [n for n in range(1, 81) if set(superclass.choose(n)) != sets[n]] == []


@pytest.mark.parametrize("n", [1, 2, 17, 100, 416])
def test_any_number_of_disjoint_superclasses(n):
    wnids = superclass.choose(n)
    assert len(set(wnids)) == n
    assert superclass.assignment(wnids).max() == n                            # disjoint, or it would refuse


def test_members_are_the_classes_below():
    assert superclass.classes()[62] == "n01744401" and superclass.name("n01744401") == "rock python"
    assert superclass.members(SNAKE).tolist() == list(range(52, 69))
    assert superclass.members("n01744401").tolist() == [62]
    assert len(superclass.members("n00001740")) == 1000


def test_hierarchy_counts_are_its_own():
    """The table's count of classes below each synset, and that each parent is in the table."""
    for wnid, row in superclass.synsets().items():
        below = len(superclass.members(wnid)) if row["class_index"] == "" else 0
        assert int(row["n_imagenet_descendants"]) == below
    assert [row["wnid"] for row in superclass.synsets().values() if not row["parent_wnid"]] == ["n00001740"]


# ------------------------------------------------------------------------------------------------ accuracy

def test_accuracies_against_one_image_at_a_time(world):
    softmax, gt = world
    wnids = [INSECT, SNAKE, TERRIER]
    result = superclass.evaluate(softmax, gt, wnids)
    of_class = {c: s for s, wnid in enumerate(wnids, 1) for c in superclass.members(wnid)}
    for g, probabilities in enumerate(softmax):
        right, covered, restricted, within = [], [], [], {1: [], 2: [], 3: []}
        confusion = np.zeros((4, 4))
        for p, c in zip(probabilities, gt, strict=True):
            truth, guess = of_class.get(c, 0), of_class.get(p.argmax(), 0)
            right.append(truth == guess)
            confusion[truth, guess] += 1
            if truth:
                covered.append(truth == guess)
                restricted.append(p.argmax() == c)
                siblings = superclass.members(wnids[truth - 1])
                within[truth].append(max(siblings, key=lambda k: p[k]) == c)
        assert result["superclass"][g] == np.mean(right)
        assert result["superclass_covered"][g] == np.mean(covered)
        assert result["restricted"][g] == np.mean(restricted)
        assert result["within"][g].tolist() == [np.mean(within[s]) for s in (1, 2, 3)]
        assert np.allclose(result["confusion"][g], confusion / confusion.sum(1, keepdims=True), atol=1e-15)


def test_superclasses_that_cover_everything_leave_no_reject(world):
    result = superclass.evaluate(*world, ["n00001740"])
    assert result["superclass"].tolist() == [1, 1] and result["confusion"][0].tolist() == [[0, 0], [0, 1]]


def test_a_superclass_without_images_is_left_out_and_counted(world):
    """A part of the set, which holds no snakes: all else is what the others alone give."""
    softmax, gt = world
    part = (gt < 52) | (gt > 68)
    whole, alone = [superclass.evaluate(softmax[:, part], gt[part], wnids) for wnids in ([INSECT, SNAKE], [INSECT])]
    assert whole["images"].tolist() == [len(superclass.members(INSECT)), 0] and np.isnan(whole["within"][:, 1]).all()
    assert (whole["within"][:, 0] == alone["within"][:, 0]).all() and (whole["confusion"][:, 2] == 0).all()
    assert (whole["superclass_covered"] == alone["superclass_covered"]).all()


def test_coarse_distinctions_need_fewer_dimensions(world):
    """What the notebook is about, in a world made so: superclasses come before classes."""
    result = superclass.evaluate(*world, superclass.choose())
    assert result["superclass_covered"][0] > result["restricted"][0] + 0.2
    assert result["restricted"][1] > result["restricted"][0] + 0.2


# ------------------------------------------------------------------------------------------------ refusals

@pytest.mark.parametrize("call, words", [
    (lambda s, y: superclass.choose(417), "from 1 to 416"),
    (lambda s, y: superclass.choose(0), "from 1 to 416"),
    (lambda s, y: superclass.evaluate(s, y, ["n99999999"]), "n99999999 is not an ImageNet class"),
    (lambda s, y: superclass.evaluate(s, y, [SNAKE, "n01744401"]), "n01726692 and n01744401 share classes"),
    (lambda s, y: superclass.evaluate(s[..., :200], y, [SNAKE]), "ImageNet-1K's classes"),
    (lambda s, y: superclass.evaluate(s, y[:-1], [SNAKE]), r"\[N\]"),
    (lambda s, y: superclass.evaluate(s, 0 * y, [INSECT, SNAKE]), "none of the 2 superclasses has an image"),
    (lambda s, y: superclass.check_classes(superclass.classes()[::-1]), "not ImageNet's 1,000 in order"),
    (lambda s, y: superclass.check_classes(["cat", "dog"]), "2 classes are not ImageNet's 1,000"),
])
def test_refusals(world, call, words):
    with pytest.raises(InputError, match=words):
        call(*world)


def test_class_names_that_are_imagenets():
    for names in (None, superclass.classes(), [str(i) for i in range(1000)]):
        assert superclass.check_classes(names) is None
