"""`apply_model` and `compute_embeddings` for Molmo2: batches of videos, prepared ahead, and failures one by one.

FiftyOne's own loop over videos drops `batch_size` and `num_workers`, decodes every file a second time with ffmpeg, and
has no hook for models. `register_loops` puts one in front of its two functions: they hand collections of a model's own
kind of media to its methods `apply_to_samples` and `embed_samples`, if it has them; other calls stay as they are.
"""

import functools
import inspect
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import fiftyone.core.models as fom
import fiftyone.core.utils as fou

logger = logging.getLogger(__name__)

METHODS = {"apply_model": "apply_to_samples", "compute_embeddings": "embed_samples"}


def register_loops() -> None:
    """Put the hook in front of `apply_model` and `compute_embeddings` of `fiftyone.core.models`, once."""
    for name, method in METHODS.items():
        function = getattr(fom, name)
        if not hasattr(function, "molmo2_method"):
            setattr(fom, name, _with_hook(function, method))


def _with_hook(function: Callable[..., Any], method: str) -> Callable[..., Any]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def hooked(samples: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        own = getattr(model, method, None)
        if own is None or model.media_type != samples.media_type:  # a model for images may be applied to frames
            return function(samples, model, *args, **kwargs)
        call = signature.bind(samples, model, *args, **kwargs)
        call.apply_defaults()
        options = dict(call.arguments)
        del options["model"]
        return own(options.pop("samples"), options.pop("kwargs"), **options)

    hooked.molmo2_method = method  # type: ignore[attr-defined]
    return hooked


def results(
    samples: Any,
    prepare: Callable[[Sequence[Any]], Any],
    compute: Callable[[Any], Any],
    *,
    batch_size: int,
    num_workers: int,
    skip_failures: bool,
    progress: Any = None,
) -> Iterator[tuple[Any, Any]]:
    """Each sample with its result, or with None where it failed.

    Args:
        prepare: From the samples of a batch to the inputs of the model; runs in threads, `num_workers` batches ahead,
            or, with 0, when they are needed.
        compute: From the inputs to one result per sample.
        skip_failures: The samples of a batch that fails are tried again one by one; those that fail are logged.
    """
    with fou.ProgressBar(samples, progress=progress) as bar:
        for batch, inputs in _prepared(fou.iter_batches(samples, batch_size), prepare, num_workers):
            try:
                found = compute(inputs())
            except Exception as error:  # decoders, models and labels raise anything
                if not skip_failures:
                    raise
                if len(batch) == 1:
                    _log(batch[0], error)
                    found = [None]
                else:
                    found = [_single(sample, prepare, compute) for sample in batch]
            yield from zip(batch, found)
            bar.update(len(batch))


def _prepared(
    batches: Iterator[Any], prepare: Callable[[Sequence[Any]], Any], num_workers: int
) -> Iterator[tuple[Any, Callable[[], Any]]]:
    """Batches with a function that gives, or waits for, their inputs."""
    if num_workers == 0:
        for batch in batches:
            yield batch, functools.partial(prepare, batch)
        return
    waiting: deque[tuple[Any, Future[Any]]] = deque()
    with ThreadPoolExecutor(num_workers, thread_name_prefix="molmo2-prepare") as pool:
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(prepare, batch)))
                if len(waiting) > num_workers:
                    done, future = waiting.popleft()
                    yield done, future.result
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result
        finally:
            for _, future in waiting:
                future.cancel()


def _single(sample: Any, prepare: Callable[..., Any], compute: Callable[..., Any]) -> Any:
    try:
        return compute(prepare([sample]))[0]
    except Exception as error:
        _log(sample, error)
        return None


def _log(sample: Any, error: Exception) -> None:
    logger.warning("Sample %s (%s) is skipped: %s", sample.id, sample.filepath, error)


def store(sample: Any, save: Callable[[], Any], skip_failures: bool) -> None:
    """Call `save`, whose failure is logged under `skip_failures`."""
    try:
        save()
    except Exception as error:
        if not skip_failures:
            raise
        _log(sample, error)
