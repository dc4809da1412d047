"""The process of one measurement: `python -m benchmarks.child '{"row": ..., "side": ...}'`, JSON on the last line."""

import json
import sys
from pathlib import Path

from benchmarks.harness import Settings, Side, measure


def main() -> None:
    request = json.loads(sys.argv[1])
    settings = request["settings"]
    settings = Settings(**{**settings, "cache": Path(settings["cache"])})

    import torch

    torch.set_num_threads(settings.threads)
    from benchmarks.catalogue import find

    prepare, device = find(request["row"], request["point"])
    # Compiled code may reject inference tensors.
    with torch.no_grad() if device == "cuda" else torch.inference_mode():
        found = measure(prepare, Side(request["side"], settings), device)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
