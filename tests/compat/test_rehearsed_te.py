"""What the stand-ins for Transformer Engine keep and send, beside the lines of its sources that they cite."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nemo_pre.compat import rehearsed_te_layers as layers
from nemo_pre.compat import rehearsed_te_ring as ring
from nemo_pre.compat.rehearsed_te_autocast import Autocast, LargestValues, Recipe
from nemo_pre.compat.rehearsed_te_package import _Package
from nemo_pre.compat.rehearsed_te_quantized import NotTransformerEngines, quantized

TOKENS, WIDTH, INNER = 256, 128, 384
RECIPES = (None, "delayed", "tensorwise", "blockwise")


class Sent(list):
    """The collectives of a group of two ranks that are not there: what each was, and bytes of what comes out."""

    group = SimpleNamespace(size=lambda: 2)

    def gather(self, out, given, group):
        assert out.numel() == 2 * given.numel()
        self.append(("gather", out.numel() * out.element_size()))

    def scatter(self, out, given, group):
        assert 2 * out.numel() == given.numel()
        self.append(("scatter", given.numel() * given.element_size()))

    def reduce(self, tensor, op=None, group=None):
        self.append(("reduce", tensor.numel() * tensor.element_size()))


@pytest.fixture
def sent(monkeypatch):
    found = Sent()
    monkeypatch.setattr(layers.dist, "all_gather_into_tensor", found.gather)
    monkeypatch.setattr(layers.dist, "reduce_scatter_tensor", found.scatter)
    monkeypatch.setattr(layers.dist, "all_reduce", found.reduce)
    return found


def built(kind, trained=True, **options):
    made = kind(**{"bias": False, "params_dtype": torch.bfloat16, "device": "cpu", **options})
    made.weight.requires_grad_(trained)
    return made


def column(trained=True, **options):
    options = {"in_features": WIDTH, "out_features": INNER, "normalization": "RMSNorm", **options}
    return built(layers.LayerNormLinear, trained, parallel_mode="column", **options)


def row(trained=True, **options):
    return built(layers.Linear, trained, in_features=INNER, out_features=WIDTH, parallel_mode="row", **options)


def passed(layer, width, recipe=None, tokens=TOKENS):
    """Bytes that a pass keeps beside weights; then its backward pass runs."""
    kept, weights = {}, {parameter.data_ptr() for parameter in layer.parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    inp = torch.zeros(tokens // 4, 4, width, dtype=torch.bfloat16, requires_grad=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        Autocast.entered(Recipe(recipe) if recipe else None),
    ):
        out = layer(inp)
    out.backward(torch.zeros_like(out))
    assert inp.grad is not None and inp.grad.shape == inp.shape
    for parameter in layer.parameters():
        assert not parameter.requires_grad or parameter.grad.shape == parameter.shape
    return sum(kept.values())


def matrix(tokens, width, recipe):
    scales = tokens // 128 * width * 4 if recipe == "blockwise" else 0
    return tokens * width * (1 if recipe else 2) + scales


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_norm_with_its_linear_layer_keeps_the_input_and_for_the_weight_the_norms_output(recipe):
    inputs = TOKENS * (WIDTH * 2 + 4)
    assert passed(column(), WIDTH, recipe) == inputs + matrix(TOKENS, WIDTH, recipe)
    assert passed(column(trained=False), WIDTH, recipe) == inputs


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_linear_layer_keeps_its_input_for_the_weight_alone(recipe):
    assert passed(row(), INNER, recipe) == matrix(TOKENS, INNER, recipe)
    assert passed(row(trained=False), INNER, recipe) == 0


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_a_projection_that_is_told_to_keep_the_original_does(recipe):
    layer = row()
    layer.save_original_input = True
    assert passed(layer, INNER, recipe) == TOKENS * INNER * 2


@pytest.mark.parametrize("recipe", RECIPES)
def test_under_sequence_parallelism_a_ranks_own_part_is_kept_and_gathered_again(recipe, sent):
    cut = {"tp_group": sent.group, "tp_size": 2, "sequence_parallel": True}
    first = column(out_features=2 * INNER, **cut)
    assert passed(first, WIDTH, recipe) == TOKENS * (WIDTH * 2 + 4) + matrix(TOKENS, WIDTH, recipe)
    kinds = [kind for kind, _ in sent]
    gathers = 2 if recipe == "blockwise" else 1  # scales travel by themselves
    largest = ["reduce"] if recipe == "tensorwise" else []
    assert kinds == largest + ["gather"] * gathers * 2 + ["scatter"]
    assert max(size for kind, size in sent if kind == "gather") == 2 * TOKENS * WIDTH * (1 if recipe else 2)
    sent.clear()
    second = built(layers.Linear, in_features=2 * INNER, out_features=WIDTH, parallel_mode="row", **cut)
    passed(second, INNER, recipe, 2 * TOKENS)
    assert next(kind for kind, _ in sent) == "scatter"
    assert sum(kind == "gather" for kind, _ in sent) == (4 if recipe == "blockwise" else 1)


def test_a_frozen_layer_gathers_nothing_again(sent):
    cut = {"tp_group": sent.group, "tp_size": 2, "sequence_parallel": True}
    passed(column(trained=False, out_features=2 * INNER, **cut), WIDTH)
    assert [kind for kind, _ in sent] == ["gather", "scatter"]


@pytest.mark.parametrize("recipe", RECIPES[1:])
def test_weights_have_both_copies_where_a_gradient_goes_through_them(recipe):
    layer = column()
    with torch.no_grad(), Autocast.entered(Recipe(recipe)):
        layer(torch.zeros(TOKENS, 1, WIDTH, dtype=torch.bfloat16))
    assert layer.quantized_weight.column is None
    passed(layer, WIDTH, recipe)
    assert {tuple(each.shape) for each in (layer.quantized_weight.row, layer.quantized_weight.column)} == {
        (INNER, WIDTH),
        (WIDTH, INNER),
    }


class Ranks:
    """A group of so many ranks."""

    def __init__(self, number):
        self.number = number

    def size(self):
        return self.number


@pytest.fixture
def group(sent, monkeypatch):
    """Two ranks that scale by the same largest values, in a process where nothing has computed yet."""
    monkeypatch.setattr(layers.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(layers.dist, "get_world_size", lambda group: group.size())
    LargestValues.forget()
    yield Ranks(2)
    LargestValues.forget()


def run(group, *chain, tokens=TOKENS, wanted=True, recipe="delayed"):
    """What leaves an autocast of the layers, whose backward pass has not run."""
    hidden = torch.zeros(tokens, 1, WIDTH, dtype=torch.bfloat16, requires_grad=wanted)
    with Autocast.entered(Recipe(recipe), group):
        for layer in chain:
            hidden = layer(hidden)
    return hidden


def test_delayed_scaling_reduces_all_layers_largest_values_once_in_each_pass(group, sent):
    first, second = column(), row()
    out = run(group, first, second)
    assert sent == [("reduce", 2 * 3 * 4)], "as the autocast is left: input, weight and output of both, in float32"
    out.sum().backward()
    assert sent[1:] == [("reduce", 2 * 2 * 4)], "as the first layer's backward pass ends: two gradients of both"
    sent.clear()
    run(group, column(), second).sum().backward()
    assert sent == [("reduce", 3 * 3 * 4), ("reduce", 3 * 2 * 4)], "of all layers that ever computed"


def test_the_layer_that_reduces_in_the_backward_pass_is_the_first_that_has_one(group, sent):
    """Of a frozen layer without a gradient to its input nothing runs in the backward pass."""
    frozen, trained = column(trained=False), row()
    frozen.layer_norm_weight.requires_grad_(False)
    run(group, frozen, trained, wanted=False).sum().backward()
    assert [kind for kind, _ in sent] == ["reduce", "reduce"]


def test_largest_values_are_sent_by_delayed_scaling_with_gradients_and_to_others_alone(group, sent):
    with torch.no_grad():
        run(group, column(), row())
    assert sent == []
    LargestValues.forget()
    for recipe in ("tensorwise", "blockwise"):
        run(group, column(), row(), recipe=recipe).sum().backward()
    assert sent == []
    LargestValues.forget()
    run(Ranks(1), column(), row()).sum().backward()
    assert sent == []


def test_a_recomputed_layer_sends_them_again_and_each_of_its_layers_in_the_backward_pass(group, sent):
    first, second = column(), row()
    with Autocast.entered(Recipe("delayed"), group), torch.no_grad(), Autocast.recomputing(again=False):
        second(first(torch.zeros(TOKENS, 1, WIDTH, dtype=torch.bfloat16)))
    assert sent == [("reduce", 2 * 3 * 4)], "as the autocast is left"
    sent.clear()
    with Autocast.recomputing(again=True):
        out = run(None, first, second)  # its own autocast knows no group, its layers do
    out.sum().backward()
    assert sent == [("reduce", 2 * 3 * 4), ("reduce", 2 * 2 * 4), ("reduce", 2 * 2 * 4)]


def test_attention_in_bf16_has_largest_values_of_three_products(group, sent):
    attention = layers.DotProductAttention(8, 32)
    tensors = [torch.zeros(64, 2, 8, 32, dtype=torch.bfloat16) for _ in range(3)]
    with Autocast.entered(Recipe("delayed"), group):
        attention(*tensors)
    assert sent == [("reduce", 9 * 4)]


@pytest.mark.parametrize("groups", [2, 8])
def test_attention_keeps_its_values_as_a_copy_and_its_output(groups):
    attention = layers.DotProductAttention(8, 32)
    mixed = torch.zeros(64, 2, groups, 3 * 32, dtype=torch.bfloat16, requires_grad=True)
    query = torch.zeros(64, 2, 8, 32, dtype=torch.bfloat16, requires_grad=True)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    key, value = mixed[..., 32:64].contiguous(), mixed[..., 64:]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = attention(query, key, value)
    assert out.shape == (64, 2, 256)
    tokens = 64 * 2
    assert sum(kept.values()) == tokens * (2 * 8 * 32 * 2 + 2 * groups * 32 * 2 + 8 * 4)
    out.sum().backward()
    assert mixed.grad.shape == mixed.shape


def test_what_has_no_stand_in_can_be_imported_and_not_called():
    module = _Package("transformer_engine.pytorch")
    with pytest.raises(NotTransformerEngines, match="transformer_engine.pytorch.GroupedLinear has no stand-in"):
        module.GroupedLinear(1)
    assert not isinstance(3, module.QuantizedTensor)
    with pytest.raises(NotTransformerEngines, match="no multiples of 8 and 16"):
        quantized(torch.zeros(12, 16), Recipe("delayed"))
    with pytest.raises(NotTransformerEngines, match="LayerNormLinear with LayerNorm has no stand-in"):
        column(normalization="LayerNorm")


@pytest.fixture
def exchanged(monkeypatch):
    """The bytes that a context rank sends, to which of the others; all arrives at once."""
    found = []

    class Handle:
        def wait(self):
            return True

    def send(tensor, peer, group):
        found.append((peer, tensor.numel() * tensor.element_size()))
        return Handle()

    def batch(operations):
        return [each.op(each.tensor, each.peer, each.group) for each in operations]

    monkeypatch.setattr(ring.dist, "isend", send)
    monkeypatch.setattr(ring.dist, "irecv", lambda tensor, peer, group: Handle())
    monkeypatch.setattr(
        ring.dist,
        "P2POp",
        lambda op, tensor, peer, group: SimpleNamespace(op=op, tensor=tensor, peer=peer, group=group),
    )
    monkeypatch.setattr(ring.dist, "batch_isend_irecv", batch)
    return found


@pytest.mark.parametrize("ranks, rank", [((3, 5), 0), ((3, 5), 1), ((0, 2, 4, 6), 2)])
def test_attention_over_context_ranks_sends_keys_on_and_gradients_back(ranks, rank, exchanged):
    tokens, rows, heads, groups, width = 64, 2, 8, 2, 32
    query = torch.zeros(tokens, rows, heads, width, dtype=torch.bfloat16, requires_grad=True)
    key, value = (torch.zeros(tokens, rows, groups, width, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    kept, flops = {}, []

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = ring.ring_attention(query, key, value, ring.Ring(None, ranks, rank), flops.append)
    pair, queries = 2 * tokens * rows * groups * width * 2, tokens * rows * heads * width * 2
    ahead, behind = ranks[(rank + 1) % len(ranks)], ranks[rank - 1]
    assert exchanged == [(ahead, pair)] * (len(ranks) - 1), "each step but the last sends keys and values on"
    assert sum(kept.values()) == 2 * queries + pair + tokens * rows * heads * 4, "as much as without context ranks"
    seen = tokens * (tokens + 1) / 2 + (len(ranks) - 1) * tokens * tokens / 2
    assert sum(flops) == 4 * rows * heads * width * seen
    exchanged.clear()
    out.sum().backward()
    assert exchanged == [(behind, pair), *[(behind, 2 * pair)] * (len(ranks) - 2), (behind, pair)]
    assert all(each.grad.shape == each.shape for each in (query, key, value))
    assert sum(flops) == 3 * 4 * rows * heads * width * seen


def test_attention_over_context_ranks_is_refused_where_transformer_engine_has_no_kernel(monkeypatch):
    monkeypatch.setattr(layers.dist, "get_rank", lambda group: 0)
    attention = layers.DotProductAttention(8, 32, cp_group=Ranks(2), cp_global_ranks=[0, 1])
    with pytest.raises(NotTransformerEngines, match="no kernel for float32"):
        attention(*(torch.zeros(64, 2, 8, 32) for _ in range(3)))
    with pytest.raises(NotTransformerEngines, match="with a2a has no stand-in"):
        layers.DotProductAttention(8, 32, cp_group=Ranks(2), cp_global_ranks=[0, 1], cp_comm_type="a2a")
