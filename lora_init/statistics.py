"""Calibration: one pass over the data collects what data-driven initializers need.

For every **distinct** input of the targeted layers (query, key and value projections usually read
one tensor) the pass accumulates, over all unmasked tokens x (rows of shape (in,)),

    mean = sum x / tokens  (in,),    covariance = sum (x - mean)(x - mean)ᵀ / tokens  (in, in),

from which second_moment = sum x xᵀ / tokens follows. Sums are float32, taken about a shift near the
mean. The model runs in eval mode, without gradients, and is left as it was.

Which rows count: for an encoder's inputs (or a decoder-only model's) `attention_mask`; for the
decoder of an encoder-decoder model `decoder_attention_mask`, if the batch has one, except where a
layer reads the encoder's output (cross-attention), which keeps the encoder's mask. Token labels
(shape of the mask) equal to the method's `ignore_label` are left out where the method asks for it;
sequence labels mask nothing. An input whose leading shape is not the mask's (a pooler's, a routed
expert's) counts every row.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_init.modules import input_rows, reading
from lora_init.moments import InputStatistics, RunningMoments, join
from lora_init.progress import tracked
from lora_init.quantization import Quantizer
from lora_init.registry import CalibrationRequest

HELD_INPUTS = 4
"""How many recent distinct inputs wait for further readers before they are summed (see _Pass)."""


@dataclass
class LayerStatistics:
    """What is known about one layer beside its weight.

    Attributes:
        inputs: moments of its inputs, where the method asked for them.
        quantizer: how the base is quantised; None for a float base.
    """

    inputs: InputStatistics | None = None
    quantizer: Quantizer | None = None


@dataclass
class Calibration:
    """The outcome of one pass: statistics by layer name, and what it cost."""

    layers: dict[str, LayerStatistics]
    tokens: int = 0
    batches: int = 0


def collect(
    model: nn.Module,
    names: Iterable[str],
    request: CalibrationRequest,
    batches: Iterable[Any],
    *,
    device: torch.device | None = None,
) -> Calibration:
    """Run `batches` through `model` once and collect the statistics of the layers `names`.

    Args:
        model: the base model, not yet changed. Its training flags are restored afterwards.
        names: qualified names of the layers to observe.
        request: what to collect.
        batches: any iterable; a mapping is passed as keyword arguments, a list or tuple as
            positional ones, anything else as the only argument. Tensors move to the model's device.
        device: where the sums live; None keeps them beside the activations.

    Raises:
        ValueError: if there is no batch, a layer is never reached, or sees a non-finite value
            (each by name), or the batches are exhausted by an earlier use.
    """
    modules = {name: model.get_submodule(name) for name in names}
    recorder = _Pass(modules, request, device, _is_encoder_decoder(model))
    home = next((p.device for p in model.parameters()), torch.device("cpu"))
    count = 0
    with _observed(model, modules, recorder), torch.no_grad():
        for batch in tracked(batches, "calibrating"):
            batch = _move(batch, home)
            recorder.start_batch(batch)
            _forward(model, batch)
            recorder.end_batch()
            count += 1
    if count == 0:
        raise ValueError(
            "calibration: the iterable gave no batch; pass a non-empty list or loader (a generator "
            "that was used before is empty)"
        )
    return Calibration(recorder.results(), tokens=recorder.tokens, batches=count)


def _move(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping):
        return {key: _move(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [_move(value, device) for value in batch]
    return batch.to(device) if isinstance(batch, Tensor) else batch


def _forward(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, dict):
        model(**batch)
    elif isinstance(batch, list):
        model(*batch)
    else:
        model(batch)


@contextmanager
def _observed(
    model: nn.Module, modules: Mapping[str, nn.Module], recorder: _Pass
) -> Iterator[None]:
    """Hooks in place and eval mode on, both undone whatever happens."""
    training = {module: module.training for module in model.modules()}
    handles = [
        module.register_forward_pre_hook(recorder.hook(name), with_kwargs=True)
        for name, module in modules.items()
    ]
    encoder = model.get_encoder() if _is_encoder_decoder(model) else None
    if encoder is not None:
        handles.append(encoder.register_forward_hook(recorder.encoder_hook))
    model.eval()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in training.items():
            module.training = flag


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)) and hasattr(
        model, "get_encoder"
    )


class _Pass:
    """Accumulates moments per distinct input tensor.

    Layers that read the same tensor object share one sum. Who shares is not guessed from names or
    from an earlier batch: an input waits, for as long as HELD_INPUTS other inputs have not followed
    it, and is then added to the sum that belongs to exactly the set of layers that read it. A
    layer's statistics are the total over all sets it was in, so that a model whose sharing changes
    between batches, or that calls a layer several times, is summed correctly too.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        request: CalibrationRequest,
        device: torch.device | None,
        encoder_decoder: bool,
    ) -> None:
        self.modules = dict(modules)
        self.request = request
        self.device = device
        self.encoder_decoder = encoder_decoder
        self.tokens = 0
        self._sums: dict[frozenset[str], RunningMoments] = {}
        self._held: OrderedDict[tuple, tuple[Tensor, int, list[str]]] = OrderedDict()
        self._masks: dict[str, Tensor | None] = {}
        self._encoder_output: weakref.ref | None = None

    def start_batch(self, batch: Any) -> None:
        fields = batch if isinstance(batch, dict) else {}
        self._encoder_output = None
        attention = _as_mask(fields.get("attention_mask"))
        kept = self._labelled(fields.get("labels"))
        if self.encoder_decoder:
            decoder = _combine(_as_mask(fields.get("decoder_attention_mask")), kept)
            self._masks = {"encoder": attention, "decoder": decoder}
        else:
            both = _combine(attention, kept)
            self._masks = {"encoder": both, "decoder": both}
        ids = fields.get("input_ids")
        if attention is not None:
            self.tokens += int(attention.sum())
        elif isinstance(ids, Tensor):
            self.tokens += ids.numel()

    def _labelled(self, labels: Any) -> Tensor | None:
        """Where token labels allow a position; None for sequence labels or where nobody asks."""
        if self.request.ignore_label is None or not isinstance(labels, Tensor):
            return None
        if labels.ndim != 2 or labels.is_floating_point():
            return None
        return labels != self.request.ignore_label

    def encoder_hook(self, module: nn.Module, args: Any, output: Any) -> None:
        state = output[0] if not isinstance(output, Tensor) else output
        self._encoder_output = weakref.ref(state)

    def hook(self, name: str):
        def observe(module: nn.Module, args: tuple, kwargs: dict) -> None:
            tensor = args[0] if args else kwargs.get("input", kwargs.get("x"))
            key = id(tensor), reading(module)
            held = self._held.get(key)
            # The held reference keeps the object alive, so the id is not reused; the version
            # tells whether it was written to since.
            if held is not None and held[1] == tensor._version:
                if name in held[2]:  # called twice on one tensor: it counts twice
                    self._flush(key)
                else:
                    held[2].append(name)
                    self._held.move_to_end(key)
                    return
            elif held is not None:
                self._flush(key)
            self._held[key] = (tensor, tensor._version, [name])
            while len(self._held) > HELD_INPUTS:
                self._flush(next(iter(self._held)))

        return observe

    def end_batch(self) -> None:
        while self._held:
            self._flush(next(iter(self._held)))

    def _flush(self, key: tuple) -> None:
        tensor, _, readers = self._held.pop(key)
        rows = self._rows(tensor, readers[0]).float()
        if self.device is not None:
            rows = rows.to(self.device)
        readers = frozenset(readers)
        if readers not in self._sums:
            self._sums[readers] = RunningMoments(rows)
        self._sums[readers].add(rows)

    def _rows(self, tensor: Tensor, reader: str) -> Tensor:
        """The unmasked rows of an input, as (rows, in)."""
        mask = self._mask(tensor, reader)
        if mask is None or tensor.shape[:-1] != mask.shape or bool(mask.all()):
            return input_rows(self.modules[reader], tensor)
        return tensor[mask.to(tensor.device)]  # a model may be spread over devices

    def _mask(self, tensor: Tensor, reader: str) -> Tensor | None:
        encoder_output = self._encoder_output() if self._encoder_output is not None else None
        if encoder_output is not None and encoder_output is tensor:
            return self._masks["encoder"]
        in_decoder = "decoder" in reader.split(".")
        return self._masks["decoder" if in_decoder else "encoder"]

    def results(self) -> dict[str, LayerStatistics]:
        members: dict[str, list[frozenset[str]]] = {name: [] for name in self.modules}
        for readers in self._sums:
            for name in readers:
                members[name].append(readers)
        made: dict[tuple[frozenset[str], ...], InputStatistics] = {}
        results = {}
        for name, sets in members.items():
            total = sum(self._sums[readers].tokens for readers in sets)
            if total == 0:
                raise ValueError(
                    f"calibration: no token reached the target {name!r}; exclude it "
                    "(exclude_modules) or pass batches that use it"
                )
            key = tuple(sets)
            if key not in made:
                made[key] = _finished(name, [self._sums[readers] for readers in sets])
            results[name] = LayerStatistics(inputs=made[key])
        return results


def _finished(name: str, parts: list[RunningMoments]) -> InputStatistics:
    """The statistics of one layer, refused if a value it read was not finite."""
    inputs = join(parts)
    # The trace is a sum of squares: it is finite exactly if every value seen was (or their squares
    # left float32's range, which no decomposition survives either).
    if not bool(torch.isfinite(inputs.covariance.diagonal().sum() + inputs.mean.sum())):
        raise ValueError(
            f"calibration: the inputs of {name!r} are not finite; check the batches, the model's "
            "weights, and its dtype (float16 overflows at 65504)"
        )
    return inputs


def _as_mask(mask: Any) -> Tensor | None:
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _combine(mask: Tensor | None, kept: Tensor | None) -> Tensor | None:
    if mask is None or kept is None:
        return kept if mask is None else mask
    return mask & kept.to(mask.device) if mask.shape == kept.shape else mask
