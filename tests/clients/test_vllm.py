"""Real vLLM on the CPU: what it answers with molmo2.vllm is what `generate` answers (`make test-vllm`).

Two engines serve the trained miniature: one in this process, one behind HTTP. Only the frames of clips and the
questions are made here; chat template, tokenizer, files and weights are those of a converted checkpoint.
"""

import base64
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM: `make test-vllm`", allow_module_level=True)

import numpy as np
import psutil
import torch
from openai import OpenAI
from PIL import Image
from safetensors.torch import save_file

from molmo2 import ask as molmo2_ask
from molmo2 import load
from molmo2.cli.serving import ServeOptions, serve_command
from molmo2.client import Client
from support.clips import write_clip
from support.ports import free_port

REPOSITORY = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(REPOSITORY / "examples"))

from miniature import native  # noqa: E402
from miniature.evaluate import FRESH_SEED, examples, judge  # noqa: E402
from miniature.world import CLIP_FPS  # noqa: E402

# Read by vLLM when it is imported, which the fixtures do.
SETTINGS = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
os.environ.update(SETTINGS)
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # an engine in this process; its worker has one of its own

NUMBER = 36  # questions about single images; with those about sets and clips more than 60
MAX_TOKENS = 260
START_SECONDS = 300
LORA_RANK, LORA_TARGETS = 8, ("att_proj", "ff_out")


def data_url(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png(pixels) -> bytes:
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass
class Asked:
    """One question: messages for the processor and for an endpoint, and what judges the answer."""

    own: list
    endpoint: list
    example: object


def part_for_endpoint(part, as_file=False):
    if part["type"] == "image":
        return {"type": "image_url", "image_url": {"url": data_url(png(part["image"]), "image/png")}}
    path = Path(part["video"])
    url = path.as_uri() if as_file else data_url(path.read_bytes(), "video/mp4")
    return {"type": "video_url", "video_url": {"url": url}}


def ask(text, *parts, as_file=False):
    """The same question in both forms."""
    written = {"type": "text", "text": text}
    return (
        [{"role": "user", "content": [*parts, written]}],
        [{"role": "user", "content": [*(part_for_endpoint(part, as_file) for part in parts), written]}],
    )


class Server:
    """`vllm serve` on a port of this machine."""

    def __init__(self, folder: Path, log: Path, *options: str, started_by_molmo2: ServeOptions | None = None):
        self.port, self.log = free_port(), log
        self.url = f"http://127.0.0.1:{self.port}"
        own = ["--served-model-name", "miniature", "--enforce-eager", *options]
        command = [Path(sys.executable).parent / "vllm", "serve", folder, "--host", "127.0.0.1"]
        command += ["--port", str(self.port), *own]
        if started_by_molmo2 is not None:
            command = serve_command("vllm", replace(started_by_molmo2, port=self.port, more=own))
        with log.open("w") as output:
            environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, start_new_session=True
            )
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def wait(self):
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            if self.is_healthy():
                return self
            time.sleep(0.3)
        pytest.fail(f"the server did not start:\n{self.log.read_text()[-4000:]}")

    def is_healthy(self):
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=120) as response:
                return response.status == 200
        except OSError:
            return False

    def create(self, messages, **options):
        extra = options.pop("extra", {})
        return self.client.chat.completions.create(
            **{"model": "miniature", "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS, **options},
            extra_body=extra,
        )

    def answer(self, messages, **options):
        return self.create(messages, **options).choices[0].message.content

    def post(self, body):
        """(status, text) of any body, however wrong."""
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions",
            json.dumps({"model": "miniature", "max_tokens": 4, **body}).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module", autouse=True)
def auto_classes_stay_as_they_are():
    """They do not: the plugin registers them. `make test-vllm` runs this module in a process of its own."""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def folder(work):
    return native.to_transformers(native.CHECKPOINT, work / "model")


@pytest.fixture(scope="module")
def starting(folder, work):
    """The server while it starts, so that this takes no time of its own."""
    options = ["--dtype", "float32", "--allowed-local-media-path", work, "--trust-request-mm-kwargs"]
    options += ["--enable-lora", "--max-lora-rank", str(LORA_RANK), "--lora-modules", f"tuned={write_adapter(work)}"]
    made = Server(folder, work / "server.log", *options)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def reference(starting, folder):
    return load(folder, dtype="float32")


@pytest.fixture(scope="module")
def engine(starting, folder, work):
    from vllm import LLM

    return LLM(str(folder), dtype="float32", enforce_eager=True, max_num_seqs=16, allowed_local_media_path=str(work))


@pytest.fixture(scope="module")
def server(starting):
    return starting.wait()


def generate(reference, messages, model=None, **options):
    """(prompt, answer) as token ids, by transformers."""
    own_model, processor = reference
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
    )
    with torch.inference_mode():
        output = (model or own_model).generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
    length = inputs["input_ids"].shape[1]
    return output[0, :length].tolist(), output[0, length:].tolist()


def chat(engine, conversations, **options):
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    outputs = engine.chat(conversations, sampling, use_tqdm=False, **options)
    return [(output.prompt_token_ids, list(output.outputs[0].token_ids)) for output in outputs]


@pytest.fixture(scope="module")
def questions(work):
    asked, paths = [], {}
    for example in examples(FRESH_SEED + 14, NUMBER):
        parts = []
        for part in example.parts:
            if part["type"] == "video":
                key = id(part["video"])
                if key not in paths:
                    paths[key] = write_clip(part["video"], work / f"clip{len(paths)}.mp4", CLIP_FPS)
                part = {"type": "video", "video": str(paths[key])}
            parts.append(part)
        asked.append(Asked(*ask(example.question.text, *parts, as_file=len(asked) % 2 == 0), example))
    return asked


@pytest.fixture(scope="module")
def expected(reference, questions):
    return [generate(reference, asked.own) for asked in questions]


@pytest.fixture(scope="module")
def clip(questions):
    return next(part for asked in reversed(questions) for part in asked.own[0]["content"] if part["type"] == "video")


@pytest.fixture(scope="module")
def images(questions):
    return [questions[index].own[0]["content"][0] for index in (0, 2, 4)]


def test_answers_are_those_of_generate_token_by_token(engine, questions, expected):
    assert len(questions) >= 60
    assert {asked.example.group for asked in questions} == {"image", "set", "clip"}
    assert chat(engine, [asked.endpoint for asked in questions]) == expected


def test_prompts_without_images(engine, reference):
    own, endpoint = ask("How many red circles are there?")
    assert chat(engine, [endpoint]) == [generate(reference, own)]


def test_nothing_else_in_the_batch_changes_an_answer(engine, questions, expected):
    """One request alone; in the batch above prompts share steps with each other and with answers."""
    for index in (0, NUMBER, -1):
        assert chat(engine, [questions[index].endpoint]) == [expected[index]]


@pytest.mark.parametrize(
    ("media", "options"),
    [
        ("image", {"max_crops": 1}),
        ("image", {"images_kwargs": {"max_crops": 3}}),
        ("clip", {"num_frames": 3}),
        ("clip", {"max_fps": 4.0}),
        ("clip", {"videos_kwargs": {"clip": [0.4, 1.6]}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_options_of_a_request(engine, reference, images, clip, media, options):
    own, endpoint = ask("Point to the red circles.", clip if media == "clip" else images[0])
    assert chat(engine, [endpoint], mm_processor_kwargs=options) == [generate(reference, own, **options)]


def test_images_beside_videos_and_several_of_each(engine, reference, images, clip, questions):
    other = next(part for asked in questions for part in asked.own[0]["content"] if part["type"] == "video")
    asked = [
        ask("What is in the image and in the video?", images[0], clip),
        ask("Point to the blue squares.", clip, other),
        ask("Point to the blue squares.", images[1], clip, images[2], other),
    ]
    assert clip != other
    assert chat(engine, [endpoint for _, endpoint in asked]) == [generate(reference, own) for own, _ in asked]


def test_files_that_vllm_reads_in_its_own_way(engine, reference, images):
    """Transparency is painted white by vLLM and left out in training; orientation tags; palettes."""
    image = Image.fromarray(images[0]["image"])
    alpha = image.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(image.size))
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(turned, "JPEG", exif=exif)
    for content in (png(alpha), turned.getvalue(), png(image.convert("P"))):
        own, endpoint = ask("Point to the red circles.")
        own[0]["content"].insert(0, {"type": "image", "image": content})
        endpoint[0]["content"].insert(0, {"type": "image_url", "image_url": {"url": data_url(content, "image/png")}})
        assert chat(engine, [endpoint]) == [generate(reference, own)]


def test_the_blocks_of_the_page_run_as_written(server, engine, page, images, reference, monkeypatch):
    """The address, the model and the image are those of this test; the engine is the one that runs already."""
    import vllm

    online, offline = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    own, endpoint = ask("Point to the red circles.", images[0])
    address = endpoint[0]["content"][0]["image_url"]["url"]
    for written, real in [
        ("http://127.0.0.1:8000", server.url),
        ("allenai/Molmo2-4B", "miniature"),
        ("https://example.org/boats.jpg", address),
        ("Point to the boats.", "Point to the red circles."),
    ]:
        assert written in online
        online = online.replace(written, real)
    found = {}
    exec(online, found)
    expected = reference[1].decode(generate(reference, own)[1], skip_special_tokens=True)
    assert found["reply"].choices[0].message.content == expected
    assert [point.x_norm for point in found["points"]] == [
        point.x_norm for point in reference[1].post_process_grounding(expected).points
    ]
    asked = []
    monkeypatch.setattr(vllm, "LLM", lambda *arguments, **options: asked.append(options) or engine)
    found = {"conversations": [endpoint]}
    exec(offline, found)
    assert found["outputs"][0].outputs[0].text == expected
    assert asked[0].keys() <= set(vllm.EngineArgs.__dataclass_fields__)


def test_frames_that_are_decoded_already(engine, reference):
    from vllm import SamplingParams

    frames = next(example.parts[0] for example in examples(FRESH_SEED + 15, 8) if example.group == "clip")
    own = [{"role": "user", "content": [frames, {"type": "text", "text": "Point to the red circles."}]}]
    prompt = reference[1].apply_chat_template(own, add_generation_prompt=True, tokenize=False)
    metadata = {**frames["video_metadata"], "do_sample_frames": True}
    request = {"prompt": prompt, "multi_modal_data": {"video": [(np.stack(frames["video"]), metadata)]}}
    (output,) = engine.generate(request, SamplingParams(temperature=0, max_tokens=MAX_TOKENS), use_tqdm=False)
    assert (output.prompt_token_ids, list(output.outputs[0].token_ids)) == generate(reference, own)


# --- other shapes ----------------------------------------------------------------------------------------------------

# Those of the golden checkpoints, small, with heads of a size that vLLM has kernels for: (text, vision, adapter).
QWEN3 = {"qk_norm_type": "qwen3", "use_qk_norm": True, "qkv_bias": False, "norm_after": False, "rope_theta": 1e6}
OLMO3 = {"qk_norm_type": "olmo", "use_qk_norm": True, "qkv_bias": False, "norm_after": True, "rope_theta": 5e5}
YARN = {"rope_type": "yarn", "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0}
SHAPES = {
    "qwen3, as the 4B and 8B: more heads than the width has": (
        {**QWEN3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
        {},
        {"vit_layers": [-3, -9], "pooling_attention_mask": True},
    ),
    "qwen3 without a mask in the pooling": (
        {**QWEN3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
        {},
        {"vit_layers": [-3, -9], "pooling_attention_mask": False},
    ),
    "qwen3 with crops of 378 pixels": (
        {**QWEN3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
        {"image_default_input_size": [378, 378], "image_num_pos": 729},
        {"vit_layers": [-3, -9], "pooling_attention_mask": True},
    ),
    "olmo3, as the O-7B: norms behind, as many keys as queries, YaRN in some layers": (
        {
            **OLMO3, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "rope_scaling_layers": [0, 3],
            "rope_scaling": {**YARN, "factor": 8.0, "original_max_position_embeddings": 128},
        },
        {"image_num_pos": 81},  # positions for a larger image, which are resized
        {"vit_layers": [-3, -9], "pooling_attention_mask": True},
    ),
    "olmo3 with shared keys": (
        {
            **OLMO3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "rope_scaling_layers": [1, 3],
            "rope_scaling": {**YARN, "factor": 8.0, "original_max_position_embeddings": 64},
        },
        {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 16},
        {"vit_layers": [-2, -5], "pooling_attention_mask": False, "num_attention_heads": 3, "num_key_value_heads": 3,
         "head_dim": 16},
    ),
    "qwen2: biases, no norms of queries and keys, one key, all layers of the vision": (
        {**QWEN3, "use_qk_norm": False, "qkv_bias": True, "num_attention_heads": 4, "num_key_value_heads": 1,
         "head_dim": 32, "layer_norm_eps": 1e-5},
        {"hidden_act": "gelu", "image_num_pos": 25},
        {"vit_layers": [-1, -4], "pooling_attention_mask": False},
    ),
}  # fmt: skip
SHAPE_TOKENS = 24


def write_shape(name, folder: Path, target: Path) -> Path:
    """A model of this shape with weights from a seed, beside the processor of the miniature."""
    from molmo2.configuration import Molmo2Config
    from molmo2.model.modeling import Molmo2ForConditionalGeneration

    shutil.copytree(folder, target)
    text, vision, adapter = SHAPES[name]
    settings = json.loads((folder / "config.json").read_text())
    settings["text_config"] |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, **text}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 12}
    settings["vit_config"] |= {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 10, **heads, **vision}
    small = {"hidden_size": 48, "intermediate_size": 80, "text_hidden_size": 64}
    settings["adapter_config"] |= {**small, **heads, **adapter}
    torch.manual_seed(5)
    model = Molmo2ForConditionalGeneration(Molmo2Config(**settings))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1:  # wide enough that answers vary with the image
                parameter.normal_(0, 1 if "embedding" in parameter_name else parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(target)
    shutil.copy(folder / "generation_config.json", target)  # it says what ends an answer
    sides = settings["vit_config"]["image_default_input_size"]
    for file in ("preprocessor_config.json", "video_preprocessor_config.json"):
        written = json.loads((target / file).read_text())
        written["size"] = {"height": sides[0], "width": sides[1]}
        (target / file).write_text(json.dumps(written))
    return target


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape(name, folder, work, images, clip):
    """Tokens, and the logarithms of their probabilities.

    All tests of `engine` come before: shutting an engine down ends the process groups of this process.
    """
    shape = write_shape(name, folder, work / "".join(filter(str.isalnum, name)))
    asked = [ask("Point to the red circles.", images[0]), ask("What is this?", images[1], clip), ask("Hello?")]
    assert len(require_equal_answers(shape, work, asked)) > 3


def test_added_tokens(folder, work, images):
    """Tables that were resized for tokens behind the visual ones, which are read and predicted."""
    shape = write_shape("qwen3 without a mask in the pooling", folder, work / "added")
    model, processor = load(shape, dtype="float32")
    processor.tokenizer.add_tokens(["<turn_left>", "<turn_right>"])
    model.resize_token_embeddings(len(processor.tokenizer))
    torch.manual_seed(3)
    with torch.no_grad():
        for table in (model.get_input_embeddings().weight, model.lm_head.weight):
            table[-2:] = 3 * torch.randn_like(table[-2:]) * table[:-2].std()
    model.save_pretrained(shape)
    processor.save_pretrained(shape)
    asked = [ask(f"Now <turn_left> {name}", images[0]) for name in ("a", "b")] + [ask("<turn_right> or <turn_left>?")]
    assert require_equal_answers(shape, work, asked) & set(range(len(processor.tokenizer))[-2:])


def require_equal_answers(shape, work, asked):
    """Compares vLLM with `generate`; returns the tokens of the answers."""
    from vllm import LLM, SamplingParams

    reference = load(shape, dtype="float32")
    engine = LLM(str(shape), dtype="float32", enforce_eager=True, max_num_seqs=4, allowed_local_media_path=str(work))
    sampling = SamplingParams(temperature=0, max_tokens=SHAPE_TOKENS, logprobs=1)
    try:
        outputs = engine.chat([endpoint for _, endpoint in asked], sampling, use_tqdm=False)
    finally:
        engine.llm_engine.engine_core.shutdown()
    found = set()
    for (own, _), output in zip(asked, outputs, strict=True):
        prompt, tokens, logprobs = scored(reference, own)
        (written,) = output.outputs
        assert output.prompt_token_ids == prompt
        assert list(written.token_ids) == tokens
        steps = [step[token].logprob for step, token in zip(written.logprobs, tokens, strict=True)]
        assert steps == pytest.approx(logprobs, abs=1e-4)
        found |= set(tokens)
    return found


def scored(reference, messages):
    """(prompt, answer, logarithms of the probabilities of its tokens), by transformers."""
    model, processor = reference
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.inference_mode():
        output = model.generate(
            **inputs, max_new_tokens=SHAPE_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    length = inputs["input_ids"].shape[1]
    tokens = output.sequences[0, length:].tolist()
    logprobs = [step[0].float().log_softmax(-1)[token].item() for step, token in zip(output.logits, tokens)]
    return output.sequences[0, :length].tolist(), tokens, logprobs


def texts(reference, expected):
    return [reference[1].decode(answer, skip_special_tokens=True) for _, answer in expected]


def test_server_answers_and_scores_with_sixteen_at_once(server, reference, questions, expected):
    wanted = texts(reference, expected)
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda asked: server.answer(asked.endpoint), questions))
    assert found == wanted
    own = [asked.example for asked in questions]
    assert judge(reference[1], own, found) == pytest.approx(judge(reference[1], own, wanted), abs=0.01)


def test_server_without_images(server, reference):
    own, endpoint = ask("How many red circles are there?")
    prompt, answer = generate(reference, own)
    found = server.create(endpoint)
    assert found.usage.prompt_tokens == len(prompt)
    assert found.choices[0].message.content == reference[1].decode(answer, skip_special_tokens=True)


def test_server_streams_the_same(server, reference, questions, expected):
    for index in (1, NUMBER + 1, -2):
        pieces = [
            chunk.choices[0].delta.content or "" for chunk in server.create(questions[index].endpoint, stream=True)
        ]
        assert len(pieces) > 2
        assert "".join(pieces) == texts(reference, expected)[index]


def test_system_message_and_follow_up(server, reference, images):
    own, endpoint = ask("How many red circles are there?", images[0])
    more = [
        {"role": "assistant", "content": "There are none."},
        {"role": "user", "content": "Point to the blue squares."},
    ]
    system = [{"role": "system", "content": "Answer briefly."}]
    _, answer = generate(reference, system + own + more)
    assert server.answer(system + endpoint + more) == reference[1].decode(answer, skip_special_tokens=True)


def test_answers_of_a_given_form(server, images, clip):
    _, endpoint = ask("What colour is the circle?", images[0])
    chosen = server.answer(endpoint, extra={"structured_outputs": {"choice": ["purple", "orange"]}})
    assert chosen in ("purple", "orange")
    pattern = r'<points coords="1( \d \d{3} \d{3}){2}">red circles</points>'
    _, endpoint = ask("Point to the red circles.", images[1])
    assert re.fullmatch(pattern, server.answer(endpoint, extra={"structured_outputs": {"regex": pattern}}))
    schema = {"type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"]}
    form = {"type": "json_schema", "json_schema": {"name": "sure", "schema": schema, "strict": True}}
    written = server.answer(endpoint, response_format=form, max_tokens=40, extra={"repetition_penalty": 1.3})
    assert written.lstrip().startswith("{")  # the miniature never saw JSON, so that it may not get to an end


def write_adapter(folder: Path) -> Path:
    """An adapter in the form of PEFT, with weights large enough to change answers."""
    target = folder / "adapter"
    target.mkdir()
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": LORA_RANK, "lora_alpha": LORA_RANK, "bias": "none",
        "target_modules": list(LORA_TARGETS), "base_model_name_or_path": "miniature",
    }  # fmt: skip
    (target / "adapter_config.json").write_text(json.dumps(config))
    save_file(adapter_weights(), target / "adapter_model.safetensors")
    return target


def adapter_weights():
    config = native.layout.native_section()
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for name, (rows, columns) in lora_shapes(config).items():
        weights[f"base_model.model.{name}.lora_A.weight"] = 0.1 * torch.randn(LORA_RANK, columns, generator=generator)
        weights[f"base_model.model.{name}.lora_B.weight"] = 0.1 * torch.randn(rows, LORA_RANK, generator=generator)
    return weights


def lora_shapes(section):
    """(rows, columns) of the layers that the adapter changes, by their names in transformers."""
    shapes = {}
    for name, tensor in native.layout.fresh_tensors(section, 0).items():
        found = re.search(r"blocks\.(\d+)\.(att_proj|ff_out)\.weight$", name)
        if found and "vision" not in name and "vit" not in name:
            place = "self_attn" if found[2] == "att_proj" else "mlp"
            shapes[f"model.transformer.blocks.{found[1]}.{place}.{found[2]}"] = tuple(tensor.shape)
    return shapes


def test_lora_adapter(server, reference, folder, images, clip):
    model, processor = load(folder, dtype="float32")
    weights = adapter_weights()
    with torch.no_grad():
        for name in lora_shapes(native.layout.native_section()):
            added = [weights[f"base_model.model.{name}.lora_{side}.weight"] for side in "BA"]
            model.get_submodule(name).weight += added[0] @ added[1]
    asked = [
        ask("Point to the red circles.", images[0]),
        ask("What is this?", images[1]),
        ask("Track the ring.", clip),
    ]
    changed = 0
    for own, endpoint in asked:
        _, answer = generate(reference, own, model=model)
        assert server.answer(endpoint, model="tuned") == processor.decode(answer, skip_special_tokens=True)
        changed += answer != generate(reference, own)[1]
    assert changed


def image_part(content, kind="image/png"):
    return {
        "type": "image_url",
        "image_url": {"url": content if isinstance(content, str) else data_url(content, kind)},
    }


def video_part(content):
    return {
        "type": "video_url",
        "video_url": {"url": content if isinstance(content, str) else data_url(content, "video/mp4")},
    }


SMALL = png(np.zeros((40, 60, 3), np.uint8))
OTHER = png(np.zeros((60, 40, 3), np.uint8))  # vLLM's cache may stumble once over images of refused requests
HUGE = io.BytesIO()
Image.new("1", (60_000, 60_000)).save(HUGE, "PNG")


def about(*parts, text="What is this?", **body):
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}], **body}


def with_options(part, **options):
    return about(part, mm_processor_kwargs=options)


HOSTILE = {
    "no image": about(image_part(b"<html>not found</html>")),
    "cut image": about(image_part(SMALL[:60])),
    "bomb": about(image_part(HUGE.getvalue())),
    "empty image": about(image_part(b"")),
    "no url": about(image_part("")),
    "no base64": about(image_part("data:image/png;base64,???")),
    "unreachable": about(image_part("http://127.0.0.1:9/x.png")),
    "file elsewhere": about(image_part("file:///etc/hostname")),
    "directory": about(video_part("file:///")),
    "no video": about(video_part(b"\x00\x01" * 200)),
    "empty video": about(video_part(b"")),
    "image as video": about(video_part(SMALL)),
    "cut frames": about({"type": "video_url", "video_url": {"url": "data:video/jpeg;base64,AAAA,BBBB"}}),
    "unknown option": with_options(image_part(SMALL), pooling_size=1),
    "negative crops": with_options(image_part(SMALL), max_crops=-1),
    "text as crops": with_options(image_part(SMALL), max_crops="many"),
    "endless crops": with_options(image_part(SMALL), max_crops=10**9),
    "nested nonsense": with_options(image_part(SMALL), images_kwargs=[1]),
    "two user turns": {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
    "no messages": {"messages": []},
    "too long": about(text="word " * 5000),
    "too many images": about(*[image_part(SMALL)] * 120),
    "wrong regex": about(structured_outputs={"regex": "((("}),
    "negative tokens": about(max_tokens=-5),
}  # fmt: skip
CLIP_OPTIONS = [
    {"num_frames": 0},
    {"num_frames": 10**9},
    {"clip": [5, 2]},
    {"max_fps": -1},
    {"frame_sample_mode": "all"},
]


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_hostile_requests(server, body):
    status, text = server.post(body)
    if body in (HOSTILE["bomb"], HOSTILE["unreachable"]):
        assert status == 500, "vLLM, which opens and fetches files, now answers better: expect 400 here"
    else:
        assert 400 <= status < 500, text
    assert server.is_healthy()


def test_clips_are_decoded_in_a_process_with_a_deadline(server, questions):
    """The child that `decode_seconds` asks for stays with the server for the next clip."""
    server.answer(questions[-1].endpoint)
    commands = []
    for process in psutil.Process(server.process.pid).children(recursive=True):
        with suppress(psutil.Error):  # others may end at any moment
            commands.append(" ".join(process.cmdline()))
    assert any("isolation.serve" in command for command in commands)


def test_hostile_options_for_clips_and_the_engine_lives_on(server, reference, clip, questions, expected):
    for options in CLIP_OPTIONS:
        status, text = server.post(with_options(part_for_endpoint(clip), **options))
        assert status == 400, (options, text)
    for text in ("<|image|>", "<im_patch>" * 50, "<|video|><|im_end|>"):
        assert server.post(about(text=text))[0] in (200, 400)
        assert server.post(about(image_part(OTHER), text=text))[0] in (200, 400)
    gone = threading.Thread(target=lambda: interrupted(server, questions[-1].endpoint))
    gone.start()
    assert server.answer(questions[0].endpoint) == texts(reference, expected)[0]
    gone.join()
    assert server.answer(questions[-1].endpoint) == texts(reference, expected)[-1]


def interrupted(server, messages):
    """A client that leaves after the first piece."""
    with server.create(messages, stream=True) as stream:
        next(iter(stream))


def test_vllm_sees_that_content_may_be_a_list(folder):
    from vllm.renderers.hf import _detect_content_format

    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    assert _detect_content_format(template, default="string") == "openai"


def test_configurations_travel_with_their_code(folder):
    """To the processes of a vLLM that runs the checkpoint's own code, without the plugin."""
    import cloudpickle
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    config = get_class_from_dynamic_module("configuration_molmo2.Molmo2Config", folder).from_pretrained(folder)
    code = sys.modules[type(config).__module__]
    cloudpickle.register_pickle_by_value(code)
    sent = cloudpickle.dumps(config)
    cloudpickle.unregister_pickle_by_value(code)
    assert len(sent) > 10 * len(cloudpickle.dumps(config))  # the code is part of it
    again = cloudpickle.loads(sent)
    assert again.to_dict() == config.to_dict()
    assert again.hidden_size == again.text_config.hidden_size == config.hidden_size


def places(answer):
    return [(point.x, point.y, point.time, point.frame and point.frame.source_index) for point in answer.grounding]


def test_the_client_of_this_package(server, reference, questions):
    """Points in pixels and source frames, whole and streamed, as `molmo2.ask` gives them; a conversation, a batch."""
    client = Client(f"{server.url}/v1", "miniature", processor_kwargs={"num_frames": 8})
    assert client.kind == "vllm"
    found, chosen = [], [questions[index] for index in (0, NUMBER, -1)]
    for asked in chosen:
        *parts, text = asked.own[0]["content"]
        media = {
            "images": [part["image"] for part in parts if part["type"] == "image"] or None,
            "videos": [part["video"] for part in parts if part["type"] == "video"] or None,
        }
        expected = molmo2_ask(*reference, text["text"], **media, max_new_tokens=MAX_TOKENS)
        found.append(client.ask(text["text"], **media, max_new_tokens=MAX_TOKENS))
        *pieces, last = client.ask_stream(text["text"], **media, max_new_tokens=MAX_TOKENS)
        assert found[-1].text == last.answer.text == expected.text == "".join(piece.text for piece in pieces)
        assert places(found[-1]) == places(last.answer) == places(expected)
        assert found[-1].timings.num_prompt_tokens == expected.timings.num_prompt_tokens
    image, text = chosen[0].own[0]["content"]
    several = client.ask([text["text"]] * 3, images=[image["image"]] * 3, max_new_tokens=MAX_TOKENS)
    assert [answer.text for answer in several] == [found[0].text] * 3
    session = client.session(images=image["image"])
    assert session.chat(text["text"], max_new_tokens=MAX_TOKENS).text == found[0].text
    assert session.chat("How many are there?").timings.num_prompt_tokens > several[0].timings.num_prompt_tokens


@pytest.fixture
def page():
    return (REPOSITORY / "docs" / "serving.md").read_text(encoding="utf-8")


def test_the_flags_of_the_page_are_those_of_vllm(page):
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.launchers import cli_args  # 0.32
    except ImportError:
        from vllm.entrypoints.common import cli_args  # 0.33
    known = cli_args.make_arg_parser(FlexibleArgumentParser())._option_string_actions
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page))
    assert {"--dtype", "--max-model-len", "--limit-mm-per-prompt", "--mm-processor-kwargs"} <= flags
    assert flags <= known.keys()


def test_restart_in_bfloat16_with_options_of_the_server(server, folder, work, reference, images, clip, questions):
    """What the server is told at its start holds for each request; it is started by what `molmo2 serve` runs."""
    server.stop()
    options = {"max_crops": 1, "num_frames": 3}
    command = ServeOptions(str(folder), dtype="bfloat16", max_model_len=2048, images=3, videos=1)
    told = ["--mm-processor-kwargs", json.dumps(options)]
    again = Server(folder, work / "again.log", *told, started_by_molmo2=command)
    try:
        again.wait()
        for part in (images[0], clip):
            own, endpoint = ask("Point to the red circles.", part)
            usage = again.create(endpoint).usage
            assert usage.prompt_tokens == len(generate(reference, own, **options)[0])
        assert again.post(about(*[image_part(SMALL)] * 4))[0] == 400
        assert again.post(about(*[image_part(SMALL)] * 3))[0] == 200
        asked = [asked for asked in questions if asked.example.group == "set"]
        scores = judge(reference[1], [own.example for own in asked], [again.answer(own.endpoint) for own in asked])
        assert scores["pointing in set"] > 0.75
    finally:
        again.stop()
