"""The fair comparison as a Hydra sweeper: `--config-name sweep_protocol`.

    settings       what is compared, under `hydra.sweeper`
    grid           log-spaced learning rates, and how a grid goes on
    trials         an arm at a rank, a rate and a seed, as overrides
    outcomes       what became of a trial
    selection      the best rate, by validation figures alone
    equal_update   the rate at which an arm moves as far as the baseline
    costs          what is left to do, and how long that takes
    tables         what the terminal shows
    record         protocol.json
    stages         the stages in their order

Imports point up that list only. The Hydra plugin itself, which composes and launches, is
`hydra_plugins/lora_init_protocol.py`: Hydra finds plugins nowhere else.
"""
