"""What the numbers of a LoRA can be stored in, by the names that users choose from."""

import torch

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
