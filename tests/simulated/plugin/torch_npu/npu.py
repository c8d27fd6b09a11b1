"""``torch.npu`` of the simulated device, over ``torch.accelerator`` and the compiled part."""

from contextlib import contextmanager

import torch

from torch_npu import faults

_compiled = torch.ops.simulated_npu


def is_available():
    return device_count() > 0


def is_initialized():
    return True


def init():
    pass


_lazy_init = init


def _is_in_bad_fork():
    return False


def device_count():
    return _compiled.devices()


def current_device():
    return torch._C._accelerator_getDeviceIndex()


def set_device(device):
    torch._C._accelerator_setDeviceIndex(_index(device))


def synchronize(device=None):
    torch.accelerator.synchronize(_index(device))


def get_device_name(device_name=None):
    model = {"A2": "NPU", "A3": "Ascend910_9392"}[faults.npu_product()]
    return f"Simulated {model} (host memory and host kernels)"


def is_bf16_supported(including_emulation=False):
    return True


def get_amp_supported_dtype():
    return [torch.float16, torch.bfloat16]


@contextmanager
def device(index):
    before = torch._C._accelerator_exchangeDevice(_index(index))
    try:
        yield
    finally:
        torch._C._accelerator_setDeviceIndex(before)


class Stream(torch.Stream):
    def __new__(cls, device=None, priority=0, **kwargs):
        return super().__new__(cls, device=torch.device("npu", _index(device)), priority=priority)


class Event(torch.Event):
    def __new__(cls, enable_timing=False, **kwargs):
        return super().__new__(cls, device="npu", enable_timing=enable_timing)


def current_stream(device=None):
    return torch.accelerator.current_stream(_index(device))


@contextmanager
def stream(stream):
    if stream is None:
        yield
        return
    before = current_stream()
    torch.accelerator.set_stream(stream)
    try:
        yield
    finally:
        torch.accelerator.set_stream(before)


# Random numbers of the device come from the host's generator, because its kernels are the host's.
def manual_seed(seed):
    torch.default_generator.manual_seed(seed)


manual_seed_all = manual_seed


def get_rng_state(device="npu"):
    return torch.default_generator.get_state()


def set_rng_state(new_state, device="npu"):
    torch.default_generator.set_state(new_state)


def memory_allocated(device=None):
    return _compiled.allocated(_index(device))


def max_memory_allocated(device=None):
    return _compiled.peak(_index(device))


def reset_peak_memory_stats(device=None):
    _compiled.reset_peak(_index(device))


def mem_get_info(device=None):
    total = _compiled.memory_limit()
    return total - memory_allocated(device), total


def empty_cache():
    pass


def _index(device):
    if device is None:
        return current_device()
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return current_device() if index is None else index
