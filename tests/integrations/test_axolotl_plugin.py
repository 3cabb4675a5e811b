"""The plugin for axolotl, on the interface of axolotl 0.19.0: its base class, read from the wheel.

If axolotl is installed, its own base class is used.
"""

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml
from peft_training import peft_model, trainer_of
from pydantic import BaseModel
from substitutes import random_llama

pytestmark = pytest.mark.filterwarnings("ignore")


class BasePlugin:
    """Of axolotl 0.19.0, the methods that the plugin overrides."""

    def __init__(self):
        pass

    def get_input_args(self) -> str | None:
        return None

    def add_callbacks_pre_trainer(self, cfg, model) -> list:
        return []


class Configuration(BaseModel):
    """Of axolotl's AxolotlInputConfig, what the plugin reads."""

    lora_mlp_kernel: bool | None = None
    lora_qkv_kernel: bool | None = None


@pytest.fixture
def plugin(monkeypatch):
    try:
        import axolotl.integrations.base  # noqa: F401
    except ImportError:
        base = ModuleType("axolotl.integrations.base")
        base.BasePlugin = BasePlugin
        for name in ("axolotl", "axolotl.integrations"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.delitem(sys.modules, "lora_init.integrations.axolotl", raising=False)
    from lora_init.integrations.axolotl import LoraInitPlugin

    yield LoraInitPlugin()
    monkeypatch.delitem(sys.modules, "lora_init.integrations.axolotl", raising=False)


def checked(plugin, **settings):
    """The settings as axolotl merges and checks them."""
    module, name = plugin.get_input_args().rsplit(".", 1)
    arguments = getattr(sys.modules[module], name)
    merged = type("AxolotlInputConfig", (Configuration, arguments), {})
    return SimpleNamespace(**merged(**settings).model_dump(exclude_none=True))


@pytest.mark.parametrize("section", [{"method": "pissa"}, {"method": "eva", "batches": 2}])
def test_the_section_starts_the_adapter(plugin, section, tmp_path):
    model = peft_model(random_llama(tmp_path / "llama", 32))
    cfg = checked(plugin, lora_init=section)
    (callback,) = plugin.add_callbacks_pre_trainer(cfg=cfg, model=model)
    trainer_of(model, tmp_path, callback).train()
    assert callback.report.method == section["method"]


def test_the_guides_section_is_accepted(plugin):
    page = Path(__file__).resolve().parents[2] / "docs" / "guides" / "trainers.md"
    (section,) = re.findall(r"^```yaml\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    settings = yaml.safe_load(section)
    assert settings["plugins"] == [f"{type(plugin).__module__}.{type(plugin).__name__}"]
    assert checked(plugin, **settings).lora_init["method"] == "eva"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "lora_init"),
        ({"lora_init": {"batches": 2}}, "method must be the name"),
        ({"lora_init": {"method": "pisa"}}, "did you mean 'pissa'"),
        ({"lora_init": {"method": "eva", "batch": 2}}, "batch=2 is not supported"),
        ({"lora_init": {"method": "eva", "options": {"rhu": 2}}}, "rhu"),
        (
            {"lora_init": {"method": "pissa"}, "lora_qkv_kernel": True},
            "lora_qkv_kernel=true is not supported with lora_init.method=pissa",
        ),
        ({"lora_init": {"method": "eva"}, "lora_mlp_kernel": True}, "no calibration"),
    ],
)
def test_mistakes_are_refused_before_the_model_is_loaded(plugin, settings, message):
    with pytest.raises(ValueError, match=message):
        checked(plugin, **settings)


def test_kernels_may_compute_a_kept_base(plugin):
    cfg = checked(plugin, lora_init={"method": "orthogonal"}, lora_mlp_kernel=True)
    (callback,) = plugin.add_callbacks_pre_trainer(cfg=cfg, model=None)
    assert callback.method
