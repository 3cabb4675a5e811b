"""`LoraConfig`: the settings of an adapter, with the fields of Hugging Face PEFT.

The constructor checks everything that does not depend on the model. `lora_init.plan.make` checks
the rest. Configurations are saved as PEFT's `adapter_config.json`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_init.config import file
from lora_init.config.field_types import check_field_types
from lora_init.config.file import CONFIG_NAME
from lora_init.config.json_types import json_value
from lora_init.config.peft_fields import COVARIANCE_SETTINGS, accepts_peft_fields
from lora_init.registry import (
    Initializer,
    build_options,
    describe,
    method_name,
    resolve,
)

PEFT_VERSION = "0.21.2"
"""Files have the format of this version of PEFT."""

PEFT_ONLY_DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "ensure_weight_tying": False,
    "kasa_config": None,
    "layer_replication": None,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "qalora_group_size": 16,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}
"""Fields of PEFT that are not supported, with the values that mean "unused"."""

PEFT_ONLY_METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "corda_config": COVARIANCE_SETTINGS,
}
"""Unsupported fields in PEFT's options of methods, with the values that mean "unused"."""

ALL_LINEAR = "all-linear"

NEVER_WRITTEN = ("experts",)
"""Fields that PEFT does not have. A file names what they select."""

BOOLEANS = ("use_dora", "lora_bias", "use_rslora", "fan_in_fan_out", "inference_mode")

METHOD_CONFIGS = ("eva", "corda", "loftq")
"""Methods whose options have a separate field, `<name>_config`, as in PEFT."""

TASK_TYPES = (
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)
HEADS = {
    "SEQ_CLS": ["classifier", "score", "classification_head"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}
"""Heads that are trained and saved in addition to the adapter, if the model has them."""


@accepts_peft_fields(PEFT_ONLY_DEFAULTS)
@dataclass
class LoraConfig:
    """Settings of a low-rank adapter. Each argument has PEFT's name, default and meaning.

    Values of OmegaConf, numpy or torch are converted to plain JSON types. PEFT's other fields are
    accepted if their values have no effect; other values raise an error.

    Attributes:
        r: the rank of the adapter.
        target_modules: names of the modules to adapt (exact or dotted suffix), one regular
            expression that must match the whole name, "all-linear", or None for the defaults of
            a known architecture.
        exclude_modules: names (exact or dotted suffix) or one regular expression to skip.
        lora_alpha: the scaling is lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`.
        lora_dropout: dropout probability on the adapter's input.
        fan_in_fan_out: whether weights have shape (in, out). The module's class decides this: yes
            for Conv1D, no for nn.Linear. True warns if no target is a Conv1D.
        bias: the biases of the base model to train: "none", "lora_only" (in adapted modules only)
            or "all". They belong to the adapter: `disable_adapter` restores the original biases.
        use_rslora: whether to use rank-stabilized scaling.
        modules_to_save: modules (dotted suffix) to train in full and save. The head of the task
            (see `HEADS`) is added if the model has it.
        init_lora_weights: the initializer: True (kaiming), False (random), a registered name,
            "pissa_niter_N", a mapping {"name": …, options}, or a method's options object.
        layers_to_transform: adapt only these layer indices. Needs target_modules as a list.
        layers_pattern: the name of the module list that the indices count, e.g. "layers".
        rank_pattern: rank by module: keys are regular expressions matched as a dotted suffix.
        alpha_pattern: alpha by module, with keys as in rank_pattern.
        use_dora: whether to train a magnitude for each row of the weight (DoRA).
        lora_bias: whether to train a bias b in B: s (B A x + b). Not supported with use_dora or on
            embeddings.
        eva_config: the options of EVA, as its dataclass or a mapping.
        corda_config: the options of CorDA, as its dataclass or a mapping.
        loftq_config: the options of LoftQ, as its dataclass or a mapping.
        task_type: one of SEQ_CLS, SEQ_2_SEQ_LM, CAUSAL_LM, TOKEN_CLS, QUESTION_ANS,
            FEATURE_EXTRACTION, or None.
        base_model_name_or_path: written to files. If None, it is taken from the model.
        revision: the revision of the base model, written to files.
        inference_mode: whether to freeze all parameters.
        target_parameters: names (exact or dotted suffix) or one regular expression of parameters to
            adapt: the fused weights of experts, such as "experts.down_proj", or the weight of a
            linear module, such as "mlp.gate.weight". With target_modules=None, only these.
        experts: whether "all-linear" includes experts and routers. It is never written to a file,
            whose target_parameters name them.

    Raises:
        ValueError: a value is not supported. The message names the supported values.
        TypeError: a value has a wrong type.
    """

    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: Any = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)
    use_dora: bool = False
    lora_bias: bool = False
    eva_config: Any = None
    corda_config: Any = None
    loftq_config: Any = field(default_factory=dict)
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    target_parameters: list[str] | str | None = None
    experts: bool | None = None

    def __post_init__(self) -> None:
        self._normalize()
        self._check_targets()
        check_field_types(self)
        self._check_numbers()
        self._check_variants()
        if self.task_type is not None and self.task not in TASK_TYPES:
            raise ValueError(
                f"task_type={self.task_type!r} is not supported: must be one of None, "
                f"{', '.join(TASK_TYPES)}. Choose one of them."
            )
        self.initializer()  # raises on an unknown method or option

    def initializer(self) -> tuple[Initializer, Any]:
        """The registered initialization method of these settings, and its options."""
        spec, options = resolve(self.init_lora_weights)
        for name in METHOD_CONFIGS:
            setting = getattr(self, f"{name}_config")
            if setting is None or setting == {}:
                continue
            if name != spec.name:
                raise ValueError(
                    f"{name}_config is not supported with init_lora_weights="
                    f"{self.init_lora_weights!r}: must be {name!r}. Set "
                    f"init_lora_weights={name!r}, or leave out {name}_config."
                )
            options = self._method_options(spec, setting)
        return spec, options

    def checked(self) -> LoraConfig:
        """Return a copy, converted and checked again, since fields may have been edited.

        Raises:
            ValueError, TypeError: the constructor does not accept the value of a field.
        """
        return dataclasses.replace(self)

    @property
    def task(self) -> str | None:
        """`task_type` as a plain string, also if it is a member of PEFT's enumeration."""
        return getattr(self.task_type, "value", self.task_type)

    def scaling(self, rank: int, alpha: float) -> float:
        """The factor s of s B A: alpha / rank, or alpha / sqrt(rank) with `use_rslora`."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    # -- files -------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The content of PEFT's adapter_config.json: all fields, as JSON types.

        Raises:
            ValueError, TypeError: an edited field has a value that is not supported.
        """
        checked = self.checked()
        values = {name: getattr(checked, name) for name in _written()}
        spec, options = checked.initializer()
        by_field = spec.name in METHOD_CONFIGS
        for name in METHOD_CONFIGS:
            values[f"{name}_config"] = {} if name == "loftq" else None
        if by_field and options != spec.options():
            values[f"{spec.name}_config"] = dataclasses.asdict(options)
        values["init_lora_weights"] = self._method_spelling(spec, options, by_field)
        return {
            **PEFT_ONLY_DEFAULTS,
            **values,
            "auto_mapping": None,
            "peft_type": "LORA",
            "peft_version": PEFT_VERSION,
        }

    def to_json(self) -> str:
        """The text of adapter_config.json, with fields sorted as in PEFT.

        The keys of a pattern keep their order, since the first matching key wins.
        """
        return json.dumps(dict(sorted(self.to_dict().items())), indent=2) + "\n"

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `adapter_config.json` to `folder`, which is created if needed."""
        path, text = Path(folder), self.to_json()
        path.mkdir(parents=True, exist_ok=True)
        (path / CONFIG_NAME).write_text(text)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> LoraConfig:
        """Read `adapter_config.json` from a folder.

        Raises:
            FileNotFoundError: the folder has no such file.
            ValueError: the file is not valid JSON, is not a LoRA adapter's, or uses a setting of
                PEFT that is not supported.
        """
        path = Path(folder) / CONFIG_NAME
        values = file.read_json(path)
        try:
            return cls.from_dict(values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoraConfig:
        """Create a configuration from the result of `to_dict`, or from the content of a PEFT file.

        Empty settings of PEFT count as unused. Unknown names are ignored with a warning.

        Raises:
            ValueError: `peft_type` is not "LORA", a value has a wrong type, or `values` use a
                setting of PEFT that is not supported.
        """
        return cls(
            **file.settings(values, _written(), PEFT_ONLY_DEFAULTS, PEFT_ONLY_METHOD_DEFAULTS)
        )

    # -- checks ------------------------------------------------------------------------------

    def _normalize(self) -> None:
        """Convert every field to plain JSON types, and different spellings to one."""
        for name in (f.name for f in dataclasses.fields(self)):
            value = getattr(self, name)
            if name == "init_lora_weights" and dataclasses.is_dataclass(value):
                value = describe(*resolve(value))  # its class names the method
            setattr(self, name, json_value(name, value))
        if isinstance(self.init_lora_weights, str):
            self.init_lora_weights = method_name(self.init_lora_weights)
        if isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR:
            self.target_modules = ALL_LINEAR
        for name in ("rank_pattern", "alpha_pattern", "loftq_config"):
            setattr(self, name, {} if getattr(self, name) is None else getattr(self, name))
        # PEFT's empty lists mean unused.
        for name in ("layers_to_transform", "layers_pattern", "target_parameters"):
            setattr(self, name, None if getattr(self, name) == [] else getattr(self, name))

    def _check_numbers(self) -> None:
        check_rank("r", self.r)
        check_alpha("lora_alpha", self.lora_alpha)
        if not isinstance(self.lora_dropout, int | float) or not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(
                f"lora_dropout={self.lora_dropout!r} is not supported: must be at least 0.0 and "
                "less than 1.0. Set a probability in this range."
            )
        for key, rank in (self.rank_pattern or {}).items():
            check_rank(f"rank_pattern[{key!r}]", rank)
        for key, alpha in (self.alpha_pattern or {}).items():
            check_alpha(f"alpha_pattern[{key!r}]", alpha)

    def _check_targets(self) -> None:
        for name in ("modules_to_save", "rank_pattern", "alpha_pattern"):
            if isinstance(getattr(self, name), str):
                kind = "a list of names" if name == "modules_to_save" else "a mapping"
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not supported: must be {kind}. Pass {kind}."
                )
        selective = self.layers_to_transform is not None
        if self.layers_pattern is not None and not selective:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} without layers_to_transform has no "
                "effect. Set layers_to_transform, or leave out layers_pattern."
            )
        if selective and isinstance(self.target_modules, str):
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform!r} is not supported with "
                f"target_modules={self.target_modules!r}: target_modules must be a list of names. "
                "Pass a list, or put the indices into the regular expression."
            )

    def _check_variants(self) -> None:
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(
                f"bias={self.bias!r} is not supported: must be one of 'none', 'all', 'lora_only'. "
                "Choose one of them."
            )
        for name in BOOLEANS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not supported: must be True or False. "
                    "Choose one of them."
                )
        if self.experts not in (None, True, False):
            raise ValueError(
                f"experts={self.experts!r} is not supported: must be True, False or None. Choose "
                "one of them."
            )
        if self.use_dora and self.lora_bias:
            raise ValueError(
                "lora_bias=True with use_dora=True is not supported: DoRA scales the adapted "
                "weight, which has no bias in B. Set one of them to False."
            )

    @staticmethod
    def _method_options(spec: Initializer, setting: Any) -> Any:
        if isinstance(setting, spec.options):
            return setting
        if dataclasses.is_dataclass(setting) and not isinstance(setting, type):
            setting = dataclasses.asdict(setting)  # PEFT's own EvaConfig, CordaConfig, LoftQConfig
        if not isinstance(setting, dict):
            raise TypeError(
                f"{spec.name}_config={setting!r} is not supported: must be a mapping or "
                f"{spec.options.__name__}. Pass one of these."
            )
        values = dict(setting)
        _drop_defaults(
            values, PEFT_ONLY_METHOD_DEFAULTS.get(f"{spec.name}_config", {}), f"{spec.name}_config."
        )
        return build_options(spec.options, values, f"{spec.name}_config")

    @staticmethod
    def _method_spelling(spec: Initializer, options: Any, by_field: bool) -> Any:
        """PEFT's spelling of the method if it exists, else the mapping form."""
        if spec.name in ("kaiming", "random"):
            return spec.name == "kaiming"
        if by_field or not dataclasses.fields(spec.options) or options == spec.options():
            return spec.name
        if spec.name == "pissa" and options == type(options)(niter=options.niter):
            return f"pissa_niter_{options.niter}"
        return describe(spec, options)


def _written() -> list[str]:
    """The names of the fields that a file holds."""
    names = [field.name for field in dataclasses.fields(LoraConfig)]
    return [name for name in names if name not in NEVER_WRITTEN]


def check_rank(setting: str, value: Any) -> None:
    """Raise a ValueError unless `value` is a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"{setting}={value!r} is not supported: must be an integer >= 1. Set a positive rank."
        )


def check_alpha(setting: str, value: Any) -> None:
    """Raise a ValueError unless `value` is a positive finite number."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < float("inf"):
        raise ValueError(
            f"{setting}={value!r} is not supported: must be a positive finite number. Set such an "
            "alpha."
        )


def _drop_defaults(values: dict[str, Any], defaults: dict[str, Any], prefix: str) -> None:
    for name, default in defaults.items():
        if name in values and values.pop(name) != default:
            raise ValueError(
                f"{prefix}{name} is a setting of PEFT that is not supported: must be {default!r}. "
                "Leave it out."
            )
