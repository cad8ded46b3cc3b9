"""megatron-core on CPU with gloo: patches for machines without a CUDA device.

megatron-core names CUDA in four ways: it asks for the current device, it synchronises and forks the
RNG, it writes device="cuda" into tensor factories, and it checks for CUDA tensor types. Each entry of
PATCHES replaces one attribute of one module or class; nothing is patched where
torch.cuda.is_available(). A test asserts that every patched attribute exists upstream, so that a new
megatron-core cannot make a patch silently void.

The literal device="cuda" lives in a few modules. They get a stand-in for the name `torch` whose tensor
factories read "cuda" as "cpu"; a torch function mode would do the same at some 20 % of a small step, and not
inside backward().
"""

from __future__ import annotations

import contextlib
import functools
import logging
import pkgutil
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

_FACTORIES = ("zeros", "ones", "empty", "empty_like", "full", "tensor", "arange")


class _TorchOnCpu(types.ModuleType):
    """The module torch with device="cuda" read as "cpu" in its tensor factories."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _reads_cuda_as_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return on_cpu


_torch_on_cpu = _TorchOnCpu("torch")
for _name in _FACTORIES:
    setattr(_torch_on_cpu, _name, _reads_cuda_as_cpu(getattr(torch, _name)))


def _nothing() -> Callable[..., None]:
    """A fresh function that does nothing: torch's compiler refuses one function under two names of torch."""
    return lambda *args, **kwargs: None


def _itself(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return tensor


def _cpu_device(*args: Any, **kwargs: Any) -> torch.device:
    return torch.device("cpu")


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.manual_seed(seed)


def _clip_grad_by_total_norm(
    parameters: torch.Tensor | list[torch.Tensor],
    max_norm: float,
    total_norm: float,
    use_decoupled_grad: bool = False,
) -> None:
    """Upstream's clip without its check that gradients are CUDA tensors."""
    coefficient = max_norm / (total_norm + 1.0e-6)
    if coefficient < 1.0:
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else parameters
        grads = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_mul_(grads, coefficient)


def _init_data(sharded: Any, device: Any, init_fn: Callable[..., torch.Tensor] = torch.empty) -> None:
    """An empty tensor for data that another rank has read; upstream allocates it on the CUDA device."""
    if sharded.data is None:
        sharded.data = init_fn(sharded.local_shape, dtype=sharded.dtype, device="cpu")


def _splits_as_numbers(dispatcher: Any, point: str, tokens_per_expert: torch.Tensor | None = None) -> Any:
    """Upstream brings the sizes of what ranks send each other from the device to the host, on
    a stream of its own.
    """
    if point == dispatcher.cuda_dtoh_point:
        for name in ("input_splits", "output_splits", "output_splits_tp"):
            splits = getattr(dispatcher, name)
            setattr(dispatcher, name, None if splits is None else splits.numpy())
    return tokens_per_expert


def _gather_rows(
    input_: torch.Tensor,
    group: dist.ProcessGroup,
    output_split_sizes: Sequence[int] | None = None,
    use_global_buffer: bool = False,
) -> torch.Tensor:
    """The rows of all ranks one after the other. gloo gathers blocks of one size only, but sends others."""
    size = group.size()
    if size == 1:
        return input_
    if output_split_sizes is None:
        output = input_.new_empty(len(input_) * size, *input_.shape[1:])
        dist.all_gather_into_tensor(output, input_.contiguous(), group=group)
    else:
        output = input_.new_empty(sum(output_split_sizes), *input_.shape[1:])
        dist.all_to_all_single(
            output, torch.cat([input_] * size), list(output_split_sizes), [len(input_)] * size, group=group
        )
    return output


def _sum_and_scatter_rows(
    input_: torch.Tensor,
    group: dist.ProcessGroup,
    input_split_sizes: Sequence[int] | None = None,
    use_global_buffer: bool = False,
) -> torch.Tensor:
    """This rank's rows of the sum over ranks; for blocks that differ in size gloo sums all
    of them everywhere.
    """
    size = group.size()
    if size == 1:
        return input_
    if input_split_sizes is None:
        assert len(input_) % size == 0, f"{len(input_)} rows for {size} ranks"
        output = input_.new_empty(len(input_) // size, *input_.shape[1:])
        dist.reduce_scatter_tensor(output, input_.contiguous(), group=group)
        return output
    total = input_.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total.split(list(input_split_sizes))[group.rank()].clone()


_upstream: dict[tuple[str, str], Any] = {}
"""The attributes that the patches have replaced."""


def _build_main_parameters(optimizer: Any, *args: Any) -> Any:
    """Upstream's function, which compares a parameter's type with the name of a CUDA type."""
    type_ = torch.Tensor.type

    def as_on_cuda(tensor: torch.Tensor, *options: Any, **more: Any) -> Any:
        named = type_(tensor, *options, **more)
        return named if options or more else named.replace("torch.", "torch.cuda.")

    torch.Tensor.type = as_on_cuda  # type: ignore[method-assign, assignment]
    try:
        return _upstream[_DISTRIBUTED_OPTIMIZER, "_build_model_and_main_param_groups"](*args)
    finally:
        torch.Tensor.type = type_  # type: ignore[method-assign]


_DISTRIBUTED_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
_DISPATCHER = "megatron.core.transformer.moe.token_dispatcher.MoEAlltoAllTokenDispatcher"

PATCHES: tuple[tuple[str, str, Any], ...] = (
    # The current device, and calls on it that have nothing to do.
    ("torch.cuda", "current_device", _cpu_device),
    ("torch.Tensor", "cuda", _itself),  # the word embeddings that the first and the last pipeline stage share
    ("torch.cuda", "synchronize", _nothing()),
    ("torch.cuda", "current_stream", _nothing()),
    ("torch.cuda", "set_device", _nothing()),
    ("torch.cuda", "empty_cache", _nothing()),
    ("torch.cuda.nvtx", "range_push", _nothing()),
    ("torch.cuda.nvtx", "range_pop", _nothing()),
    # Random state: without CUDA the stock setters queue callbacks that never run.
    ("torch.cuda", "manual_seed", _manual_seed),
    ("torch.cuda", "get_rng_state", _get_rng_state),
    ("torch.cuda", "set_rng_state", _set_rng_state),
    ("megatron.core.tensor_parallel.random", "_get_cuda_rng_state", _get_rng_state),
    ("megatron.core.tensor_parallel.random", "_set_cuda_rng_state", _set_rng_state),
    # device="cuda" in tensor factories.
    ("megatron.core.pipeline_parallel.schedules", "torch", _torch_on_cpu),
    ("megatron.core.optimizer.optimizer", "torch", _torch_on_cpu),
    ("megatron.core.optimizer.clip_grads", "torch", _torch_on_cpu),
    ("megatron.core.optimizer.grad_scaler", "torch", _torch_on_cpu),
    ("megatron.core.distributed.param_and_grad_buffer", "torch", _torch_on_cpu),
    ("megatron.core.dist_checkpointing.exchange_utils", "torch", _torch_on_cpu),
    ("megatron.core.dist_checkpointing.mapping.ShardedTensor", "init_data", _init_data),
    ("megatron.core.transformer.utils", "torch", _torch_on_cpu),
    ("megatron.core.utils", "torch", _torch_on_cpu),
    # Checks for CUDA tensor types.
    ("megatron.core.optimizer.optimizer", "clip_grad_by_total_norm_fp32", _clip_grad_by_total_norm),
    (_DISTRIBUTED_OPTIMIZER, "_build_model_and_main_param_groups", _build_main_parameters),
    ("megatron.core.inference.communication_utils", "_is_cuda", _nothing()),
    # A mixture of experts: a stream that nothing runs on, and the sizes of what ranks send each other.
    (_DISPATCHER, "cuda_dtoh_stream", "none"),
    (_DISPATCHER, "_maybe_dtoh_and_synchronize", _splits_as_numbers),
    ("megatron.core.tensor_parallel.mappings", "_gather_along_first_dim", _gather_rows),
    ("megatron.core.tensor_parallel.mappings", "_reduce_scatter_along_first_dim", _sum_and_scatter_rows),
)

_patched = False


def patch_megatron() -> bool:
    """Apply PATCHES once per process; returns False, and does nothing, if a CUDA device is available."""
    global _patched
    if torch.cuda.is_available():
        return False
    if _patched:
        return True
    with _quietly(), _without_loggers(), _without_compilation():
        for module_name, attribute, replacement in PATCHES:
            module = pkgutil.resolve_name(module_name)
            if not hasattr(module, attribute):
                raise AttributeError(
                    f"{module_name}.{attribute} does not exist in this megatron-core; the CPU patch is void"
                )
            _upstream[module_name, attribute] = getattr(module, attribute)
            setattr(module, attribute, replacement)
    # Advice for CUDA devices, and names that torch is about to change under megatron-core.
    warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS.*")
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+_tensor` is deprecated.*")
    _patched = True
    return True


@contextlib.contextmanager
def _without_compilation() -> Iterator[None]:
    """megatron-core hands its small fused functions to torch.compile at import time: 2-8 s each at their
    first call.

    Its modules take the decorator from megatron.core.jit, which reads it from torch when
    it is first imported.
    """
    compile_ = torch.compile
    torch.compile = lambda function=None, **options: function or (lambda f: f)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_


@contextlib.contextmanager
def megatron_imports() -> Iterator[None]:
    """Where this package imports megatron-core: patched first on CPU, and without its
    warnings at import time.
    """
    patch_megatron()
    with _quietly(), _without_loggers():
        yield


@contextlib.contextmanager
def _without_loggers() -> Iterator[None]:
    """megatron-core imports these where they are installed, for parts of it that nothing here calls: a fifth
    of the time in which a process starts. Later imports of them work as usual."""
    hidden = [name for name in ("tensorboard", "wandb") if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: to import it is an ImportError
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Mute warnings of megatron-core that TransformerEngine and Apex are missing, and of torch that there is
    nvcc but no GPU."""
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"megatron\.core.*")
            warnings.filterwarnings("ignore", message=r".*(Transformer Engine|Apex|apex).*")
            yield
    finally:
        logging.disable(disabled)
