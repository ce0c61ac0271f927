"""Where tests of artifacts for CUDA run: in the host's memory, and by `make test-gpu` on a GPU, the same code."""

from __future__ import annotations

import pytest

from serve.device_stream import HOST, Device

DEVICES = [pytest.param(HOST, id="host"), pytest.param(Device("cuda"), id="cuda", marks=pytest.mark.gpu)]
