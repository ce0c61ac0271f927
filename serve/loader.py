"""From an artifact's folder to a version: verify, choose, read, and a way to make its engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from weakref import WeakValueDictionary

from proto.manifest import CHAT_TEMPLATE, TOKENIZER, Manifest
from serve.choices import MIB, Choices, choose, kv_budget
from serve.delivery import Delivery
from serve.device_session import devices_of
from serve.engine import Engine
from serve.engines import Engines
from serve.forms import Form, pick
from serve.metrics import Metrics
from serve.plan import Plan
from serve.settings import Settings
from serve.tokenizer import Tokenizer
from serve.version import Version


class Loader:
    """Makes versions that answer on `loop`. `load` may be called from any thread, what it returns from the loop's."""

    def __init__(self, settings: Settings, metrics: Metrics, loop: asyncio.AbstractEventLoop) -> None:
        self._settings = settings
        self._metrics = metrics
        self._delivery = Delivery(loop)
        self._kv_budget = kv_budget(settings)
        # Reading one stops all other threads for a third of a second, and retraining keeps the tokenizer.
        self._tokenizers: WeakValueDictionary[tuple[str, ...], Tokenizer] = WeakValueDictionary()

    def load(self, directory: Path, manifest: Manifest, *, warm: bool = False) -> Version:
        """A version from a verified artifact; `warm`: its weights have been read once, so no request waits for that.

        Raises SettingsError, or what ONNX Runtime raises.
        """
        forms = [pick(self._settings.form, manifest, device) for device in devices_of(self._settings.device)]
        choices = choose(self._settings, manifest, forms[0], self._kv_budget)
        tokenizer = self._tokenizer(directory, manifest)
        sessions = [form.open(directory, choices.threads) for form in forms]
        if warm:
            for form, session in zip(forms, sessions, strict=True):
                plan = Plan()
                plan.add([0], 0, [0])
                form.build(session, manifest, self._settings, choices)[0].run(plan)

        def make_engine(number: int) -> Engine:
            runner, scheduler = forms[number].build(sessions[number], manifest, self._settings, choices)
            engine = Engine(
                runner,
                scheduler,
                tokenizer,
                self._metrics.engine(manifest, choices, number),
                self._delivery,
                eos_token_ids=tuple(manifest.architecture.eos_token_ids),
                vocab_size=manifest.architecture.vocab_size,
                request_timeout_seconds=self._settings.request_timeout_seconds,
            )
            engine.start()
            return engine

        def make_engines() -> Engine | Engines:
            engines = [make_engine(number) for number in range(len(forms))]
            return engines[0] if len(engines) == 1 else Engines(engines)

        return Version(manifest, tokenizer, choices.max_context, make_engines, describe(manifest, forms, choices))

    def _tokenizer(self, directory: Path, manifest: Manifest) -> Tokenizer:
        files = manifest.files
        key = tuple(files[name].sha256 if name in files else "" for name in (TOKENIZER, CHAT_TEMPLATE))
        found = self._tokenizers.get(key) or Tokenizer(directory)
        self._tokenizers[key] = found
        return found


def describe(manifest: Manifest, forms: Sequence[Form], choices: Choices) -> str:
    """What is served and what was chosen, in one line."""
    return (
        f"(recipe {manifest.recipe.name}, {', '.join(form.phrase for form in forms)}), "
        f"{choices.threads} threads ({choices.threads_why}), {choices.num_slots} slots ({choices.slots_why}) of "
        f"{choices.max_context} tokens, KV budget {choices.kv_bytes // MIB} MiB {choices.block.type}"
    )
