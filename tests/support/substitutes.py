"""What stands in for things of the hub: a Llama, and the files of MetaMathQA and GSM8K."""

from __future__ import annotations

import json
from pathlib import Path

import torch

WHO = ["Ann", "Bob", "Cid", "Dan", "Eve", "Fay", "Gus", "Hal", "Ida", "Jon", "Kim", "Leo"]


def random_llama(folder: Path, width: int, characters: str = "0123456789+-= ") -> Path:
    """A folder with a random two-layer Llama and a tokenizer of single characters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = word_tokenizer(list(characters), characters=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=2 * width, max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def word_tokenizer(words: list[str], characters: bool = False):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    entries = ["[PAD]", "[UNK]", "[EOS]", *words]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(entries)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Split(Regex("."), "isolated") if characters else pre_tokenizers.Whitespace()
    )
    if characters:
        tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def write_word_problems(folder: Path) -> Path:
    """MetaMathQA's and GSM8K's files, in their formats, with a few sums in them."""
    rows = []
    for number in range(12):
        have, more = number + 2, 3 * number + 1
        question = f"{WHO[number]} has {have} pens and buys {more} more. How many are there?"
        solution = f"{have} + {more} = {have + more}\nThe answer is: {have + more}"
        masked = question.replace(f"{more} more", "x more")
        backward = f"{masked} If it is {have + more}, what is the value of unknown variable x?"
        for kind, query, original, response in (
            ("GSM_AnsAug", question, question, solution),
            ("GSM_Rephrased", f"Tell me: {question}", question, solution),
            ("GSM_FOBAR", backward, masked, f"x = {more}\nThe answer is: {more}"),
            ("MATH_AnsAug", f"Halve {number}.", f"Halve {number}, {WHO[number]}.",
             f"$\\frac{{{number}}}{{2}}$\nThe answer is: \\frac{{{number}}}{{2}}"),
        ):  # fmt: skip
            rows.append({"query": query, "response": response, "type": kind,
                         "original_question": original})  # fmt: skip
    (folder / "MetaMathQA-395K.json").write_text(json.dumps(rows))
    for split, count in (("train", 20), ("test", 6)):
        lines = []
        for number in range(count):
            have, price = 600 + number, len(split)
            total = have * price
            worked = f"It is {have} * {price} = <<{have}*{price}={total}>>{total}\n#### {total:,}"
            question = f"{WHO[number % 12]} sells {have} pens at ${price}. How much is it?"
            lines.append(json.dumps({"question": question, "answer": worked}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder
