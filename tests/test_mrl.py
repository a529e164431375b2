"""MRL.py against the original's numbers (tests/golden) and against plain loops."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fill
from torch import nn

import MRL
from MRL import Matryoshka_CE_Loss, Matryoshka_Loss, MRL_Linear_Layer, truncate

# ---- golden: the original's own numbers

@pytest.mark.parametrize("kind", ["mrl", "mrl_e"])
def test_head_equals_the_original(golden, kind):
    numbers, arrays = golden("model")
    head = MRL_Linear_Layer(MRL.NESTING_LIST, 10, efficient=kind == "mrl_e")
    assert {k: list(v.shape) for k, v in head.state_dict().items()} == numbers[f"head_{kind}_state_dict"]
    head.load_state_dict(fill(head.state_dict(), 11))
    rng = np.random.default_rng(7)
    x = torch.from_numpy(rng.standard_normal((6, 2048)).astype(np.float32)).requires_grad_()
    y = torch.from_numpy(rng.integers(0, 10, 6))
    logits = head(x)
    assert isinstance(logits, tuple) and len(logits) == 9
    np.testing.assert_allclose(torch.stack(logits).detach(), arrays[f"head_{kind}_logits"], atol=2e-6)
    loss = Matryoshka_CE_Loss(label_smoothing=0.1)(logits, y)
    loss.backward()
    assert loss.item() == pytest.approx(float(arrays[f"head_{kind}_loss"]), rel=3e-7)
    np.testing.assert_allclose(x.grad, arrays[f"head_{kind}_grad_x"], atol=1e-7)
    weighted = Matryoshka_CE_Loss(range(1, 10), label_smoothing=0.1)(logits, y)
    assert weighted.item() == pytest.approx(float(arrays[f"head_{kind}_loss_weighted_1to9"]), rel=3e-7)


def test_fixed_feature_layer_equals_the_original(golden):
    _, arrays = golden("model")
    head = MRL.FixedFeatureLayer(512, 10)
    head.load_state_dict(fill(head.state_dict(), 11))
    x = torch.from_numpy(np.random.default_rng(7).standard_normal((6, 2048)).astype(np.float32))
    np.testing.assert_allclose(head(x).detach(), arrays["head_ff512_logits"], atol=1e-6)


# ---- the layer and the loss, against plain computations

def test_mrl_e_is_one_matrix_read_to_each_size():
    head = MRL_Linear_Layer([2, 3, 8], 4, efficient=True)
    x = torch.randn(5, 10)
    weight, bias = head.nesting_classifier_0.weight, head.nesting_classifier_0.bias
    for size, logits in zip([2, 3, 8], head(x), strict=True):
        torch.testing.assert_close(logits, x[:, :size] @ weight[:, :size].T + bias)


@pytest.mark.parametrize("efficient", [False, True])
def test_one_size_is_a_plain_linear_layer(efficient):
    head = MRL_Linear_Layer([8], 4, efficient=efficient)
    x = torch.randn(5, 8)
    (logits,) = head(x)
    torch.testing.assert_close(logits, head.nesting_classifier_0(x))


def test_no_bias_means_none():
    assert [k for k in MRL_Linear_Layer([2, 4], 3, bias=False).state_dict() if "bias" in k] == []


def plain_logits(head, x):
    """What a reader would write first: one linear layer on each slice of the features."""
    layers = [head.nesting_classifier_0] * len(head.nesting_list) if head.efficient else head.children()
    return [F.linear(x[..., :size], layer.weight[:, :size], layer.bias)
            for layer, size in zip(layers, head.nesting_list, strict=True)]


def plain_loss(outputs, target):
    return sum(F.cross_entropy(logits, target, label_smoothing=0.1) for logits in outputs)


KINDS = pytest.mark.parametrize("efficient", [False, True], ids=["mrl", "mrl_e"])


@KINDS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", ["none", "features", "weights"])
def test_gradients_are_those_of_plain_layers(efficient, bias, frozen):
    """Width 11 above the largest size; of the sizes, the loss uses two."""
    head, x = MRL_Linear_Layer([2, 5, 9], 4, efficient, bias=bias).double(), torch.randn(6, 11).double()
    x.requires_grad_(frozen != "features")
    head.requires_grad_(frozen != "weights")
    results = []
    for logits in (head(x), plain_logits(head, x)):
        wanted = [t for t in (x, *head.parameters()) if t.requires_grad]
        loss = (logits[0] ** 2).sum() + (logits[2] ** 3).sum()
        results.append((*logits, *torch.autograd.grad(loss, wanted, allow_unused=True)))
    torch.testing.assert_close(*results)


@KINDS
def test_second_derivatives_are_those_of_plain_layers(efficient):
    """A gradient penalty, and a Hessian-vector product."""
    head = MRL_Linear_Layer([2, 5, 9], 4, efficient).double()
    x, v, y = torch.randn(6, 9).double().requires_grad_(), torch.randn(6, 9).double(), torch.tensor([0, 1, 2, 3, 0, 1])
    results = []
    for logits, loss in ((head(x), Matryoshka_CE_Loss(label_smoothing=0.1)), (plain_logits(head, x), plain_loss)):
        (slope,) = torch.autograd.grad(loss(logits, y), x, create_graph=True)
        product = torch.autograd.grad((slope * v).sum(), x, retain_graph=True)
        results.append((*product, *torch.autograd.grad(slope.pow(2).sum(), [x, *head.parameters()], allow_unused=True)))
    torch.testing.assert_close(*results)
    assert all(values.any() for values in results[0][:2])


@KINDS
def test_torch_func(efficient):
    """The gradient of each image by itself: vmap over grad, as for per-sample clipping."""
    head, loss = MRL_Linear_Layer([2, 5, 9], 4, efficient), Matryoshka_CE_Loss([1, 2, 3], label_smoothing=0.1)
    x, y, parameters = torch.randn(6, 9), torch.tensor([0, 1, 2, 3, 0, 1]), dict(head.named_parameters())

    def loss_of(parameters, image, label):
        return loss(torch.func.functional_call(head, parameters, (image[None],)), label[None])

    each = torch.func.vmap(torch.func.grad(loss_of), in_dims=(None, 0, 0))(parameters, x, y)
    whole = torch.autograd.grad(loss(head(x), y), list(head.parameters()))
    torch.testing.assert_close([gradient.mean(0) for gradient in each.values()], list(whole))


@KINDS
def test_modules_can_be_moved_copied_and_started_again(efficient):
    head = MRL_Linear_Layer([2, 5, 9], 4, efficient, bias=False, dtype=torch.float64)
    x = torch.randn(6, 9).double()
    torch.testing.assert_close(copy.deepcopy(head)(x), head(x), rtol=0, atol=0)
    assert head.to("meta")(x.to("meta"))[2].shape == (6, 4)
    assert MRL_Linear_Layer([2, 5], 3, efficient, device="meta").nesting_classifier_0.weight.is_meta
    torch.manual_seed(0)
    made = MRL_Linear_Layer([2, 5, 9], 4, efficient)
    again = MRL_Linear_Layer([2, 5, 9], 4, efficient)
    torch.manual_seed(0)
    again.reset_parameters()
    torch.testing.assert_close(again.state_dict(), made.state_dict(), rtol=0, atol=0)


@KINDS
def test_heads_in_autocast_and_compiled(efficient):
    head, x = MRL_Linear_Layer([2, 5, 9], 4, efficient), torch.randn(6, 9)
    whole = torch.stack(head(x))
    with torch.autocast("cpu", torch.bfloat16):
        half = head(x)
        loss = Matryoshka_CE_Loss()(half, torch.zeros(6, dtype=torch.long))
    assert {logits.dtype for logits in half} == {torch.bfloat16} and loss.dtype == torch.float32
    torch.testing.assert_close(torch.stack(half).float(), whole, rtol=0.05, atol=0.05)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in head.parameters())
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.stack(compiled(x)), whole)


@KINDS
def test_features_of_any_number_of_dimensions(efficient):
    head, x = MRL_Linear_Layer([2, 5, 9], 4, efficient), torch.randn(2, 3, 9)
    for logits, flat in zip(head(x), head(x.flatten(0, 1)), strict=True):
        torch.testing.assert_close(logits.flatten(0, 1), flat)


@pytest.mark.parametrize("kwargs", [{}, {"label_smoothing": 0.1}, {"weight": torch.tensor([1., 2., 3., 4.])},
                                    {"ignore_index": 2}, {"reduction": "sum"},
                                    {"weight": torch.tensor([1., 2., 3., 4.]), "ignore_index": 2}])
@pytest.mark.parametrize("importance", [None, [1, 2, 0.5]])
@pytest.mark.parametrize("ignored", [0, 2])
def test_loss_equals_the_loop_over_sizes(kwargs, importance, ignored):
    target, logits = torch.tensor([0, 1, 2, 3, 2, 1]), [torch.randn(6, 4, requires_grad=True) for _ in range(3)]
    target[:ignored] = kwargs.get("ignore_index", -100)
    loop = sum(c * F.cross_entropy(x, target, **kwargs) for c, x in zip(importance or [1, 1, 1], logits, strict=True))
    expected = torch.autograd.grad(loop, logits)
    for given in (tuple(logits), torch.stack(logits)):
        loss = Matryoshka_CE_Loss(importance, **kwargs)(given, target)
        torch.testing.assert_close(loss, loop)
        torch.testing.assert_close(torch.autograd.grad(loss, logits), expected)


def test_loss_takes_what_cross_entropy_takes():
    """Class probabilities, and a class for each pixel: [N, C, H, W] logits."""
    for logits, target in ((torch.randn(3, 6, 4), torch.rand(6, 4).softmax(1)),
                           (torch.randn(3, 2, 4, 5, 5), torch.randint(4, (2, 5, 5)))):
        torch.testing.assert_close(Matryoshka_CE_Loss()(tuple(logits), target),
                                   sum(F.cross_entropy(x, target) for x in logits))


def test_the_originals_tests_of_its_loss():
    """It asks for: the sum over nine sizes, the sum with weights, and cross-entropy's own options passed through."""
    logits, target = torch.randn(9, 16, 10), torch.randint(10, (16,))
    each = [nn.CrossEntropyLoss()(x, target) for x in logits]
    torch.testing.assert_close(Matryoshka_CE_Loss()(logits, target), sum(each))
    weighted = sum(weight * loss for weight, loss in zip(range(1, 10), each, strict=True))
    torch.testing.assert_close(Matryoshka_CE_Loss(relative_importance=list(range(1, 10)))(logits, target), weighted)
    criterion = Matryoshka_CE_Loss(label_smoothing=0.1, ignore_index=3).criterion
    assert (criterion.label_smoothing, criterion.ignore_index) == (0.1, 3)


def test_one_loss_for_each_image():
    logits, target = torch.randn(3, 6, 4), torch.randint(4, (6,))
    each = Matryoshka_CE_Loss([1, 2, 3], reduction="none")(tuple(logits), target)
    torch.testing.assert_close(each, sum(c * F.cross_entropy(x, target, reduction="none")
                                         for c, x in zip([1, 2, 3], logits, strict=True)))


def test_fixed_features_have_one_size():
    logits, target = torch.randn(6, 4), torch.randint(4, (6,))
    torch.testing.assert_close(Matryoshka_CE_Loss()(logits, target), F.cross_entropy(logits, target))


def test_relative_importance_is_a_buffer():
    loss = Matryoshka_CE_Loss([1, 2])
    assert loss.relative_importance.tolist() == [1, 2] and not loss.state_dict()
    assert loss.to("meta").relative_importance.is_meta      # follows the device
    with pytest.raises(ValueError, match="2 weights of relative_importance for 3 sizes"):
        Matryoshka_CE_Loss([1, 2])(torch.randn(3, 6, 4), torch.zeros(6, dtype=torch.long))


@pytest.mark.parametrize("sizes", [[], [8, 8], [16, 8], [0, 8]])
def test_sizes_must_increase(sizes):
    with pytest.raises(ValueError, match="increasing positive integers"):
        MRL_Linear_Layer(sizes)


def test_features_that_are_too_few():
    with pytest.raises(ValueError, match="4 dimensions, 8 are needed"):
        MRL_Linear_Layer([2, 8], 3)(torch.randn(1, 4))


# ---- any loss of embeddings

def contrast(images, texts):
    """A CLIP-like loss: of all pairs in the batch, those in the same row belong together."""
    pairs = torch.arange(len(images))
    return F.cross_entropy(images @ texts.T, pairs) + F.cross_entropy(texts @ images.T, pairs)


@pytest.mark.parametrize("importance", [None, [1, 2, 0.5]])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("loss, inputs, others", [
    (contrast, 2, {}), (F.triplet_margin_loss, 3, {}), (nn.TripletMarginLoss(margin=0.2), 3, {}),
    (F.cosine_embedding_loss, 2, {"target": torch.tensor([1, -1, 1, 1, -1, 1])}),
])
def test_embedding_loss_equals_the_loop_over_sizes(loss, inputs, others, normalize, importance):
    embeddings = [torch.randn(6, 11).double().requires_grad_() for _ in range(inputs)]
    loop = 0
    for weight, size in zip(importance or [1, 1, 1], [2, 5, 9], strict=True):
        cuts = [x[:, :size] / (x[:, :size].norm(dim=1, keepdim=True) if normalize else 1) for x in embeddings]
        loop += weight * loss(*cuts, **others)
    nested = Matryoshka_Loss(loss, [2, 5, 9], importance, normalize)(*embeddings, **others)
    torch.testing.assert_close(nested, loop)
    torch.testing.assert_close(torch.autograd.grad(nested, embeddings), torch.autograd.grad(loop, embeddings))


def test_what_does_not_fit_an_embedding_loss():
    with pytest.raises(ValueError, match="4 dimensions, 8 are needed"):
        Matryoshka_Loss(contrast, [2, 8])(torch.randn(3, 8), torch.randn(3, 4))
    with pytest.raises(ValueError, match="2 weights of relative_importance for 1 sizes"):
        Matryoshka_Loss(contrast, [2], [1, 1])(torch.randn(3, 8), torch.randn(3, 8))


def test_a_loss_with_parameters_is_trained_and_moved_with_the_nested_one():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, images, texts):
            return contrast(self.scale * images, texts)

    loss = Matryoshka_Loss(Scaled(), [2, 8], normalize=True)
    loss(torch.randn(3, 8), torch.randn(3, 8)).backward()
    assert [name for name, p in loss.named_parameters() if p.grad.any()] == ["loss.scale"]


def test_truncate_cuts_and_then_normalises():
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(truncate(x, 5), x[..., :5] / x[..., :5].norm(dim=-1, keepdim=True))
    with pytest.raises(ValueError, match="8 dimensions, 9 are needed"):
        truncate(x, 9)
