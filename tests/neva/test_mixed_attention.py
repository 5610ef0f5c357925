"""Mixed attention against plain loops, its rule in FlexAttention's words, and its refusals."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from nemo_pre.neva.mixed_attention import (
    MixedAttention,
    SplitMixedAttention,
    attend_dense,
    mask_rule,
    with_mixed_attention,
)
from nemo_pre.neva.split_attention import runs_of_rows
from nemo_pre.parallel.token_streams import StreamShape, VisualBranch, decoder_streams, may_attend
from tests.parallel.test_token_streams import packed, samples, shape

HEADS, GROUPS, WIDTH = 4, 2, 8


def attention(kind: type[MixedAttention] = MixedAttention) -> MixedAttention:
    config = SimpleNamespace(
        attention_dropout=0.0,
        window_size=None,
        softmax_type="vanilla",
        apply_query_key_layer_scaling=False,
        kv_channels=WIDTH,
    )
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    groups = SimpleNamespace(cp=alone, tp=alone)
    return kind(config, 1, None, "self", pg_collection=groups)  # type: ignore[arg-type]


def structure(branch: VisualBranch | None = None, **changes: object) -> torch.Tensor:
    found = decoder_streams(samples(), branch, StreamShape(**{**vars(shape()), **changes})).structure_BK3
    assert found is not None
    return found


def inputs(length: int, batch: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(length, batch, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes]


def slow(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    rows = []
    for q in range(len(query)):
        row = []
        for b in range(query.shape[1]):
            heads = []
            for n in range(HEADS):
                group = n // (HEADS // GROUPS)
                seen = [
                    k
                    for k in range(len(key))
                    if tokens[b, k, 0] == tokens[b, q, 0]
                    and (tokens[b, k, 1] <= tokens[b, q, 1] or tokens[b, k, 2] == tokens[b, q, 2] >= 0)
                ]
                score = torch.stack([query[q, b, n] @ key[k, b, group] / math.sqrt(WIDTH) for k in seen])
                heads.append((score.softmax(0)[:, None] * torch.stack([value[k, b, group] for k in seen])).sum(0))
            row.append(torch.cat(heads))
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", [MixedAttention, SplitMixedAttention])
@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("with_branch", [False, True], ids=["samples", "samples-and-branch"])
def test_values_and_gradients_equal_plain_loops(with_branch, tp_size, kind):
    tokens = structure(packed() if with_branch else None, tp_size=tp_size)
    given = inputs(tokens.shape[1])
    weight = torch.randn(tokens.shape[1], 3, HEADS * WIDTH, generator=torch.Generator().manual_seed(1)).double()
    found = attention(kind)(*given, tokens)
    gradients = torch.autograd.grad((found * weight).sum(), given)
    expected = slow(*given, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for mine, right in zip(gradients, torch.autograd.grad((expected * weight).sum(), given), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("first_query", [0, 8])
def test_flexattentions_rule_is_the_same_rule(first_query):
    tokens = structure(packed())
    queries = 24 - 2 * first_query
    rule = create_mask(mask_rule(tokens, first_query), 3, None, queries, 24, device="cpu")[:, 0]
    assert torch.equal(rule, may_attend(tokens[:, first_query : first_query + queries], tokens))


@pytest.mark.parametrize("first_query", [0, 4, 8, 12])
def test_runs_see_what_the_rule_allows_also_where_a_rank_has_a_part_of_the_queries(first_query):
    tokens, queries = structure(packed(), tp_size=2), 24 - 2 * first_query or 4
    rule = may_attend(tokens[:, first_query : first_query + queries], tokens)
    for allowed, row in zip(rule, runs_of_rows(tokens, first_query, queries, "cpu"), strict=True):
        seen = torch.zeros_like(allowed)
        query_order = torch.arange(queries) if row.query_order is None else row.query_order
        key_order = torch.arange(24) if row.key_order is None else row.key_order
        for run in row.runs:
            of_run, keys = query_order[run.queries], key_order[run.keys]
            for number, query in enumerate(of_run.tolist()):
                seen[query, keys[: len(keys) - (len(of_run) - 1 - number)] if run.causal else keys] = True
        assert torch.equal(seen, allowed)


def test_runs_want_the_tokens_of_an_image_together():
    tokens = structure()
    tokens[0, :, 2] = torch.tensor([0, -1] * 8)
    with pytest.raises(ValueError, match="do not lie together"):
        runs_of_rows(tokens, 0, 16, "cpu")


def test_changing_one_image_changes_no_other_and_no_earlier_text():
    tokens = structure(packed())
    query, key, value = (tensor.detach() for tensor in inputs(24))
    before = attention()(query, key, value, tokens)
    image = (tokens[0, :, 2] == 1).nonzero().squeeze(1)  # sample 0's second image, in the sample and in the branch
    changed = value.clone()
    changed[image, 0] += 1.0
    differs = (attention()(query, key, changed, tokens) - before).abs().amax(-1)[:, 0] > 0
    sample_image = image[image < 16]
    assert differs[image].all()
    assert not differs[: sample_image[0]].any(), "earlier text and the earlier image"
    assert differs[sample_image[-1] + 1 : 16].all(), "later text sees it"
    assert not differs[16:][tokens[0, 16:, 2] != 1].any(), "other packed images"


def test_without_a_structure_it_raises_instead_of_being_causal():
    given = inputs(24)
    with pytest.raises(ValueError, match="would be causal"):
        attention()(*given, None)
    with pytest.raises(ValueError, match="has shape"):
        attention()(*given, structure())


def test_a_backend_that_cannot_run_here_is_refused():
    with pytest.raises(ValueError, match="choose auto"):
        with_mixed_attention(None, "sdpa")  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
            with_mixed_attention(None, "flex")  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention's kernels and their gradients need a GPU")
@pytest.mark.parametrize("with_branch", [False, True], ids=["samples", "samples-and-branch"])
def test_flex_equals_dense_on_a_gpu(with_branch):
    from nemo_pre.neva.mixed_attention import _attend_flex

    tokens = structure(packed() if with_branch else None).cuda()
    length = tokens.shape[1]
    generator = torch.Generator().manual_seed(0)
    given = [
        torch.randn(3, heads, length, 64, generator=generator).cuda().requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    ]
    answers = [attend(*given, tokens, 0, 0.125) for attend in (attend_dense, _attend_flex)]
    torch.testing.assert_close(answers[1], answers[0], rtol=2e-2, atol=2e-2)
    gradients = [torch.autograd.grad(answer.sum(), given) for answer in answers]
    for mine, right in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(mine, right, rtol=2e-2, atol=2e-2)
