"""Model card: the README.md of the converted folder."""

from molmo2.convert.config_files import rope_scaling
from molmo2.convert.native_config import NativeConfig

PACKAGE = """
With the package (`pip install molmo2-transformers`), nothing in this folder is executed:

```python
from molmo2 import ask, load

model, processor = load("path/or/repository", dtype="auto", device_map="auto")
answer = ask(model, processor, "What is in the image?", images="photo.jpg")
print(answer.text)
```
"""
TEMPLATE = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- molmo2
- multimodal
---

# {title}

A Molmo2 vision-language model: images, videos and text in, text out.
Converted from a native training checkpoint; its weights are {rounding}.

| | |
|---|---|
| Source | {source} |
| Parameters | {parameters:,} |
| Stored as | {dtype} |
| Text model | {text} |
| Vision transformer | {vision} |
| Maximum sequence length | {positions:,} tokens |

## Use
{package}
With transformers alone, running the code in this folder:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "path/or/repository"
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype="auto", device_map="auto")

content = [{{"type": "text", "text": "What is in the image?"}}, {{"type": "image", "image": "photo.jpg"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device){causal}
output = model.generate(**inputs, max_new_tokens=200)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
{notes}
## Licence

The code in this folder is licensed under Apache-2.0, and so are the Molmo2 weights published by the Allen Institute
for AI. If this checkpoint was trained from weights or on data under other terms, state them here and in the header.
"""


def model_card(config: NativeConfig, *, source: str, num_parameters: int, source_dtypes: set[str], dtype: str) -> str:
    """The text of the card.

    Args:
        source: Name of the checkpoint and its step.
        source_dtypes: Of the native tensors.
        dtype: Of the converted ones.
    """
    llm, vit = config.llm, config.vit
    norm = f", {llm['attention_layer_norm_type']} query/key norm" if llm["attention_layer_norm"] else ""
    scaling = rope_scaling(llm)
    rope = f", {scaling['rope_type']} rotary scaling" if scaling is not None else ""
    height, width = vit["image_default_input_size"]
    is_exact = dtype == "float32" or source_dtypes == {"bfloat16"}
    notes = "".join(f"\n> {warning}\n" for warning in config.warnings)
    return TEMPLATE.format(
        title=f"Molmo2 ({source})",
        rounding="unchanged" if is_exact else "rounded to the nearest bfloat16",
        source=source,
        parameters=num_parameters,
        dtype=dtype,
        text=f"{llm['n_layers']} layers of width {llm['d_model']}, {llm['n_heads']} heads over {config.num_kv_heads} "
        f"key/value heads{norm}{rope}",
        vision=f"{config.num_vit_layers} of {vit['image_num_layers']} layers of width {vit['image_emb_dim']}, "
        f"{height}x{width} pixels per crop",
        positions=config.max_positions,
        package=PACKAGE if config.has_two_way_images else "",  # `ask` marks visual tokens as two-way
        causal="" if config.has_two_way_images else '\ninputs["token_type_ids"].zero_()',
        notes=notes,
    )
