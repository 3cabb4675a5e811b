"""Upload an adapter to the Hugging Face Hub, with a model card."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from lora_init.config.lora_config import LoraConfig

CARD = """---
{base}library_name: peft
tags:
- lora
- lora_init
---

# Adapter

A low-rank adapter (LoRA) of rank {rank}, initialized with `{method}` by `lora_init`.

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "{repo}")
```
"""


def push_adapter(
    save: Any,
    config: LoraConfig,
    method: str,
    repo_id: str,
    *,
    commit_message: str = "Upload adapter",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> Any:
    """Save an adapter to a temporary folder and upload it.

    Args:
        save: a function that saves the adapter to a folder.
        config, method: the configuration and the name of the method, for the model card.
        repo_id, commit_message, private, token, revision, create_pr: see `huggingface_hub.HfApi`.

    Returns:
        The `CommitInfo` of the upload.

    Raises:
        ImportError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError(
            "push_to_hub needs huggingface_hub. Install it, or upload the folder of "
            "save_pretrained yourself."
        ) from error
    name = config.base_model_name_or_path
    base = f"base_model: {name}\n" if name and not Path(name).exists() else ""
    card = CARD.format(base=base, rank=config.r, method=method, repo=repo_id)
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        (Path(folder) / "README.md").write_text(card)
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
