"""streamda: data-aware LoRA initialization for models far larger than the GPU at hand.

import streamda

report = streamda.initialize(model="meta-llama/Llama-2-13b-hf", dataset="my_task.jsonl",
output_dir="adapter", max_gpu_mem="24GB")
print(report.to_table())
# later, anywhere: PeftModel.from_pretrained(base, "adapter", is_trainable=True)

A program that imports it keeps its signal handlers (only the command takes them over while it starts); what is asked of
PyTorch before it is imported is in `streamda.huge_pages` and `streamda.openmp`.
"""

from streamda import huge_pages, openmp, stopping

stopping.guard_start()  # the imports below take seconds
huge_pages.request()  # they also make tensors
openmp.spin_briefly()  # and bring PyTorch's threads with them

from streamda.api import collect, initialize, repair, solve, verify
from streamda.collected import Statistics, open_statistics
from streamda.errors import StreamdaError
from streamda.factors import LayerStatistics
from streamda.repair import Repair
from streamda.report import InitReport
from streamda.verification import Verification

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 - in groups, as a table of contents
    # stages
    "collect",
    "initialize",
    "solve",
    # checks
    "repair",
    "verify",
    # what they read and return
    "InitReport",
    "LayerStatistics",
    "Repair",
    "Statistics",
    "Verification",
    "open_statistics",
    # what they raise
    "StreamdaError",
    "__version__",
]
