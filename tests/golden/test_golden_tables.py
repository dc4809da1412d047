"""The golden tables of single functions of the processor: chat texts, visual tokens, BOS, tokenizer."""

import numpy as np
import pytest

from support.generated import generated
from support.golden_cases import table
from support.golden_processor import corrected, generated_processor, tokenizer

insert_bos = generated("processing_molmo2").insert_bos
CHATS = table("chat_template")
# What the original raises, and what the message here says.
CHAT_ERRORS = {
    "TemplateError": "roles must alternate",
    "IndexError": "conversation is empty",
    "TypeError": "content of a message from .user. is null",
}


@pytest.mark.parametrize("row", table("tokenizer"), ids=lambda row: ascii(row["text"]))
def test_tokenizer(row):
    """Every supported release of transformers reads the tokenizer files alike."""
    assert tokenizer()(row["text"])["input_ids"] == row["ids"]
    assert tokenizer().decode(row["ids"], clean_up_tokenization_spaces=False) == row["decoded"]
    skipped = tokenizer().decode(row["ids"], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert skipped == row["decoded_skip_special"]


@pytest.mark.parametrize("row", table("visual_tokens"), ids=lambda row: f"{row['kind']}-{row['processor_init']}")
def test_visual_tokens(row):
    processor = generated_processor(row)
    if row["kind"] == "image":
        text = processor.get_image_tokens(np.array(row["grid"]))
    else:
        text = processor.get_video_string(np.array(row["grid"]), np.array(row["timestamps"]))
    assert "".join(text) == row["text"]


# Rows of insert_bos.json where the original decides for the whole batch, or counts padding as text: what each row
# should be, without its padding.
BOS_PER_ROW = {
    4: [[1002, 7], [1002, 4, 5, 6]],
    5: [[1002, 5, 6], [1002, 4, 5, 6]],
    6: [[1002], [1002, 5, 6]],
    7: [[1002]],
    8: [[1002, 5, 6]],
}


@pytest.mark.parametrize(("index", "row"), list(enumerate(table("insert_bos"))))
def test_insert_bos(index, row):
    recorded = attended(*row["ok"])
    rows = [insert_bos(ids, row["bos"]) for ids in attended(row["input_ids"], row["attention_mask"])]
    assert rows == BOS_PER_ROW.get(index, recorded)
    assert (rows != recorded) == (index in BOS_PER_ROW)


def attended(input_ids, attention_mask):
    """The rows without what is masked."""
    if not input_ids or not isinstance(input_ids[0], list):
        input_ids, attention_mask = [input_ids], [attention_mask]
    return [
        [token for token, real in zip(ids, mask, strict=True) if real]
        for ids, mask in zip(input_ids, attention_mask, strict=True)
    ]


@pytest.mark.parametrize(
    "row", CHATS, ids=[f"{i}-{'-'.join(m['role'] for m in row['messages'])}" for i, row in enumerate(CHATS)]
)
def test_chat_template(row):
    """Texts are the recorded ones, corrected; errors stay errors, but for system messages."""
    messages, add_generation_prompt = row["messages"], row["add_generation_prompt"]
    processor = generated_processor({})

    def render():
        return processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)

    if messages and messages[0]["role"] == "system":
        system, user = (message["content"] for message in messages)
        prompt = "<|im_start|>assistant\n" if add_generation_prompt else ""
        assert render() == f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n{prompt}"
    elif "error" in row:
        with pytest.raises(Exception, match=CHAT_ERRORS[row["error"]["type"]]):
            render()
    else:
        assert render() == corrected(row["ok"], messages, add_generation_prompt)
