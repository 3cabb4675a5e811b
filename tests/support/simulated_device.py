"""A CUDA device that is not there: placement is simulated, arithmetic is the CPU's.

Inside `simulated_cuda()` every memory block (a tensor's storage) carries the place it would be in,
and tensors behave as torch's do with regard to it:

- ``.device``, ``.is_cuda``, ``.is_cpu`` and ``.get_device()`` report it; ``.to``, ``.cuda``,
  ``.cpu``, ``device=`` of any factory, ``copy_``, ``.data = …`` and ``Module.to`` respect it, and
  so does autograd;
- an operation on tensors of both places raises torch's RuntimeError. Allowed are CPU tensors
  without a dimension as operands, CPU indices into a CUDA tensor, and copies;
- ``.numpy()`` and numpy's own conversions, a CPU generator for a draw on CUDA, and a CPU result
  memory for CUDA operands raise;
- draws on CUDA without a generator come from a stream of their own, not from the CPU's;
- products of 16-bit factors with float32 results (`out_dtype`) are computed on CUDA only.

Two modes do it: one sees the calls that Python code makes, the other the operations below autograd,
which are where devices are compared. No tensor subclass is involved, so that parameters, ``.data``
and storages (by which ties are found) are the ordinary ones.

What is not simulated: CUDA's kernels, their rounding and the dtypes they refuse; streams, and that
its errors come late; memory, pinned or not; autocast, whose CUDA key no CPU kernel looks at. Where
a library asks for the device to choose a kernel (bitsandbytes for 8-bit products), CUDA's branch is
taken, on the CPU. Tensors that torch itself makes inside one call (in C++, or in its own Python
functions) take the place of the first tensor they meet.
"""

import functools
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

PLACES = CPU, CUDA = "cpu", "cuda"
UNSETTLED = "unsettled"  # made by torch itself: goes where it is needed
DEVICES = {CPU: torch.device("cpu"), CUDA: torch.device("cuda", 0)}

SEQUENCES = (tuple, list)
HOLDERS = (Tensor, tuple, list, dict)
WITHOUT_TENSORS = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size}
COPIES = {"copy_", "_foreach_copy_", "set_", "lift_fresh"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
WITHOUT_SCALARS = {"cat", "stack"}
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm)
WITH_OUT_DTYPE = {
    getattr(product, name): product.default
    for product in PRODUCTS
    for name in ("dtype", "dtype_out")
    if hasattr(product, name)
}


@contextmanager
def simulated_cuda(*, has_float64=True):
    """A process with one CUDA device, for the duration of the context.

    Without float64 it stands for Apple's GPUs: a float64 tensor there is a TypeError.
    """
    values = {
        "_lazy_init": lambda: None,
        "current_device": lambda: 0,
        "current_stream": lambda device=None: operations.stream,
        "device_count": lambda: 1,
        "get_device_name": lambda device=None: "simulated",
        "is_available": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_initialized": lambda: True,
        "synchronize": lambda device=None: None,
    }
    operations = Operations(has_float64)
    values |= {
        "get_rng_state": lambda device=None: operations.random_state,
        "set_rng_state": lambda state, device=None: setattr(operations, "random_state", state),
    }
    calls, apply = Calls(operations), BackwardCFunction.apply

    def applied(ctx, *gradients):
        with calls:  # autograd calls backward functions that are written in Python without modes
            return apply(ctx, *gradients)

    backwards = patch.object(BackwardCFunction, "apply", applied)
    with patch.multiple(torch.cuda, **values), backwards, operations, calls:
        yield


# -- where a tensor is -----------------------------------------------------------------------------


def refuse_float64(operations, tensor):
    if not operations.has_float64 and tensor.dtype is torch.float64 and place(tensor) == CUDA:
        raise TypeError("the device has no float64")


def place(tensor):
    """ "cpu", "cuda" or, inside torch's own code, not settled; None for tensors without memory."""
    with torch._C.DisableTorchFunction():
        try:
            return tensor.untyped_storage().simulated_place
        except (AttributeError, RuntimeError):  # not told yet, or a layout without a storage
            return CPU if tensor.layout == torch.strided and not tensor.is_meta else None


def put(tensor, where):
    with torch._C.DisableTorchFunction():
        tensor.untyped_storage().simulated_place = where


def is_settled(tensor):
    """False of what torch made itself, until it has met another tensor or its call has ended."""
    with torch._C.DisableTorchFunction():
        return getattr(tensor.untyped_storage(), "simulated_place", UNSETTLED) != UNSETTLED


def tensors_in(*values):
    """All tensors with memory, in sequences and mappings too."""
    found = []
    _gather(values, found)
    return found


def _gather(values, found):
    for value in values:
        if type(value) in WITHOUT_TENSORS:  # most of what is passed: asked millions of times
            continue
        if isinstance(value, Tensor):
            if place(value):
                found.append(value)
        elif isinstance(value, SEQUENCES):
            _gather(value, found)
        elif isinstance(value, dict):
            _gather(value.values(), found)


def moved(tensor, where, dtype=None, copy=False, memory_format=torch.preserve_format):
    if place(tensor) == where:
        return copied(tensor, dtype or tensor.dtype, copy, memory_format)
    return Move.apply(tensor, where, dtype or tensor.dtype, memory_format)


def copied(tensor, dtype, copy, memory_format):
    # A subclass may have a method of its own (bitsandbytes' parameters quantise in theirs).
    return Tensor.to(tensor, dtype, copy=copy, memory_format=memory_format)


class Move(torch.autograd.Function):
    """To the other device, and the gradient back."""

    @staticmethod
    def forward(ctx, tensor, where, dtype, memory_format):
        ctx.source = place(tensor), tensor.dtype
        result = copied(tensor, dtype, True, memory_format)
        put(result, where)
        return result

    @staticmethod
    def backward(ctx, gradient):
        return moved(gradient, *ctx.source), None, None, None


# -- what Python code calls ------------------------------------------------------------------------


def different_devices():
    return RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 "
        "and cpu!"
    )


def refuse_numpy(tensor, *args, **kwargs):
    raise TypeError(
        "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to "
        "host memory first."
    )


def backward(tensor, gradient=None, retain_graph=None, create_graph=False, inputs=None):
    """`Tensor.backward`, without its own handling of modes."""
    torch.autograd.backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)


def target_of(tensor, device=None, dtype=None, non_blocking=False, copy=False, **kwargs):
    """What the overloads of `Tensor.to` mean: a place (or another device's type), dtype, copy, …"""
    if "other" in kwargs:
        device = kwargs.pop("other")
    if isinstance(device, torch.dtype):
        # to(dtype, non_blocking, copy)
        device, dtype, copy = None, device, non_blocking if isinstance(dtype, bool) else copy
    elif isinstance(device, Tensor):
        # to(other, non_blocking, copy)
        copy = non_blocking if isinstance(dtype, bool) else copy
        device, dtype = place(device), device.dtype
    where = place(tensor) if device is None else kind_of(device)
    return where, dtype, copy, kwargs.get("memory_format", torch.preserve_format)


def kind_of(device):
    return CUDA if isinstance(device, int) else torch.device(device).type


class Calls(TorchFunctionMode):
    """Answers where a tensor is, moves it, and makes new ones in the right place."""

    def __init__(self, operations):
        super().__init__()
        self.operations = operations
        self.on_cuda = {
            Tensor.device.__get__: lambda tensor: DEVICES[CUDA],
            Tensor.is_cuda.__get__: lambda tensor: True,
            Tensor.is_cpu.__get__: lambda tensor: False,
            Tensor.get_device: lambda tensor: 0,
            Tensor.numpy: refuse_numpy,
            Tensor.__array__: refuse_numpy,
        }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if "pin_memory" in kwargs:
            kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
        if func in self.on_cuda:
            answer = self.on_cuda[func] if place(args[0]) == CUDA else func
            return answer(*args, **kwargs)
        if func is Tensor.to:
            where, *settings = target_of(*args, **kwargs)
            if where in DEVICES and place(args[0]) is not None:
                return self._checked(moved(args[0], where, *settings))
        if func is Tensor.cuda:
            return self._checked(moved(args[0], CUDA))
        if func is Tensor.cpu:
            return moved(args[0], CPU, **kwargs)
        if func is Tensor.backward:
            with self:  # autograd's own Python code
                return backward(*args, **kwargs)
        if kwargs.get("device") is not None and kind_of(kwargs["device"]) in DEVICES:
            return self._made(func, args, kwargs)
        return self._settled(func(*args, **kwargs), args, kwargs)

    def _made(self, func, args, kwargs):
        """A new tensor on the device that was asked for."""
        where = kind_of(kwargs["device"])
        refuse_generator(kwargs.get("generator"), where)
        before, self.operations.making = self.operations.making, where
        try:
            result = func(*args, **(kwargs | {"device": "cpu"}))
        finally:
            self.operations.making = before
        return self._checked(moved(result, where) if place(result) != where else result)

    def _checked(self, tensor):
        refuse_float64(self.operations, tensor)
        return tensor

    def _settled(self, result, args, kwargs):
        """What torch made itself in this call, and never met another tensor, goes with the rest."""
        if type(result) is Tensor:
            if is_settled(result):
                return result
        elif not isinstance(result, HOLDERS):
            return result
        fresh = [tensor for tensor in tensors_in(result) if not is_settled(tensor)]
        if fresh:
            given = {place(tensor) for tensor in tensors_in(args, kwargs)}
            for tensor in fresh:
                put(tensor, CUDA if CUDA in given else CPU)
        return result


# -- operations below autograd ---------------------------------------------------------------------


def refuse_generator(generator, where):
    if generator is not None and generator.device.type != where:
        raise RuntimeError(
            f"Expected a '{where}' device type for generator but found '{generator.device.type}'"
        )


def product_with_out_dtype(product, *args, out=None, **kwargs):
    """What CUDA's kernels compute: exact products of 16-bit factors, summed in float32."""
    *tensors, out_dtype = args
    if out_dtype != torch.float32 or tensors[-1].dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("out_dtype must be fp32, for fp16/bf16 inputs")
    if tensors[-1].dtype != tensors[-2].dtype:
        raise RuntimeError("mat1 and mat2 must have the same dtype")
    result = product(*(tensor.to(out_dtype) for tensor in tensors), **kwargs)
    return result if out is None else out.copy_(result)


@functools.cache
def is_draw(func):
    return torch.Tag.nondeterministic_seeded in func.tags


class Stream:
    """The only one. There is nothing to wait for."""

    def synchronize(self):
        pass


class Operations(TorchDispatchMode):
    """Compares the places of an operation's tensors, and gives the results theirs."""

    def __init__(self, has_float64=True):
        super().__init__()
        self.has_float64 = has_float64
        self.making = None
        self.random_state = torch.Generator().manual_seed(20_26).get_state()
        self.stream = Stream()

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # nothing is compiled here, and to tell dynamo so takes its time at every call

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            given = tensors_in(args, kwargs)
            where = self._common_place(func, given, args, kwargs)
            draws = is_draw(func)
            if draws:
                refuse_generator(kwargs.get("generator"), CUDA if where == CUDA else CPU)
            if draws and where == CUDA:
                result = self._drawn(func, *args, **kwargs)
            elif where == CUDA and func in WITH_OUT_DTYPE:
                result = product_with_out_dtype(WITH_OUT_DTYPE[func], *args, **kwargs)
            else:
                result = func(*args, **kwargs)
            for tensor in tensors_in(result):
                storage = tensor.untyped_storage()
                if not hasattr(storage, "simulated_place"):
                    storage.simulated_place = where
                refuse_float64(self, tensor)
            return result

    def _common_place(self, func, given, args, kwargs):
        """Where the operation runs; tensors that are not settled yet settle there."""
        if not given:
            return self.making or UNSETTLED
        name = func.overloadpacket.__name__
        places = {}
        for tensor in given:
            storage = tensor.untyped_storage()
            where = getattr(storage, "simulated_place", None)
            if where is None:  # of before this context, or torch.tensor's
                where = self.making if name == "lift_fresh" and self.making else CPU
                storage.simulated_place = where
            places[id(tensor)] = where
        if name in COPIES:
            return places[id(given[0])]
        if len(set(places.values())) == 1:
            return where
        compared = given
        if name in INDEXING:
            if place(args[0]) == CUDA:
                indices = {id(index) for index in args[1] if index is not None}
                compared = [tensor for tensor in given if id(tensor) not in indices]
            elif any(place(index) == CUDA for index in args[1] if index is not None):
                raise RuntimeError(
                    "indices should be either on cpu or on the same device as the indexed tensor "
                    "(cpu)"
                )
        there = {places[id(tensor)] for tensor in compared}
        if CUDA not in there:
            where = CPU if CPU in there else UNSETTLED
        else:
            where = CUDA
            written = [args[0]] if name.endswith("_") and isinstance(args[0], Tensor) else []
            written += tensors_in(kwargs.get("out"))
            for tensor in compared:
                exempt = tensor.ndim == 0 and name not in WITHOUT_SCALARS
                if places[id(tensor)] == CPU and (
                    not exempt or any(tensor is one for one in written)
                ):
                    raise different_devices()
        if where != UNSETTLED:
            for tensor in compared:
                if places[id(tensor)] == UNSETTLED:
                    put(tensor, where)
        return where

    def _drawn(self, func, *args, **kwargs):
        before = torch.get_rng_state()
        torch.set_rng_state(self.random_state)
        try:
            return func(*args, **kwargs)
        finally:
            self.random_state = torch.get_rng_state()
            torch.set_rng_state(before)
