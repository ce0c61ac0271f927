"""OpenVINO reads token windows and leaves their logits as files. Run by its own interpreter for `bench.contestants`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import openvino as ov


def main() -> None:
    options = json.loads(sys.argv[1])
    properties = {"INFERENCE_NUM_THREADS": options["threads"], "INFERENCE_PRECISION_HINT": options["precision"]}
    request = ov.Core().compile_model(options["model"], "CPU", properties).create_infer_request()
    for number, window in enumerate(options["windows"]):
        request.reset_state()
        tokens = np.array([window], np.int64)
        feeds = {
            "input_ids": tokens,
            "attention_mask": np.ones_like(tokens),
            "position_ids": np.arange(len(window))[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        logits = request.infer(feeds)["logits"]  # [1, tokens, vocabulary]
        np.save(Path(options["folder"]) / f"{number}.npy", logits[0])


if __name__ == "__main__":
    main()
