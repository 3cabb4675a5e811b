"""Language modeling of prompt and completion; the data's judge scores generated answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from ..data import Completion, Generated, Judge, says_exactly
from .batches import by_length

IGNORED = -100


class CausalLM:
    """Learn the completion, not the prompt; generate greedily and compare.

    The parts of an example are tokenized one by one and joined, so the answer's first token is
    known exactly. Texts are padded on the right for the loss and on the left for generation.

    Args:
        generate_limit: how many examples of a split to generate for, from the first on. A
            generated answer takes much longer than a loss.
        max_new_tokens: the greatest length of a generated answer.
        judge: decides whether a generated text is right.
    """

    metric = "exact_match"

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        generate_limit: int,
        max_new_tokens: int,
        judge: Judge = says_exactly,
    ) -> None:
        self.tokenizer = tokenizer
        self.judge = judge
        self.puts_space_first = puts_space_first(tokenizer)
        self.max_length = max_length
        self.generate_limit = generate_limit
        self.max_new_tokens = max_new_tokens

    def tokenize(self, example: Completion) -> tuple[list[int], list[int], int]:
        """Token ids, labels (-100 on the prompt), and how many trailing tokens are the answer."""
        prompt = self.tokenizer(example.prompt)["input_ids"]
        reasoning = self.plain(example.reasoning)
        answer = [*self.plain(example.answer), self.tokenizer.eos_token_id]
        room = max(self.max_length - len(answer), 0)
        # If it is too long, the start of the prompt is cut.
        prompt = prompt[max(len(prompt) + len(reasoning) - room, 0) :]
        ids = prompt + reasoning[: max(room - len(prompt), 0)] + answer
        return ids, [IGNORED] * len(prompt) + ids[len(prompt) :], len(answer)

    def plain(self, text: str) -> list[int]:
        """The tokens of a part that follows another part."""
        if self.puts_space_first:
            text = text.removeprefix(" ")  # the tokenizer adds one
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def counted(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The number of tokens over which the model's loss on a batch is a mean: a scalar."""
        return (batch["labels"][:, 1:] != IGNORED).sum()

    def collate(self, examples: Sequence[Completion]) -> dict[str, torch.Tensor]:
        """A batch padded on the right: input_ids, attention_mask, labels, each (batch, length)."""
        rows = [self.tokenize(example)[:2] for example in examples]
        longest = max(len(ids) for ids, _ in rows)
        pad = self.tokenizer.pad_token_id
        return {
            "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows]),
            "attention_mask": torch.tensor(
                [[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]
            ),
            "labels": torch.tensor(
                [labels + [IGNORED] * (longest - len(labels)) for _, labels in rows]
            ),
        }

    def rows(
        self,
        model: torch.nn.Module,
        examples: Sequence[Completion],
        batch_size: int,
        device: torch.device,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[dict[str, Any]]:
        """One row per example; `correct` is None if no answer was generated."""
        limit = self.generate_limit
        for some, generate in ((examples[:limit], True), (examples[limit:], False)):
            lengths = [len(example.prompt) + len(example.reasoning) for example in some]
            for indices in by_length(lengths, batch_size, part):
                chosen = [some[index] for index in indices]
                answers = self.generate(model, chosen, device) if generate else None
                for i, row in enumerate(self.read(model, chosen, device)):
                    if answers is None:
                        yield {**row, "correct": None}
                    else:
                        right = self.judge(answers[i], chosen[i])
                        yield {**row, "correct": right, "said": answers[i]}

    def read(
        self, model: torch.nn.Module, examples: Sequence[Completion], device: torch.device
    ) -> Iterator[dict[str, Any]]:
        """The figures of completions; `loss` is a sum over learned tokens, `weight` counts them."""
        batch = {key: value.to(device) for key, value in self.collate(examples).items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1].float()
        losses = F.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        hits = logits.argmax(-1) == labels
        for i, example in enumerate(examples):
            learned = (labels[i] != IGNORED).nonzero().flatten()
            answer = learned[-self.tokenize(example)[2] :]
            yield {
                "id": example.id,
                "score": -float(losses[i, answer].sum()),
                "loss": float(losses[i].sum()),
                "weight": len(learned),
                "answer_token_accuracy": float(hits[i, answer].float().mean()),
            }

    def generate(
        self, model: torch.nn.Module, examples: Sequence[Completion], device: torch.device
    ) -> list[Generated]:
        """Generate greedily after each prompt."""
        prompts = [self.tokenizer(e.prompt)["input_ids"][-self.max_length :] for e in examples]
        longest = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        written = model.generate(
            input_ids=ids,
            attention_mask=mask.to(device),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=self.tokenizer.eos_token_id,
        )[:, longest:]
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        ended = (written == self.tokenizer.eos_token_id).any(1).tolist()
        return [Generated(*answer) for answer in zip(texts, ended, strict=True)]

    def probed(self, batch: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """A mask without padding."""
        return batch["attention_mask"].bool()

    def majority(self, examples: Sequence[Completion]) -> float | None:
        return None


def puts_space_first(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a space before every text, as Llama-2's does."""
    first = tokenizer("a", add_special_tokens=False)["input_ids"][:1]
    return any(token.startswith("▁") for token in tokenizer.convert_ids_to_tokens(first))
