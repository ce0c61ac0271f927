"""OpenVINO GenAI's pipeline, stepped by us. Run by its own interpreter; see `bench.peers.loop_process`."""

from __future__ import annotations

import itertools

import numpy as np
import openvino as ov
import openvino_genai as genai

from bench.peers.loop_process import Options, answer

BLOCK = 32  # tokens of a block of its cache


class OpenVino:
    def __init__(self, options: Options) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.num_kv_blocks = options.cache_tokens // BLOCK
        scheduler.max_num_seqs = options.streams
        scheduler.enable_prefix_caching = True
        properties = {
            "INFERENCE_NUM_THREADS": options.threads,
            "INFERENCE_PRECISION_HINT": options.choices["precision"],
        }
        self.pipeline = genai.ContinuousBatchingPipeline(options.model, scheduler, "CPU", properties)
        self.ids = itertools.count()
        self.handles: list[genai.GenerationHandle] = []
        self.counts: list[int] = []

    def submit(self, prompts: list[list[int]], max_tokens: int) -> None:
        config = genai.GenerationConfig(max_new_tokens=max_tokens, ignore_eos=True, do_sample=False)
        self.handles = [
            self.pipeline.add_request(next(self.ids), ov.Tensor(np.array([prompt], np.int64)), config)
            for prompt in prompts
        ]
        self.counts = [0] * len(prompts)

    def step(self) -> list[int]:
        self.pipeline.step()
        for i, handle in enumerate(self.handles):
            while handle.can_read():
                self.counts[i] += sum(len(output.generated_ids) for output in handle.read().values())
        return self.counts[:]


if __name__ == "__main__":
    answer(OpenVino)
