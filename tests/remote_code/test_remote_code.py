"""The generated files as remote code: what loaders copy, what must be installed, what a stranger's program gets."""

import ast
import functools
import importlib
import importlib.machinery
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from transformers import dynamic_module_utils

from molmo2.convert.conversion import remote_code_files
from support.checkpoints import (
    AUTO_MAP,
    DATA,
    PUBLISHED,
    REPOSITORY,
    build_model,
    make_image,
    read_json,
    write_checkpoint,
)
from support.fresh_process import run

FILES = {
    f"{name}_molmo2": REPOSITORY / f"{name}_molmo2.py"
    for name in ("configuration", "grounding", "image_processing", "modeling", "processing", "video_processing")
}
MAX_LINES = 10_850  # of all files together: who trusts remote code has to read it
AUTO_MAP_MODULES = [name for name in FILES if name != "grounding_molmo2"]
# What every installation of this project has; all the rest is looked for when it is needed.
# transformers brings safetensors and tokenizers.
REQUIRED_PACKAGES = {"torch", "transformers", "safetensors", "tokenizers", "numpy", "PIL"}
VIDEO = DATA / "golden" / "media" / "one_frame.mp4"

HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None
HAS_NATIVE_MOLMO2 = importlib.util.find_spec("transformers.models.molmo2") is not None


# --- the text of the files -------------------------------------------------------------------------------------------


@functools.cache
def parse(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def relative_imports(name: str) -> set[str]:
    """Names of the files that a file imports relatively."""
    nodes = [node for node in ast.walk(parse(name)) if isinstance(node, ast.ImportFrom) and node.level]
    return {node.module or "" for node in nodes}


def unguarded_packages(node: ast.AST) -> set[str]:
    """Packages imported anywhere, functions included, outside the body of a `try`."""
    found = set()
    if isinstance(node, ast.Import):
        found |= {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and not node.level:
        found.add(str(node.module).partition(".")[0])
    for child in ast.iter_child_nodes(node):
        if not (isinstance(node, ast.Try) and child in node.body):
            found |= unguarded_packages(child)
    return found


def reachable(name: str) -> set[str]:
    """Names of all files that a file needs, at any distance."""
    found: set[str] = set()
    pending = {name}
    while pending:
        found |= pending
        pending = set().union(*map(relative_imports, pending)) - found
    return found - {name}


def test_six_files_lie_in_the_root():
    """And no other Python file: a checkpoint takes them all."""
    assert sorted(REPOSITORY.glob("*.py")) == sorted(FILES.values())
    assert sorted(remote_code_files()) == sorted(
        [*FILES.values(), REPOSITORY / "chat_template.jinja", REPOSITORY / "LICENSE"]
    )


def test_the_files_are_short_enough_to_be_read():
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in FILES.values()) <= MAX_LINES


def test_tools_training_and_converter_stay_at_home():
    sources = [line for path in FILES.values() for line in path.read_text(encoding="utf-8").splitlines()]
    sources = [line.split()[2] for line in sources if line.startswith("# --- src/")]
    assert "src/molmo2/model/modeling.py" in sources
    assert [source for source in sources if re.match(r"src/molmo2/(tools|training|convert)/", source)] == []
    assert [name for name in FILES if {"molmo2", "molmo2_fiftyone"} & unguarded_packages(parse(name))] == []


def test_relative_imports_name_a_file_beside():
    """`from . import x` and packages in packages are not understood by the loader."""
    for name in FILES:
        for node in ast.walk(parse(name)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert (node.level, node.module in FILES) == (1, True), (name, node.lineno)


def test_the_loader_reads_the_imports_that_are_there():
    """The loader searches the text, docstrings included; what it finds must be what Python imports."""
    for name, path in FILES.items():
        assert set(dynamic_module_utils.get_relative_imports(path)) == relative_imports(name), name
        found = set(dynamic_module_utils.get_imports(path))
        assert found - sys.stdlib_module_names <= REQUIRED_PACKAGES, name


def test_files_named_in_auto_map_import_all_they_need_directly():
    """Older loaders copy the direct imports of the file that an Auto class asks for, and nothing further."""
    for name in AUTO_MAP_MODULES:
        assert reachable(name) == relative_imports(name), name


def test_every_file_is_needed():
    assert set(AUTO_MAP_MODULES).union(*map(reachable, AUTO_MAP_MODULES)) == FILES.keys()


def test_other_packages_are_optional():
    for name in FILES:
        assert unguarded_packages(parse(name)) - sys.stdlib_module_names <= REQUIRED_PACKAGES, name


def test_torchvision_is_never_imported():
    for name in FILES:
        imported = set()
        for node in ast.walk(parse(name)):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
                imported.add(node.value)  # a name that importlib could be given
        assert [found for found in imported if found.split(".")[0] == "torchvision"] == [], name


def test_decoders_in_a_process_are_refused_with_what_to_install(monkeypatch):
    """The process would raise errors of the package, which no `except` with these classes catches."""
    folder = importlib.machinery.ModuleSpec("generated_molmo2", None, is_package=True)
    folder.submodule_search_locations = [str(REPOSITORY)]
    monkeypatch.setitem(sys.modules, "generated_molmo2", importlib.util.module_from_spec(folder))
    videos = importlib.import_module("generated_molmo2.video_processing_molmo2")
    images = importlib.import_module("generated_molmo2.image_processing_molmo2")
    for name in [name for name in sys.modules if name.startswith("generated_molmo2.")]:
        monkeypatch.setitem(sys.modules, name, sys.modules.pop(name))  # forgotten after the test
    processor = videos.Molmo2VideoProcessor()
    assert processor.preprocess(VIDEO, limits=images.MediaLimits())["video_grids"].tolist() == [[2, 9, 9]]
    with pytest.raises(ValueError, match=r"decode_seconds=\.\.\.\) needs the package molmo2-transformers") as caught:
        processor.preprocess(VIDEO, limits=images.MediaLimits(decode_seconds=60))
    assert type(caught.value) is ValueError


def test_checks_are_not_assertions():
    """They would be gone under `python -O`."""
    for name in FILES:
        assert [node.lineno for node in ast.walk(parse(name)) if isinstance(node, ast.Assert)] == [], name


def test_the_annotation_of_the_processors_options_is_a_type():
    """Serving engines read it; as text it would tell them nothing."""
    imports = [node for node in ast.walk(parse("processing_molmo2")) if isinstance(node, ast.ImportFrom)]
    assert "__future__" not in {node.module for node in imports}


def test_auto_map_of_the_published_files_is_served():
    published = {}
    for name in ("config", "preprocessor_config", "video_preprocessor_config", "processor_config"):
        published.update(read_json(PUBLISHED / "Molmo2-4B" / f"{name}.json")["auto_map"])
    assert {name: AUTO_MAP.get(name, target) for name, target in published.items()} == published
    for target in {*published.values(), *AUTO_MAP.values()}:
        name, class_name = target.split(".")
        assert class_name in [node.name for node in parse(name).body if isinstance(node, ast.ClassDef)]


# --- a stranger's program --------------------------------------------------------------------------------------------

AUTO_CLASSES = {
    "AutoConfig": "Molmo2Config",
    "AutoModel": "Molmo2Model",
    "AutoModelForImageTextToText": "Molmo2ForConditionalGeneration",
    "AutoModelForMultimodalLM": "Molmo2ForConditionalGeneration",
    "AutoProcessor": "Molmo2Processor",
    "AutoTokenizer": None,  # the library's
    "AutoImageProcessor": "Molmo2ImageProcessor",
    "AutoVideoProcessor": "Molmo2VideoProcessor",
    "transformers.models.auto.image_processing_auto.AutoImageProcessor": "Molmo2ImageProcessor",
    "transformers.models.auto.video_processing_auto.AutoVideoProcessor": "Molmo2VideoProcessor",
}


def older_than(release: str) -> bool:
    return Version(transformers.__version__) < Version(release)


def library_limit(name: str) -> str | None:
    """What the library answers where it cannot load a class without torchvision, whatever the class does."""
    if name == "AutoModelForMultimodalLM" and older_than("5.0"):
        return "absent"
    if HAS_TORCHVISION:
        return None
    if name == "AutoVideoProcessor":
        return "ImportError"  # its place is taken by a stand-in
    if name == "AutoImageProcessor" and not older_than("5.4") and older_than("5.18"):
        return "ImportError"
    if name.endswith("video_processing_auto.AutoVideoProcessor") and older_than("5.1"):
        return "TypeError"  # the table of video processors is half empty
    return None


@pytest.fixture(scope="module")
def image_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images") / "image.png"
    make_image().save(path)
    return path


@pytest.fixture(scope="module")
def stranger(tmp_path_factory, image_file) -> dict[str, Any]:
    """The report of `fresh_process.auto_classes`."""
    folder = tmp_path_factory.mktemp("stranger")
    folders = {name: write_checkpoint(folder / f"copy{i}", "olmo3") for i, name in enumerate(AUTO_CLASSES)}
    cache = tmp_path_factory.mktemp("cache")
    output = folder / "answer.safetensors"
    report = run(
        "auto_classes",
        cache,
        folders={name: str(path) for name, path in folders.items()},
        image=image_file,
        video=VIDEO,
        output=output,
    )
    return {**report, "answer": load_file(output)}


def test_nothing_is_warned_about_in_the_ordinary_case(tmp_path, image_file):
    """Not even of the library's own class, which transformers imports while it loads ours."""
    folder = write_checkpoint(tmp_path / "checkpoint", "olmo3")
    (tmp_path / "cache").mkdir()
    assert run("messages_of_a_first_answer", tmp_path / "cache", folder=folder, image=image_file) == []


def assert_right_answer(answer: dict[str, torch.Tensor], family: str = "olmo3") -> None:
    """The logits that were found elsewhere are those of the model that was never saved or loaded."""
    inputs = dict(answer)
    logits = inputs.pop("logits")
    with torch.no_grad():
        expected = build_model(family)(**inputs).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", AUTO_CLASSES)
def test_auto_class(stranger, name):
    found = stranger["classes"][name]
    if library_limit(name) is not None:
        assert found.get("error") == library_limit(name)
        assert "_molmo2.py" not in found.get("trace", "")  # it never came to our code
        return
    assert "error" not in found, found["trace"]
    if AUTO_CLASSES[name] is None:
        assert found["module"].startswith("transformers.")
    else:
        assert found["class"] == AUTO_CLASSES[name]
        assert found["module"].startswith("transformers_modules.")


@pytest.mark.parametrize(
    ("name", "module"), [("AutoModelForImageTextToText", "modeling_molmo2"), ("AutoProcessor", "processing_molmo2")]
)
def test_auto_class_copies_what_it_needs(stranger, name, module):
    copied = {Path(file).stem for file in stranger["modules"][name]}
    assert copied - {"configuration_molmo2"} == ({module} | reachable(module)) - {"configuration_molmo2"}
    assert "modeling_molmo2" not in reachable("processing_molmo2")


def test_answer_of_a_loaded_checkpoint(stranger):
    assert_right_answer(stranger["answer"])


def test_processor_loads_its_own_parts(stranger):
    assert stranger["parts"]["image_processor"].endswith(".image_processing_molmo2")
    assert stranger["parts"]["video_processor"].endswith(".video_processing_molmo2")


def test_pipeline(stranger):
    answers = stranger["pipeline"]
    assert answers["model"].endswith(".modeling_molmo2")
    assert answers["expected"] != ""
    assert answers["messages"] == answers["expected"]
    assert answers["images"] == answers["expected"]


def test_optional_packages_are_imported_when_a_video_asks_for_them(stranger):
    assert stranger["imports"] == {}
    importers = stranger["imports with a video"]
    assert importers.keys() <= {"decord", "av", "torchcodec"}
    assert len(importers) == 1
    assert [module for files in importers.values() for module in files if not module.startswith("video_")] == []


def test_without_trust_the_library_uses_its_own_classes(stranger):
    """Also after remote code ran in the same process. Releases without a Molmo2 of their own refuse."""
    native = stranger["native"]
    for name in ("AutoConfig", "AutoModelForImageTextToText"):
        if HAS_NATIVE_MOLMO2:
            assert native[name]["module"].startswith("transformers.models.molmo2."), native[name]
        else:
            assert native[name]["error"] == "ValueError"
            assert "trust_remote_code=True" in native[name]["message"]
    assert native["remote again"]["module"].startswith("transformers_modules.")


def write_hub_cache(cache: Path, repository: str, revision: str, source: Path) -> None:
    """Lay a folder out as a download leaves it: blobs, a snapshot of links to them, and the name of the revision."""
    root = cache / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / revision
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(revision)
    for number, file in enumerate(sorted(source.iterdir())):
        blob = root / "blobs" / f"{number:040x}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)


def test_load_by_name_from_the_hub_cache(tmp_path, image_file):
    repository, revision = "example/Molmo2-tiny.v1", "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "cache"
    write_hub_cache(cache, repository, revision, write_checkpoint(tmp_path / "source", "qwen3"))

    output = tmp_path / "answer.safetensors"
    report = run("from_hub_cache", cache, repository=repository, image=image_file, output=output)

    for name, found in report.items():
        assert "error" not in found, found["trace"]
        if name != "AutoTokenizer":
            assert found["class"] == AUTO_CLASSES[name]
            assert revision in found["module"]
    assert_right_answer(load_file(output), "qwen3")


STAND_IN = '''
class Untouchable:
    """Can be named, by the library's own imports, but not used."""

    def __init__(self, name):
        self.name = name

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Untouchable(f"{self.name}.{name}")

    def __call__(self, *args, **kwargs):
        raise RuntimeError(f"torchvision was used: {self.name}")


def __getattr__(name):
    if name.startswith("__") and name != "__version__":
        raise AttributeError(name)
    return "0.28.0" if name == "__version__" else Untouchable(f"{__name__}.{name}")
'''


def write_torchvision(folder: Path) -> Path:
    """An installed torchvision without a single function."""
    for module in (
        "",
        "transforms",
        "transforms/functional",
        "transforms/v2",
        "transforms/v2/functional",
        "io",
        "ops",
    ):
        path = folder / "torchvision" / module
        path.mkdir(parents=True, exist_ok=True)
        (path / "__init__.py").write_text(STAND_IN)
    metadata = folder / "torchvision-0.28.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    return folder


def test_an_installed_torchvision_changes_nothing(tmp_path, image_file):
    """The library believes in it and offers more Auto classes; ours never call it."""
    (tmp_path / "cache").mkdir()
    folder, output = write_checkpoint(tmp_path / "Molmo2-4B.v1", "qwen2"), tmp_path / "answer.safetensors"
    report = run(
        "with_torchvision",
        tmp_path / "cache",
        python_path=write_torchvision(tmp_path / "packages"),
        folder=folder,
        image=image_file,
        video=VIDEO,
        output=output,
    )
    assert report["is_torchvision_available"]
    for name in ("AutoImageProcessor", "AutoVideoProcessor"):
        assert report[name].get("class") == AUTO_CLASSES[name], report[name].get("trace")
        assert report[name]["module"].startswith("transformers_modules.")
    assert_right_answer(load_file(output), "qwen2")
