"""What was measured with the six files above, on a small pipeline and a CPU; see README.md."""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its notes on torchvision, at import
