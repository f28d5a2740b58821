"""The Triton kernels in Triton's interpreter. Triton decides at import, so these run in a process of their own:
`TRITON_INTERPRET=1 python -m pytest tests/interpreter`; tests/kernels/test_interpreter.py starts one.

bf16 products and casts are wrong in the interpreter (casts cut off, products are garbage): fp32 and fp16 here.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
