"""Operations and copies on the devices: computed on the CPU, checked by CUDA's rules."""

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from support.accelerator.active import TYPE, AcceleratorError, index_of
from support.accelerator.devices import Devices
from support.accelerator.memory import CPU_KEYS, bytes_of, fill_garbage, view

_COPIES = ("aten::_to_copy", "aten::copy_")
_TAKE_HOST_INDICES = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
_SYNCHRONIZE = (
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2", "aten::unique_dim",
    "aten::bincount", "aten::repeat_interleave", "aten::is_nonzero",
)  # fmt: skip
"""Operations whose result, or its size, the host waits for."""


class Accelerator(Devices):
    """The devices as a mode of PyTorch, to which it gives every operation; ``pretend_accelerator`` makes it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func._schema.name
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        own = [t for t in tensors if t.device.type == TYPE]
        wanted = kwargs.get("device")
        wanted = None if wanted is None else torch.device(wanted)
        if not own and (wanted is None or wanted.type != TYPE):
            return self._run_on_host(func, name, args, kwargs)
        if wanted is not None and wanted.type == TYPE:
            wanted = torch.device(TYPE, index_of(wanted))
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **kwargs)
        if name == "aten::set_":
            return func.redispatch(CPU_KEYS, *args, **kwargs)  # another storage, no work
        if name in _COPIES:
            return self._copy(func, args, kwargs, wanted)
        device = wanted or own[0].device
        self._check_devices(name, tensors, own, device)
        if name in _SYNCHRONIZE or (name in _TAKE_HOST_INDICES and _synchronizing_indices(args)):
            self._synchronizes(name)
        return self._compute(func, name, args, kwargs, device)

    def _run_on_host(self, func, name, args, kwargs):
        if name in ("aten::is_pinned",):
            return self._is_pinned(args[0])
        if name in ("aten::_pin_memory", "aten::pin_memory"):
            return self._pin(torch.empty_like(args[0])).copy_(args[0])
        if kwargs.pop("pin_memory", None):
            return self._pin(func(*args, **kwargs))
        return func(*args, **kwargs)

    def _check_devices(self, name, tensors, own, device):
        for tensor in tensors:
            joins = tensor.device == own[0].device or (tensor.device.type == "cpu" and tensor.dim() == 0)
            if not joins and not (name in _TAKE_HOST_INDICES and tensor.device.type == "cpu"):
                raise RuntimeError(
                    f"{name}: Expected all tensors to be on the same device, but found at least two devices, "
                    f"{own[0].device} and {tensor.device}!"
                )

    def _compute(self, func, name, args, kwargs, device):
        stream = self.stream(device)
        if self.recording is not None and stream is not self.recording_stream:
            raise RuntimeError(
                "CUDA error: operation would make the legacy stream depend on a capturing blocking stream"
            )
        originals, aliases = {}, {}

        def lower(value):
            if not isinstance(value, Tensor):
                return value
            if value.device.type != TYPE:
                return value.clone() if self.recording is not None else value
            alias = aliases.get(id(value))
            if alias is None:
                alias = aliases[id(value)] = self._on_host(value)
                originals[id(alias)] = value
            return alias

        lowered, options = tree_map(lower, args), tree_map(lower, kwargs)
        if "device" in options:
            options["device"] = torch.device("cpu")
        options.pop("pin_memory", None)
        written = _written(func, args, kwargs)
        if self.recording is not None and written:
            self.counts["launches"] += 1
            self._record(lambda: func(*lowered, **options), originals.values(), written)
            return args[0] if func._schema.returns else None
        is_view = not written and any(r.alias_info is not None for r in func._schema.returns)
        position = stream.position if is_view or self.recording is not None else stream.advance()
        if not is_view:
            self.counts["launches"] += 1
            self.counts[name] += 1
            if self.recording is None:
                self._check_order(originals.values(), written, stream, position)
        storages = {alias.untyped_storage()._cdata: originals[id(alias)] for alias in aliases.values()}
        result = func(*lowered, **options)
        fresh = []

        def lift(value):
            if not isinstance(value, Tensor):
                return value
            if id(value) in originals:
                return originals[id(value)]
            base = storages.get(value.untyped_storage()._cdata)
            if base is not None:
                if value.dtype != base.dtype:
                    base = torch.ops.aten.view.dtype.redispatch(CPU_KEYS, base.flatten(), value.dtype)
                return view(base, value.size(), value.stride(), value.storage_offset())
            if "empty" in name:
                fill_garbage(value)
            labelled = self._label(value, device)
            fresh.append((value, labelled))
            return labelled

        lifted = tree_map(lift, result)
        if self.recording is not None and not is_view:
            self._record_results(func, lowered, options, result, originals.values(), fresh)
        else:
            for _, labelled in fresh:
                self.block(labelled).written = (stream, position)
        return lifted

    def _check_order(self, tensors, written, stream, position):
        for tensor in tensors:
            if any(tensor is w for w in written):
                self.writes(self.block(tensor), stream, position)
            else:
                self.reads(self.block(tensor), stream, position)

    def _record(self, operation, read, written):
        """Add an operation that writes to tensors which exist already."""
        graph = self.recording
        graph.operations.append(operation)
        for tensor in read:
            block, key = self.block(tensor), tensor.untyped_storage()._cdata
            if block.pool is None:
                graph.read[key] = block
        for tensor in written:
            block, key = self.block(tensor), tensor.untyped_storage()._cdata
            if block.pool is None:
                graph.written[key] = block
                graph.read.pop(key, None)

    def _record_results(self, func, lowered, options, result, read, fresh):
        """Add an operation with results of its own. They hold garbage until the replay."""
        targets = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        for value, _ in fresh:
            fill_garbage(value)

        def operation():
            again = [value for value in tree_leaves(func(*lowered, **options)) if isinstance(value, Tensor)]
            for target, value in zip(targets, again, strict=True):
                target.copy_(value)

        if "empty" not in func._schema.name:
            self._record(operation, read, ())

    # Copies

    def _copy(self, func, args, kwargs, wanted):
        name = func._schema.name
        if name == "aten::copy_":
            target, source = args[0], args[1]
            asynchronous = bool(args[2]) if len(args) > 2 else bool(kwargs.get("non_blocking", False))
        else:
            source = args[0]
            asynchronous = bool(kwargs.pop("non_blocking", False))
            kwargs.pop("pin_memory", None)
            device = wanted or source.device
            if device == source.device:
                return self._compute(func, name, args, kwargs, device)
            kwargs["device"] = torch.device("cpu")
            sample = source if source.device.type == "cpu" else self._on_host(source)
            shape = torch.empty_like(
                sample, dtype=kwargs.get("dtype"), memory_format=kwargs.get("memory_format") or torch.preserve_format
            )
            if device.type == TYPE:
                fill_garbage(shape)
                target = self._label(shape, device)
            else:
                target = self._pin(shape) if asynchronous else shape
        if target.device == source.device:
            return self._compute(func, name, args, kwargs, target.device)
        if self.recording is not None:
            raise RuntimeError(
                "CUDA error: operation not permitted when stream is capturing (a copy from or to the host)"
            )
        if source.device.type == "cpu" and source.dim() == 0 and name == "aten::copy_":
            self._on_host(target).copy_(source)
            self._touch(target, source)
            return target
        if source.device.type == "cpu":
            self._upload(target, source, asynchronous)
        elif target.device.type == "cpu":
            self._download(target, source, asynchronous)
        else:
            streams = self.stream(source.device), self.stream(target.device)
            streams[1].wait_stream(streams[0])
            self._on_host(target).copy_(self._on_host(source))
            self._touch(target, source)
            streams[0].wait_stream(streams[1])
        return target

    def _touch(self, target, source):
        """Count a copy, and check its order. Returns (stream, position)."""
        stream = self.stream(target.device if target.device.type == TYPE else source.device)
        position = stream.advance()
        self.counts["copies"] += 1
        if source.device.type == TYPE:
            self.reads(self.block(source), stream, position)
        if target.device.type == TYPE:
            self.writes(self.block(target), stream, position)
        return stream, position

    def _upload(self, target, source, asynchronous):
        stream, position = self._touch(target, source)
        self._on_host(target).copy_(source)
        if not (asynchronous and self._is_pinned(source)):
            self._synchronizes("a copy of pageable memory" if asynchronous else "a blocking copy to the device")
            return
        before = source.clone()

        def finish():
            if not torch.equal(bytes_of(source), bytes_of(before)):
                raise AcceleratorError("pinned memory was changed before its copy to the device had ended")

        self._pending.append((stream, position, None, finish))

    def _download(self, target, source, asynchronous):
        stream, position = self._touch(target, source)
        values = self._on_host(source)
        if asynchronous and self._is_pinned(target):
            fill_garbage(target)
            self._pending.append((stream, position, self.block(source), lambda: target.copy_(values)))
            return
        self._synchronizes("a copy to pageable memory" if asynchronous else "a blocking copy to the host")
        target.copy_(values)


def _written(func, args, kwargs):
    """Arguments that an operation writes to."""
    if not func._schema.is_mutable:
        return []
    found = []
    for k, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[k] if k < len(args) else kwargs.get(argument.name)
            found += [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    return found


def _synchronizing_indices(args):
    """Masks have as many results as true values, which the host must know, and indices of the host are copied."""
    indices = [i for i in args[1] if i is not None]
    return any(i.dtype in (torch.bool, torch.uint8) or i.device.type == "cpu" for i in indices)
