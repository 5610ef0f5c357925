"""Which ranks are rehearsed, and what is told of those that are not."""

from nemo_pre.config.compose import compose_run
from nemo_pre.config.derived import world_size
from nemo_pre.config.schema import ParallelConfig
from nemo_pre.planner.memory import stages_that_differ
from nemo_pre.rehearsal.places import (
    Place,
    answers,
    place_of,
    places_for_memory,
    places_for_messages,
    rank_of,
    representatives,
    said_by,
)

LAYOUT = ParallelConfig(tensor=2, context=2, data=3, pipeline=4)
LARGE = ["experiment=siglip2_qwen25_72b_laver_stage2_knowledge"]


def pipeline_of(rank):
    place = place_of(LAYOUT, rank)
    return [rank_of(LAYOUT, Place(stage, place.data, place.context, place.tensor)) for stage in range(4)]


def test_ranks_and_places_are_megatrons_tensor_first_stages_last():
    assert [rank_of(LAYOUT, place_of(LAYOUT, rank)) for rank in range(48)] == list(range(48))
    assert place_of(LAYOUT, 1) == Place(0, tensor=1)
    assert place_of(LAYOUT, 2) == Place(0, context=1)
    assert place_of(LAYOUT, 4) == Place(0, data=1)
    assert place_of(LAYOUT, 12) == Place(1)


def test_what_is_no_group_is_said_alike_by_all():
    for said in (3, "text", [0.1, 1.0], {"a": 1}, [7, 8], None):
        assert said_by(LAYOUT, 30, 0, said) == said


def test_counts_are_never_taken_for_ranks():
    config = compose_run(["experiment=digits_tiny", "parallel=dp2"])
    speakers = representatives(config, [Place(0)])
    assert answers(config.parallel, [0, 1], speakers, {0: [1, 0]}, numbers=True) == [[1, 0], [1, 0]]


def test_the_ranks_of_a_group_are_those_of_the_same_group_at_the_ranks_own_place():
    for rank in range(48):
        assert said_by(LAYOUT, rank, 13, pipeline_of(13)) == pipeline_of(rank)
        assert said_by(LAYOUT, rank, 0, (0, 1)) == (rank - rank % 2, rank - rank % 2 + 1)
        assert said_by(LAYOUT, rank, 5, list(range(48))) == list(range(48))


def test_a_world_of_pipelines_follows_from_one_rank_of_each_stage():
    config = compose_run(LARGE)
    rehearsed = [Place(stage) for stage in range(config.parallel.pipeline)]
    ranks = list(range(world_size(config.parallel)))
    group = {rank: [r for r in ranks if r % 16 == rank % 16] for rank in ranks}
    said = {rank_of(config.parallel, place): group[rank_of(config.parallel, place)] for place in rehearsed}
    assert answers(config.parallel, ranks, representatives(config, rehearsed), said) == [group[rank] for rank in ranks]


def test_a_rank_is_spoken_for_by_one_of_its_own_stage_or_of_one_with_the_same_parts():
    config = compose_run(LARGE)
    some = places_for_memory(config)
    speakers = representatives(config, some)
    assert set(speakers) == set(range(world_size(config.parallel)))
    own = {place.stage for place in some}
    for rank, speaker in speakers.items():
        stage, of = place_of(config.parallel, rank).stage, place_of(config.parallel, speaker).stage
        assert of == stage if stage in own else of not in (0, config.parallel.pipeline - 1)


def test_memory_is_of_each_kind_of_stage_and_messages_of_all_stages_and_two_replicas():
    config = compose_run(LARGE)
    last = config.parallel.pipeline - 1
    memory, messages = places_for_memory(config), places_for_messages(config)
    assert [place.stage for place in memory if not place.tensor] == stages_that_differ(config)
    assert {place.stage for place in memory if place.tensor == config.parallel.tensor - 1} == {0, last}
    assert {place.stage for place in messages if place.data == 1} == set(range(last + 1))
    assert places_for_memory(config, [2, 5]) == [Place(2), Place(5)]
    assert places_for_messages(compose_run(["experiment=digits_tiny", "parallel=single"])) == [Place(0)]
