"""One thread a process: the tensors here are tiny, and threads that spin only slow each other."""

import torch

torch.set_num_threads(1)
