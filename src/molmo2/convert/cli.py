"""The command line: parses arguments, calls the package, prints results."""

import argparse
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from molmo2.convert.config_files import ATTENTION_CHOICES
from molmo2.convert.conversion import (
    ConversionOptions,
    ensure_remote_code,
    plan_source,
    remote_code_hashes,
    write_plan,
)
from molmo2.convert.errors import ConversionError, OutputError, printable
from molmo2.convert.folder import read_folder
from molmo2.convert.from_parts import VIT_LAYERS, Parts, PartsSource, open_parts, plan_parts
from molmo2.convert.shards import GIGABYTE, INDEX_FILE, SAFETENSORS_DTYPES, SINGLE_FILE
from molmo2.convert.source import NativeSource
from molmo2.convert.staging import ensure_disjoint, ensure_posix, ensure_replaceable

DESCRIPTION = """\
Convert a native training checkpoint of Molmo2 into a folder that transformers, vLLM and the Hub can load.

CHECKPOINT is a checkpoint directory (config.yaml beside model.pt or model_and_optim/), or a save folder with step<N>
directories, of which the latest is used. OUTPUT is the folder to create; it appears complete or not at all. The
training code is not needed, code hidden in the checkpoint is never executed, and memory use does not depend on the
size of the model.
"""
EXAMPLES = """\
examples:
  python -m molmo2.convert runs/molmo2 molmo2-hf --dtype bfloat16 --verify --probe
  python -m molmo2.convert runs/molmo2/step5000 molmo2-hf --dry-run
  python -m molmo2.convert runs/molmo2 molmo2-hf --verify   (OUTPUT exists: check it only)
  python -m molmo2.convert runs/molmo2 molmo2-hf --resume   (continue after an interruption)
  python -m molmo2.convert molmo2-hf back-to-training --to-native  (CHECKPOINT is a converted folder)
  python -m molmo2.convert --from-parts --llm Qwen3-4B --vision siglip2-so400m-patch14-384 molmo2-new

exit codes:
  0 success   2 wrong arguments   3 checkpoint missing, damaged or unsafe   4 not expressible as Molmo2
  5 output cannot be written   6 output differs from its source, or does not load
  7 the Hub cannot be reached, or refuses the upload   130 interrupted
"""
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
INTERRUPTED = 130
INSTALLED_NAME = "molmo2-convert"


def parse_size(text: str) -> int:
    """Bytes of "5GB" (decimal), "500MB", "2GiB" or "1000"."""
    match = SIZE.fullmatch(text.strip())
    if match is None or len(text) > 30 or float(match.group(1)) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 5GB, 500MB or a number of bytes")
    base = 1024 if match.group(3) else 1000
    return int(float(match.group(1)) * base ** POWERS[match.group(2).upper()])


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers; write --vit-layers=-3,-9") from None


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """All options with their explanations."""
    parser = argparse.ArgumentParser(
        prog=INSTALLED_NAME if Path(sys.argv[0]).stem == INSTALLED_NAME else "python -m molmo2.convert",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", nargs="?")  # required but for --from-parts
    parser.add_argument("output", type=Path, metavar="OUTPUT")
    model = parser.add_argument_group("the converted model")
    model.add_argument(
        "--dtype",
        choices=list(SAFETENSORS_DTYPES),
        help="dtype of all tensors; float32 keeps every byte of a float32 checkpoint, bfloat16 halves the size "
        "(default: float32; with --to-native: that of the folder)",
    )
    model.add_argument(
        "--max-model-len",
        type=_positive,
        metavar="TOKENS",
        help="maximum sequence length, instead of the checkpoint's",
    )
    model.add_argument(
        "--attn-implementation",
        choices=ATTENTION_CHOICES,
        default="sdpa",
        help="attention implementation in config.json (default: sdpa)",
    )
    model.add_argument(
        "--max-shard-size",
        type=parse_size,
        default=5 * GIGABYTE,
        metavar="SIZE",
        help="maximum size of one file (default: 5GB)",
    )
    model.add_argument("--tokenizer", metavar="PATH", help="base tokenizer: a local folder or a repository")
    model.add_argument(
        "--ignore-field",
        action="append",
        default=[],
        metavar="NAME",
        help="accept this unknown field of config.yaml, or of a part",
    )
    model.add_argument(
        "--data-set",
        action="append",
        metavar="REPO",
        help='data set for the model card, in the place of those of the published models; "none" for no data set',
    )
    run = parser.add_argument_group("actions")
    run.add_argument("--dry-run", action="store_true", help="check everything, print the plan, write nothing")
    run.add_argument("--resume", action="store_true", help="keep the finished files of an interrupted conversion")
    run.add_argument(
        "--overwrite",
        action="store_true",
        help="replace OUTPUT once the new one is complete; refused if OUTPUT holds files that are read",
    )
    run.add_argument(
        "--verify",
        action="store_true",
        help="compare OUTPUT with CHECKPOINT, tensor by tensor, and its code with this version's",
    )
    run.add_argument("--probe", action="store_true", help="load OUTPUT with transformers and compare logits")
    run.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    hub = parser.add_argument_group("publishing")
    hub.add_argument(
        "--push-to-hub", metavar="REPO", help="upload OUTPUT to the Hub (if it exists already, without converting)"
    )
    hub.add_argument("--private", action="store_true", help="make REPO private if it is created")
    hub.add_argument("--revision", metavar="BRANCH", help="branch or refs/pr/N of REPO to upload to (default: main)")
    hub.add_argument("--create-pr", action="store_true", help="open a pull request against main of REPO, which exists")
    parts = parser.add_argument_group("building a new model (OUTPUT alone, without CHECKPOINT)")
    parts.add_argument(
        "--from-parts",
        action="store_true",
        help="build OUTPUT from --llm and --vision with a fresh connector, to be trained",
    )
    parts.add_argument(
        "--llm", type=Path, metavar="DIR", help="text model: Qwen3, Qwen2, Llama, Mistral, OLMo 2 or OLMo 3"
    )
    parts.add_argument("--vision", type=Path, metavar="DIR", help="vision transformer: SigLIP or SigLIP 2")
    parts.add_argument("--seed", type=_natural, default=0, metavar="N", help="of the fresh weights (default: 0)")
    parts.add_argument(
        "--vit-layers",
        type=_layers,
        default=VIT_LAYERS,
        metavar="N,N",
        help="layers of the vision transformer that are used (default: --vit-layers=-3,-9)",
    )
    native = parser.add_argument_group("converting back")
    native.add_argument(
        "--to-native",
        action="store_true",
        help="write a native checkpoint OUTPUT from the converted folder CHECKPOINT",
    )
    native.add_argument(
        "--native-config",
        type=Path,
        metavar="YAML",
        help="with --to-native: config.yaml to copy training settings from",
    )
    return parser


def _data_sets(given: list[str] | None) -> tuple[str, ...] | None:
    return None if given is None else tuple(name for name in given if name != "none")


@contextmanager
def _progress(title: str, num_bytes: int, is_quiet: bool) -> Iterator[Callable[[int], object]]:
    """Context with a progress bar in bytes, shown on terminals only; yields its update function."""
    from tqdm import tqdm

    hidden = True if is_quiet else None
    with tqdm(total=num_bytes, desc=title, unit="B", unit_scale=True, disable=hidden, mininterval=0.5) as bar:
        yield bar.update


PARTS_ONLY = ("llm", "vision", "seed", "vit_layers")
# Options that do not apply to --to-native.
ONE_WAY = (
    *("max_model_len", "data_set", "attn_implementation", "max_shard_size", "dry_run", "resume", "verify", "probe"),
    *("push_to_hub", "private", "revision", "create_pr"),
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The arguments; the program ends with code 2 where they are wrong or do not fit together."""
    parser = build_parser()
    parsed = parser.parse_args(arguments)
    _check_parts(parser, parsed)
    if parsed.to_native:
        given = [name for name in ONE_WAY if getattr(parsed, name) != parser.get_default(name)]
        if given:
            options = ", ".join("--" + name.replace("_", "-") for name in given)
            parser.error(f"{options}: not available with --to-native")
    elif parsed.native_config is not None:
        parser.error("--native-config: only available with --to-native")
    if parsed.create_pr and (parsed.push_to_hub is None or parsed.private or parsed.revision is not None):
        parser.error("--create-pr: needs --push-to-hub, and neither --private nor --revision")
    return parsed


def _check_parts(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> None:
    if not parsed.from_parts:
        given = [name for name in PARTS_ONLY if getattr(parsed, name) != parser.get_default(name)]
        if given:
            parser.error(f"--{given[0].replace('_', '-')}: only available with --from-parts")
        if parsed.checkpoint is None:
            parser.error("two arguments are required: CHECKPOINT and OUTPUT")
        return
    if parsed.llm is None or parsed.vision is None:
        parser.error("--from-parts: needs --llm and --vision")
    if parsed.checkpoint is not None:
        parser.error(f"--from-parts: takes OUTPUT alone, but there is also {parsed.checkpoint}")
    if parsed.to_native or parsed.resume:
        parser.error("--from-parts: not available with --to-native or --resume")


class _Command:
    """One run of the command line."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.options = ConversionOptions(
            dtype="float32" if arguments.dtype is None else arguments.dtype,
            max_model_len=arguments.max_model_len,
            attn_implementation=arguments.attn_implementation,
            max_shard_bytes=arguments.max_shard_size,
            tokenizer=arguments.tokenizer,
            ignored_fields=tuple(arguments.ignore_field),
            data_sets=_data_sets(arguments.data_set),
        )

    def log(self, text: str) -> None:
        if not self.arguments.quiet:
            print(printable(text), flush=True)

    def warn(self, text: str) -> None:
        print(f"warning: {printable(text)}", file=sys.stderr)

    def run(self) -> None:
        arguments = self.arguments
        ensure_posix()
        if arguments.to_native:
            self.to_native()
            return
        wants_checks = arguments.verify or arguments.probe or arguments.push_to_hub is not None
        is_kept = wants_checks and not arguments.overwrite and not arguments.dry_run
        must_convert = not (is_kept and _is_converted(arguments.output))
        if not must_convert:
            self.log(f"{arguments.output} exists and is left as it is.")
        with self.opened(must_convert) as source:
            if must_convert:
                self.convert(source)
            if not arguments.dry_run:
                self.check(source)
                self.push()

    @contextmanager
    def opened(self, must_convert: bool) -> Iterator[NativeSource]:
        """Context with the checkpoint, or with the parts as one."""
        arguments = self.arguments
        inputs = [arguments.llm, arguments.vision] if arguments.from_parts else [arguments.checkpoint]
        if must_convert:
            ensure_disjoint([arguments.output], inputs)
            ensure_replaceable(arguments.output, arguments.overwrite)
        if not arguments.from_parts:
            yield self.options.open_source(arguments.checkpoint)
            return
        parts = Parts(arguments.llm, arguments.vision, arguments.seed, arguments.vit_layers)
        options = self.options
        opened = open_parts(parts, max_positions=options.max_model_len, ignored_fields=options.ignored_fields)
        with opened as source:
            yield source

    def convert(self, source: NativeSource) -> None:
        arguments = self.arguments
        if isinstance(source, PartsSource):
            plan = plan_parts(source, self.options)
        else:
            plan = plan_source(source, self.options, {arguments.checkpoint})
        ensure_disjoint([arguments.output], plan.inputs)
        self.log(plan.describe())
        for warning in plan.source.config.warnings:
            self.warn(warning)
        if not arguments.dry_run:
            with _progress("converting", plan.output_bytes, arguments.quiet) as on_progress:
                write_plan(
                    plan,
                    arguments.output,
                    overwrite=arguments.overwrite,
                    resume=arguments.resume,
                    on_progress=on_progress,
                    warn=self.warn,
                )
            for name, digest in remote_code_hashes().items():
                self.log(f"sha256 {digest}  {name}")
            self.log(f"Wrote {arguments.output}.")

    def check(self, source: NativeSource) -> None:
        if self.arguments.verify:
            from molmo2.convert.verify import verify_folder

            total = sum(tensor.num_bytes for tensor in read_folder(self.arguments.output).values())
            with _progress("verifying", total, self.arguments.quiet) as on_progress:
                result = verify_folder(source, self.arguments.output, on_progress)
            self.log(
                f"Verified: {result.num_tensors} tensors, {result.num_bytes:,} bytes of {result.dtype} equal the "
                "checkpoint (names, shapes, SHA-256)."
            )
            self.log(
                f"Verified: {len(ensure_remote_code(self.arguments.output))} files of code are those of this version."
            )
        if self.arguments.probe:
            from molmo2.convert.probe import TOLERANCE, probe_folder

            difference = probe_folder(source, self.arguments.output)
            self.log(
                f"Probed: logits differ by {difference:.1e} from those of the native tensors (allowed {TOLERANCE})."
            )

    def push(self) -> None:
        arguments = self.arguments
        if arguments.push_to_hub is not None:
            from molmo2.convert.hub import push_folder

            address = push_folder(
                arguments.output,
                arguments.push_to_hub,
                private=arguments.private,
                revision=arguments.revision,
                create_pr=arguments.create_pr,
                log=self.log,
                warn=self.warn,
            )
            self.log(f"Uploaded: {address}")

    def to_native(self) -> None:
        from molmo2.convert.to_native import write_native

        arguments = self.arguments
        total = sum(tensor.num_bytes for tensor in read_folder(arguments.checkpoint).values())
        with (
            _progress("converting", total, arguments.quiet) as on_progress,
            warnings.catch_warnings(record=True) as said,
        ):
            warnings.simplefilter("always")
            write_native(
                arguments.checkpoint,
                arguments.output,
                native_config_path=arguments.native_config,
                tokenizer=arguments.tokenizer,
                dtype=arguments.dtype,
                ignored_fields=arguments.ignore_field,
                overwrite=arguments.overwrite,
                on_progress=on_progress,
            )
        for warning in said:
            self.warn(str(warning.message))
        self.log(f"Wrote the native checkpoint {arguments.output}.")


def _is_converted(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in (INDEX_FILE, SINGLE_FILE))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parsed = parse_arguments(arguments)
    try:
        _Command(parsed).run()
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return OutputError.exit_code
    except KeyboardInterrupt:
        advice = "start again" if parsed.to_native or parsed.from_parts else "continue with --resume"
        print(f"Interrupted. {parsed.output} is as it was; {advice}.", file=sys.stderr)
        return INTERRUPTED
    return 0
