"""Base models: resolving, loading at 16, 8 and 4 bit, facts per architecture, the head's split.

Import the modules one by one (`models.resolve`, `models.load`, ...): each pulls in torch and
transformers, and this package must stay light.
"""

import logging

# On a CPU with avx512_bf16 bitsandbytes looks for an optional download when it is imported (also
# by transformers and peft) and warns when there is none. Training never takes that road, see
# `models.quantization.guard_cpu_4bit`.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# LLM.int8 says at every product that it casts to float16; `models.load` says it once.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
