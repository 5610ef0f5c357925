"""What VIRAL costs in training beside the frozen model: step time, FLOPs and peak memory, in both forms and without.

The target is the model's own encoder, so what is measured are heads, matrices and the target's way to the layer.

python -m benchmarks.viral_overhead                                      # digits_tiny, on what the machine has
python -m benchmarks.viral_overhead --model llava15_7b --layers 4 --precision bf16 --micro-batch-size 2
"""

from benchmarks.overhead import Settings, compare, parse_arguments

VIRAL = ["objective=viral", "objective.viral.target=encoder"]

if __name__ == "__main__":
    arguments = parse_arguments("Step time, FLOPs and peak memory with and without VIRAL.")
    sides = {
        "none": ["objective=none"],
        "viral": VIRAL,
        "viral_similarity": [*VIRAL, "objective.viral.form=similarity"],
    }
    compare(Settings("viral_overhead", sides, **arguments))
