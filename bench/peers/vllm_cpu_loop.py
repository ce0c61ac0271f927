"""vLLM's engine in one process, stepped by us. Run by vLLM's own interpreter; see `bench.peers.loop_process`."""

from __future__ import annotations

import itertools

from vllm import EngineArgs, LLMEngine, SamplingParams

from bench.peers.loop_process import Options, answer


class Vllm:
    def __init__(self, options: Options) -> None:
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=options.model,
                max_model_len=options.context,
                max_num_seqs=options.streams,
                enable_prefix_caching=True,
                disable_log_stats=True,
                **options.choices,
            )
        )
        self.ids = itertools.count()
        self.counts: dict[str, int] = {}

    def submit(self, prompts: list[list[int]], max_tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        self.counts = {str(next(self.ids)): 0 for _ in prompts}
        for name, prompt in zip(self.counts, prompts, strict=True):
            self.engine.add_request(name, {"prompt_token_ids": prompt}, params)

    def step(self) -> list[int]:
        for output in self.engine.step():
            self.counts[output.request_id] = len(output.outputs[0].token_ids)
        return list(self.counts.values())


if __name__ == "__main__":
    answer(Vllm)
