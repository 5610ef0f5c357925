"""What a run needs, before anyone queues: parameters, memory, FLOPs, step time and layouts, by arithmetic alone.

Nothing here imports torch. The counts of :mod:`~nemo_pre.planner.parameters`, :mod:`~nemo_pre.planner.activations`
(for Megatron's own layers, which CPU runs have) and :mod:`~nemo_pre.planner.flops` are compared with built models in
the tests; Transformer Engine's activations, step times and efficiencies are estimates, never checked on a GPU.
"""
