"""The fair comparison as a Hydra sweeper: `--config-name sweep_protocol`.

    rates      log-spaced learning rates, the choice, the rate of an equal update size
    trials     an arm at a rank, a rate and a seed, as overrides
    outcomes   what became of a trial
    overview   what is left to do, and the grid, as tables
    record     protocol.json
    stages     the stages in their order
    search     the jobs of a Hydra launcher, and the whole protocol on them

The settings are `ProtocolConfig`. Hydra finds plugins only in `hydra_plugins/`, so the sweeper that
Hydra knows is `hydra_plugins/lora_init_protocol.py`.
"""
