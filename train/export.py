"""From a trained model to a Hugging Face folder that `transformers` loads and `compress` takes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from proto.manifest import digest_files
from train.run_folder import write

KEPT = ("tokenizer", "special_tokens", "added_tokens", "chat_template", "vocab", "merges", "generation_config")
TRAINING = "training.json"


def export(model: PreTrainedModel, parent: Path, directory: Path, training: Mapping[str, Any]) -> None:
    """Weights and config of `model`, tokenizer and chat template of `parent`, and `training` as training.json.

    The folder appears whole: it is made beside its place and renamed as the last act.
    """
    with tempfile.TemporaryDirectory(prefix=".model-", dir=directory.parent) as temporary:
        made = Path(temporary) / "model"
        model.save_pretrained(made)
        for file in sorted(parent.iterdir()):
            if file.is_file() and file.name.startswith(KEPT):
                shutil.copyfile(file, made / file.name)
        write(made / TRAINING, training)
        os.replace(made, directory)


def digest(checkpoint: Path) -> str:
    """SHA-256 over the names and digests of configuration and weights, as `compress` computes it."""
    return digest_files(checkpoint, {"config.json", *(file.name for file in checkpoint.glob("*.safetensors"))})
