"""Masks and positions as drawings: rows are queries, columns keys, 1 = may attend."""

import pytest
import torch
from transformers import DynamicCache

from molmo2.model.attention.dispatch import attention_implementation, make_attention_mask
from molmo2.model.attention.mask import (
    AttentionSpec,
    make_position_ids,
    mask_mod,
    split_examples_by_position_ids,
    starts_sequence,
)
from support.checkpoints import tiny_config


def drawing(mask: torch.Tensor) -> list[str]:
    return ["".join("1" if allowed else "." for allowed in row) for row in mask.tolist()]


def dense_mask(visual: str, attention_mask: list[int] | None = None, implementation: str = "sdpa") -> torch.Tensor:
    """The mask that one row of tokens gets; `visual` says which are: "tvvt" is text, visual, visual, text."""
    config = tiny_config("qwen3").text_config
    config._attn_implementation = implementation
    is_visual = torch.tensor([[kind == "v" for kind in visual]])
    padding = None if attention_mask is None else torch.tensor([attention_mask])
    embeds = torch.zeros(1, len(visual), 8)
    places = torch.arange(len(visual))
    tables = AttentionSpec(is_visual=is_visual)
    return make_attention_mask(config, embeds, padding, None, tables, implementation, places)[0, 0]


def test_visual_tokens_see_each_other_and_text_stays_causal():
    assert drawing(dense_mask("tvvtv")) == [
        "1....",
        "111.1",
        "111.1",
        "1111.",
        "11111",
    ]


def test_padding_is_never_a_key():
    assert drawing(dense_mask("ttvv", [0, 1, 1, 1])) == [
        "....",
        ".1..",
        ".111",
        ".111",
    ]


def test_padding_among_visual_tokens_is_hidden_too():
    # Right padding: the queries of padding may attend to anything, nothing attends to them.
    assert [row[-1] for row in drawing(dense_mask("vvtt", [1, 1, 1, 0]))] == ["."] * 4


def test_eager_gets_the_same_mask_as_numbers_to_add():
    added = dense_mask("tvvtv", implementation="eager")
    assert drawing(added == 0) == drawing(dense_mask("tvvtv"))
    assert added.min() == torch.finfo(added.dtype).min


def test_keys_past_the_sequence_are_not_visual():
    allowed = mask_mod(AttentionSpec(is_visual=torch.tensor([[True, True]])))
    index = torch.tensor(0)
    assert bool(allowed(index, index, torch.tensor(0), torch.tensor(1)))
    assert not bool(allowed(index, index, torch.tensor(0), torch.tensor(2)))
    assert not bool(allowed(index, index, torch.tensor(3), torch.tensor(5)))
    assert bool(allowed(index, index, torch.tensor(5), torch.tensor(3)))  # causal, as everywhere


def test_a_prepared_mask_is_used_as_it_is():
    prepared = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    config = tiny_config("qwen3").text_config
    arguments = (torch.zeros(1, 3, 8), prepared, None, AttentionSpec(), "sdpa", torch.arange(3))
    assert make_attention_mask(config, *arguments) is prepared
    inside = (torch.zeros(1, 3, 8), {"full_attention": prepared}, None, AttentionSpec(), "sdpa", torch.arange(3))
    assert make_attention_mask(config, *inside) is prepared


@pytest.mark.parametrize(
    ("chosen", "wants_weights", "has_visual", "expected"),
    [
        ("sdpa", False, True, "sdpa"),
        ("sdpa", True, True, "eager"),  # only eager computes weights
        ("flex_attention", False, True, "flex_attention"),
        ("flash_attention_2", False, True, "sdpa"),  # flash has no mask of this kind
        ("flash_attention_2", False, False, "flash_attention_2"),
        (None, False, False, "sdpa"),
    ],
)
def test_implementation_of_a_pass(chosen, wants_weights, has_visual, expected):
    config = tiny_config("qwen3").text_config
    config._attn_implementation_internal = chosen
    assert attention_implementation(config, wants_weights, has_visual) == expected


def test_positions_count_real_tokens():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    expected = [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 2, 2]]
    assert make_position_ids(mask, torch.arange(5), 5).tolist() == expected
    # A later step: the mask covers what is cached, the query is its last column.
    assert make_position_ids(mask, torch.arange(4, 5), 1).tolist() == [[2], [4], [2]]
    # A mask may cover places that nothing fills yet, as for caches of fixed size.
    assert make_position_ids(mask, torch.arange(1, 3), 2).tolist() == [row[1:3] for row in expected]
    assert make_position_ids(None, torch.arange(3, 5), 2).tolist() == [[3, 4]]
    # As many queries as rows are still a later step, and slots past the mask come after what it counts.
    assert make_position_ids(mask[1:2], torch.arange(4, 5), 1).tolist() == [[4]]
    assert make_position_ids(mask[1:2], torch.arange(6, 7), 1).tolist() == [[4]]


def test_examples_by_positions_that_restart():
    spec = AttentionSpec(is_visual=torch.tensor([[True, False, False]]))
    assert split_examples_by_position_ids(spec, torch.tensor([[0, 1, 2]]), 1) is spec
    split = split_examples_by_position_ids(spec, torch.tensor([[0, 1, 0]]), 2)
    assert (split.is_visual is spec.is_visual, split.example_ids.tolist()) == (True, [[0, 0, 1]] * 2)


def test_only_a_prefill_starts_a_sequence():
    cache = DynamicCache()
    assert starts_sequence(4, None)
    assert starts_sequence(2, cache)
    assert not starts_sequence(1, cache)  # one query has no other token to see
    cache.update(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), 0)
    assert not starts_sequence(4, cache)
