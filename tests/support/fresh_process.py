"""Uses checkpoints the way a stranger's program does: a new interpreter, empty caches, nothing of the tests imported.

`run("scenario", ...)` starts this file as a program; what the scenario returns comes back as JSON. Scenarios import
what they need themselves, because which imports happen, and in what order, is part of what is tested. Those that begin
with the library's Auto classes in any case are forked from a process that has imported these, which takes seconds.
"""

import atexit
import contextlib
import functools
import importlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT = "What is in the picture?"
FORKED = ("auto_classes", "from_hub_cache", "registered", "remote_logits", "save_all")
WATCHED = ("torchvision", "decord", "av", "torchcodec", "cv2", "requests", "httpx")


def run(
    scenario: str, cache: Path, *, python_path: Path | None = None, env: dict[str, str] | None = None, **arguments
):
    """Run a scenario in a new interpreter.

    Args:
        cache: An empty folder, used for everything that libraries keep between runs.
        python_path: A folder that is searched for packages before all others.
        env: Further environment variables.
        arguments: Of the scenario; paths are passed as text.
    Returns:
        What the scenario returned.
    """
    if scenario in FORKED and python_path is None and env is None:
        return forker().run(scenario, cache, arguments)
    environment = clean_environment(cache)
    environment.update({} if python_path is None else {"PYTHONPATH": str(python_path)})
    environment.update({} if env is None else env)
    done = subprocess.run(
        [sys.executable, __file__, scenario, json.dumps(arguments, default=str)],
        env=environment,
        cwd=cache,
        capture_output=True,
        text=True,
        timeout=900,  # ten copies of a checkpoint, on machines that have other things to do
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"scenario {scenario!r} failed:\n{done.stderr[-6000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def clean_environment(home: Path) -> dict[str, str]:
    """Variables of a new interpreter, without those of the tests for the library."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    return {**environment, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}


class Forker:
    """A process that has imported the library, and is forked for each scenario.

    Its HF_HOME is a link to the folder of the scenario, because the library reads the variable while it is imported.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="molmo2_fresh_"))
        self.home, self.results, self.errors = (self.folder / name for name in ("home", "results", "errors"))
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=clean_environment(self.home),
            cwd=self.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self.close)

    def run(self, scenario: str, cache: Path, arguments: dict[str, Any]) -> Any:
        self.home.unlink(missing_ok=True)
        self.home.symlink_to(cache, target_is_directory=True)
        self.process.stdin.write(json.dumps([scenario, arguments], default=str) + "\n")
        self.process.stdin.flush()
        if self.process.stdout.readline() != "0\n":
            raise RuntimeError(f"scenario {scenario!r} failed:\n{self.errors.read_text()[-6000:]}")
        return json.loads(self.results.read_text().splitlines()[-1])

    def close(self) -> None:
        self.process.stdin.close()  # which ends it
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@functools.cache
def forker() -> Forker:
    return Forker()


def fork_for_each_request() -> None:
    """Run scenarios, each a line of JSON on stdin, in forks of this process; prints the status of each."""
    from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if not child:
            run_forked(*json.loads(line))
        print(os.waitpid(child, 0)[1], flush=True)


def run_forked(scenario: str, arguments: dict[str, Any]) -> None:
    """Run a scenario in this process, which ends with it."""
    try:
        for name, stream in (("results", sys.stdout), ("errors", sys.stderr)):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
        os.chdir(os.environ["HF_HOME"])
        print(json.dumps(globals()[scenario](**arguments)), flush=True)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


class ImportWatch:
    """Notes which of our modules import a watched package themselves; what the library imports is its own business."""

    def __init__(self) -> None:
        self.importers: dict[str, set[str]] = {}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        package = name.partition(".")[0]
        frame = sys._getframe(1)
        while package in WATCHED and frame is not None and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        if frame is not None and frame.f_code.co_filename.endswith("_molmo2.py"):
            self.importers.setdefault(package, set()).add(Path(frame.f_code.co_filename).name)

    def report(self) -> dict[str, list[str]]:
        return {package: sorted(files) for package, files in self.importers.items()}


def attempt(action: Callable[[], Any]) -> dict[str, Any]:
    """What came of it: the class and module of the result, or the error."""
    try:
        result = action()
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error), "trace": traceback.format_exc()[-3000:]}
    return {"class": type(result).__name__, "module": type(result).__module__}


def messages(image: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "path": image}, {"type": "text", "text": PROMPT}]}]


def prepare(processor: Any, image: str) -> Any:
    return processor.apply_chat_template(
        messages(image), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def save_answer(model: Any, processor: Any, image: str, output: str) -> None:
    """Write the inputs and the logits as safetensors."""
    import torch
    from safetensors.torch import save_file

    inputs = dict(prepare(processor, image))
    with torch.no_grad():
        save_file({**inputs, "logits": model(**inputs).logits}, output)


def auto_classes(folders: dict[str, str], image: str, video: str, output: str) -> dict[str, Any]:
    """Load each Auto class from a folder of its own, so that none finds code that another one has copied."""
    watch = ImportWatch()
    sys.meta_path.insert(0, watch)
    report: dict[str, Any] = {"classes": {}, "modules": {}}
    import transformers
    from transformers import dynamic_module_utils

    for name, folder in folders.items():
        module, _, attribute = name.rpartition(".")
        source = importlib.import_module(module) if module else transformers
        if not hasattr(source, attribute):
            report["classes"][name] = {"error": "absent"}
            continue
        report["classes"][name] = attempt(
            lambda: getattr(source, attribute).from_pretrained(folder, trust_remote_code=True)  # noqa: B023
        )
        cached = Path(dynamic_module_utils.HF_MODULES_CACHE).glob(f"transformers_modules/{Path(folder).name}/**/*.py")
        report["modules"][name] = sorted({file.name for file in cached if file.name != "__init__.py"})

    folder = folders["AutoModelForImageTextToText"]
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    save_answer(model, processor, image, output)
    report["parts"] = {name: type(getattr(processor, name)).__module__ for name in processor.attributes}
    report["pipeline"] = _pipeline_answers(folder, model, processor, image)
    report["native"] = _native_classes(folder)
    report["imports"] = watch.report()
    processor(text="<|video|>", videos=video)
    report["imports with a video"] = watch.report()
    return report


def messages_of_a_first_answer(folder: str, image: str) -> list[str]:
    """What is logged and warned about from the imports to an answer, by remote code."""
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    for name in (None, "transformers"):  # the latter passes nothing on
        logging.getLogger(name).addHandler(Keep(logging.WARNING))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        from transformers import AutoModelForImageTextToText, AutoProcessor

        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
        model.generate(**prepare(processor, image), max_new_tokens=2, do_sample=False)
    ours = [str(warning.message) for warning in caught if warning.filename.endswith("_molmo2.py")]
    return said + ours


def _pipeline_answers(folder: str, model: Any, processor: Any, image: str) -> dict[str, Any]:
    """What the pipeline answers to messages and to images with text, and what generate answers."""
    from PIL import Image
    from transformers import pipeline

    inputs = prepare(processor, image)
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    expected = processor.tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ask = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
    options = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    prompt = processor.apply_chat_template(messages(image), add_generation_prompt=True)
    return {
        "model": type(ask.model).__module__,
        "expected": expected,
        "messages": ask(text=messages(image), **options)[0]["generated_text"],
        "images": ask(images=[Image.open(image)], text=prompt, **options)[0]["generated_text"],
    }


def _native_classes(folder: str) -> dict[str, Any]:
    """The classes without trust in remote code, after remote code was used in the same process."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    return {
        "AutoConfig": attempt(lambda: AutoConfig.from_pretrained(folder, trust_remote_code=False)),
        "AutoModelForImageTextToText": attempt(
            lambda: AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False)
        ),
        "remote again": attempt(lambda: AutoConfig.from_pretrained(folder, trust_remote_code=True)),
    }


def startup(folder: str, is_remote: bool) -> dict[str, Any]:
    """Modules that a processor, and its first call with an image, bring beside those of the library's own parts."""
    from PIL import Image
    from transformers import AutoProcessor, AutoTokenizer, image_processing_utils, video_processing_utils  # noqa: F401
    from transformers.models.auto import image_processing_auto, video_processing_auto  # noqa: F401

    AutoTokenizer.from_pretrained(folder)
    before = set(sys.modules)
    if is_remote:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    else:
        from molmo2.processing.processor import Molmo2Processor

        processor = Molmo2Processor.from_pretrained(folder)
    loaded = set(sys.modules)
    content = [{"type": "image", "image": Image.new("RGB", (50, 40))}, {"type": "text", "text": PROMPT}]
    processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    return {"loading": sorted(loaded - before), "call": sorted(set(sys.modules) - loaded)}


def imported(module: str) -> list[str]:
    """Modules that come with one."""
    importlib.import_module(module)
    return sorted(sys.modules)


def from_hub_cache(repository: str, image: str, output: str) -> dict[str, Any]:
    """Load by repository name from what a download has left in the cache, offline."""
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    report = {
        auto.__name__: attempt(lambda: auto.from_pretrained(repository, trust_remote_code=True))  # noqa: B023
        for auto in (AutoConfig, AutoTokenizer, AutoModel)
    }
    model = AutoModelForImageTextToText.from_pretrained(repository, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(repository, trust_remote_code=True)
    save_answer(model, processor, image, output)
    report["AutoProcessor"] = attempt(lambda: processor)
    report["AutoModelForImageTextToText"] = attempt(lambda: model)
    return report


def with_torchvision(folder: str, image: str, video: str, output: str) -> dict[str, Any]:
    """Everything that looks different to the library where torchvision can be imported."""
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoVideoProcessor
    from transformers.utils import is_torchvision_available

    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    save_answer(model, processor, image, output)
    processor(text="<|video|>", videos=video)
    report = {
        auto.__name__: attempt(lambda: auto.from_pretrained(folder, trust_remote_code=True))  # noqa: B023
        for auto in (AutoImageProcessor, AutoVideoProcessor)
    }
    return {"is_torchvision_available": bool(is_torchvision_available()), **report}


def save_all(folder: str, target: str) -> dict[str, Any]:
    """Load a checkpoint and save it again."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).save_pretrained(target)
    AutoProcessor.from_pretrained(folder, trust_remote_code=True).save_pretrained(target)
    return {"files": sorted(os.listdir(target))}


def registered(folder: str, target: str) -> dict[str, Any]:
    """Load with the installed package behind the Auto classes; save to `target`."""
    import transformers

    import molmo2

    molmo2.register()
    molmo2.register()  # again: nothing changes
    names = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
    report: dict[str, Any] = {"classes": {}}
    for name in (*names, "AutoProcessor", "AutoImageProcessor"):
        if not hasattr(transformers, name):
            report["classes"][name] = {"error": "absent"}
            continue
        report["classes"][name] = attempt(lambda: getattr(transformers, name).from_pretrained(folder))  # noqa: B023
    model, processor = molmo2.load(folder, processor_options={"num_frames": 3})
    report["load"] = [type(model).__module__, type(processor).__module__]
    report["parts"] = {
        name: type(getattr(processor, name)).__module__ for name in ("image_processor", "video_processor")
    }
    report["training"], report["num_frames"] = model.training, processor.video_processor.num_frames
    report["same processor as AutoProcessor's"] = type(transformers.AutoProcessor.from_pretrained(folder)) is type(
        processor
    )
    report["pipeline"] = type(transformers.pipeline("image-text-to-text", model=folder).model).__module__
    architecture = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    report["architecture"] = getattr(transformers, architecture).__module__  # as trainers look it up
    report["refused"] = attempt(lambda: molmo2.load(folder, trust_remote_code=True))
    model.save_pretrained(target)
    processor.save_pretrained(target)
    report["sum"] = _logit_sum(model)
    return report


def trainer_of_folder(folder: str, target: str) -> dict[str, Any]:
    """The classes that TRL takes for a folder once the package is registered."""
    import trl
    from datasets import Dataset
    from trl.trainer import utils

    import molmo2

    molmo2.register()
    if not hasattr(utils, "create_model_from_path"):
        return {"skipped": "this release of TRL passes on the inputs of some models alone"}
    settings = trl.SFTConfig(target, use_cpu=True, report_to=[], bf16=False, max_length=None)
    said = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    trainer = trl.SFTTrainer(folder, settings, train_dataset=Dataset.from_list([{"messages": said}]))
    return {
        "create_model_from_path": type(utils.create_model_from_path(folder)).__module__,
        "SFTTrainer": [type(part).__module__ for part in (trainer.model, trainer.processing_class)],
    }


def _logit_sum(model: Any) -> float:
    import torch

    with torch.no_grad():
        return float(model(input_ids=torch.arange(5, 25)[None]).logits.sum())


def remote_logits(folder: str) -> dict[str, Any]:
    """The sum of the logits of a checkpoint's own code for some ids."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    return {"module": type(model).__module__, "sum": _logit_sum(model)}


def push(folder: str, repository: str) -> dict[str, Any]:
    """Upload the configuration, and a whole checkpoint in two ways, each to a repository of its own."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    AutoConfig.from_pretrained(folder, trust_remote_code=True).push_to_hub(f"{repository}-config")
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model.push_to_hub(repository)
    processor.push_to_hub(repository)
    for part in (model, processor):
        part.save_pretrained(f"{folder}-saved", push_to_hub=True, repo_id=f"{repository}-saved")
    return {}


def code_blocks(folder: str, blocks: list[str]) -> dict[str, Any]:
    """Run blocks of Python code one after another in a folder: what they print, and some of what they leave."""
    os.chdir(folder)
    names: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in blocks:
            exec(compile(block, "block", "exec"), names)
    return {
        "lines": printed.getvalue().splitlines(),
        "planned tokens": names["planned"].num_tokens,
        "answers": [answer.text for answer in names["answers"]],
    }


def load_from_hub(repository: str) -> dict[str, Any]:
    """FiftyOne's call in the form of its plugin's page, twice: what it left in the database."""
    from fiftyone.utils.huggingface import load_from_hub as load

    numbers = []
    for _ in range(2):
        dataset = load(repository, max_samples=20, overwrite=True)
        numbers.append(len(dataset))
    dataset.persistent = True  # others are gone with their process
    return {"name": dataset.name, "numbers": numbers, "media_type": dataset.media_type}


def fsdp_plugin(output: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What `TrainingArguments` make of settings for FSDP; some releases keep it in the environment."""
    from accelerate import FullyShardedDataParallelPlugin
    from transformers import TrainingArguments

    arguments = TrainingArguments(output, fsdp="full_shard auto_wrap", fsdp_config=settings, use_cpu=True)
    plugin = FullyShardedDataParallelPlugin(**(getattr(arguments, "fsdp_plugin_args", None) or {}))
    return {
        "version": plugin.fsdp_version,
        "state_dict": plugin.state_dict_type.name,
        "units": plugin.transformer_cls_names_to_wrap,
    }


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(globals()[sys.argv[1]](**json.loads(sys.argv[2]))))
    else:
        fork_for_each_request()
