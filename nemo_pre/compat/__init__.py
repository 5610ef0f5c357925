"""Everything that changes Megatron-Core, NeMo or torch at run time, as named and reversible patches.

``cpu_backend``        runs the whole stack on CPU ranks over gloo; applied only where no GPU is used.
``learning_rates``     a learning rate per module, on CPUs and GPUs alike.
``checkpoints``        what asynchronous and float32 checkpoints need, on CPUs (``cpu_backend`` applies it) and GPUs.
``safe_reading``       readers of checkpoints that call nothing which a file names.
``distributed_setup``  the run's seed and time-out reach the ranks.
``progress``           NeMo's progress printer without the collective that only rank 0 enters.
``unified_memory``     Megatron's import without a CUDA helper to compile; applied before it, in every process.
``first_use``          Weights & Biases imported where it is used; applied before Megatron's import, in every process.
``telemetry``          NeMo's telemetry callback off.

Nothing is patched by importing; the entry point (or a test's conftest) calls ``apply()``.
"""
