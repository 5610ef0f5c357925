"""A rank's calls by kind and group beside the plan's, where the plan counts their bytes."""

from nemo_pre.config.compose import compose_run
from nemo_pre.planner.parameters import rank_parameters, trainable_parameters
from nemo_pre.rehearsal.calls import Call, Log
from nemo_pre.rehearsal.compare import kind_of_group, traffic
from nemo_pre.rehearsal.found import Found
from nemo_pre.rehearsal.places import Place


def call(kind, ranks, size, phase="2", peer=None):
    return Call(kind, "group", tuple(ranks), size, "float32", "cuda", peer, phase=phase)


def test_groups_are_named_by_the_axes_along_which_their_ranks_differ():
    config = compose_run(["experiment=siglip2_qwen25_72b_laver_stage2_knowledge"])  # TP4 x PP8 x DP4
    names = {
        (0, 1, 2, 3): "tensor",
        (0, 4, 8, 12): "data",
        tuple(range(0, 128, 16)): "pipeline",
        (0, 5): "tensor x data",
    }
    for ranks, name in names.items():
        assert kind_of_group(config, call("all_reduce", ranks, 1)) == name


def test_calls_of_a_step_are_summed_and_put_beside_the_plans():
    config = compose_run(["experiment=digits_tiny", "parallel=dp2"])
    trained = sum(trainable_parameters(config, rank_parameters(config, 0)).values())
    log = Log()
    for each in (
        call("reduce_scatter", (0, 1), 4 * trained),
        call("all_gather", (0, 1), 2 * trained),
        call("all_reduce", (0, 1), 8),
        call("all_reduce", (0, 1), 8),
        call("all_reduce", (0, 1), 8, phase="1"),
        call("all_reduce", (0,), 8),
    ):
        log.call(each)
    calls = {each.kind: each for each in traffic(config, Found(Place(0), 0, log=log))}
    assert (calls["all_reduce"].number, calls["all_reduce"].bytes, calls["all_reduce"].planned) == (2, 16, None)
    assert calls["all_gather"].planned == calls["all_gather"].bytes
    assert calls["reduce_scatter"].planned == calls["reduce_scatter"].bytes
