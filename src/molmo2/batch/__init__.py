"""Questions over many images and videos: a table or folder in, one result per row out, whatever happens meanwhile.

    run_batch(open_source("questions.jsonl"), Path("answers.jsonl"), WorkerPool(settings))

Rows stream from the source through an engine into a journal beside the output; a run that was killed continues with
the rows that the journal lacks. `molmo2 batch` is this on the command line.
Nothing here needs torch: the model is in the processes of the pool, or in `molmo2.batch.engines.LocalEngine`.
"""

from molmo2.batch.journal import OutputError
from molmo2.batch.pool import WorkerPool
from molmo2.batch.rows import Row, SourceError, open_source
from molmo2.batch.run import Summary, run_batch
from molmo2.batch.settings import EngineError, EngineSettings

__all__ = [
    "EngineError",
    "EngineSettings",
    "OutputError",
    "Row",
    "SourceError",
    "Summary",
    "WorkerPool",
    "open_source",
    "run_batch",
]
