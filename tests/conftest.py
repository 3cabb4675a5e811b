"""Shared set-up: one thread a worker, no network, repeatable draws."""

import contextlib
import gc
import logging
import os
import sys
from unittest import mock

# Set before huggingface_hub is imported: a missing file is then an error, not a download.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What one test computed is not for another to find.
os.environ.setdefault("LORA_INIT_CACHE", "off")
# One thread in the processes that tests start, too, and in libraries other than torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import annotations
import jaxtyping
import products
import pytest
import torch
from products import mark_exhaustive
from simulated_device import simulated_cuda

# Else each process that a test starts compiles all of lora_init and experiments, for seconds.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


def pytest_addoption(parser):
    parser.addoption(
        "--no-check-shapes",
        action="store_true",
        help="leave out the checks of lora_init's annotated types and shapes, to measure times",
    )
    parser.addoption(
        "--check-only",
        action="store_true",
        help="of the tests that are named, the quick selection of `make check`",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "wrong_types: passes what the annotations forbid")
    products.every_member = "not exhaustive" not in config.option.markexpr
    # The members of products repeat calls that `make test` has checked.
    repeats = config.option.markexpr == "exhaustive"
    if not (config.getoption("--no-check-shapes") or repeats):
        annotations.install()


def pytest_runtest_setup(item):
    annotations.test += 1


def quick(items):
    """The selection of `make check`.

    Of the contract: every method on nn.Linear in float32, at one scaling. Of each method's file:
    the first test. Of the pages: the README. Of all other files: everything.
    """
    started = set()
    for item in items:
        name = item.path.name
        if name == "test_contract.py":
            wanted = item.nodeid.endswith("-Linear-float32-s=2]")
        elif name == "test_pages.py":
            wanted = "test_python_blocks_run[README.md]" in item.nodeid
        elif item.path.parent.name == "initializers":
            wanted = item.path not in started
            started.add(item.path)
        else:
            wanted = True
        if wanted:
            yield item


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks
def pytest_collection_modifyitems(config, items):
    mark_exhaustive(items)
    if config.getoption("--check-only"):
        items[:] = quick(items)
    for item in items:
        if "wrong_types" in item.keywords:  # else the annotations refuse it first
            item.fixturenames.insert(0, "unchecked")
    items.sort(key=lambda item: "slow" not in item.keywords)  # none of them begins last


def pytest_collection_finish(session):
    """What is loaded by now stays: collections of garbage, which some tests ask for, pass it by."""
    gc.collect()
    gc.freeze()
    # pytest hangs its handlers on every logger that does not propagate, and takes them off again,
    # six times a test. Torch and what comes with it have a hundred: that is another millisecond.
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger) and not logger.name.startswith("lora_init"):
            logger.propagate = True
    # PEFT writes a README next to every adapter, and compiles its template each time: 20 ms.
    if "peft" in sys.modules:
        sys.modules["peft"].PeftModel.create_or_update_model_card = lambda *_: None


# Collections of garbage at Python's own thresholds are a fifteenth of the tests' time: most objects
# that they look through are loaded modules, and models are freed without them.
gc.set_threshold(20_000, 20, 20)
torch.set_num_threads(1)  # the matrices are small, and xdist already uses the cores

# bitsandbytes compiles some of its CPU kernels for each shape, seconds each with a cold cache,
# and runs the same functions as they are where that fails.
with contextlib.suppress(ImportError), mock.patch.object(torch, "compile", None):
    import bitsandbytes  # noqa: F401


def plain():
    """A decorator in place of `torch.compile()`."""
    return lambda function: function


# hqq loads torch's compiler, two seconds, for a backend that no test uses.
with contextlib.suppress(ImportError), mock.patch.object(torch, "compile", plain):
    import hqq.core.quantize  # noqa: F401

with contextlib.suppress(ImportError):  # a machine that runs the GPU's tests may lack it
    from hypothesis import settings

    settings.register_profile("lora_init", deadline=None, derandomize=True, max_examples=30)
    settings.load_profile("lora_init")


@pytest.fixture(autouse=True)
def one_thread():
    """A run of experiments sets its process's number, and two workers of two threads wait."""
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture
def unchecked():
    """No checks of annotated types and shapes."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def seeded():
    if torch.accelerator.is_available():
        torch.manual_seed(0)
    else:  # the same without a stack trace for each kind of device, which take a millisecond
        torch.default_generator.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def second_weights():
    """So the suites over all methods need no data for those that read second weights."""
    from second import nearby_by_default  # not on top: --check-shapes hooks the import first

    with nearby_by_default():
        yield


@pytest.fixture
def cuda():
    """One CUDA device, simulated."""
    with simulated_cuda():
        yield
