"""Copies to a GPU that run beside what it computes."""

import functools

import torch


def on_device(tensors: dict[str, torch.Tensor], device: torch.device | str) -> dict[str, torch.Tensor]:
    """Tensors on a device; to a GPU they go on a stream of their own.

    Since training waits for no step, it asks for the copies of one while the GPU computes an earlier one: what lies
    in pinned memory is there when its turn comes.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in tensors.items()}
    beside, computing = _stream_of_copies(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(beside):
        copied = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
    computing.wait_stream(beside)
    for tensor in copied.values():
        tensor.record_stream(computing)  # its memory is not to be used again before the step is done with it
    return copied


@functools.cache
def _stream_of_copies(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)
