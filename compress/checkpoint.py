"""A Hugging Face checkpoint on disk: its configuration, and its tensors read one at a time.

Nothing is kept: `read` maps the file, copies one tensor out as float32 and forgets it, so the memory a reader needs
is that of the tensors it holds itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes  # registers bfloat16 with numpy, which safetensors needs to read it
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from proto.manifest import digest_files

Floats = NDArray[np.float32]

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
READABLE = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


class CheckpointError(Exception):
    """The checkpoint cannot be read or understood; the message says what is wrong and the cure."""


class Checkpoint:
    """`config` is config.json; `generation` is generation_config.json, empty where there is none."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not (self.path / CONFIG).is_file():
            raise CheckpointError(
                f"{self.path} is not a checkpoint: it has no {CONFIG}. Give a directory written by `save_pretrained`."
            )
        self.config = self._read_json(CONFIG)
        self.generation = self._read_json(GENERATION_CONFIG) if (self.path / GENERATION_CONFIG).is_file() else {}
        self._files = self._map_tensors()

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._files)

    def read(self, name: str) -> Floats:
        """One tensor as float32, a fresh array that the caller owns. Refuses NaN and infinity."""
        if name not in self._files:
            raise CheckpointError(
                f"{self.path} has no tensor {name}. The checkpoint is incomplete or not of the architecture that its "
                f"{CONFIG} names; save it again with `save_pretrained`."
            )
        path = self.path / self._files[name]
        try:
            with safe_open(path, framework="numpy") as file:
                dtype = file.get_slice(name).get_dtype()
                if dtype not in READABLE:
                    raise CheckpointError(
                        f"{path}: tensor {name} is {dtype}; {', '.join(READABLE)} are readable. "
                        "Give the checkpoint from before its quantization."
                    )
                tensor: NDArray[Any] = file.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: tensor {name} cannot be read: {error}. Fetch the file again.") from error
        values: Floats = tensor.astype(np.float32, copy=False)
        # Least and largest tell of NaN too, and need no memory, as a mask would.
        if values.size and not (np.isfinite(values.min()) and np.isfinite(values.max())):
            wrong = ~np.isfinite(values)
            first = np.argwhere(wrong)[0].tolist()
            raise CheckpointError(
                f"{path}: {int(wrong.sum()):,} of the {values.size:,} values of tensor {name} are not finite, such as "
                f"{values[tuple(first)]} at {first}. Give a checkpoint from before the training diverged."
            )
        return values

    def dtype(self, name: str) -> np.dtype[Any]:
        """In which a tensor that can be read is kept."""
        with safe_open(self.path / self._files[name], framework="numpy") as file:
            kept: np.dtype[Any] = READABLE[file.get_slice(name).get_dtype()]
        return kept

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the names and digests of the configuration and the weight files."""
        return digest_files(self.path, {CONFIG, *self._files.values()})

    def _map_tensors(self) -> Mapping[str, str]:
        """Tensor name -> name of the file that holds it."""
        if (self.path / WEIGHTS).is_file():
            return dict.fromkeys(self._tensors_in(WEIGHTS), WEIGHTS)
        if not (self.path / INDEX).is_file():
            pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in self.path.glob(pattern))
            found = f" {', '.join(pickled)} may run code when read and is not." if pickled else ""
            raise CheckpointError(
                f"{self.path} has neither {WEIGHTS} nor {INDEX}.{found} "
                "Load the model with transformers and write it with `save_pretrained`."
            )
        weight_map = self._read_json(INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{self.path / INDEX} has no weight_map from tensor to file; fetch it again.")
        held: set[str] = set()
        for file in sorted(set(weight_map.values())):
            if Path(file).name != file or not (self.path / file).is_file():
                raise CheckpointError(f"{self.path} lacks {file}, which {INDEX} lists. Fetch that file.")
            held.update(self._tensors_in(file))
        if lost := sorted(weight_map.keys() - held):
            raise CheckpointError(f"{self.path}: {INDEX} lists tensor {lost[0]}, which no file holds. Fetch it again.")
        return weight_map

    def _tensors_in(self, file: str) -> list[str]:
        try:
            with safe_open(self.path / file, framework="numpy") as tensors:
                return list(tensors.keys())
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.path / file} is not a safetensors file or is truncated: {error}. Fetch it again."
            ) from error

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            value = json.loads((self.path / name).read_bytes())
        except ValueError as error:
            raise CheckpointError(f"{self.path / name} is not JSON: {error}. Fetch it again.") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.path / name} is not a JSON object. Fetch it again.")
        return value
