"""ONNX Runtime GenAI's generator, stepped by us. Run by its own interpreter; see `bench.peers.loop_process`."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime_genai as genai

from bench.peers.loop_process import Options, answer


class OrtGenai:
    """A generator for each request: the first step computes its prompt."""

    def __init__(self, options: Options) -> None:
        config = genai.Config(options.model)
        # no token ends a request: its length does
        session = {
            "model": {"eos_token_id": [], "decoder": {"session_options": {"intra_op_num_threads": options.threads}}}
        }
        config.overlay(json.dumps(session))
        self.model = genai.Model(config)
        self.prompt: list[int] = []
        self.max_tokens = self.count = 0

    def submit(self, prompts: list[list[int]], max_tokens: int) -> None:
        (self.prompt,) = prompts
        self.max_tokens, self.count = max_tokens, 0

    def step(self) -> list[int]:
        if not self.count:
            params = genai.GeneratorParams(self.model)
            length = len(self.prompt) + self.max_tokens
            params.set_search_options(do_sample=False, min_length=length, max_length=length)
            self.generator = genai.Generator(self.model, params)
            self.generator.append_tokens(np.array(self.prompt, np.int32))
        self.generator.generate_next_token()
        self.count += 1
        return [self.count]


if __name__ == "__main__":
    answer(OrtGenai)
