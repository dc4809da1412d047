"""Attention in blocks: the same numbers as with a mask in one piece, and no memory that grows with S x S."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from molmo2.model.attention.blockwise import BlockwiseMask, blockwise_attention, plan_blocks
from molmo2.model.attention.dispatch import eager_attention
from molmo2.model.attention.mask import AttentionSpec, mask_mod
from molmo2.model.modeling import Molmo2ForConditionalGeneration
from molmo2.model.text import Molmo2Attention
from support.allocations import Allocations
from support.checkpoints import FAMILIES, build_model, fill_weights, tiny_config
from support.model_inputs import MIXED, batch, real_tokens

ATOL = 2e-5


@pytest.fixture
def small_blocks(monkeypatch):
    """Tiny prompts take many blocks."""
    monkeypatch.setattr(BlockwiseMask, "queries_per_block", 5)


def in_one_piece(monkeypatch) -> None:
    monkeypatch.setattr(BlockwiseMask, "queries_per_block", 10**9)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return build_model(request.param)


def tables_of(visual: str = "", padding: str = "", examples: str = "", branches: str = "") -> AttentionSpec:
    """Tables of one row, a letter per token: `v` visual, `x` padding, digits for examples and branches."""

    def ids(text: str) -> torch.Tensor | None:
        return torch.tensor([[int(digit) for digit in text]]) if text else None

    return AttentionSpec(
        is_real=torch.tensor([[letter != "x" for letter in padding]]) if padding else None,
        is_visual=torch.tensor([[letter == "v" for letter in visual]]) if visual else None,
        example_ids=ids(examples),
        branch_ids=ids(branches),
    )


def random_tables(seed: int, batch_size: int, length: int) -> AttentionSpec:
    """Every table is there in half of the cases; examples and branches come in runs, padding on one side."""
    random = torch.Generator().manual_seed(seed)

    def coin() -> bool:
        return bool(torch.rand((), generator=random) < 0.5)

    def runs(chance: float) -> torch.Tensor:
        return (torch.rand(batch_size, length, generator=random) < chance).long().cumsum(-1)

    padded = torch.randint(0, length, (batch_size, 1), generator=random)
    place = torch.arange(length)
    return AttentionSpec(
        is_real=((place >= padded) if coin() else (place <= padded)) if coin() else None,
        is_visual=(runs(0.3) % 2 == 1) if coin() else None,
        example_ids=runs(0.1) if coin() else None,
        branch_ids=(runs(0.2) % 4) if coin() else None,
    )


def dense(tables: AttentionSpec, batch_size: int, first_query: int, length: int) -> torch.Tensor:
    """The rule, pair by pair."""
    batch_idx = torch.arange(batch_size)[:, None, None, None]
    query, key = torch.arange(first_query, length)[:, None], torch.arange(length)
    return mask_mod(tables)(batch_idx, batch_idx, query, key).expand(batch_size, 1, -1, -1)


def assembled(mask: BlockwiseMask, length: int) -> torch.Tensor:
    """The blocks of a mask put together: pairs outside of all blocks are forbidden."""
    whole = torch.zeros(mask.batch, 1, length, length, dtype=torch.bool)
    for block in mask.blocks:
        part = mask.part(block, torch.device("cpu"))
        part = True if part is None else part
        whole[:, :, block.start : block.end, block.first_key : block.last_key] = part
    return whole[:, :, mask.first_query :]


# --- the rule and the plan of blocks ---------------------------------------------------------------------------------


def drawing(mask: torch.Tensor) -> list[str]:
    return ["".join("1" if allowed else "." for allowed in row) for row in mask[0, 0].tolist()]


def test_packed_examples_with_their_own_images():
    assert drawing(dense(tables_of(visual="tvvttvv", examples="0000111"), 1, 0, 7)) == [
        "1......",
        "111....",
        "111....",
        "1111...",
        "....1..",
        "....111",
        "....111",
    ]


def test_branches_see_their_prefix_and_themselves():
    assert drawing(dense(tables_of(visual="vvttttt", branches="0001122"), 1, 0, 7)) == [
        "11.....",
        "11.....",
        "111....",
        "1111...",
        "11111..",
        "111..1.",
        "111..11",
    ]


def planned(tables: AttentionSpec, length: int, size: int, first_query: int = 0) -> list[tuple]:
    blocks = plan_blocks(tables, 1, first_query, length, size)
    return [(block.start, block.end, block.first_key, block.last_key, block.is_masked) for block in blocks]


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        # Causal: each block needs the keys up to its own end.
        (AttentionSpec(), [(0, 2, 0, 2, True), (2, 4, 0, 4, True), (4, 6, 0, 6, True)]),
        # Visual tokens need keys up to the block of the last one; where all pairs are visual, no mask.
        (tables_of(visual="vvvvtt"), [(0, 2, 0, 4, False), (2, 4, 0, 4, False), (4, 6, 0, 6, True)]),
        (tables_of(visual="ttvttv"), [(0, 2, 0, 2, True), (2, 4, 0, 6, True), (4, 6, 0, 6, True)]),
        # Keys of earlier examples and of padding are left out.
        (tables_of(examples="001122"), [(0, 2, 0, 2, True), (2, 4, 2, 4, True), (4, 6, 4, 6, True)]),
        (tables_of(padding="xxtttt"), [(0, 2, 0, 2, True), (2, 4, 2, 4, True), (4, 6, 2, 6, True)]),
        # Branches reach back to their prefix.
        (tables_of(branches="001122"), [(0, 2, 0, 2, True), (2, 4, 0, 4, True), (4, 6, 0, 6, True)]),
    ],
)
def test_keys_of_each_block(tables, expected):
    assert planned(tables, 6, 2) == expected


def test_queries_after_cached_keys():
    assert planned(AttentionSpec(), 7, 3, first_query=4) == [(4, 6, 0, 6, True), (6, 7, 0, 7, True)]


@pytest.mark.parametrize("seed", range(60))
def test_blocks_together_are_the_rule(seed):
    random = torch.Generator().manual_seed(1000 + seed)
    batch_size, size = (int(torch.randint(1, high, (), generator=random)) for high in (4, 9))
    length = int(torch.randint(1, 40, (), generator=random))
    first_query = int(torch.randint(0, length, (), generator=random))
    tables = random_tables(seed, batch_size, length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockwiseMask, "queries_per_block", size)
        mask = BlockwiseMask(tables, batch_size, first_query, length, torch.device("cpu"))
    assert torch.equal(assembled(mask, length), dense(tables, batch_size, first_query, length))


# --- the attention ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("allocated", [0, 7], ids=["keys of the sequence", "keys of an allocated cache"])
def test_outputs_and_gradients_equal_those_of_the_whole_mask(small_blocks, seed, allocated):
    length, first_query = 23, 4 if seed % 2 else 0
    random = torch.Generator().manual_seed(seed)
    tables = random_tables(seed, 2, length)
    query = torch.randn(2, 4, length - first_query, 6, generator=random, requires_grad=True)
    key, value = (torch.randn(2, 2, length + allocated, 6, generator=random, requires_grad=True) for _ in range(2))
    mask = BlockwiseMask(tables, 2, first_query, length, torch.device("cpu"))
    whole = dense(tables, 2, first_query, length)
    sees_some = whole.any(-1).transpose(1, 2)[..., None]  # others are padding: no meaning
    found = blockwise_attention(query, key, value, mask, 0.4, 0.0) * sees_some
    expected, _ = eager_attention(query, key[:, :, :length], value[:, :, :length], whole, 0.4, 0.0)
    expected = expected * sees_some
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    upstream = torch.randn(found.shape, generator=random)
    inputs = (query, key, value)
    gradients = [torch.autograd.grad((output * upstream).sum(), inputs) for output in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_dropout_is_the_same_in_the_backward_pass(small_blocks):
    """Blocks are computed again there; other dropped weights would give a gradient of another function."""
    query = torch.zeros(1, 1, 12, 2)
    value = torch.ones(1, 1, 12, 2, requires_grad=True)
    mask = BlockwiseMask(AttentionSpec(), 1, 0, 12, torch.device("cpu"))
    torch.manual_seed(0)
    output = blockwise_attention(query, query, value, mask, 1.0, 0.5)
    assert output.std() > 0.1  # weights were dropped
    (gradient,) = torch.autograd.grad(output.sum(), value)
    # Linear in the values, so the gradient times the values is the output.
    torch.testing.assert_close((gradient * value).sum(), output.sum())


# --- the model -------------------------------------------------------------------------------------------------------


def count_blocks(monkeypatch) -> list[int]:
    """Blocks of each mask that is made from now on."""
    counts: list[int] = []
    original = BlockwiseMask.__init__

    def counting(self, *arguments):
        original(self, *arguments)
        counts.append(len(self.blocks))

    monkeypatch.setattr(BlockwiseMask, "__init__", counting)
    return counts


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_in_blocks(model, side, monkeypatch):
    inputs = batch(*MIXED, padding_side=side)
    in_one_piece(monkeypatch)
    expected = model(**inputs).logits
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    for size in (1, 5, 64):
        monkeypatch.setattr(BlockwiseMask, "queries_per_block", size)
        counts = count_blocks(monkeypatch)
        found = model(**inputs).logits
        assert counts == [-(-inputs["input_ids"].shape[1] // size)]
        assert not found.isnan().any()
        for other in (expected, eager(**inputs).logits):
            for a, b in zip(real_tokens(found, inputs), real_tokens(other, inputs), strict=True):
                torch.testing.assert_close(a, b, atol=ATOL, rtol=0)


@torch.no_grad()
def test_plain_text_needs_no_mask_at_all(model, small_blocks, monkeypatch):
    counts = count_blocks(monkeypatch)
    inputs = batch("text")
    found = model(**inputs).logits
    assert counts == []
    in_one_piece(monkeypatch)
    torch.testing.assert_close(found, model(**inputs).logits, atol=ATOL, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_in_blocks(model, side, checkpointing, monkeypatch):
    inputs = batch("image", "video", "text", padding_side=side)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    gradients = []
    for size in (10**9, 5):
        monkeypatch.setattr(BlockwiseMask, "queries_per_block", size)
        trained = copy.deepcopy(model).train()
        if checkpointing:
            trained.gradient_checkpointing_enable()
        trained(**inputs, labels=labels).loss.backward()
        gradients.append({name: value.grad for name, value in trained.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) > 50
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-5, rtol=1e-4)


def answer(model, inputs, **options) -> list[list[int]]:
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 1151, "pad_token_id": 1000, **options}
    return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static", "disable_compile": True},
        {"num_beams": 3},
        {"use_cache": False},
        {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
    ],
    ids=str,
)
def test_answers_in_blocks(model, options, monkeypatch):
    inputs = batch(*MIXED)
    in_one_piece(monkeypatch)
    expected = answer(model, inputs, **options)
    monkeypatch.setattr(BlockwiseMask, "queries_per_block", 5)
    counts = count_blocks(monkeypatch)
    assert answer(model, inputs, **options) == expected
    # Only the prefill takes blocks; without a cache every step is one.
    assert len(counts) == (6 if options.get("use_cache") is False else 1)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_a_long_question_after_a_kept_cache(model, kind, small_blocks, monkeypatch):
    text = model.config.text_config
    inputs = batch("image", "text")
    question = torch.arange(40, 54).repeat(2, 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(question)], 1)
    logits = []
    for size in (10**9, 5):
        monkeypatch.setattr(BlockwiseMask, "queries_per_block", size)
        cache = DynamicCache(config=text) if kind == "dynamic" else StaticCache(config=text, max_cache_len=200)
        model(**inputs, past_key_values=cache)
        logits.append(model(input_ids=question, attention_mask=mask, past_key_values=cache).logits)
    torch.testing.assert_close(logits[1], logits[0], atol=ATOL, rtol=0)


# --- memory ----------------------------------------------------------------------------------------------------------


def thin_model(max_length: int) -> Molmo2ForConditionalGeneration:
    """One layer, one head of 8: everything but an S x S tensor is small."""
    config = tiny_config("qwen3")
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    for name, value in (sizes | {"hidden_size": 8, "max_position_embeddings": max_length}).items():
        setattr(config.text_config, name, value)
    config.adapter_config.text_hidden_size = 8
    model = Molmo2ForConditionalGeneration(config)
    fill_weights(model, 0)
    return model.eval()


def clip_and_text(length: int) -> dict[str, torch.Tensor]:
    """A row in which three quarters are frames of 16 visual tokens with 4 of text between, then text."""
    place = torch.arange(length)
    types = ((place % 20 < 16) & (place < length * 3 // 4))[None]
    return {"input_ids": (place % 1000)[None], "token_type_ids": types}


def prefill(model, length: int) -> Allocations:
    with torch.no_grad(), Allocations() as counted:
        model(**clip_and_text(length), logits_to_keep=1)
    return counted


def training_step(model, length: int) -> Allocations:
    inputs = clip_and_text(length)
    with Allocations() as counted:
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        hidden.square().sum().backward()
    model.zero_grad()
    return counted


@pytest.mark.parametrize("run", [prefill, training_step])
def test_memory_grows_with_the_length_alone(run):
    model = thin_model(4096)
    lengths = (1024, 2048, 4096)
    counted = {length: run(model, length) for length in lengths}
    peaks = [counted[length].peak_bytes for length in lengths]
    assert all(counted[length].largest <= 512 * length for length in lengths)  # one block's mask
    assert peaks[1] <= 2.05 * peaks[0]
    assert peaks[2] <= 2.05 * peaks[1]


def test_the_count_of_memory_notices_a_whole_mask(monkeypatch):
    model = thin_model(2048)
    in_one_piece(monkeypatch)
    counted = [prefill(model, length) for length in (1024, 2048)]
    assert counted[1].largest >= 2048**2
    assert counted[1].peak_bytes > 3.5 * counted[0].peak_bytes


@pytest.mark.slow
def test_a_prompt_of_full_length():
    """36,864 tokens: a mask in one piece would take 1.4 GB as bool."""
    length = 36_864
    model = thin_model(length)
    counted = prefill(model, length)
    assert counted.largest <= 512 * length
    assert counted.peak_bytes < 0.1 * length**2 * 4
    # Rows of the attention, against the sum written out.
    inputs = clip_and_text(length)
    tables = AttentionSpec(is_visual=inputs["token_type_ids"])
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, length, 8, generator=random) for _ in range(3))
    mask = BlockwiseMask(tables, 1, 0, length, torch.device("cpu"))
    attention = Molmo2Attention(model.config.text_config, 0)
    found, _ = attention.attend(query, key, value, mask, "sdpa")
    for place in (0, 17, 1000, 20_001, 27_640, 27_660, length - 1):
        row = mask_mod(tables)(torch.tensor(0), torch.tensor(0), torch.tensor(place), torch.arange(length))
        scores = (key[0, 0] @ query[0, 0, place] * 8**-0.5).masked_fill(~row, float("-inf"))
        torch.testing.assert_close(found[0, place], scores.softmax(-1) @ value[0, 0], atol=1e-5, rtol=0)


def test_a_prefill_makes_the_logits_of_one_place(model, monkeypatch):
    """`generate` needs the last ones; all of them would be S x vocabulary."""
    shapes = []
    handle = model.lm_head.register_forward_hook(lambda module, given, output: shapes.append(tuple(output.shape)))
    inputs = batch("image", "text")
    answer(model, inputs)
    handle.remove()
    assert set(shapes) == {(2, 1, model.config.vocab_size)}
