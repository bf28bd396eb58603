"""A pretended GPU: tensors on "cuda" or "mps" that compute on this CPU and refuse what a device refuses.

    with pretended("cuda"):
        x = torch.zeros(3, device="cuda")
        x.device                 # cuda:0, of x + 1 and of a gradient too
        x + torch.zeros(3)       # RuntimeError: a tensor on the CPU meets one on the device
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x += 1               # recorded, not run
            x.sum().item()       # RuntimeError: the host would wait inside a capture
        graph.replay()           # runs

What is refused: operands on two places; on mps float64; on CUDA matmuls of integers, and out_dtype for
anything but two 16-bit matrices; inside a capture everything for which the host waits or copies. A replay
reads and writes the very memory that was recorded, as a CUDA graph does: a weight that has moved is not seen.
Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1 before the import of triton). It sees no other
mistake: streams, shared memory and the time that anything takes.
"""

import contextlib
from types import SimpleNamespace
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from nanorlhf import kernels

try:
    from triton.runtime.interpreter import InterpretedFunction
except ImportError:
    InterpretedFunction = None

CPU = torch.device("cpu")
GIB = 1 << 30
WAITS = {  # operations after which the host knows a number, or a shape, that the device computed
    "_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "_unique2", "equal",
    "is_nonzero",
}  # fmt: skip
MOVES = {"copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_"}  # may meet two places
SIXTEEN_BITS = torch.bfloat16, torch.float16
place = None  # the torch.device that is pretended now
capture = None  # the Graph that is recorded now


def on_device(where):
    """Whether a device, as a call names it, is the pretended one."""
    if place is None or where is None or isinstance(where, int):
        return False
    return torch.device(where).type == place.type


class OnDevice(torch.Tensor):
    """Says that it is on the device. For torch's C++ it is a tensor on the CPU, its numbers in `content`."""

    device = property(lambda self: place)
    is_cuda = property(lambda self: place.type == "cuda")
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, content):
        assert not isinstance(content, OnDevice)
        layout = dict(strides=content.stride(), storage_offset=content.storage_offset())
        made = torch.Tensor._make_wrapper_subclass(cls, content.shape, dtype=content.dtype, **layout)
        made.content = content
        return made

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, new):
        torch.Tensor.data.__set__(self, new)
        self.content = new.content

    def data_ptr(self):
        return self.content.data_ptr()

    def __repr__(self):
        return f"OnDevice({self.content})"

    def __deepcopy__(self, memo):
        made = OnDevice(self.content.detach().clone())
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, self.requires_grad)
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol):  # of torch.save, whose files are read back to the CPU
        return self.content.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


def unwrap(x):
    return x.content if isinstance(x, OnDevice) else x


def compute(operation, args, kwargs):
    """The operation on the CPU; its results are on the device if an operand is, or if `device` says so."""
    leaves = tree_leaves((args, kwargs))
    operands = [x for x in leaves if isinstance(x, OnDevice)]
    wrapped = bool(operands)
    name = operation.overloadpacket.__name__
    if kwargs.get("device") is not None:
        # Autograd casts gradients to the "cpu" that C++ sees; moves by a trainer go through `Functions`
        wrapped = on_device(kwargs["device"]) or (wrapped and name == "_to_copy")
        kwargs = kwargs | {"device": CPU}
    if operands:
        others = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, OnDevice)]
        _refuse(operation, name, args, operands, others)
    in_place = {id(x.content): x for x in operands}

    def wrap(x):
        if not wrapped or not isinstance(x, torch.Tensor):
            return x
        if x.dtype == torch.float64 and place.type == "mps":
            raise TypeError(f"{operation}: the MPS framework doesn't support float64")
        return in_place[id(x)] if id(x) in in_place else OnDevice(x)

    args = tree_map(unwrap, args)
    kwargs = tree_map(unwrap, kwargs)
    run = _out_dtype if operation in _WITH_OUT_DTYPE else operation
    if capture is not None and wrapped:
        return tree_map(wrap, capture.record(run, args, kwargs, operation._schema.is_mutable))
    return tree_map(wrap, run(*args, **kwargs))


def _refuse(operation, name, args, operands, others):
    """RuntimeError for what a device would not do."""
    # A number in a tensor of no dimensions may stay on the CPU; so may the indices of a look-up
    if name not in MOVES and any(x.dim() and not _zeros_of_autograd(x) for x in others):
        raise RuntimeError(f"{operation}: expected all tensors to be on the same device, {place} and cpu")
    if place.type != "cuda":
        return
    matmul = name in ("mm", "bmm", "addmm", "addmm_", "baddbmm", "addmv", "mv", "dot")
    if matmul and not operands[0].dtype.is_floating_point:
        raise RuntimeError(f"{operation}: not implemented on CUDA for {operands[0].dtype}")
    if operation in _WITH_OUT_DTYPE and {x.dtype for x in operands[-2:]} - set(SIXTEEN_BITS):
        dtypes = [x.dtype for x in operands]
        if dtypes[0] == torch.float32 and name == "mm" or torch.float32 in dtypes[-3:-1]:
            raise RuntimeError(f"{operation}: out_dtype is for bf16 and fp16, not for {dtypes}")
    if capture is None:
        return
    indices = tree_leaves(args[1]) if name in ("index", "index_put", "index_put_") else []
    by_mask = torch.bool in [x.dtype for x in indices if isinstance(x, torch.Tensor)]
    if name in WAITS or by_mask:
        raise RuntimeError(f"{operation}: the host would wait for the GPU inside a capture")
    if name in ("copy_", "_to_copy") and others:
        raise RuntimeError(f"{operation}: a copy between CPU and GPU inside a capture")


def _zeros_of_autograd(x):
    """Whether autograd made this tensor for an output that no gradient reached: on the device, in truth."""
    return torch._C._current_graph_task_id() != -1 and not x.any()


_WITH_OUT_DTYPE = set()  # torch.mm and torch.addmm with out_dtype, which a CPU does not have
for _packet in (torch.ops.aten.mm, torch.ops.aten.addmm):
    _WITH_OUT_DTYPE |= {getattr(_packet, x) for x in _packet.overloads() if x.startswith("dtype")}


def _out_dtype(*args, out=None):
    """mm and addmm with out_dtype: 16-bit operands, summed in fp32 and not rounded."""
    *summand, a, b, dtype = args
    result = a.to(dtype) @ b.to(dtype)
    for x in summand:
        result += x
    return result if out is None else out.copy_(result)


class Operations(TorchDispatchMode):
    """Sees operations without an operand on the device, such as torch.zeros(3, device="cuda")."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


class Functions(TorchFunctionMode):
    """Sees the calls that move a tensor: torch's C++ takes both sides for the CPU, and would do nothing."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.tolist and isinstance(args[0], OnDevice):
            _not_in_a_capture("tolist")
            return args[0].content.tolist()
        if function in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            return self.move(function, args, kwargs)
        if not on_device(kwargs.get("device")):
            return function(*args, **kwargs)
        if function in (torch.tensor, torch.as_tensor):
            _not_in_a_capture(function.__name__)
        made = function(*args, **kwargs | {"device": CPU})  # CUDA would be looked for before `Operations`
        if place.type == "mps" and made.dtype == torch.float64:
            raise TypeError("the MPS framework doesn't support float64")
        return made if isinstance(made, OnDevice) else OnDevice(made)

    def move(self, function, args, kwargs):
        x, *rest = args
        if rest and isinstance(rest[0], torch.Tensor):  # x.to(other)
            rest = [rest[0].device, rest[0].dtype]
        if function is not torch.Tensor.to:
            rest = [CPU if function is torch.Tensor.cpu else place]
        places = [y for y in (*rest, *kwargs.values()) if isinstance(y, (str, torch.device))]
        if not places:
            return function(x, *rest, **kwargs)
        to_device = on_device(places[0])
        if to_device != isinstance(x, OnDevice):
            _not_in_a_capture("a copy between CPU and GPU")
            x = OnDevice(x.detach().clone()) if to_device else x.content.detach().clone()
        elif kwargs.get("copy"):
            x = x.clone()
        dtypes = [y for y in (*rest, *kwargs.values()) if isinstance(y, torch.dtype)]
        return x.to(dtypes[0]) if dtypes else x


def _not_in_a_capture(what):
    if capture is not None:
        raise RuntimeError(f"{what}: not inside a capture, where the host neither waits nor copies")


# ------------------------------------------------------------------------------------------------------------
# CUDA: graphs, Triton's kernels, and what torch.cuda says of the card


class Graph:
    """torch.cuda.CUDAGraph: operations with the memory that they read and write."""

    def __init__(self):
        self.calls = []
        self.before = {}  # address of a storage → itself, and its bytes before the capture wrote to it

    def save(self, tensors):
        for x in tensors:
            storage = x.untyped_storage()
            if storage.data_ptr() not in self.before:
                self.before[storage.data_ptr()] = storage, storage.clone()

    def record(self, function, args, kwargs, writes):
        """Run it now, to know the shapes of its results; `capture_end` takes back what it wrote."""
        if writes:
            self.save([x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)])
        out = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, [x for x in tree_leaves(out) if torch.is_tensor(x)]))
        return out

    def capture_begin(self, pool=None, capture_error_mode="global"):
        global capture
        capture = self

    def capture_end(self):
        global capture
        capture = None
        for storage, old in self.before.values():
            storage.copy_(old)

    def replay(self):
        for function, args, kwargs, results in self.calls:
            new = [x for x in tree_leaves(function(*args, **kwargs)) if torch.is_tensor(x)]
            for x, y in zip(results, new):
                if x.data_ptr() != y.data_ptr():  # otherwise a view, or written in place
                    x.copy_(y)

    def reset(self):
        self.calls = []


@contextlib.contextmanager
def recording(graph, **settings):
    """torch.cuda.graph: inside, operations on the device are recorded and not run."""
    graph.capture_begin()
    try:
        yield
    finally:
        graph.capture_end()


def launch(run):
    """InterpretedFunction.run for operands on the device; a call inside a capture is recorded."""

    def wrapper(kernel, *args, grid, warmup, **kwargs):
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        if any(isinstance(x, OnDevice) for x in tensors):
            others = [x for x in tensors if not isinstance(x, OnDevice)]
            if not all(map(_zeros_of_autograd, others)):
                raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
            args = tree_map(unwrap, args)
            kwargs = tree_map(unwrap, kwargs)

        def call():
            run(kernel, *args, grid=grid, warmup=warmup, **kwargs)

        if capture is None:
            return call()
        capture.save([unwrap(x) for x in tensors])
        return capture.record(call, (), {}, writes=False)

    return wrapper


class Event:
    """torch.cuda.Event, by the clock of the host."""

    def __init__(self, enable_timing=False):
        self.at = 0.0

    def record(self, stream=None):
        import time

        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return max(1e3 * (end.at - self.at), 1e-6)


class OutOfTheWay(contextlib.nullcontext):
    """torch.cuda.device, device_of and stream: there is one device, and one stream."""

    def __init__(self, *_):
        super().__init__()


# A small card: so few processors that a tiny vocabulary makes several slices
CARD = SimpleNamespace(name="pretended", multi_processor_count=4, total_memory=8 * GIB, major=9, minor=0)
CUDA = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "synchronize": lambda device=None: _not_in_a_capture("synchronize"),
    "get_device_name": lambda device=None: CARD.name,
    "get_device_properties": lambda device=None: CARD,
    "get_device_capability": lambda device=None: (CARD.major, CARD.minor),
    "mem_get_info": lambda device=None: (4 * GIB, 8 * GIB),
    "memory_reserved": lambda device=None: 1 << 20,
    "memory_allocated": lambda device=None: 1 << 20,
    "max_memory_allocated": lambda device=None: 2 << 20,
    "reset_peak_memory_stats": lambda device=None: None,
    "empty_cache": lambda: None,
    "graph_pool_handle": lambda: (0, 0),
    "is_current_stream_capturing": lambda: capture is not None,
    "CUDAGraph": Graph,
    "graph": recording,
    "Event": Event,
    "device": OutOfTheWay,
    "Stream": lambda device=None: None,
    "stream": OutOfTheWay,
    "device_of": OutOfTheWay,
}


def without_triton(real):
    """kernels._backend that takes plain torch where a GPU takes Triton: the interpreter is slow."""

    def backend(name, *tensors):
        return real(name or "torch", *tensors)

    return backend


@contextlib.contextmanager
def pretended(kind, triton=True):
    """Inside, --device auto takes the device of this kind, "cuda" or "mps".

    triton: on "cuda", kernels run in Triton's interpreter, seconds for a step of a tiny trainer; without it
    in plain torch.
    """
    global place
    there = torch.backends.mps if kind == "mps" else torch.cuda
    patches = [mock.patch.object(there, "is_available", lambda: True)]
    if kind == "cuda":
        patches = [mock.patch.multiple(torch.cuda, **CUDA)]
        if hasattr(InterpretedFunction, "run"):  # in Triton 3.5 it has none, and kernels stay on the CPU
            patches.append(mock.patch.object(InterpretedFunction, "run", launch(InterpretedFunction.run)))
        if not triton:
            patches.append(mock.patch.object(kernels, "_backend", without_triton(kernels._backend)))
    swap = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # a Parameter's data cannot change its class
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        place = torch.device(kind, 0)
        stack.enter_context(Operations())
        stack.enter_context(Functions())
        try:
            yield
        finally:
            place = None
            torch.__future__.set_swap_module_params_on_conversion(swap)
