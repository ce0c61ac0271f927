"""From a trained model to a Hugging Face folder that `transformers` loads and `compress` takes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from proto.manifest import digest_files
from train.folders import new_folder
from train.run_folder import write

KEPT = ("tokenizer", "special_tokens", "added_tokens", "chat_template", "vocab", "merges", "generation_config")
TRAINING = "training.json"


def export(model: PreTrainedModel, parent: Path, directory: Path, training: Mapping[str, Any]) -> None:
    """Weights and config of `model`, tokenizer and chat template of `parent`, and `training` as training.json.

    The folder appears whole. Raises TrainError if it is there.
    """
    with new_folder(directory) as made:
        model.save_pretrained(made)
        add_companions(made, parent, training)


def add_companions(made: Path, parent: Path, training: Mapping[str, Any]) -> None:
    """What a checkpoint has besides weights and config: the files of `parent`, and `training` as training.json."""
    for file in sorted(parent.iterdir()):
        if file.is_file() and file.name.startswith(KEPT):
            shutil.copyfile(file, made / file.name)
    write(made / TRAINING, training)


def digest(checkpoint: Path) -> str:
    """SHA-256 over the names and digests of configuration and weights, as `compress` computes it."""
    return digest_files(checkpoint, {"config.json", *(file.name for file in checkpoint.glob("*.safetensors"))})
