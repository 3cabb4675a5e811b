"""Forward hooks that sum the inputs of layers, once per distinct input, over unmasked rows.

Layers that read the same tensor object share one sum. Sharing is observed, not guessed from names:

1. A new input waits until HELD_INPUTS other inputs have followed.
2. It is then added to the sum of exactly the set of layers that read it.
3. Once such a set is known, an input is summed as soon as the set is complete.

A layer's statistics are the total over all sets that contain the layer. The result is therefore
also correct if sharing changes between batches, or if a layer is called several times.

Rows that count:

- `attention_mask` applies to an encoder's inputs and to decoder-only models.
- `decoder_attention_mask`, if the batch has one, applies to the decoder of an encoder-decoder
  model. Layers that read the encoder's output (cross-attention) keep the encoder's mask.
- Token labels (of the mask's shape) equal to the method's `ignore_label` are left out, for methods
  that request it. Sequence labels mask nothing.
- Flat inputs (batch·time, features) are masked too, see `lora_init.calibration.token_rows`.
- For an input of another shape (a pooler's, a routed expert's) every row counts.

Fused experts: a matrix of an expert reads the rows that the router sends to the expert, see
`lora_init.layers.routed_rows`. Their tokens are known, so masks apply exactly.

Grouped convolutions: each group of channels has its own sum, over its own patches.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from lora_init.calibration.memory import Budget
from lora_init.calibration.places import Place
from lora_init.calibration.sums import Moments, RunningMoments, joined
from lora_init.calibration.token_rows import TokenRows
from lora_init.layers.routed_rows import routed_rows
from lora_init.linalg.precision import wide_device
from lora_init.weights.experts import DOWN
from lora_init.weights.kinds import known_format
from lora_init.weights.sharded import local_part, whole_input

HELD_INPUTS = 4
"""Number of recent distinct inputs that wait for more readers before they are summed."""

Label = int | None
"""A label whose positions are left out. None leaves out nothing."""


@dataclass(frozen=True)
class Source:
    """The key of one sum: a set of layers that read the same rows, and a set of labels."""

    readers: frozenset[str]
    labels: frozenset[Label]


@dataclass
class _Held:
    """An input that waits for more readers.

    Attributes:
        tensor: a reference that keeps the object alive, so that its id is not reused.
        version: the tensor's version when it was read, to detect in-place writes.
        copy: a copy of the values, if they may be overwritten before they are summed.
        masks: the masks of its positions.
    """

    tensor: Tensor
    version: int
    readers: list[str]
    copy: Tensor | None
    masks: list[_Mask]


@dataclass(frozen=True)
class _Mask:
    """The positions that count, for some of the labels.

    Attributes:
        rows: indices into the flattened positions; None if all count. They stay on the batch's
            device. For a batch in CPU memory, no GPU synchronization is needed.
    """

    labels: frozenset[Label]
    shape: torch.Size | None = None
    rows: Int[Tensor, " kept"] | None = None
    _elsewhere: dict[torch.device, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, labels: Collection[Label], mask: Bool[Tensor, "batch length"] | None) -> _Mask:
        if mask is None:
            return cls(frozenset(labels))
        rows = mask.flatten().nonzero().squeeze(1)
        return cls(frozenset(labels), mask.shape, None if len(rows) == mask.numel() else rows)

    def placed(self, rows: Int[Tensor, " counted"], device: torch.device) -> Tensor:
        """Copy `rows`, or indices derived from them, to `device`, at most once per batch."""
        if rows.device == device:
            return rows
        # Copies from pageable memory do not wait for the GPU's queued work.
        ahead = rows.device.type == "cpu"
        if rows is not self.rows:
            return rows.to(device, non_blocking=ahead)
        if device not in self._elsewhere:
            self._elsewhere[device] = rows.to(device, non_blocking=ahead)
        return self._elsewhere[device]


class Observer:
    """Sum the inputs of some layers while a model runs.

    Args:
        places: the matrices, by name.
        labels: the `ignore_label`s of the requests. Each gets separate statistics where the batches
            have token labels.
        budget: the memory for the sums. Layers whose input does not fit are added to `deferred`;
            nothing is returned for them.
        device: where the sums are stored. None stores them on the device of the activations.
    """

    def __init__(
        self,
        places: Mapping[str, Place],
        labels: Collection[Label],
        budget: Budget,
        device: torch.device | None = None,
    ) -> None:
        self.places = dict(places)
        self._routed: dict[nn.Module, dict[tuple[str, int], str]] = {}
        for name, place in places.items():
            if place.expert is not None:
                self._routed.setdefault(place.module, {})[place.matrix, place.expert] = name
        self._admitted: set[str] = set()  # fused parameters whose experts' sums fit
        self.labels = tuple(labels)
        self.deferred: set[str] = set()
        self._budget = budget
        self._device = device
        self._sums: dict[Source, list[RunningMoments]] = {}  # one for each group of inputs
        self._seen: set[frozenset[str]] = set()
        self._held: OrderedDict[tuple, _Held] = OrderedDict()
        # By first reader of an input: whether the input is overwritten while it waits.
        self._overwritten: dict[str, bool] = {}
        self._encoder_decoder = False
        self._encoder_masks: list[_Mask] = []
        self._masks: list[_Mask] = []  # of the decoder, or of the whole model if it has no encoder
        self._encoder_output: Callable[[], Tensor | None] = lambda: None
        self._encoder_done = False
        self._rows = TokenRows()
        self._in_batch = False

    @contextmanager
    def observing(self, model: nn.Module) -> Iterator[None]:
        """Register hooks and set eval mode; undo both on exit."""
        with ExitStack() as undo:
            restore_training(model, undo)
            hooks = [(p.module, self._hook(n)) for n, p in self.places.items() if p.expert is None]
            hooks += [(module, self._routed_hook(module)) for module in self._routed]
            for module, hook in hooks:
                undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            self._encoder_decoder = is_encoder_decoder(model)
            if self._encoder_decoder:
                get_encoder: Any = model.get_encoder
                encoder = get_encoder()
                undo.callback(encoder.register_forward_hook(self._note_encoder_output).remove)
            model.eval()
            yield

    @contextmanager
    def batch(self, batch: Any) -> Iterator[None]:
        """Apply the masks of a batch during its forward pass.

        Args:
            batch: the batch as the caller passed it, before it moves to the model's device.
        """
        self._read_masks(batch)
        self._in_batch = True
        try:
            yield
        finally:
            # A backward pass may call layers again, to compute activations that were not stored.
            self._in_batch = False
        while self._held:
            self._close(next(iter(self._held)))

    def sources(self) -> dict[tuple[str, Label], tuple[Source, ...]]:
        """The sums that make up each layer's total, by layer and label; empty if not reached."""
        keys = [(name, label) for name in self.places for label in self.labels]
        found: dict[tuple[str, Label], tuple[Source, ...]] = dict.fromkeys(keys, ())
        for source in self._sums:
            for name in source.readers:
                for label in source.labels:
                    found[name, label] += (source,)
        return {key: sources for key, sources in found.items() if key[0] not in self.deferred}

    def totals(self, name: str, sources: tuple[Source, ...]) -> list[Moments]:
        """Compute the moments of a layer's inputs, one for each group of them."""
        place = self.places[name]
        if not sources:
            device = next((sums[0].device for sums in self._sums.values()), torch.device("cpu"))
            return [self._budget.sums(place.shape[1], device).moments for _ in range(place.groups)]
        return [
            joined([self._sums[source][group].moments for source in sources])
            for group in range(place.groups)
        ]

    def release(self, source: Source) -> None:
        """Free sums that no other layer's total needs."""
        del self._sums[source]

    def _read_masks(self, batch: Any) -> None:
        fields = batch if isinstance(batch, Mapping) else {}
        self._encoder_output = lambda: None
        self._encoder_done = False
        mask = _as_mask(fields.get("attention_mask"))
        if self._encoder_decoder:
            self._encoder_masks = [_Mask.of(self.labels, mask)]
            mask = _as_mask(fields.get("decoder_attention_mask"))
        labels = _token_labels(fields.get("labels"))
        if labels is None:
            self._masks = [_Mask.of(self.labels, mask)]
        else:
            self._masks = [
                _Mask.of([label], _unlabeled(mask, labels, label)) for label in self.labels
            ]

    def _note_encoder_output(self, module: nn.Module, args: Any, output: Any) -> None:
        self._encoder_output = weakref.ref(output if isinstance(output, Tensor) else output[0])
        self._encoder_done = True

    def _hook(self, name: str) -> Callable:
        def observe(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if not self._in_batch:
                return
            tensor: Any = args[0] if args else kwargs.get("input", kwargs.get("x"))
            key = id(tensor), known_format(module).reading(module)
            held = self._held.get(key)
            if held is not None and (held.version != tensor._version or name in held.readers):
                self._close(key)  # modified in place, or one layer called twice on one tensor
                held = None
            if held is None:
                copy = tensor.detach().clone() if self._overwritten.get(name, True) else None
                masks = self._masks_of(tensor, name)
                self._held[key] = _Held(tensor, tensor._version, [name], copy, masks)
                self._close_oldest()
            else:
                held.readers.append(name)
                self._held.move_to_end(key)
            if frozenset(self._held[key].readers) in self._seen:
                self._close(key)

        return observe

    def _close_oldest(self) -> None:
        """Keep HELD_INPUTS inputs, and the encoder's output, which all decoder layers read."""
        waiting = [
            key for key, held in self._held.items() if held.tensor is not self._encoder_output()
        ]
        for key in waiting[:-HELD_INPUTS]:
            self._close(key)

    def _close(self, key: tuple) -> None:
        """Sum a waiting input."""
        held = self._held.pop(key)
        first = held.readers[0]
        written = held.tensor._version != held.version
        if written and held.copy is None:
            raise ValueError(
                f"calibration: the input of {first!r} is written to in place in some batches and "
                "not in others; exclude the layer (exclude_modules)"
            )
        self._overwritten[first] = written or self._overwritten.get(first, False)
        readers = frozenset(held.readers)
        self._seen.add(readers)
        place = self.places[first]
        sums = [
            (self._sums_of(Source(readers, mask.labels), place, held.tensor.device), mask)
            for mask in held.masks
        ]
        if any(totals is not None for totals, _ in sums):
            values = held.tensor.detach() if held.copy is None else held.copy
            values = whole_input(place.module, values)
            rows = known_format(place.module).input_rows(place.module, values)
            for totals, mask in sums:
                if totals is None:
                    continue
                leading, counted = held.tensor.shape[:-1], None
                if len(rows) == leading.numel() and place.groups == 1:  # false for patches
                    counted = self._rows.counted(first, leading, mask.shape, mask.rows)
                kept = None if counted is None else mask.placed(counted, rows.device)
                for group, total in enumerate(totals):
                    total.add(rows[group :: place.groups], kept)

    def _routed_hook(self, module: nn.Module) -> Callable:
        readers = self._routed[module]
        owner = self.places[next(iter(readers.values()))].owner
        experts: dict[str, list[str]] = {}
        for (matrix, _), name in readers.items():
            experts.setdefault(matrix, []).append(name)

        def observe(_: nn.Module, args: tuple, kwargs: dict) -> None:
            if not self._in_batch:
                return
            given: list[Any] = [*args, *kwargs.values(), None]
            hidden, index = given[:2]
            # Llama-4 passes one copy of the tokens per expert, without an index.
            copies = 1 if index is not None else len(getattr(module, DOWN))
            tokens = hidden[: len(hidden) // copies]
            masks = [(mask, self._counted(owner, tokens, mask)) for mask in self._masks]
            for found in routed_rows(module, hidden.detach(), index):
                for matrix, rows in found.rows.items():
                    name = readers.get((matrix, found.expert))
                    if name is None or not self._admits(experts[matrix], rows.shape[1]):
                        continue
                    for mask, counted in masks:
                        source = Source(frozenset([name]), mask.labels)
                        sums = self._sums.get(source)
                        if sums is None:
                            device = self._device or rows.device
                            sums = self._sums[source] = [self._budget.sums(rows.shape[1], device)]
                        own = None
                        if counted is not None:
                            own = counted[found.tokens % len(tokens)].nonzero()[:, 0]
                        sums[0].add(rows, own)

        return observe

    def _admits(self, experts: list[str], width: int) -> bool:
        """Whether the sums of all experts of a fused parameter fit."""
        parameter = experts[0].rpartition(".")[0]
        if parameter not in self._admitted and experts[0] not in self.deferred:
            if self._budget.admits(width, len(experts)):
                self._admitted.add(parameter)
            else:
                self.deferred |= set(experts)
        return parameter in self._admitted

    def _counted(self, reader: str, hidden: Tensor, mask: _Mask) -> Bool[Tensor, " tokens"] | None:
        """Which tokens count; None if all do."""
        rows = self._rows.counted(reader, hidden.shape[:-1], mask.shape, mask.rows)
        if rows is None:
            return None
        counted = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        counted[mask.placed(rows, hidden.device)] = True
        return counted

    def _sums_of(
        self, source: Source, place: Place, device: torch.device
    ) -> list[RunningMoments] | None:
        """The running sums of a source, one for each group, or None if they do not fit."""
        if source not in self._sums and not source.readers <= self.deferred:
            width, home = place.shape[1], wide_device(self._device or device)
            if self._budget.admits(width, place.groups):
                self._sums[source] = [self._budget.sums(width, home) for _ in range(place.groups)]
            else:
                self.deferred |= source.readers
        return self._sums.get(source)

    def _masks_of(self, tensor: Tensor, reader: str) -> list[_Mask]:
        """Select the encoder's masks for inputs inside the encoder and for its output."""
        if not self._encoder_decoder:
            return self._masks
        in_decoder = self._encoder_done or "decoder" in reader.split(".")
        if in_decoder and not self._is_encoder_output(tensor):
            return self._masks
        return self._encoder_masks

    def _is_encoder_output(self, tensor: Tensor) -> bool:
        """Whether an input is the encoder's output or a view of it."""
        output, tensor = self._encoder_output(), local_part(tensor)
        if output is None or tensor is output:
            return output is not None
        return tensor.numel() == output.numel() and tensor.data_ptr() == output.data_ptr() != 0


def is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)) and hasattr(
        model, "get_encoder"
    )


def _as_mask(mask: Any) -> Tensor | None:
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _token_labels(labels: Any) -> Tensor | None:
    """The labels of tokens, or None for labels of sequences."""
    tokens = isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point()
    return labels if tokens else None


def _unlabeled(mask: Tensor | None, labels: Tensor, label: Label) -> Tensor | None:
    """Remove the positions with this label from the mask."""
    if label is None:
        return mask
    kept = labels != label
    if mask is None:
        return kept
    return mask & kept.to(mask.device) if mask.shape == kept.shape else mask


def restore_training(model: nn.Module, undo: ExitStack) -> None:
    """Let `undo` restore the training flag of every module, also if one step of it fails."""
    for module in model.modules():
        undo.callback(setattr, module, "training", module.training)
