"""Train the two-tower AlexNet of 2012."""

import os

# Large tensors of a processor lie in huge pages, where Linux has them: torch reads this at its first allocation. Of the
# response normalization's time at batch 128, half was page faults: 36,000 of them forward and backward, 1,000 with.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
