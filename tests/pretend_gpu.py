"""Tensors that say they are on a GPU and compute on the CPU: tests of device placement where there is no GPU.

Mixing them with CPU tensors raises, as CUDA would. Each read back to the host (`.item()`, `.cpu()`, `nonzero`) is counted,
with the line that did it. Values are the CPU's: rounding on a GPU is not pretended. Two things are gone around:
autograd's engine asks the driver for a context, so `backward` walks the graph and gives every weight that it finds a
gradient of its own making; and cuDNN's BatchNorm is switched off.
"""

import collections
import contextlib
import traceback
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only

GPU = torch.device("cuda", 0)
MAY_MIX = ("_to_copy", "copy_", "index", "index_put", "index_put_", "_index_put_impl_")
reads: collections.Counter = collections.Counter()  # (operation, line) -> how often a value went back to the host


class There(torch.Tensor):
    """A tensor that reports `cuda:0`; `here` holds its values."""

    @staticmethod
    def __new__(cls, here: torch.Tensor, requires_grad: bool = False):
        with torch._C.DisableTorchFunctionSubclass(), _disable_current_modes():
            shape = torch.empty_strided(here.size(), here.stride(), dtype=here.dtype, device="meta")
        made = torch.Tensor._make_subclass(cls, shape, requires_grad, dispatch_device=True, device_for_backend_keys=GPU)
        made.here = here
        return made

    @property
    def device(self):
        return GPU

    def __repr__(self):
        return f"There({tuple(self.here.shape)}, {self.here.dtype})"

    def __deepcopy__(self, memo):
        return There(self.here.clone(), self.requires_grad)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatched(func, args, kwargs or {})


class PretendGPU(TorchDispatchMode):
    """Within it, what asks for a GPU gets `There`."""

    def __init__(self):
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE  # so that no factory looks for a driver
        self.static_shapes, self.allow_non_fake_inputs, self.shape_env = True, True, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if on_gpu(kwargs.get("device")) or any(isinstance(a, There) for a in tree_flatten((args, kwargs))[0]):
            return dispatched(func, args, kwargs)
        return func(*args, **kwargs)


def on_gpu(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def line() -> str:
    """The innermost line of the project, or of a library, that is at work."""
    stack = traceback.extract_stack()
    for package in ("/sdlab/", "/diffusers/"):
        for frame in reversed(stack):
            if package in frame.filename:
                return f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.line}"
    return "?"


def dispatched(func, args, kwargs):
    """One operation on the CPU; its result is `There` if an argument was, or if `device` says so."""
    if func is torch.ops.prim.device.default:
        return GPU
    name = func.overloadpacket.__name__
    tensors = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, torch.Tensor)]
    there = [a for a in tensors if isinstance(a, There)]
    left = [a for a in tensors if not isinstance(a, There) and a.dim()]  # scalars may mix
    if there and left and name not in MAY_MIX:
        raise RuntimeError(
            f"{func} mixes devices: a CPU tensor {tuple(left[0].shape)} with one on the GPU, at {line()}"
        )
    if name == "index" and left and not isinstance(args[0], There) and there:
        raise RuntimeError(f"a CPU tensor is indexed by one on the GPU, at {line()}")
    if name in ("_local_scalar_dense", "nonzero", "masked_select") and there:
        reads[name, line()] += 1
    result_there, plain = bool(there), dict(kwargs)
    if plain.get("device") is not None:
        result_there = on_gpu(plain["device"])
        if there and not result_there:
            reads["to the host", line()] += 1
        plain["device"] = torch.device("cpu")
    if name == "copy_":
        into, source = args[0], args[1]
        if isinstance(source, There) and not isinstance(into, There):
            reads["to the host", line()] += 1
        getattr(into, "here", into).copy_(getattr(source, "here", source))
        return into
    args_here, kwargs_here = tree_map_only(There, lambda a: a.here, (args, plain))
    result = func(*args_here, **kwargs_here)
    known = {id(a.here): a for a in there}

    def shown(value):
        return known[id(value)] if id(value) in known else There(value)

    return tree_map_only(torch.Tensor, shown, result) if result_there else result


def move(module: torch.nn.Module, trained: bool = False) -> torch.nn.Module:
    """The module with its parameters and buffers on the pretended GPU, in place."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                there = value.detach() if isinstance(value, There) else There(value.detach())
                part._parameters[name] = torch.nn.Parameter(there, requires_grad=trained)
        for name, value in part._buffers.items():
            if value is not None and not isinstance(value, There):
                part._buffers[name] = There(value)
    return module


def weights_behind(loss: torch.Tensor) -> list[torch.Tensor]:
    """The parameters that autograd would give a gradient."""
    found, seen, left = [], set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        left += [following for following, _ in node.next_functions]
    return found


def pretended_backward(loss: torch.Tensor) -> None:
    for weight in weights_behind(loss):
        made = There(0.1 * weight.here + 0.01)
        weight.grad = made if weight.grad is None else There(weight.grad.here + made.here)


@contextlib.contextmanager
def pretended_gpu(monkeypatch) -> Iterator[collections.Counter]:
    """A machine with one GPU; yields the reads back to the host, of this block only."""
    torch._C._ensureCUDADeviceGuardSet()  # indexing asks for a guard, which does nothing here
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    monkeypatch.setattr(torch.Tensor, "backward", pretended_backward)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") builds on the CPU, then moves
    reads.clear()
    try:
        with sdpa_kernel(SDPBackend.MATH), PretendGPU():
            yield reads
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
