"""The settings of what a run records: measures in its folder, and a tracker."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .bounds import check_choice, check_integer, refusal

BACKENDS = ("none", "wandb")
MODES = ("offline", "online", "disabled")
PROJECT = re.compile(r"[^/\\#?%:\x00-\x1f\x7f]{1,128}")


@dataclass
class MeasuresConfig:
    """How much is measured. Not part of a run's identity: no measure changes the training.

    Attributes:
        update_every: steps between two sizes of the update. It is always measured at step 100 and
            at the end; 0 measures it only there.
        forgetting_texts: validation examples on which the original base and the trained model are
            compared; 0 compares none.
        intruder_layers: evenly spaced layers whose intruder dimensions are counted; null counts
            all, 0 none. Each needs a full singular value decomposition of its weight.
        intruder_directions: how many leading directions of the trained weight to look at.
        first_step_layers: evenly spaced linear layers in which the first step is compared with the
            gradient of the whole weight; null compares all, 0 none. It takes one forward and
            backward pass, and memory for these layers' gradients.
        spectra_layers: evenly spaced layers whose singular values are recorded.
    """

    update_every: int = 25
    forgetting_texts: int = 64
    intruder_layers: int | None = 8
    intruder_directions: int = 10
    first_step_layers: int | None = 8
    spectra_layers: int = 4

    def __post_init__(self) -> None:
        for name in ("update_every", "forgetting_texts", "spectra_layers"):
            check_integer(f"measures.{name}", getattr(self, name), 0, fix="0 means none")
        for name in ("intruder_layers", "first_step_layers"):
            check_integer(f"measures.{name}", getattr(self, name), 0, null="all layers")
        fix = "measures.intruder_layers=0 turns this measure off"
        check_integer("measures.intruder_directions", self.intruder_directions, 1, fix=fix)


@dataclass
class TrackingConfig:
    """Where a run is mirrored to.

    Attributes:
        backend: none or wandb.
        project, mode: wandb's; `wandb sync` uploads offline runs later.
    """

    backend: str = "none"
    project: str = "lora_init"
    mode: str = "offline"

    def __post_init__(self) -> None:
        check_choice("tracking.backend", self.backend, BACKENDS)
        check_choice("tracking.mode", self.mode, MODES)
        if not (isinstance(self.project, str) and PROJECT.fullmatch(self.project)):
            must_be = r"1 to 128 characters without / \ # ? % : and control characters"
            raise refusal("tracking.project", self.project, must_be)
