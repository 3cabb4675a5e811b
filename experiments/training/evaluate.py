"""The evaluation of a model on a split, shared by all processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..config.training import TrainingConfig
from ..tasks import Evaluation, Task, collect


def evaluate(
    model: torch.nn.Module,
    task: Task,
    examples: Sequence[Any],
    settings: TrainingConfig,
    accelerator: Accelerator,
) -> Evaluation:
    """Evaluate in evaluation mode. Processes share the work, and each gets the whole result."""
    part = (accelerator.process_index, accelerator.num_processes)
    was_training = model.training
    model.eval()
    with torch.inference_mode(), accelerator.autocast():
        rows = task.rows(model, examples, settings.eval_batch_size, accelerator.device, part)
        gathered = gather_object(list(rows))
    model.train(was_training)
    return collect(gathered, task.metric)
