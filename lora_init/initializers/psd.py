"""PSDLoRA: initialize A with noise whose spectrum follows a power law, and B with zero (a control).

One signal of r · in numbers has the amplitudes f^(-exponent / 2) at the frequencies f = 1, 2, …,
and random phases. Its mean is 0. The inverse Fourier transform of this spectrum fills A row by row.
A is then scaled to the standard deviation sqrt(2 / (in + r)); B = 0. The base stays.

The order of the input features has no meaning. So a gain over white noise of the same size needs
another cause than the spectrum. Four forms of the same size test this:

- "iid": white Gaussian noise;
- "shuffle": the numbers of the signal in random order;
- "row": one signal for each row of A;
- "column": one signal for each column of A.

Source: the code of PSDLoRA-Initialization (kesiledada233), formerly SpecLoRA, with its controls.
Deviations: the official code draws from the global generator; here each layer has a seeded
generator. The size is about 2.4 times that of `kaiming` for r far below the number of inputs, so
compare it with form="iid". The factors are not divided by the scaling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.factors import Factors
from lora_init.layer import Layer
from lora_init.linalg.draws import normal, uniform, zeros
from lora_init.registry import Options, register_initializer

FORMS = ("signal", "iid", "shuffle", "row", "column")


@dataclass
class PsdOptions(Options):
    """Settings of PSDLoRA.

    Attributes:
        exponent: the power of the signal falls as frequency^(-exponent); 0 is white noise.
        form: "signal" (one signal for A), or a control: "iid", "shuffle", "row" or "column".
    """

    exponent: float = 0.6
    form: str = "signal"

    def __post_init__(self) -> None:
        number = isinstance(self.exponent, int | float) and not isinstance(self.exponent, bool)
        if not number or not 0.0 <= self.exponent < math.inf:
            raise ValueError(
                f"psd: exponent={self.exponent!r} is not supported: must be a finite number >= 0"
            )
        if self.form not in FORMS:
            raise ValueError(
                f"psd: form={self.form!r} is not supported: must be one of {', '.join(FORMS)}"
            )

    def refuse_rank(self, rank: int, shape: tuple[int, int]) -> str | None:
        length = {"row": shape[1], "column": rank}.get(self.form, rank * shape[1])
        if length > 1:
            return None
        return f"a signal of one number has no frequency, and form={self.form!r} needs more"


@register_initializer(
    "psd",
    options=PsdOptions,
    paper="PSDLoRA, kesiledada233 (code); a control",
    operations=("product", "convolution", "lookup"),
    control=True,
)
def psd(layer: Layer, options: PsdOptions) -> Factors:
    """A (rank, in) of mean 0 and standard deviation sqrt(2 / (in + rank)), B zero; float32."""
    (rows, columns), rank, generator = layer.shape, layer.rank, layer.generator
    if options.form == "iid":
        noise = normal(rank, columns, generator=generator, dtype=torch.float64)
    elif options.form == "row":
        noise = power_law(rank, columns, options.exponent, generator)
    elif options.form == "column":
        noise = power_law(columns, rank, options.exponent, generator).mT
    else:
        noise = power_law(1, rank * columns, options.exponent, generator)
        if options.form == "shuffle":
            noise = noise[:, torch.randperm(rank * columns, generator=generator, device="cpu")]
        noise = noise.view(rank, columns)
    noise = noise - noise.mean()
    size = math.sqrt(2 / (columns + rank))
    return Factors((noise * size / noise.std(correction=0)).float(), zeros(rows, rank))


def power_law(
    count: int, length: int, exponent: float, generator: torch.Generator
) -> Float[Tensor, "count length"]:
    """`count` signals of mean 0 with amplitudes f^(-exponent / 2) and random phases; float64."""
    amplitudes = torch.arange(length // 2 + 1, dtype=torch.float64, device="cpu")
    amplitudes[1:].pow_(-exponent / 2)
    phases = 2 * math.pi * uniform(count, length // 2 + 1, generator=generator).double()
    return torch.fft.irfft(torch.polar(amplitudes.expand_as(phases).contiguous(), phases), length)
