"""Interrupts at sampled lines of lora_init: an operation is broken off, its model is compared.

The n-th executed line of the package raises an error, as Ctrl-C or a lack of memory would. The
test then says which states are right, usually the one before and the one after the operation.
"""

import contextlib
import sys
from pathlib import Path

import torch

import lora_init

PACKAGE = str(Path(lora_init.__file__).parent)


class Lines:
    """Count executed lines of the package, and raise `error` at the line of number `at`."""

    def __init__(self, at=None, error=KeyboardInterrupt):
        self.at, self.error, self.count, self.where = at, error, 0, None

    def __call__(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.count += 1
            if self.count == self.at:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise self.error(f"interrupted at line {self.at}, {self.where}")
        return self


@contextlib.contextmanager
def traced(lines):
    before = sys.gettrace()
    sys.settrace(lines)
    try:
        yield lines
    finally:
        sys.settrace(before)


def count_lines(operation):
    """The number of lines of the package that `operation()` executes."""
    with traced(Lines()) as lines:
        operation()
    return lines.count


@contextlib.contextmanager
def interrupted_at(number, error=KeyboardInterrupt):
    """Raise `error` at the `number`-th line of the package that the block executes, and catch it.

    Yields the `Lines`, whose `where` stays None if the block executed fewer lines.
    """
    lines = Lines(number, error)
    # A tracer may raise between a `with` block and its end, where no signal is handled: torch's
    # no_grad would then stay on.
    enabled = torch.is_grad_enabled()
    try:
        with traced(lines):
            yield lines
    except BaseException as raised:
        if not _comes_from(raised, error):
            raise
    finally:
        torch.set_grad_enabled(enabled)


def _comes_from(raised, error):
    """Whether it is the interrupt, or an error made of it: a pattern may take all memory."""
    while raised is not None:
        if isinstance(raised, error) and "interrupted at line" in str(raised):
            return True
        raised = raised.__cause__ or raised.__context__
    return False


def sample_interrupts(make, operation, check, points=40, error=KeyboardInterrupt, finish=None):
    """Break `operation(model)` off at `points` evenly spread lines; `check` the model each time.

    Args:
        make: returns a fresh model.
        operation: changes it.
        check: called with the model after each interrupt; returns a reason why its state is
            wrong, or None.
        finish: called with the model after `check`, to complete the operation; the result must
            pass `check` as well.

    Raises:
        AssertionError: names the lines after which the state was wrong, and why.
    """
    model = make()
    total = count_lines(lambda: operation(model))
    step = max(1, total // points)
    wrong = []
    for number in range(1, total + 1, step):
        model = make()
        with interrupted_at(number, error) as lines:
            operation(model)
        reason = check(model)
        if reason is None and finish is not None:
            finish(model)
            reason = check(model)
        if reason is not None:
            wrong.append(f"{lines.where} (line {number} of {total}): {reason}")
    assert not wrong, f"{len(wrong)} of {len(range(1, total + 1, step))}:\n" + "\n".join(wrong)
