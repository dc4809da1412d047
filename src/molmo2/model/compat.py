"""The one place for calls whose signature changed between the supported releases of transformers (4.57.1 .. 5.24)."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_MASK_PARAMETERS = frozenset(inspect.signature(create_causal_mask).parameters)
# What the library calls `past_key_values` in arguments, outputs and options of `generate`: "cache" from 5.24 on.
CACHE_NAME = next(
    field.name for field in fields(BaseModelOutputWithPast) if field.name in ("past_key_values", "cache")
)
_CACHE_TAKES_KWARGS_DICT = "cache_kwargs" in inspect.signature(Cache.update).parameters

Function = TypeVar("Function", bound=Callable)


def takes_cache(function: Function) -> Function:
    """A forward pass or hook of `generate` whose `past_key_values` may be passed as `cache`, its name from 5.24 on.

    Raises:
        ValueError: When called with two caches.
    """

    @wraps(function)
    def with_either_name(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.pop("cache", None)
        if cache is not None:
            named = kwargs.get("past_key_values")
            if named is not None and named is not cache:
                raise ValueError("`cache` and `past_key_values` are two names of one argument: pass one of them.")
            kwargs["past_key_values"] = cache
        return function(*args, **kwargs)

    # `generate` looks for its own name among the arguments.
    signature = inspect.signature(function)
    names = {"past_key_values": CACHE_NAME}
    parameters = [entry.replace(name=names.get(name, name)) for name, entry in signature.parameters.items()]
    with_either_name.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return with_either_name  # type: ignore[return-value]


def mask_arguments(inputs_embeds: Tensor, past_key_values: Cache | None, cache_position: Tensor) -> dict[str, Any]:
    """Those arguments of `create_causal_mask` whose names differ between releases, or that some do not take."""
    embeds, cache = inputs_embeds, past_key_values
    names = {"inputs_embeds": embeds, "input_embeds": embeds, "past_key_values": cache, "cache": cache}
    arguments = {**names, "cache_position": cache_position}
    return {name: value for name, value in arguments.items() if name in _MASK_PARAMETERS}


def update_cache(
    cache: Cache, key: Tensor, value: Tensor, layer_idx: int, cache_position: Tensor
) -> tuple[Tensor, Tensor]:
    """Append `key` and `value`, each (B, heads, S, head_dim), and return everything the layer has seen.

    With the arguments of the library's own models: caches of others may take no more.
    """
    if _CACHE_TAKES_KWARGS_DICT:
        return cache.update(key, value, layer_idx, {"cache_position": cache_position})
    return cache.update(key, value, layer_idx)


def scaled_rope(config: Any) -> tuple[Tensor, float]:
    """Scaled inverse frequencies (head_dim / 2,), float32, and the factor on cos and sin, by transformers.

    Its functions are given the attributes that they have read in any release.
    """
    parameters = dict(config.rope_parameters)
    if parameters["rope_type"] == "yarn":  # the default of 4.57; later releases require it
        parameters.setdefault("original_max_position_embeddings", config.max_position_embeddings)
    names = ("rope_scaling", "rope_theta", "head_dim", "hidden_size", "num_attention_heads", "max_position_embeddings")
    settings: Any = SimpleNamespace(
        rope_parameters=parameters,
        standardize_rope_params=lambda: None,  # they are in the standard form already
        partial_rotary_factor=1.0,
        **{name: getattr(config, name) for name in names},
    )
    with torch.device("cpu"):
        inv_freq, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](settings, torch.device("cpu"))
    return inv_freq.float(), float(factor)
