"""Model card: the README.md of the converted folder, with the header of the published ones."""

import re
from collections.abc import Sequence

import yaml

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
POINTING = """
Answers to "Point to ..." hold coordinates. They come back in pixels, for videos with times and identities:

```python
answer = ask(model, processor, "Point to the boats.", images="photo.jpg")
for point in answer.grounding.points:
    print(point.label, round(point.x), round(point.y))
answer = ask(model, processor, "Track the boats.", videos="clip.mp4")
for track in answer.grounding.tracks:
    print(track.id, [(point.time, point.x, point.y) for point in track.points])
```
"""
PIPELINE = "video-text-to-text"  # as published: images and text alone are the smaller case
TAGS = ["multimodal", "olmo", "molmo", "molmo2"]
# What the published models were trained on; a conversion cannot see it.
MOLMO2_DATA_SETS = tuple(
    f"allenai/Molmo2-{name}"
    for name in (
        *("Cap", "VideoCapQA", "VideoSubtitleQA", "AskModelAnything", "VideoPoint", "VideoTrack"),
        *("MultiImageQA", "SynMultiImageQA", "MultiImagePoint"),
    )
)
SIGLIP = "google/siglip-so400m-patch14-384"
SIGLIP_SIZES = {"image_num_layers": 27, "image_emb_dim": 1152, "image_mlp_dim": 4304, "image_patch_size": 14}
REPOSITORY_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TEMPLATE = """---
{header}---

# {title}

A Molmo2 vision-language model: images, videos and text in, text out.
{origin}; its weights are {rounding}.

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
{provenance}
## Citation

```bibtex
@article{{molmo2openweightsdata,
  title   = {{Molmo2: Open Weights and Data for Vision-Language Models with Video Understanding and Grounding}},
  author  = {{Christopher Clark and Jieyu Zhang and Zixian Ma and Jae Sung Park and Mohammadreza Salehi and others}},
  journal = {{arXiv preprint arXiv:2601.10611}},
  year    = {{2026}}
}}
```
"""


def base_models(config: NativeConfig) -> list[str]:
    """Repositories of the two models that the checkpoint began with, as far as its settings name them.

    The vision transformer is known by its sizes, the text model by the repository of its tokenizer.
    """
    found = [SIGLIP] if all(config.vit[name] == size for name, size in SIGLIP_SIZES.items()) else []
    name = config.tokenizer or ""
    return found + ([name] if REPOSITORY_NAME.fullmatch(name) else [])


def card_header(bases: Sequence[str], data_sets: Sequence[str], licence: str | None = "apache-2.0") -> str:
    """The metadata at the top of the card, YAML in the order of the published ones."""
    header = {
        "license": licence,
        "datasets": list(data_sets),
        "language": ["en"],
        "base_model": list(bases),
        "pipeline_tag": PIPELINE,
        "library_name": "transformers",
        "tags": TAGS,
    }
    return yaml.safe_dump({name: value for name, value in header.items() if value}, sort_keys=False)


def model_card(
    config: NativeConfig,
    *,
    source: str,
    origin: str,
    num_parameters: int,
    source_dtypes: set[str],
    dtype: str,
    data_sets: Sequence[str] | None = None,
    is_from_parts: bool = False,
) -> str:
    """The text of the card.

    Args:
        source: Name of the checkpoint and its step.
        origin: How the folder came about.
        source_dtypes: Of the native tensors.
        dtype: Of the converted ones.
        data_sets: Repositories of the training data; None: those of the published models, which the card says.
        is_from_parts: Built from two models of others: their names and licences are not known here.
    """
    llm, vit = config.llm, config.vit
    norm = f", {llm['attention_layer_norm_type']} query/key norm" if llm["attention_layer_norm"] else ""
    scaling = rope_scaling(llm)
    rope = f", {scaling['rope_type']} rotary scaling" if scaling is not None else ""
    height, width = vit["image_default_input_size"]
    is_exact = dtype == "float32" or source_dtypes == {"bfloat16"}
    notes = "".join(f"\n> {warning}\n" for warning in config.warnings)
    bases = [] if is_from_parts else base_models(config)
    lines = (
        [] if len(bases) == 2 else ["The header lacks a base model: add `base_model` with those of text and vision."]
    )
    if is_from_parts:
        lines.append("The header names no licence: add `license`, as the licences of both parts allow.")
    if data_sets is None:
        lines.insert(
            0, "The data sets in the header are those of the published Molmo2 models; correct them if they differ."
        )
    return TEMPLATE.format(
        header=card_header(
            bases, MOLMO2_DATA_SETS if data_sets is None else data_sets, None if is_from_parts else "apache-2.0"
        ),
        provenance="".join(f"\n{line}\n" for line in lines),
        title=f"Molmo2 ({source})",
        rounding="unchanged" if is_exact else "rounded to the nearest bfloat16",
        source=source,
        origin=origin,
        parameters=num_parameters,
        dtype=dtype,
        text=f"{llm['n_layers']} layers of width {llm['d_model']}, {llm['n_heads']} heads over {config.num_kv_heads} "
        f"key/value heads{norm}{rope}",
        vision=f"{config.num_vit_layers} of {vit['image_num_layers']} layers of width {vit['image_emb_dim']}, "
        f"{height}x{width} pixels per crop",
        positions=config.max_positions,
        package=PACKAGE + POINTING if config.has_two_way_images else "",  # `ask` marks visual tokens as two-way
        causal="" if config.has_two_way_images else '\ninputs["token_type_ids"].zero_()',
        notes=notes,
    )
