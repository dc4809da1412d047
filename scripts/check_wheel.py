"""Builds the wheel and uses it as a stranger would: in an empty environment, from a folder outside of the checkout.

    python scripts/check_wheel.py [--fiftyone PYTHON]

Tried are what is at the top level of the wheel, what travels with checkpoints, the converter on the miniature's native
checkpoint, `molmo2.load`, `ask`, `draw`, the Auto classes, and on request the FiftyOne plugin.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOP_LEVEL = {"molmo2", "molmo2_fiftyone"}
TRAVELS = "molmo2/convert/remote_code/"

# Runs in the new environment, in an empty folder: arguments are the native checkpoint and an image.
TRIAL = """
import pathlib, subprocess, sys
import molmo2
checkpoint, image = sys.argv[1:]
assert pathlib.Path(sys.prefix) in pathlib.Path(molmo2.__file__).parents, molmo2.__file__
tokenizer = f"{checkpoint}/base_tokenizer"
subprocess.run(["molmo2-convert", checkpoint, "model", "--tokenizer", tokenizer, "--quiet"], check=True)
code = sorted(path.name for path in pathlib.Path("model").glob("*.py"))
assert len(code) == 6, code
for path in pathlib.Path("model").glob("*.py"):
    path.write_text("raise RuntimeError('code of the checkpoint was executed')")
from molmo2 import ask, draw, load, prompts
from PIL import Image
model, processor = load("model")
answer = ask(model, processor, prompts.point("red circle"), images=image, max_new_tokens=64)
draw(Image.open(image), answer.grounding).save("drawn.png")
from transformers import AutoModelForImageTextToText, AutoProcessor
molmo2.register()
assert type(AutoModelForImageTextToText.from_pretrained("model")) is type(model)
assert type(AutoProcessor.from_pretrained("model")) is type(processor)
print(f"molmo2 {molmo2.__version__}: {answer.text!r}")
"""
FIFTYONE_TRIAL = """
import pathlib, sys
import fiftyone as fo, fiftyone.zoo as foz
import molmo2_fiftyone
assert pathlib.Path(sys.argv[3]) in pathlib.Path(molmo2_fiftyone.__file__).parents, molmo2_fiftyone.__file__
settings = {"operation": "pointing", "prompt": "red circle", "media_type": "image"}
model = molmo2_fiftyone.load_model("miniature", sys.argv[1], **settings)
dataset = fo.Dataset()
dataset.add_sample(fo.Sample(filepath=sys.argv[2]))
dataset.apply_model(model, label_field="points")
print(f"molmo2_fiftyone: {dataset.first()['points']}")
"""


def build(folder: Path) -> Path:
    """Build the wheel by way of the source distribution, as `python -m build` does."""
    run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)])
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_contents(wheel: Path) -> None:
    """Raises `SystemExit` if the wheel has other packages at its top level, or lacks what travels with checkpoints."""
    names = zipfile.ZipFile(wheel).namelist()
    found = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
    if found != TOP_LEVEL:
        sys.exit(f"{wheel.name} has {sorted(found)} at its top level; expected {sorted(TOP_LEVEL)}.")
    needed = {
        f"{TRAVELS}{path.name}" for path in [*ROOT.glob("*_molmo2.py"), ROOT / "chat_template.jinja", ROOT / "LICENSE"]
    }
    missing = sorted(needed - set(names))
    if missing:
        sys.exit(f"{wheel.name} lacks {missing}; add them to `force-include` in pyproject.toml.")


def install(wheel: Path, folder: Path, packages: str | None = None) -> Path:
    """An environment with the wheel; returns its interpreter.

    Args:
        packages: A folder of packages that are seen besides. None: pip installs what the wheel asks for.
    """
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
    python = folder / "bin" / "python"
    options = ["-c", str(ROOT / "constraints/dev.txt")]
    if packages is not None:
        # `addsitedir`, because what lies there may name further folders itself; the wheel comes first.
        (Path(site_packages(python)) / "packages.pth").write_text(f"import site; site.addsitedir({packages!r})\n")
        options = ["--no-deps", "--force-reinstall"]
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    run([*pip, "install", "-qq", "--no-compile", *options, str(wheel)])
    return python


def site_packages(python: str | Path) -> str:
    """Where an interpreter's packages are installed."""
    script = "import sysconfig; print(sysconfig.get_path('purelib'), end='')"
    return subprocess.check_output([python, "-c", script], text=True)


def run(command: list[str], cwd: Path = ROOT) -> None:
    """Run a command without the checkout on its path; an error ends this script."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    clean["PATH"] = f"{Path(command[0]).parent}{os.pathsep}{clean.get('PATH', os.defpath)}"
    done = subprocess.run(command, cwd=cwd, env={**clean, "HF_HUB_OFFLINE": "1"}, check=False)
    if done.returncode:
        sys.exit(f"Failed with exit status {done.returncode}: {' '.join(command)[:300]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--fiftyone", type=Path, help="interpreter of an environment with FiftyOne: try the plugin there too"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build(folder / "dist")
        check_contents(wheel)
        outside = folder / "outside"
        outside.mkdir()
        python = install(wheel, folder / "env")
        checkpoint, image = ROOT / "examples/miniature/checkpoint", ROOT / "examples/data/world_single.png"
        run([str(python), "-c", TRIAL, str(checkpoint), str(image)], cwd=outside)
        if options.fiftyone:
            python = install(wheel, folder / "fiftyone", site_packages(options.fiftyone))
            arguments = [str(outside / "model"), str(image), str(folder / "fiftyone")]
            script = str(ROOT / "scripts/with_mongod")
            run([str(python), script, "300", str(python), "-c", FIFTYONE_TRIAL, *arguments], cwd=outside)
    print(f"{wheel.name}: built, installed and used outside of the checkout")


if __name__ == "__main__":
    main()
