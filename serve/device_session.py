"""Sessions on a device, or none: nothing goes on silently on the CPU.

The same graphs run in the host's memory, one thread computing: there are their tests.
"""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort

from serve.device_stream import HOST, ON_HOST, CudaStream, Device, Stream

PROVIDER = "CUDAExecutionProvider"
CURE = (
    "It takes an NVIDIA driver, CUDA 13 and `pip install -r requirements/gpu.txt` in place of onnxruntime: "
    "docs/cuda.md. Or serve an artifact for the CPU with --device cpu"
)


class DeviceUnavailable(Exception):
    """The device cannot compute here; the message says what is missing and the cure."""


def devices_of(text: str) -> list[Device]:
    """Those that `--device` names."""
    kind, _, numbers = text.partition(":")
    return [Device(kind, int(number)) for number in (numbers or "0").split(",")]


class DeviceSession(ort.InferenceSession):  # type: ignore[misc]
    """A session and the stream that it runs on."""

    def __init__(self, path: Path, options: ort.SessionOptions, provider: object, stream: Stream) -> None:
        super().__init__(str(path), options, providers=[provider])
        self.stream = stream


def open_stream(device: Device) -> Stream:
    """Raises DeviceUnavailable if there is no such device, or nothing here that computes on it."""
    if device == HOST:
        return ON_HOST
    if PROVIDER not in ort.get_available_providers():
        raise DeviceUnavailable(
            f"{device} cannot be used: this onnxruntime {ort.__version__} has no {PROVIDER}. {CURE}"
        )
    try:
        return CudaStream(device)
    except OSError as error:
        raise DeviceUnavailable(f"{device} cannot be used: {error}. {CURE}") from error


def open_device_session(path: Path, device: Device) -> DeviceSession:
    """A session that captures CUDA graphs; on the host, one that runs the same graph there, with a thread.

    Raises DeviceUnavailable if the provider is not there, or ONNX Runtime would go on without it; and what ONNX Runtime
    raises, which refuses to capture a graph that has a node elsewhere.
    """
    stream = open_stream(device)
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_mem_pattern = False
    if device == HOST:
        return DeviceSession(path, options, "CPUExecutionProvider", stream)
    wanted = {"device_id": str(device.number), "enable_cuda_graph": "1", "user_compute_stream": str(stream.handle)}
    session = DeviceSession(path, options, (PROVIDER, wanted), stream)
    session.disable_fallback()
    if session.get_providers()[0] != PROVIDER:
        raise DeviceUnavailable(
            f"{device} cannot be used: {PROVIDER} did not load, and ONNX Runtime's log above says why. {CURE}"
        )
    return session
