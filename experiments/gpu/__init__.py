"""One command checks and measures lora_init on a GPU, within eight minutes.

    python -m experiments.gpu
    python -m experiments.gpu --parts agreement methods
    python -m experiments.gpu --small

Every part runs in a separate process with a time limit and writes `<part>.json` while it runs.
A part that fails or is killed does not stop the next one. `parts.py` lists them by worth.
The command needs no network, compiler, Hydra, PEFT or bitsandbytes; a part says what it lacks.
It exits with status 1 only when results are wrong. See docs/gpu.md for the expected figures.
"""
