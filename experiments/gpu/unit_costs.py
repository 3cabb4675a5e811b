"""What the device takes for the operations that initializers are made of.

The expected figures in docs/gpu.md are counts of these operations times their costs. A cost that is
far from the expectation explains a method that is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from experiments.gpu.stopwatch import best_of
from experiments.gpu.task import Task
from lora_init.calibration.sums import RunningMoments
from lora_init.linalg import small
from lora_init.linalg.thin import cholesky_qr

FLOAT32, FLOAT64, BFLOAT16 = torch.float32, torch.float64, torch.bfloat16


def run(task: Task) -> None:
    bandwidth(task)
    products(task)
    sums_of_inputs(task)
    if task.cuda:
        mixed_products(task)
        launches(task)
    thin_decompositions(task)
    small_eigenproblems(task)
    singular_values(task)
    inverse_factors(task)


def draw(task: Task, *shape: int, dtype: torch.dtype = FLOAT32) -> Tensor:
    """Random data: zeros would run faster than what models hold."""
    generator = torch.Generator(task.device).manual_seed(0)
    return torch.randn(*shape, generator=generator, device=task.device).to(dtype)


def measure(task: Task, name: str, function: Callable[[], object], calls: int = 3) -> float | None:
    """Milliseconds of the call as a row; None where it failed."""
    if not task.affords(name, 1.0):
        return None
    with task.guarded(name):
        seconds = best_of(function, task.device, calls)
        task.record.row(name, ms=1e3 * seconds)
        return seconds
    return None


def bandwidth(task: Task) -> None:
    source = draw(task, 2**22 if task.small else 2**28)
    sink = torch.empty_like(source)
    if seconds := measure(task, "copy", lambda: sink.copy_(source)):
        task.record.rows[-1]["gb_per_s"] = 2 * source.nbytes / seconds / 1e9
    if task.cuda:
        host = torch.empty(2**26, pin_memory=True)
        if seconds := measure(task, "copy to the host, pinned", lambda: host.copy_(sink[: 2**26])):
            task.record.rows[-1]["gb_per_s"] = host.nbytes / seconds / 1e9
    task.record.write()


def products(task: Task) -> None:
    """Square products in each precision. TF32 is set for its own row only."""
    size = 256 if task.small else 8192
    matmul = torch.backends.cuda.matmul
    setting = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    before = getattr(matmul, setting)
    exact, reduced = ("ieee", "tf32") if setting == "fp32_precision" else (False, True)
    cases = (
        ("float32", FLOAT32, exact),
        ("tf32", FLOAT32, reduced),
        ("bfloat16", BFLOAT16, exact),
        ("float64", FLOAT64, exact),
    )
    for name, dtype, value in cases:
        side = size // 2 if dtype == FLOAT64 else size
        factor = draw(task, side, side, dtype=dtype)
        result = torch.empty_like(factor)
        setattr(matmul, setting, value)
        try:
            multiply = lambda f=factor, r=result: torch.mm(f, f, out=r)  # noqa: E731
            seconds = measure(task, f"product {name} {side}", multiply)
        finally:
            setattr(matmul, setting, before)
        if seconds:
            task.record.rows[-1]["tflop_per_s"] = 2 * side**3 / seconds / 1e12


def sums_of_inputs(task: Task) -> None:
    """Second moments of one input and batch, as calibration sums them, and their errors."""
    count, width = (64, 128) if task.small else (2048, 4096)
    rows = draw(task, count, width, dtype=BFLOAT16)
    exact = (rows.double() - rows.double().mean(0)).T.cov(correction=0)
    for name, dtype in (("float32 sums", FLOAT32), ("float64 sums", FLOAT64)):
        sums = RunningMoments(width, task.device, dtype)
        if measure(task, f"second moments {count}x{width}, {name}", lambda s=sums: s.add(rows)):
            found = sums.moments.products.double()
            task.record.rows[-1]["error"] = float((found - exact).norm() / exact.norm())
    task.record.write()


def mixed_products(task: Task) -> None:
    """A bfloat16 weight times float32 columns, in ways that do not round the columns."""
    weight, block = draw(task, 11008, 4096, dtype=BFLOAT16), draw(task, 4096, 24)
    wide, high = weight.float(), block.to(BFLOAT16)
    pair = torch.cat([high, (block - high.float()).to(BFLOAT16)], dim=1)
    measure(task, "W X, 11008x4096x24, float32 copy", lambda: wide @ block)

    def halves() -> Tensor:
        both = torch.mm(weight, pair, out_dtype=FLOAT32)
        return both[:, :24] + both[:, 24:]

    measure(task, "W X, 11008x4096x24, two bfloat16 parts", halves)
    with task.guarded("two bfloat16 parts"):
        exact = weight.double() @ block.double()
        errors = [float((one.double() - exact).norm() / exact.norm()) for one in (halves(),)]
        task.record.rows[-1]["error"] = errors[0]
        task.record.write()


def launches(task: Task) -> None:
    """The host's cost of a kernel, and of waiting for one."""
    one = torch.ones(1, device=task.device)

    def thousand() -> None:
        for _ in range(1000):
            one.add_(1)

    measure(task, "1000 launches", thousand)
    measure(task, "100 synchronizations", lambda: [one.item() for _ in range(100)])


def thin_decompositions(task: Task) -> None:
    rows, width, stack = (256, 8, 2) if task.small else (4096, 24, 16)
    for dtype in (FLOAT32, FLOAT64):
        kind = str(dtype)[6:]
        single, many = draw(task, rows, width), draw(task, stack, rows, width)
        single, many = single.to(dtype), many.to(dtype)
        size = f"{rows}x{width} {kind}"
        measure(task, f"Householder QR {size}", lambda x=single: torch.linalg.qr(x))
        measure(task, f"Householder QR {stack} of {size}", lambda x=many: torch.linalg.qr(x))
        measure(task, f"Cholesky QR {size}", lambda x=single: cholesky_qr(x))
        measure(task, f"Cholesky QR {stack} of {size}", lambda x=many: cholesky_qr(x))
    if not task.small:
        wide = draw(task, stack, rows, 136)
        measure(task, f"Householder QR {stack} of {rows}x136", lambda: torch.linalg.qr(wide), 1)
        measure(task, f"Cholesky QR {stack} of {rows}x136", lambda: cholesky_qr(wide))


def small_eigenproblems(task: Task) -> None:
    """As the library solves them, and on the device."""
    for size in (16, 32) if task.small else (32, 96, 160, 272, 544):
        block = draw(task, 2 if task.small else 16, size, size, dtype=FLOAT64)
        matrix = block @ block.mT
        measure(task, f"eigh {len(block)} of {size}, library", lambda m=matrix: small.eigh(m), 2)
        calls = 1 if size > 160 else 2
        name = f"eigh {len(block)} of {size}, device"
        measure(task, name, lambda m=matrix: torch.linalg.eigh(m), calls)


def singular_values(task: Task) -> None:
    drivers = ("gesvd", "gesvdj", "gesvda") if task.cuda else (None,)
    for size in (16,) if task.small else (24, 136):
        matrix = draw(task, 2 if task.small else 16, size, size, dtype=FLOAT64)
        name = f"svd {len(matrix)} of {size}"
        measure(task, f"{name}, library", lambda m=matrix: small.svd(m), 2)
        for driver in drivers:
            measure(
                task,
                f"{name}, {driver or 'LAPACK'}",
                lambda m=matrix, d=driver: torch.linalg.svd(m, full_matrices=False, driver=d),
                1,
            )


def inverse_factors(task: Task) -> None:
    """A solve with a Cholesky factor, compared with products by its inverse."""
    size, width = (128, 8) if task.small else (4096, 24)
    root, block = draw(task, size, size, dtype=FLOAT64), draw(task, size, width, dtype=FLOAT64)
    gram = root @ root.T
    gram.diagonal().add_(1e-3 * gram.diagonal().mean())
    factor = torch.linalg.cholesky(gram)
    identity = torch.eye(size, dtype=FLOAT64, device=task.device)
    invert = lambda: torch.linalg.solve_triangular(factor, identity, upper=False)  # noqa: E731
    inverse = invert()
    measure(task, f"Gram {size} float64", lambda: root.T @ root)
    measure(task, f"Cholesky {size}", lambda: torch.linalg.cholesky_ex(gram))
    if not task.small:
        pair = torch.stack([gram, gram])
        measure(task, f"Cholesky 2 of {size}", lambda: torch.linalg.cholesky_ex(pair), 1)
    measure(task, f"inverse of the factor {size}", invert)
    solve = lambda: torch.linalg.solve_triangular(factor, block, upper=False)  # noqa: E731
    measure(task, f"triangular solve {size}x{width}", solve)
    measure(task, f"product with the inverse {size}x{width}", lambda: inverse @ block)
    if task.affords(f"eigh {size} float64", 12):
        measure(task, f"eigh {size} float64", lambda: torch.linalg.eigh(gram), 1)
