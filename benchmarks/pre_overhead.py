"""What PRe costs in training: step time, FLOPs and peak memory, with and without it.

python -m benchmarks.pre_overhead                                        # digits_tiny, on what the machine has
python -m benchmarks.pre_overhead --model llava15_7b --layers 4 --precision bf16 --micro-batch-size 2
"""

from benchmarks.overhead import Settings, compare, parse_arguments

if __name__ == "__main__":
    arguments = parse_arguments("Step time, FLOPs and peak memory with and without PRe.")
    compare(Settings("pre_overhead", {"none": ["objective=none"], "pre": ["objective=pre"]}, **arguments))
