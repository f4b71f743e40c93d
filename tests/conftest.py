"""Where there is no GPU, Triton's interpreter runs the kernels.

That is chosen for a whole process, before anything in it imports Triton.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
