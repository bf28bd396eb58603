"""A pretended Mac: tensors on "mps" that compute on this CPU, and refuse float64, as Apple's GPUs do.

    with pretended():
        x = torch.zeros(3, device="mps")
        x.device           # mps:0, of x + 1 and of a gradient too
        x.double()         # TypeError, as on a Mac
        x.cpu().double()   # works

It sees no other mistake: a tensor on the CPU may meet one on mps.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

MPS = torch.device("mps:0")  # with its number: torch asks the missing backend for that of plain "mps"


def is_mps(place):
    return place == "mps" or isinstance(place, torch.device) and place.type == "mps"


class OnMac(torch.Tensor):
    """Says that it is on mps. For torch's C++ it is a tensor on the CPU, with its numbers in `content`."""

    device = property(lambda self: MPS)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, content):
        layout = dict(strides=content.stride(), storage_offset=content.storage_offset())
        made = torch.Tensor._make_wrapper_subclass(cls, content.shape, dtype=content.dtype, **layout)
        made.content = content
        return made

    def __repr__(self):
        return f"OnMac({self.content})"

    def __reduce_ex__(self, protocol):  # of torch.save, whose files are read back to the CPU
        return self.content.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


def compute(operation, args, kwargs):
    """The operation on the CPU; its results are on mps if an operand is, or if `device` says so."""
    operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, OnMac)]
    on_mps = bool(operands)
    if kwargs.get("device") is not None:
        on_mps = is_mps(kwargs["device"])
        kwargs = kwargs | {"device": torch.device("cpu")}
    in_place = {id(x.content): x for x in operands}

    def unwrap(x):
        return x.content if isinstance(x, OnMac) else x

    def wrap(x):
        if not on_mps or not isinstance(x, torch.Tensor):
            return x
        if x.dtype == torch.float64:
            raise TypeError(f"{operation}: the MPS framework doesn't support float64")
        return in_place[id(x)] if id(x) in in_place else OnMac(x)

    return tree_map(wrap, operation(*tree_map(unwrap, args), **tree_map(unwrap, kwargs)))


class Operations(TorchDispatchMode):
    """Sees operations without an operand on mps, such as torch.zeros(3, device="mps")."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


class Functions(TorchFunctionMode):
    """Sees the calls that move a tensor: torch's C++ takes both sides for the CPU, and would do nothing."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.tolist and isinstance(args[0], OnMac):
            return args[0].content.tolist()
        if function in (torch.Tensor.to, torch.Tensor.cpu):
            return self.move(function, args, kwargs)
        if function in (torch.tensor, torch.as_tensor) and is_mps(kwargs.get("device")):
            made = function(*args, **kwargs | {"device": "cpu"})
            return made if isinstance(made, OnMac) else OnMac(made)
        if is_mps(kwargs.get("device")):
            kwargs = kwargs | {"device": MPS}
        return function(*args, **kwargs)

    def move(self, function, args, kwargs):
        x, *rest = args
        places = [y for y in (*rest, *kwargs.values()) if isinstance(y, (str, torch.device))]
        if not places and function is torch.Tensor.to:
            return function(x, *rest, **kwargs)
        to_mps = bool(places) and is_mps(places[0])
        if to_mps and not isinstance(x, OnMac):
            x = OnMac(x.detach().clone())
        elif not to_mps and isinstance(x, OnMac):
            x = x.content.detach().clone()
        dtypes = [y for y in (*rest, *kwargs.values()) if isinstance(y, torch.dtype)]
        return x.to(dtypes[0]) if dtypes else x


@contextlib.contextmanager
def pretended():
    """Inside, --device auto takes mps."""
    available = torch.backends.mps.is_available
    torch.backends.mps.is_available = lambda: True
    swap = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # a Parameter's data cannot change its class
    try:
        with Operations(), Functions():
            yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swap)
        torch.backends.mps.is_available = available
