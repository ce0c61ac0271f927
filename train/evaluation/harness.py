"""lm-evaluation-harness on local task files: its own models for checkpoints and servers, no hub, no network.

A task file is the harness's YAML with `dataset_path: json`; its `data_files` are found beside it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from train.errors import DataError, TrainError
from train.evaluation.options import Options
from train.evaluation.targets import Classifier, Target
from train.evaluation.windows import LARGEST_WINDOW

RESAMPLES = 1000


def run_harness(target: Target | Classifier, files: Sequence[str | Path], options: Options) -> dict[str, Any]:
    """For each task of the files its metrics, as the harness names them, and `examples`.

    Raises TrainError for what cannot be judged so. The harness takes seconds to import: nothing else imports it.
    """
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # or the first load of a file is told to the hub
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory(prefix="lm-eval-") as cache, _quiet():
        model, arguments = _model(target, options)
        try:
            found = simple_evaluate(
                model=model,
                model_args=arguments,
                tasks=[_task(Path(file), cache) for file in files],
                limit=options.limit or None,
                bootstrap_iters=RESAMPLES,
                apply_chat_template=options.chat,
                task_manager=TaskManager(include_defaults=False),
                random_seed=options.seed,
                numpy_random_seed=options.seed,
                torch_random_seed=options.seed,
                fewshot_random_seed=options.seed,
                log_samples=False,
            )
        except (AssertionError, NotImplementedError) as error:
            raise TrainError(f"lm-evaluation-harness cannot judge this target so: {error}") from error
    return {
        task: {name: value for name, value in values.items() if "," in name and isinstance(value, int | float)}
        | {"examples": found["n-samples"][task]["effective"]}
        for task, values in found["results"].items()
    }


def _model(target: Target | Classifier, options: Options) -> tuple[Any, dict[str, Any] | None]:
    """The harness's model, or its name and arguments."""
    from train.evaluation.checkpoint_target import CheckpointTarget
    from train.evaluation.server_target import ServerTarget

    if isinstance(target, CheckpointTarget):
        from lm_eval.models.huggingface import HFLM

        tokenizer = target.tokenization.tokenizer
        return HFLM(target.model, tokenizer=tokenizer, max_length=target.window, batch_size=options.batch), None
    if not isinstance(target, ServerTarget):
        raise TrainError(f"--lm-eval judges checkpoints that generate, and servers, not a {type(target).__name__}")
    arguments = {
        "model": target.model,
        "base_url": f"{target.url}/v1/{'chat/completions' if options.chat else 'completions'}",
        "num_concurrent": options.batch,
        "max_length": options.window or LARGEST_WINDOW,
        "header": target.header(),
        "seed": options.seed,
    }
    if options.chat:
        return "local-chat-completions", arguments
    # Without a tokenizer it sends texts: it can generate then, but not tell where a choice begins.
    with_tokenizer = {"tokenizer": options.tokenizer, "tokenizer_backend": "huggingface"}
    return "local-completions", arguments | (with_tokenizer if options.tokenizer else {"tokenizer_backend": "None"})


def _task(path: Path, cache: str) -> dict[str, Any]:
    """The task's configuration with its data's paths made absolute and its cache made ours."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if not path.is_file():
        raise DataError(f"{path} is no file; give task files (YAML) of lm-evaluation-harness")
    task: dict[str, Any] = load_yaml(path, resolve_func=True)
    named = task.get("dataset_kwargs", {})
    files = named.get("data_files")
    if task.get("dataset_path") != "json" or not files:
        raise DataError(
            f"{path} must have `dataset_path: json` and `dataset_kwargs: {{data_files: ...}}`; no hub is asked"
        )
    here = path.resolve().parent

    def absolute(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: absolute(item) for name, item in value.items()}
        if isinstance(value, list):
            return [absolute(item) for item in value]
        return str(here / value)

    return task | {"dataset_kwargs": named | {"data_files": absolute(files), "cache_dir": cache}}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Its log, and that of what it uses, says at the level of warnings what is no news here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
