"""A miniature Molmo2 that really points: a synthetic world, its questions, training from scratch, and scores.

`world` draws, `questions` asks and answers, `layout` says how large the model is, `tokenizer` writes its vocabulary,
`native` keeps it in the trainer's form, `batches` and `dense_heads` and `train` teach it, `evaluate` scores it.
"""

import sys
from pathlib import Path

REPOSITORY = str(Path(__file__).resolve().parents[2])
if REPOSITORY not in sys.path:  # `convert` and the modules of the remote code lie there
    sys.path.insert(0, REPOSITORY)
