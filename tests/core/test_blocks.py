"""Layers of a hybrid pattern, counted as users count blocks."""

from types import SimpleNamespace

import pytest

from nemo_pre.neva.blocks import block_ends, block_output, num_blocks


@pytest.mark.parametrize(
    "pattern, ends",
    [
        ("*-*-", [2, 4]),
        ("*-|*-", [2, 4]),
        ("*|-*-", [2, 4]),  # a block may be cut by a pipeline stage
        ("M-M*-ME", [2, 3, 5, 7]),  # a mixer without an MLP is a block by itself
        ("MMM", [1, 2, 3]),
        ("*-*-/MM/MM", [2, 4]),  # what predicts further tokens is no part of the decoder
    ],
)
def test_a_block_is_a_mixer_and_the_mlp_behind_it(pattern, ends):
    assert block_ends(pattern) == ends
    assert num_blocks(SimpleNamespace(hybrid_layer_pattern=pattern, num_layers=99)) == len(ends)


def test_a_chunk_knows_the_blocks_whose_last_layer_it_has():
    layers = [SimpleNamespace(layer_number=number) for number in (3, 4)]
    decoder = SimpleNamespace(layers=layers)
    hybrid = SimpleNamespace(decoder=decoder, hybrid_layer_pattern="*-|*-")
    assert block_output(hybrid, 2) is layers[1]
    assert block_output(hybrid, 1) is None and block_output(hybrid, 3) is None
    assert block_output(SimpleNamespace(decoder=decoder), 3) is layers[0]
