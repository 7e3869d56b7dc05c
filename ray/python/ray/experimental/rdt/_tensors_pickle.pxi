# Pickling a value without its tensors.

class Pickler(cloudpickle.CloudPickler):
    """Ray's pickler, with placeholders for the tensors that RDT transfers.

    Attributes:
        tensors: The tensors taken out, in the order in which ``restore`` inserts them.
        is_parameter: Whether each torch tensor is a Parameter.
    """

    def __init__(self, stream, buffer_callback, wanted):
        """Take the arguments of ``capture.take``."""
        super().__init__(stream, protocol=5, buffer_callback=buffer_callback)
        self.tensors = []
        self.is_parameter = []
        is_torch = wanted is None or wanted.is_torch
        self._devices = None if wanted is None else wanted.devices
        self._others = None if is_torch else wanted
        # If the process has not imported torch, the value has no tensor.
        torch = sys.modules.get("torch") if is_torch else None
        self._tensor_type = getattr(torch, "Tensor", None)
        self._parameter_type = getattr(getattr(torch, "nn", None), "Parameter", None)

    def reducer_override(self, obj):
        kind = type(obj)
        if kind is self._tensor_type:
            if is_carried(obj, self._devices):
                self.tensors.append(obj)
                self.is_parameter.append(False)
                return (*_CALL, obj.__dict__.copy(), None, None, _set_attributes) \
                    if obj.__dict__ else _CALL
        elif kind is self._parameter_type:
            if is_carried(obj, self._devices) and not obj.__dict__:
                self.tensors.append(obj)
                self.is_parameter.append(True)
                return _CALL
        if self._others is not None and self._others.takes(obj):
            self.tensors.append(obj)
            return _CALL
        return super().reducer_override(obj)


cpdef bint is_carried(tensor, devices=None) except -1:
    """Tell whether RDT transfers this tensor's bytes: it is plain, strided, on a known device.

    Args:
        tensor: The tensor.
        devices: The device types of a user's transport; None for those of RDT's transports.
    """
    cdef DlTensor view
    if not _is_torch_loaded:
        _load_torch()
    # A CPU tensor that DLPack supports is of none of the kinds that are excluded below.
    if devices is None and _view(tensor, &view) and view.device.type == CPU:
        return True
    return (
        tensor.layout is _torch.strided
        and _is_on_known_device(tensor, devices)
        and not tensor.is_quantized
        and not tensor.is_nested
        and not _torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


cdef bint _is_on_known_device(tensor, devices) except -1:
    if devices is not None:
        return tensor.device.type in devices
    return tensor.is_cpu or accelerators.of(tensor.device.type) is not None


_restoring = threading.local()


def restore(inband, buffers, tensors):
    """Unpickle a value and replace its placeholders by the tensors, in order.

    Runs on: consumer, the thread that deserializes.
    """
    before = getattr(_restoring, "tensors", None)
    _restoring.tensors = iter(tensors)
    try:
        return pickle.loads(inband, buffers=buffers)
    finally:
        _restoring.tensors = before


def next_tensor():
    """Return the next tensor of the value that is restored: the placeholder of each tensor."""
    tensors = getattr(_restoring, "tensors", None)
    if tensors is None:
        raise pickle.UnpicklingError(
            "this is an RDT value without its tensors; only Ray can restore them"
        )
    for tensor in tensors:
        return tensor
    raise pickle.UnpicklingError("this RDT value has more placeholders than tensors")


def _set_attributes(tensor, attributes):
    tensor.__dict__.update(attributes)


#: The reduced form of each tensor. One shared tuple: ten thousand would burden the collector.
cdef tuple _CALL = (next_tensor, ())
