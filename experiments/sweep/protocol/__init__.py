"""The fair comparison as a Hydra sweeper: `--config-name sweep_protocol`.

    rates      log-spaced learning rates, the choice, the rate of an equal update size
    trials     an arm at a rank, a rate and a seed, as overrides
    outcomes   what became of a trial
    overview   what is left to do, and the grid, as tables
    record     protocol.json
    stages     the stages in their order

The settings are `experiments.config.protocol`. Hydra finds plugins only in `hydra_plugins/`, so the
sweeper that composes and launches is `hydra_plugins/lora_init_protocol.py`.
"""
