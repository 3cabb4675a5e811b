"""Regular expressions take bounded time, and match what Python's `re` matches."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mixtures import mixture
from models import llama
from torch import nn

from lora_init import LoraConfig, get_peft_model
from lora_init.plan.patterns import Expression

SLOW = [
    r"(.*)*x!",
    r"(a|a)*b|(a|a)*[c]",
    r"(?:a|a|\w|\.)*[A-Z]|(?:a|a|\w|\.)*!",
    r"((\w|\.|a)*)*\d[A-Z]|(a|a)*[c]",
    r"(?:(\w|a)\.?)*\1!|(a|a)*[c]",
    r"(.{1000}){1000}",
    r"((.{100}){100}){100}",
    "(" * 3000 + ")" * 3000,
    "a{99999999999}",
]


class Letters(nn.Module):
    """Layers with long names of one repeated letter, which make expressions backtrack."""

    def __init__(self):
        super().__init__()
        for length in range(40, 60):
            self.add_module("a" * length, nn.Linear(4, 4))


SETTINGS = [
    lambda p: {"target_modules": p},
    lambda p: {"target_modules": "a+", "exclude_modules": p},
    lambda p: {"target_modules": "a+", "rank_pattern": {p: 2}},
    lambda p: {"target_modules": "a+", "alpha_pattern": {p: 2}},
    lambda p: {"target_modules": ["a" * 50], "layers_to_transform": [0], "layers_pattern": p},
]
NAMES = ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"]


@pytest.mark.parametrize(
    ("number", "pattern"), [(2, p) for p in SLOW] + [(i, SLOW[1]) for i in (0, 1, 3)]
)
def test_a_slow_expression_is_named_with_its_setting_in_a_second(number, pattern):
    config = LoraConfig(r=1, **SETTINGS[number](pattern))
    model = Letters()
    start = time.thread_time()
    with pytest.raises(ValueError, match=re.escape(NAMES[number])) as caught:
        get_peft_model(model, config, dry_run=number < 2)
    assert repr(pattern) in str(caught.value)
    assert time.thread_time() - start < 1


def test_many_slow_keys_take_no_longer_than_one():
    patterns = {f"(a|a)*b|(a|a)*[{c}]": 2 for c in "bcdefghijk"}
    start = time.thread_time()
    with pytest.raises(ValueError, match="rank_pattern=.*linear time.*Remove nested"):
        get_peft_model(Letters(), LoraConfig(r=1, target_modules="a+", rank_pattern=patterns))
    assert time.thread_time() - start < 1


def test_an_expression_can_be_used_several_times():
    expression = Expression("target_modules", r".*\.(q|v)_proj")
    for _ in range(20_000):
        assert expression.fullmatch("model.layers.0.self_attn.q_proj")


PATTERNS = [
    r".*\.(q|v)_proj", r"(?:.*\.)?(?:q_proj)$", r"^(?!.*vision).*q_proj", r"(.*\.)?(^layers\.0)$",
    r"layers\.\d+\.self_attn\.[qkvo]_proj", r"model\.layers\.(1[0-9]|2[0-3])\..*", r"(?i:Q_PROJ)",
    r".*{e<=1}q", r"x{2}y{,3}z{1,}", r"[[:alpha:]]+", r"(?P<a>q)_(?P=a)", r"\bq_proj\b", r"a{}b",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)", r"q{s}", r"(?<=\.)q.*",
    r"\.layers\.[\d]{1,}\.", r"(?>a+)b", r"a++b", r"[^.]*\.q\Z", r"(?x: q _ proj )",
]  # fmt: skip
TEXTS = [
    "q_proj", "Q_PROJ", "layers.0", "model.layers.12.self_attn.q_proj", "vision.q_proj", "q{s}",
    "model.language_model.layers.3.mlp.up_proj", "aab", "xxyyz", "xxy{,3}z", ".q", "layers.q",
    "layers.10.self_attn.k_proj", "{e<=1}q", "xx{e<=1}q", "layers\n.0", "[:a]", "alpha]", "",
    "ß", "K", "a{}b", "q_q",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_expressions_match_what_re_matches(pattern):
    ours, theirs = Expression("target_modules", pattern), re.compile(pattern)
    for text in TEXTS:
        for ours_found, found in (
            (ours.match(text), theirs.match(text)),
            (ours.fullmatch(text), theirs.fullmatch(text)),
        ):
            assert (ours_found is None) == (found is None), (pattern, text)
            if found:
                assert (ours_found.span(), ours_found.groups()) == (found.span(), found.groups())


PIECES = ["a", "b", r"\.", ".", "[ab]", r"\w", "(a|b)", "(?:ab)?", "a*", "b+?", "^", "$", "(?!b)",
          "{", "}", "{e}", "a{2}", "|", r"\d", "_"]  # fmt: skip


@given(
    st.lists(st.sampled_from(PIECES), max_size=6).map("".join),
    st.lists(st.sampled_from(["a", "b", ".", "1", "_", "{e}"]), max_size=6).map("".join),
)
def test_any_expression_matches_what_re_matches(pattern, text):
    try:
        theirs = re.compile(pattern)
    except re.error:
        with pytest.raises(ValueError, match="is not a regular expression"):
            Expression("target_modules", pattern)
        return
    ours = Expression("target_modules", pattern)
    assert (ours.match(text) is None) == (theirs.match(text) is None)
    assert (ours.fullmatch(text) is None) == (theirs.fullmatch(text) is None)


def test_a_layers_pattern_may_have_groups():
    config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[1],
                        layers_pattern="(h|layers)")  # fmt: skip
    plan = get_peft_model(llama(), config, dry_run=True)
    assert [target.name for target in plan.targets] == ["model.layers.1.self_attn.q_proj"]


def test_an_expression_that_reaches_experts_is_bounded_too():
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(mixture("mixtral"), LoraConfig(target_modules=SLOW[0]), dry_run=True)
