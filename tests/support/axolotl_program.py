"""axolotl's command without triton, a gigabyte of kernels that no CPU runs.

One module that it imports is made of them; two functions of it are used elsewhere, in reinforcement learning. Here
they are None: whatever calls them fails.
"""

import sys
from types import ModuleType

kernels = ModuleType("axolotl.monkeypatch.trainer.utils")
vars(kernels).update(entropy_from_logits=None, selective_log_softmax=None)
sys.modules[kernels.__name__] = kernels

from axolotl.cli.main import main  # noqa: E402

if __name__ == "__main__":
    main()
