"""What the ways of rounding cost: the update of every parameter alone, and a whole step, of the TinyLlama shape in bfloat16.

    python benchmarks/rounding.py [--what update rounding] [--rounds 2] [--layers 22] [--seq-len 128]

Paired: the ways take turns in one process. The rest is ``clip_cost.py``, which measures clipping the same way.
"""

from clip_cost import main

if __name__ == "__main__":
    main(("update", "rounding"))
