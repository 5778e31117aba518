"""What every test run starts from; set before torch, triton or transformers are imported."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a model hub
os.environ.setdefault("MPLBACKEND", "Agg")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Time limits per example would only measure how busy the machine is.
settings.register_profile("kvenv", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("kvenv")
