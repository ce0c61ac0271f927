"""The full-precision model over windows of text, one layer in memory at a time.

What is kept between the layers is the residual stream of every window. All else grows with the largest layer, not with
the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from compress.checkpoint import Checkpoint, Floats
from compress.constants import write_embedding, write_final_norm, write_head, write_layer, write_positions
from compress.families import Decoder
from compress.precisions import FLOAT
from compress.section import Embedding, FinalNorm, Head, Layer, Seen
from compress.weight_memory import WeightMemory
from compress.weights import Weights
from proto.manifest import Recipe

FULL = Recipe(name="fp32", default=FLOAT)


class Stream:
    """`hidden` is the residual stream [tokens, hidden] of each window before layer number `layer`."""

    def __init__(
        self, checkpoint: Checkpoint, decoder: Decoder, windows: Sequence[Sequence[int]], *, threads: int
    ) -> None:
        self.decoder = decoder
        self.layer = 0
        self._weights = Weights(checkpoint, decoder, {})
        self._threads = threads
        self._length = max(map(len, windows))
        self.hidden = self._embed(windows)

    def run_layer(self, see: Callable[[int, Seen], None] | None = None) -> None:
        """Run the next layer over every window; `see` is told the window's number and what the layer made of it."""
        memory = WeightMemory()
        write_positions(memory, self.decoder, self._weights, self._length)
        write_layer(memory, self.decoder, self._weights, FULL, self.layer, None)
        layer = Layer(memory, self.decoder, FULL, self.layer, threads=self._threads)
        for number, hidden in enumerate(self.hidden):
            seen = layer.run(hidden)
            self.hidden[number] = seen.hidden
            if see:
                see(number, seen)
        self.layer += 1

    def final_norm(self) -> FinalNorm:
        """The final norm alone, ready to run."""
        memory = WeightMemory()
        write_final_norm(memory, self._weights)
        return FinalNorm(memory, self.decoder, FULL, threads=self._threads)

    def head(self) -> Head:
        """The final norm and the head, ready to run."""
        memory = WeightMemory()
        write_final_norm(memory, self._weights)
        write_head(memory, self.decoder, self._weights, FULL, None)
        return Head(memory, self.decoder, FULL, threads=self._threads)

    def _embed(self, windows: Sequence[Sequence[int]]) -> list[Floats]:
        memory = WeightMemory()
        write_positions(memory, self.decoder, self._weights, self._length)
        if self.decoder.tied:
            write_head(memory, self.decoder, self._weights, FULL, None)
        else:
            write_embedding(memory, self.decoder, self._weights, FULL)
        embedding = Embedding(memory, self.decoder, FULL, threads=self._threads)
        return [embedding.run(window) for window in windows]
