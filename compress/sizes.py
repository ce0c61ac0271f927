"""How large the parts of an artifact are, from what its graph says of its constants."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import onnx

from compress.families import Decoder
from proto.manifest import GRAPH

OTHER = "other"
ONCE = ("head", "embedding")  # not in every layer
PRODUCT = re.compile(r"(?:layers\.\d+\.)?(qkv|o|gate_up|fc|down|head|embedding)\.(?:weight|scale|sums|zero)")


@dataclass(slots=True)
class Part:
    """Bytes in the artifact, and how many weights they hold; 0 where that says nothing."""

    size_bytes: int = 0
    num_weights: int = 0

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.size_bytes / self.num_weights if self.num_weights else math.nan


def parts_of(directory: Path, decoder: Decoder | None = None) -> dict[str, Part]:
    """By role: `qkv`, `o`, ... of all layers together, `head`, `embedding`, and the rest.

    Scales, zeros and padding count with the weights, whose number only the decoder knows.
    """
    parts: dict[str, Part] = {}
    for constant in onnx.load(directory / GRAPH, load_external_data=False).graph.initializer:
        external = {entry.key: entry.value for entry in constant.external_data}
        found = PRODUCT.fullmatch(constant.name)
        size = int(external["length"]) if external else constant.ByteSize()
        parts.setdefault(found[1] if found else OTHER, Part()).size_bytes += size
    if decoder:
        for role in parts.keys() - {OTHER}:
            num_outputs, num_inputs = decoder.shape("head" if role == "embedding" else role)
            parts[role].num_weights = num_outputs * num_inputs * (1 if role in ONCE else decoder.num_layers)
    return dict(sorted(parts.items(), key=lambda item: (item[0] == OTHER, -item[1].size_bytes)))
