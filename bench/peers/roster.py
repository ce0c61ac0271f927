"""Every peer by the name that the command line gives it, baseline first."""

from __future__ import annotations

from collections.abc import Callable

from bench.peers.llama_cpp import LlamaCpp
from bench.peers.onnxruntime_genai import OnnxruntimeGenai
from bench.peers.openvino_genai import OpenVinoGenai
from bench.peers.vllm_cpu import VllmCpu
from bench.system import System

PEERS: dict[str, Callable[[], System]] = {
    "llama_cpp": lambda: LlamaCpp("Q8_0"),
    "llama_cpp_q4": lambda: LlamaCpp("Q4_0"),
    "vllm": VllmCpu,
    "openvino": OpenVinoGenai,
    "ort_genai": OnnxruntimeGenai,
}
