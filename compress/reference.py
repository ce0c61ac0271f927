"""The full-precision model's opinion of a text, without the memory for the model."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm import tqdm

from compress.checkpoint import Checkpoint, Floats
from compress.families import Decoder
from compress.scores import log_softmax
from compress.stream import Stream


class Reference:
    """Streams the model over `windows` once, layer by layer, and keeps the final hidden states and the head.

    Memory in float32: hidden_size numbers for every token of the windows, and the head's matrix.
    """

    def __init__(
        self, checkpoint: Checkpoint, decoder: Decoder, windows: Sequence[Sequence[int]], *, threads: int
    ) -> None:
        stream = Stream(checkpoint, decoder, windows, threads=threads)
        for _ in tqdm(range(decoder.num_layers), desc="reference", unit="layer", disable=None):
            stream.run_layer()
        self._hidden = stream.hidden
        self._head = stream.head()

    def log_probabilities(self, window: int, start: int, end: int) -> Floats:
        """[end - start, vocab], in natural logarithms, behind the tokens `start` to `end` of window number `window`."""
        return log_softmax(self._head.run(self._hidden[window][start:end]))
