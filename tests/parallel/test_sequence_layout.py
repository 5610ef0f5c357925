import pytest
import torch

from nemo_pre.parallel.sequence_layout import (
    combined_lengths,
    combined_places,
    expand_labels,
    local_positions,
    local_visual_tokens,
    sequence_layout,
    square_tiles,
)

IMAGE = -200
IGNORE = -100


def test_neva_docstring_example():
    # [0, 1, <image>, 2, 3] with a 3-token image: embeddings 0, 1, v0, v1, v2, 2, 3; labels as NeVA documents them.
    tokens = torch.tensor([[0, 1, IMAGE, 2, 3]])
    layout = sequence_layout(tokens, square_tiles([1], 3), IMAGE, 7)
    assert layout.text_source_BS.tolist() == [[0, 1, -1, -1, -1, 3, 4]]
    assert layout.visual_source_BS.tolist() == [[-1, -1, 0, 1, 2, -1, -1]]
    labels, mask = expand_labels(layout, torch.tensor([[1, IMAGE, 2, 3, 4]]), torch.ones(1, 5), IGNORE)
    assert mask.tolist() == [[1, 0, 0, 0, 0, 1, 1]]
    assert labels[0, [0, 5, 6]].tolist() == [1, 3, 4]
    assert labels[0, 2:5].tolist() == [IGNORE] * 3


def slow_layout(tokens, tiles, tile_tokens, length):
    """Rows of ('text', t) and ('visual', k, image) by plain loops."""
    rows, visual, image = [], 0, 0
    for sample in tokens.tolist():
        row = []
        for t, token in enumerate(sample):
            if token != IMAGE:
                row.append(("text", t))
                continue
            for _ in range(tiles[image] * tile_tokens):
                row.append(("visual", visual, image))
                visual += 1
            image += 1
        rows.append((row + [None] * length)[:length])
    return rows


@pytest.mark.parametrize("length", [40, 17, 9])  # padded, cut in text, cut inside an image
@pytest.mark.parametrize("seed", range(5))
def test_layout_equals_plain_loops(seed, length):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 50, (3, 8), generator=generator)
    tokens[torch.rand(3, 8, generator=generator) < 0.25] = IMAGE
    tiles = torch.randint(1, 3, (int((tokens == IMAGE).sum()),), generator=generator).tolist()
    layout = sequence_layout(tokens, square_tiles(tiles, 3), IMAGE, length)
    expected = slow_layout(tokens, tiles, 3, length)
    for b, row in enumerate(expected):
        for s, what in enumerate(row):
            text, visual, image = (
                int(t[b, s]) for t in (layout.text_source_BS, layout.visual_source_BS, layout.visual_image_BS)
            )
            if what is None:
                assert (text, visual, image) == (-1, -1, -1)
            elif what[0] == "text":
                assert (text, visual, image) == (what[1], -1, -1)
            else:
                assert (text, visual, image) == (-1, what[1], what[2])
    assert layout.num_visual_tokens == sum(
        what is not None and what[0] == "visual" for row in expected for what in row
    )
    assert layout.num_images == len({what[2] for row in expected for what in row if what and what[0] == "visual"})


def test_text_only_micro_batch():
    layout = sequence_layout(torch.tensor([[1, 2, 3]]), [], IMAGE, 4)
    assert layout.num_visual_tokens == 0 and layout.num_images == 0
    assert layout.text_source_BS.tolist() == [[0, 1, 2, -1]]


def test_lengths_count_every_tile():
    tokens = torch.tensor([[1, IMAGE, 2], [1, 2, 3]])
    assert combined_lengths(tokens, square_tiles([2], 5), IMAGE).tolist() == [12, 3]


def test_more_images_than_image_tokens_are_refused():
    with pytest.raises(ValueError, match="1 image tokens but 2 images"):
        sequence_layout(torch.tensor([[1, IMAGE]]), square_tiles([1, 1], 4), IMAGE, 8)


@pytest.mark.parametrize("tp, cp", [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
def test_shards_cover_the_sequence_once(tp, cp):
    shards = [local_positions(16, tp, t, cp, c) for c in range(cp) for t in range(tp)]
    assert sorted(torch.cat(shards).tolist()) == list(range(16))
    assert len({len(shard) for shard in shards}) == 1


def test_context_parallel_shards_are_zigzag():
    assert local_positions(8, 1, 0, 2, 0).tolist() == [0, 1, 6, 7]
    assert local_positions(8, 1, 0, 2, 1).tolist() == [2, 3, 4, 5]
    with pytest.raises(ValueError, match="6 tokens cannot be cut into 4 chunks"):
        local_positions(6, 1, 0, 2, 0)


def test_local_tokens_index_the_flattened_sequence_first_hidden_states():
    tokens = torch.tensor([[1, IMAGE, 2], [IMAGE, 1, 2]])
    layout = sequence_layout(tokens, square_tiles([1, 1], 2), IMAGE, 4)
    hidden_SB = torch.arange(8).view(4, 2)  # value = flattened index
    for t in range(2):
        positions = local_positions(4, 2, t, 1, 0)
        local = local_visual_tokens(layout, positions)
        shard = hidden_SB[positions]
        for position, source, image in zip(local.position, local.source, local.image, strict=True):
            s, b = divmod(int(shard.reshape(-1)[position]), 2)
            assert layout.visual_source_BS[b, s] == source
            assert layout.visual_image_BS[b, s] == image


def test_an_image_that_truncation_took_whole_has_no_number():
    """So that a mean over images is over as many rows as there are, and no rank has to ask which are empty."""
    tokens = torch.tensor([[1, IMAGE, 2, IMAGE, IMAGE], [IMAGE, 1, 2, 3, 4]])
    layout = sequence_layout(tokens, square_tiles([1, 1, 1, 1], 4), IMAGE, 8)
    assert layout.num_images == 3 and layout.visual_image_BS.unique().tolist() == [-1, 0, 1, 3]
    numbers = {0: 0, 1: 1, 3: 2}
    places = combined_places(layout)
    for index in range(len(places.visual.row)):
        row, column = places.visual.row[index], places.visual.column[index]
        assert places.visual.source[index] == layout.visual_source_BS[row, column]
        assert places.image[index] == numbers[int(layout.visual_image_BS[row, column])]
    assert len(places.visual.row) == layout.num_visual_tokens
    texts = zip(places.text.row, places.text.column, places.text.source, strict=True)
    assert {(int(b), int(s)): int(t) for b, s, t in texts} == {
        (b, s): int(t) for b, row in enumerate(layout.text_source_BS) for s, t in enumerate(row) if t >= 0
    }
    local = local_visual_tokens(layout, torch.arange(8))
    assert sorted(local.image.tolist()) == sorted(places.image.tolist())
    text_alone = sequence_layout(torch.tensor([[1, 2]]), [], IMAGE, 4)
    assert len(combined_places(text_alone).image) == len(local_visual_tokens(text_alone, torch.arange(4)).image) == 0
