"""The full 4B shape on a GPU: bfloat16 weights from a seed. These rows run wherever CUDA is there."""

import torch

from benchmarks.bounds import weight_reads
from benchmarks.harness import Goal, NotAvailable, Side, Work, row
from benchmarks.media import photo
from benchmarks.models import clip_and_text, image_inputs
from benchmarks.sides import load_model, processor

SIDES = ("ours", "native", "peer")
SHAPE = "4b"


def _model(side: Side) -> torch.nn.Module:
    if not torch.cuda.is_available():
        raise NotAvailable("no GPU")
    return load_model(side, SHAPE, torch.bfloat16, "cuda")


def _on_gpu(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.cuda() for name, value in inputs.items()}


@row("gpu-vision", "GPU: vision and prefill, 25 crops", bound="none", sides=SIDES, device="cuda")
def gpu_vision(side: Side) -> Work:
    model, inputs = _model(side), _on_gpu(image_inputs(side, SHAPE, 24))
    return lambda: model(**inputs, use_cache=True, logits_to_keep=1).logits


@row("gpu-prefill", "GPU: prefill, 16,384 tokens", bound="none", sides=SIDES, device="cuda")
def gpu_prefill(side: Side) -> Work:
    model, inputs = _model(side), _on_gpu(clip_and_text(side, side.pick(16384, 2048)))

    def work() -> None:
        model(**inputs, use_cache=True, logits_to_keep=1)

    return work


@row(
    "gpu-decode",
    "GPU: decode, static cache and compile",
    bound="the weights of decoder layers and output matrix read once per token",
    goals=(Goal(1.5, "bound"),),
    sides=("bound", *SIDES),
    device="cuda",
)
def gpu_decode(side: Side) -> Work:
    """`generate` compiles the step by itself for caches of fixed size; the calls in which it does are not timed."""
    model, tokens = _model(side), side.pick(128, 16)
    if side.is_bound:
        return weight_reads(model, tokens)
    ids = torch.tensor([[65] * 8], device="cuda")

    def work() -> None:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            cache_implementation="static",
        )

    work()
    work()
    return work


@row(
    "gpu-end-to-end", "GPU: from a photo of 24 crops to 64 tokens", bound="none", sides=("ours", "peer"), device="cuda"
)
def gpu_end_to_end(side: Side) -> Work:
    model, our, image = _model(side), processor(side, SHAPE), photo(1080, 1920)
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Describe it."}]

    def work() -> None:
        inputs = our.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            max_crops=24,
        )
        model.generate(**_on_gpu(dict(inputs)), max_new_tokens=64, do_sample=False)

    return work
