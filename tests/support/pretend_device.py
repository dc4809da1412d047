"""A CUDA device where there is none: tensors say `cuda:0`, hold their data on the CPU and count what they would cost.

    model, inputs = moved(model), {name: on_device(value) for name, value in inputs.items()}
    with PretendDevice() as device:
        answer = model.generate(**inputs)
    device.counts["launch"], device.places.most_common(10), on_cpu(answer)

Operations are counted where they reach the backend, after composite ones are taken apart, as

    launch   a kernel is started; views and memory without content are free, fused attention and norms are one
    wait     the host needs a value: `item`, `tolist`, `bool`, `nonzero`, boolean indices, copies to the CPU
    copy     from the host to the device, among them `torch.tensor(..., device="cuda")` and indices on the CPU

and refused, with the words of CUDA, where tensors of both devices meet. `device.capture()` records the kernels with
the memory that they read and write, and starts them again, as a CUDA graph does. Not simulated: streams, memory,
autocast, inference mode (which is `no_grad` here) and what the compiler would fuse.
"""

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA, META, CPU = torch.device("cuda:0"), torch.device("meta"), torch.device("cpu")
aten = torch.ops.aten

# Neither compute nor wait, although their schemas do not call them views.
FREE = {"_unsafe_view", "_reshape_alias", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive"}
# One kernel each on a GPU, where a CPU has several.
FUSED = {nn.functional.scaled_dot_product_attention, nn.functional.rms_norm, torch.rms_norm}
FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
_active: list["PretendDevice"] = []


class PretendTensor(torch.Tensor):
    """A tensor on the device; for C++ a tensor on `meta`, which has no data."""

    data_on_cpu: Tensor

    @staticmethod
    def __new__(cls, data: Tensor) -> "PretendTensor":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, data.shape, strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype, device=META
        )
        tensor.data_on_cpu = data
        return tensor

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def __repr__(self, **kwargs: Any) -> str:
        return f"PretendTensor({self.data_on_cpu!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = _active[-1] if _active else PretendDevice()
        return device.run(func, args, kwargs or {})


def _each(change: Callable[[Tensor], Any], value: Any) -> Any:
    """The value with each tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _each(change, entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        entries = [_each(change, entry) for entry in value]
        return entries if isinstance(value, list) else tuple(entries)
    return value


def _tensors(*values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _each(found.append, values)
    return found


def on_device(value: Tensor) -> Tensor:
    """The tensor on the device, uncounted; gradients are recorded as before."""
    return PretendTensor(value.detach()).requires_grad_(value.requires_grad)


def on_cpu(value: Tensor) -> Tensor:
    """The content of a tensor on either device, uncounted."""
    return value.data_on_cpu if isinstance(value, PretendTensor) else value


def moved(model: Any) -> Any:
    """The model with its parameters and buffers on the device."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(PretendTensor(parameter.data), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = PretendTensor(buffer)
    return model


class Capture:
    """The kernels that a piece of code started, as a CUDA graph has them: with their arguments and their memory.

    Numbers of the host are those of the capture for ever, and so are the addresses of tensors.

    Attributes:
        kernels: (operation, shapes of its tensors) of each.
    """

    def __init__(self) -> None:
        self.kernels: list[tuple[str, tuple[torch.Size, ...]]] = []
        self._calls: list[tuple[Callable[..., Any], Any, Any, list[Tensor]]] = []

    def add(self, name: str, func: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        """A kernel, with arguments and result on the CPU."""
        given = _tensors(args, kwargs)
        self.kernels.append((name, tuple(tensor.shape for tensor in given)))
        made = [tensor for tensor in _tensors(result) if not any(tensor is argument for argument in given)]
        self._calls.append((func, args, kwargs, made))

    @torch.no_grad()
    def replay(self) -> None:
        """Start all kernels again; what they read has been written to the memory of the captured run before."""
        for func, args, kwargs, made in self._calls:
            given = _tensors(args, kwargs)
            found = [t for t in _tensors(func(*args, **kwargs)) if not any(t is argument for argument in given)]
            for memory, tensor in zip(made, found, strict=True):
                memory.copy_(tensor)


class PretendDevice:
    """The device, within a `with` block.

    Attributes:
        counts: "launch", "wait" and "copy", how often.
        places: (kind, operation, file:line) of each, how often; the line is the innermost one outside of torch.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.places: Counter[tuple[str, str, str]] = Counter()
        self._capture: Capture | None = None
        self._modes: tuple[TorchFunctionMode, TorchDispatchMode] = (_Functions(self), _Operations(self))

    def __enter__(self) -> "PretendDevice":
        _active.append(self)
        # Tensors without data have no views in inference mode.
        self._patch = mock.patch.object(torch._C, "_InferenceMode", lambda mode: torch.set_grad_enabled(not mode))
        self._patch.start()
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)
        self._patch.stop()
        _active.remove(self)

    @contextmanager
    def capture(self) -> Iterator[Capture]:
        """Records the kernels of a `with` block."""
        self._capture = found = Capture()
        try:
            yield found
        finally:
            self._capture = None

    def captured(self, name: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The result of a kernel on the CPU, recorded in a capture."""
        result = func(*args, **kwargs)
        if self._capture is not None:
            self._capture.add(name, func, args, kwargs, result)
        return result

    def count(self, kind: str, name: str) -> None:
        frame: Any = sys._getframe(1)
        while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
            frame = frame.f_back
        self.counts[kind] += 1
        self.places[kind, name, f"{'/'.join(frame.f_code.co_filename.split('/')[-2:])}:{frame.f_lineno}"] += 1

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operation of the backend on tensors of one device, or a copy from one to the other."""
        tensors = _tensors(args, kwargs)
        is_here = any(isinstance(tensor, PretendTensor) for tensor in tensors)
        target = kwargs.get("device")
        if target is not None:
            kwargs = {**kwargs, "device": CPU}
        goes_here = is_here if target is None else torch.device(target) == META
        if not is_here and not goes_here:
            return func(*args, **kwargs)
        if _is_composite(func):
            return func.decompose(*args, **({**kwargs, "device": target} if target is not None else kwargs))
        num_launched = self.counts["launch"]
        self._account(func, args, kwargs, tensors, goes_here)
        originals = {id(t.data_on_cpu): t for t in tensors if isinstance(t, PretendTensor)}
        given, named = _each(on_cpu, args), _each(on_cpu, kwargs)
        is_kernel = self.counts["launch"] > num_launched
        result = self.captured(func.name(), func, given, named) if is_kernel else func(*given, **named)
        is_placed = goes_here if not func.name().startswith("aten::copy_") else isinstance(args[0], PretendTensor)

        def placed(value: Tensor) -> Tensor:
            return originals[id(value)] if id(value) in originals else PretendTensor(value)

        return _each(placed, result) if is_placed else result

    def _account(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], goes_here: bool) -> None:
        is_here = any(isinstance(tensor, PretendTensor) for tensor in tensors)
        name = func.name().removeprefix("aten::").split(".")[0]
        if name == "copy_":
            is_here, goes_here = (isinstance(tensor, PretendTensor) for tensor in (args[1], args[0]))
        strangers = [tensor for tensor in tensors if not isinstance(tensor, PretendTensor)]
        if name in ("copy_", "_to_copy"):
            kind = "launch" if is_here == goes_here else "copy" if goes_here else "wait"
            self.count(kind, name)
            return
        if name in INDEXED:
            self._account_indices(name, args[1])
            strangers = [t for t in strangers if not any(t is index for index in args[1])]
        if is_here and any(tensor.dim() for tensor in strangers):
            shapes = [tuple(tensor.shape) for tensor in strangers]
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"(in {func}, tensors of shapes {shapes} on the cpu)"
            )
        aliases = [argument.alias_info for argument in func._schema.arguments if argument.alias_info is not None]
        if name in WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.count("wait", name)
        if name not in FREE and not any(not alias.is_write for alias in aliases):
            self.count("launch", name)

    def _account_indices(self, name: str, indices: Any) -> None:
        for index in indices:
            if index is not None and not isinstance(index, PretendTensor):
                self.count("copy", name)
            elif index is not None and index.dtype in (torch.bool, torch.uint8):
                self.count("wait", name)


class _Operations(TorchDispatchMode):
    """Sees operations without tensors of the device among their arguments: factories and copies to it."""

    def __init__(self, owner: PretendDevice):
        super().__init__()
        self.owner = owner

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.owner.run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Names the device `meta` to C++, which would look for a driver otherwise."""

    def __init__(self, owner: PretendDevice):
        super().__init__()
        self.owner = owner

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        own = args[0] if args and isinstance(args[0], PretendTensor) else None
        if own is not None and func is torch.Tensor.tolist:
            self.owner.count("wait", "tolist")
            return own.data_on_cpu.tolist()
        if own is not None and func in (torch.Tensor.numpy, torch.Tensor.__array__):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if func in FUSED and isinstance(args[0], PretendTensor) and not torch.is_grad_enabled():
            return self._fused(func, args, kwargs)
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.cuda:
            func, args = torch.Tensor.to, (args[0], CUDA)
        if func in FROM_DATA and own is None and _is_cuda(kwargs.get("device")):
            self.owner.count("copy", func.__name__)
            return PretendTensor(func(*args, **{**kwargs, "device": CPU}))
        if func is not torch.device:
            args = tuple(META if _is_cuda(argument) else argument for argument in args)
            kwargs = {name: META if name == "device" and _is_cuda(value) else value for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _fused(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """A kernel that takes an operation as it is; a bool mask is turned into numbers for it first."""
        tensors = _tensors(args, kwargs)
        if not all(isinstance(tensor, PretendTensor) for tensor in tensors):
            raise RuntimeError(f"Expected all tensors to be on the same device (in {func.__name__})")
        for _ in range(1 + any(tensor.dtype == torch.bool for tensor in tensors)):
            self.owner.count("launch", func.__name__)
        with torch._C.DisableTorchFunction():
            given, named = _each(on_cpu, args), _each(on_cpu, kwargs)
            return PretendTensor(self.owner.captured(func.__name__, func, given, named))


@functools.cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _is_cuda(device: Any) -> bool:
    """Whether an argument of a function of torch names the device."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.split(":")[0] == "cuda"
