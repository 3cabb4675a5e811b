"""The schemas that Hydra checks a configuration against, in its ConfigStore.

`init=pissa` needs no YAML: its schema comes from the options that the method registered with the
library, also for methods of third parties. A control method is a choice of `control`, too.
`conf/init/preset/` holds other values of options, and `conf/control/` the controls that are a
setting.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, field, fields, make_dataclass
from typing import Any, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_init import list_initializers
from lora_init.registry import Initializer

from .launchers import register_launchers
from .location import qualified
from .names import sweep_path
from .protocol import ProtocolConfig
from .records import TrackingConfig
from .run_config import InitConfig, RunConfig
from .training import TrainingConfig, steps_of

SUPPLIED = {"weight", "inputs", "gradient", "output_moments", "quantizer"}
"""What a run gives to a method; a second data set or a second checkpoint is not part of it."""


def init_schema(method: Initializer) -> type:
    """A dataclass of a method's name and options, for OmegaConf to check values against."""
    hints = get_type_hints(method.options)
    made = [("name", str, field(default=method.name))]
    for option in fields(method.options):
        default = asdict(method.options())[option.name]
        # OmegaConf does not support some types, such as Literal. The method's own dataclass checks
        # the values of such an option.
        kind = hints[option.name] if supports(hints[option.name], default) else Any
        made.append((option.name, kind, field(default_factory=lambda given=default: given)))
    return make_dataclass(f"{method.name}_init", made, bases=(InitConfig,))


def supports(kind: Any, default: Any) -> bool:
    """Whether OmegaConf supports a field of this type."""
    option = ("option", kind, field(default_factory=lambda: default))
    try:
        OmegaConf.structured(make_dataclass("OneOption", [option]))
    except OmegaConfBaseException:
        return False
    return True


def missing_inputs(method: Initializer) -> list[str]:
    """What a method reads and a sweep over all methods does not supply."""
    request = method.request(method.options())
    sets = () if request is None else request.sets
    return sorted(set(method.reads) - SUPPLIED) + [f"the calibration set {name}" for name in sets]


def leave_out_unsupplied() -> dict[str, list[str]]:
    """Take methods that need an input which the sweep lacks out of `init=glob(*)`.

    Returns:
        By name, the inputs that are missing.
    """
    options = ConfigStore.instance().repo["init"]
    found = {method.name: missing_inputs(method) for method in list_initializers()}
    skipped = {name: missing for name, missing in found.items() if missing}
    for name in skipped:
        options.pop(f"{name}.yaml", None)
    return skipped


def register_sources(group: str, sources: Iterable[type]) -> None:
    """Store the schemas of a group's sources, named after their modules: data/schema/table."""
    for source in sources:
        name = source.__module__.rpartition(".")[2]
        ConfigStore.instance().store(group=f"{group}/schema", name=name, node=source)


def register_schemas() -> None:
    """Put the schema of a run and of each method into Hydra's ConfigStore."""
    register_launchers()
    OmegaConf.register_new_resolver("steps_of", steps_of, replace=True)
    OmegaConf.register_new_resolver(
        "sweep_path", lambda outputs, sweep: str(sweep_path(outputs, sweep)), replace=True
    )
    OmegaConf.register_new_resolver("qualified", qualified, replace=True)
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    for method in list_initializers():
        schema = init_schema(method)
        store.store(group="init", name=method.name, node=schema)
        store.store(group="init/schema", name=method.name, node=schema)  # third parties' YAMLs
        if method.control:
            override = [{"override /init": method.name}]
            node = {"defaults": override, "control": method.name}
            store.store(group="control", name=method.name, node=node, package="_global_")
    store.store(group="training/schema", name="training", node=TrainingConfig)
    store.store(group="tracking/schema", name="tracking", node=TrackingConfig)
    store.store(group="hydra/sweeper", name="protocol", node=ProtocolConfig)
