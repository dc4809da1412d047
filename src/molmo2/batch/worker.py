"""The process that answers rows for `pool`: JSON lines in, JSON lines out.

    -> {"settings": {...}, "index": 0}              first of all
    <- {"ready": true} or {"failed": "why"}
    -> [{"number": 7, "question": ...}, ...]        rows to sort and answer, at any time
    <- {"busy": [7]}, {"idle": [7]} and {"result": {...}}

The end of the input ends the process, also amid an answer: the process that started it has ended. What libraries
print goes to stderr, so that it cannot get between the lines.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from queue import Queue
from threading import Lock, Thread
from typing import Any

from molmo2.batch.engines import LocalEngine, ServerEngine, Watch
from molmo2.batch.rows import Row
from molmo2.batch.settings import EngineError, EngineSettings


def main() -> int:
    """Answer rows from stdin until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: who started this process ends it
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lock = Lock()

    def send(message: dict[str, Any]) -> None:
        try:
            with lock:
                output.write(json.dumps(message) + "\n")
                output.flush()
        except OSError:  # the reader has gone
            os._exit(1)

    line = sys.stdin.readline()
    if not line:
        return 1
    first = json.loads(line)
    try:
        engine = _open_engine(EngineSettings(**first["settings"]), first["index"], _watcher(send))
    except Exception as error:  # whatever keeps the model from loading is told to the one who waits for it
        send({"failed": f"{type(error).__name__}: {error}"})
        return 1
    send({"ready": True})
    windows: Queue[list[Row]] = Queue()
    Thread(target=_receive, args=(windows,), daemon=True).start()
    try:
        engine.serve(windows, lambda result: send({"result": result}))
    except Exception as error:
        send({"failed": str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"})
        os._exit(1)  # other threads may be amid a request
    return 0


def _watcher(send: Callable[[dict[str, Any]], None]) -> Watch:
    return lambda rows, busy: send({"busy" if busy else "idle": [row.number for row in rows]})


def _receive(windows: "Queue[list[Row]]") -> None:
    for line in sys.stdin:
        windows.put([Row(**values) for values in json.loads(line)])
    os._exit(0)


def _open_engine(settings: EngineSettings, index: int, watch: Watch) -> Any:
    """The engine of the settings; worker number `index` takes that GPU, if there are several."""
    if settings.server is not None:
        from molmo2.client import Client, api_key

        options: dict[str, Any] = {"timeout": settings.timeout, "max_concurrency": settings.batch_size}
        client = Client(settings.server, model=settings.model, api_key=api_key(), **options)
        return ServerEngine(client, settings, watch)
    import torch
    from transformers.utils import logging

    from molmo2.registration import load

    logging.disable_progress_bar()
    model, processor = load(str(settings.model), dtype=settings.dtype)
    device = settings.device
    if device == "auto":
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        device = f"cuda:{gpu_index(index, gpus, os.environ)}" if gpus else "cpu"
    return LocalEngine(model.to(device), processor, settings, watch, is_worker=True)  # type: ignore[arg-type]


def gpu_index(index: int, gpus: int, environment: Mapping[str, str]) -> int:
    """The GPU of worker number `index`; the processes of a launcher, each with such workers, take turns."""
    local, count = int(environment.get("LOCAL_RANK", 0)), int(environment.get("LOCAL_WORLD_SIZE", 1))
    return (local + index * count) % gpus


if __name__ == "__main__":
    sys.exit(main())
