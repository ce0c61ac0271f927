"""The folder in which an artifact is made: it is whole, or not there, and a full disk is told as such."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jinja2
import msgspec

from compress.checkpoint import CheckpointError
from proto.manifest import CHAT_TEMPLATE, TOKENIZER
from serve.tokenizer import Tokenizer
from train.folders import new_folder

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk, quota, size of a file


@contextmanager
def artifact_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` if the block ends well, and is removed otherwise.

    Raises TrainError if there is a `target`, and OSError that tells of the room if it did not suffice.
    """
    with new_folder(target) as folder:
        try:
            yield folder
        except OSError as error:
            if error.errno not in FULL:
                raise
            written = sum(path.stat().st_size for path in folder.iterdir())
            free = shutil.disk_usage(folder).free
            raise OSError(
                f"{target.parent} has no room for the artifact ({error.strerror}): {written:,} bytes of it were "
                f"written, and {free:,} bytes are free. Make room, or name an output elsewhere"
            ) from error


def copy_tokenizer(source: Path, folder: Path) -> Tokenizer:
    """The tokenizer and, if the model chats, its template, from where transformers keeps them.

    Raises CheckpointError if there is none, or none that can be read.
    """
    if not (source / TOKENIZER).is_file():
        raise CheckpointError(f"{source} has no {TOKENIZER}; save it with a fast tokenizer")
    shutil.copyfile(source / TOKENIZER, folder / TOKENIZER)
    template = source / CHAT_TEMPLATE
    config = source / "tokenizer_config.json"
    try:
        if template.is_file():
            shutil.copyfile(template, folder / CHAT_TEMPLATE)
        elif config.is_file() and isinstance(
            text := msgspec.json.decode(config.read_bytes()).get("chat_template"), str
        ):
            (folder / CHAT_TEMPLATE).write_text(text)
        return Tokenizer(folder)
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{config} is not JSON: {error}. Fetch it again.") from error
    except jinja2.TemplateError as error:
        raise CheckpointError(f"the chat template of {source} is wrong: {error}. Correct it or remove it.") from error
    except OSError:
        raise
    except Exception as error:  # what tokenizers raises for a broken file
        raise CheckpointError(f"{source / TOKENIZER} cannot be read: {error}. Fetch it again.") from error
