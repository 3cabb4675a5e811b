"""One command checks and measures lora_init on a GPU within eight minutes.

    python -m experiments.gpu
    python -m experiments.gpu --parts agreement methods
    python -m experiments.gpu --small

Each part runs in a separate process with a time limit and saves `<part>.json` after every row.
The next part runs even if one fails or is killed. `parts.py` lists them in order of value.
The command needs no network, compiler, Hydra, PEFT or bitsandbytes. A part notes what is missing.
The exit status is 1 only if results are wrong. docs/gpu.md has the expected figures.
"""
