"""Recipe files: what a conversion did, as TOML, to do it again.

Format: docs/reference/recipe.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from converters.awq.environment import stated_versions
from converters.cache import digest_of_path
from converters.libraries import tool_versions
from converters.options import ConversionOptions
from converters.settings import Settings, Trial
from converters.sources.base import Source, sha256_file
from nearfar.bundle import Bundle
from nearfar.bundle.manifest import Task
from nearfar.errors import ConfigError, ConversionError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

_MAX_BYTES = 4 << 20
_BROUGHT = Path(__file__).parent / "recipes"
#: Files beside a model that change what comes out of it.
_BESIDE_ONNX = ("config.min.json", "tokenizer.json")

SourceKind = Literal["onnx", "gguf", "huggingface", "pytorch", "bundle"]


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class RecipeSource(_Table, frozen=True, kw_only=True):
    """What was converted.

    Attributes:
        kind: Form of the source; another one cannot be converted by this recipe.
        name: What the manifest calls it.
        sha256: See `fingerprint`; "" fits any source.
    """

    kind: SourceKind
    name: str = ""
    sha256: str = ""


class RecipeBundle(_Table, frozen=True, kw_only=True):
    """What the manifest says for people."""

    name: str
    version: str = "1.0.0"
    task: Task | None = None
    license: str = ""
    description: str = ""


class RecipeSteps(_Table, frozen=True, kw_only=True):
    """What was chosen.

    Attributes:
        variants: Ids; empty takes the task's default.
        measure: Whether speed and memory were measured.
        golden: Whether golden inputs and outputs were put into the bundle.
        labels: Class names that were given.
        preprocessing: JSON that was given, "" when none was.
        samples: Path of the ``.npz``, relative to the recipe; "" when none was given.
        samples_sha256: Its digest.
        inputs: Example inputs of a PyTorch module: a function, or a file relative to the recipe.
        axes: Its free sizes; `None` is the first axis.
        train: What a pruned module was trained on, in the form of `inputs`.
        trials: Variant id to how it was made, where a search found several ways.
    """

    variants: tuple[str, ...] = ()
    measure: bool = True
    golden: bool = True
    labels: tuple[str, ...] = ()
    preprocessing: str = ""
    samples: str = ""
    samples_sha256: str = ""
    inputs: str = ""
    axes: str | None = None
    train: str = ""
    trials: dict[str, Trial] = {}


class Recipe(_Table, frozen=True, kw_only=True):
    """A recipe file.

    Attributes:
        settings: Numbers of the steps.
        versions: Packages that took part. Others may give other files.
        files: Path in the bundle to SHA-256: what came out.
    """

    format: Literal[1] = 1
    source: RecipeSource
    bundle: RecipeBundle
    convert: RecipeSteps = RecipeSteps()
    settings: Settings = Settings()
    versions: dict[str, str] = {}
    files: dict[str, str] = {}


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        ConfigError: Missing, not TOML, or a field does not fit; names file and field.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES).decode("utf-8")
        return msgspec.convert(tomllib.loads(text), Recipe)
    except OSError as exc:
        raise ConfigError(
            f"Recipe {path} cannot be read ({exc.strerror})", field="recipe", fix="Check the path"
        ) from exc
    except msgspec.ValidationError as exc:
        problem, _, field = str(exc).partition(" - at ")
        where = field.strip("`").removeprefix("$").lstrip(".") or "the top level"
        raise ConfigError(
            f"Recipe {path}: {where}: {problem}",
            field="recipe",
            fix="See docs/reference/recipe.md, or write a new one with --save-recipe",
        ) from exc
    except (ValueError, RecursionError) as exc:  # TOMLDecodeError and UnicodeDecodeError are such
        raise ConfigError(
            f"Recipe {path} is not TOML ({exc})", field="recipe", fix="Correct that line"
        ) from exc


def find_recipe(path: Path) -> Path:
    """The file, or the recipe of that name that nearfar brings.

    Raises:
        ConfigError: There is neither.
    """
    if path.exists():
        return path
    brought = sorted(_BROUGHT.glob("*.toml"))
    for file in brought:
        if str(path) == file.stem:
            return file
    raise ConfigError(
        f"There is no recipe {path}",
        field="recipe",
        fix="Give a file, or one of: " + ", ".join(file.stem for file in brought),
    )


def options_of(recipe: Recipe, path: Path) -> ConversionOptions:
    """The options that repeat a recipe.

    Args:
        recipe: What was read.
        path: Where it was read; its samples lie relative to that.

    Raises:
        ConversionError: The samples are other ones, or are not there.
    """
    steps = recipe.convert
    samples = path.parent / steps.samples if steps.samples else None
    stated = steps.samples_sha256
    if samples is not None and stated and _sha256_of(samples) != stated:
        raise ConversionError(
            f"{samples} holds other samples than those of recipe {path}",
            fix="Bring the old file back, or take samples_sha256 out of the recipe",
        )
    return ConversionOptions(
        name=recipe.bundle.name,
        version=recipe.bundle.version,
        task=recipe.bundle.task,
        license=recipe.bundle.license,
        description=recipe.bundle.description,
        variants=steps.variants,
        measure=steps.measure,
        golden=steps.golden,
        labels=steps.labels or None,
        preprocessing=steps.preprocessing or None,
        samples=samples,
        inputs=_inputs_from(steps.inputs, path.parent),
        axes=steps.axes,
        train=_inputs_from(steps.train, path.parent),
        trials=tuple(steps.trials.values()),
        settings=recipe.settings,
    )


def recipe_of(source: Source, options: ConversionOptions, bundle: Bundle, path: Path) -> Recipe:
    """What has just been done.

    Args:
        source: What was converted.
        options: How.
        bundle: What came out.
        path: Where the recipe will be written.
    """
    manifest = bundle.manifest
    samples = samples_sha256 = preprocessing = ""
    if options.samples is not None:
        samples = Path(os.path.relpath(options.samples, path.absolute().parent)).as_posix()
        samples_sha256 = _sha256_of(options.samples)
    if options.preprocessing is not None:
        preprocessing = msgspec.json.encode(manifest.preprocessing).decode()
    return Recipe(
        source=RecipeSource(
            kind=kind_of(source), name=manifest.lineage.source, sha256=fingerprint(source)
        ),
        bundle=RecipeBundle(
            name=manifest.name,
            version=manifest.version,
            task=manifest.task,
            license=manifest.license,
            description=manifest.description,
        ),
        convert=RecipeSteps(
            variants=tuple(variant.id for variant in manifest.variants),
            measure=options.measure,
            golden=options.golden,
            labels=manifest.labels if options.labels is not None else (),
            preprocessing=preprocessing,
            samples=samples,
            samples_sha256=samples_sha256,
            inputs=_inputs_for(options.inputs, path.absolute().parent),
            axes=options.axes,
            train=_inputs_for(options.train, path.absolute().parent),
            trials={one.id: one for one in options.trials},
        ),
        settings=options.settings,
        versions=manifest.lineage.tools,
        files=_hashes(bundle),
    )


def _sha256_of(samples: Path) -> str:
    """Of a folder that of names and contents together."""
    return digest_of_path(samples) if samples.is_dir() else sha256_file(samples)


def _inputs_from(stated: str, folder: Path) -> str | None:
    if not stated:
        return None
    return stated if ":" in stated else str(folder / stated)


def _inputs_for(stated: str | None, folder: Path) -> str:
    if stated is None or ":" in stated:
        return stated or ""
    return Path(os.path.relpath(stated, folder)).as_posix()


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe file, whole or not at all.

    Raises:
        ConfigError: It cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        temporary.write_text(to_toml(recipe), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as exc:
        temporary.unlink(missing_ok=True)
        raise ConfigError(
            f"Recipe {path} cannot be written ({exc.strerror})",
            field="save_recipe",
            fix="Choose a place you may write to",
        ) from exc


def to_toml(recipe: Recipe) -> str:
    """The text of a recipe file; the same recipe always has the same."""
    lines = ["# Written by `nearfar convert --save-recipe`. Again:"]
    lines.append("# nearfar convert MODEL -o BUNDLE --recipe THIS_FILE")
    _emit("", msgspec.to_builtins(recipe), lines)
    return "\n".join(lines) + "\n"


def in_short(settings: Settings, variants: Sequence[str]) -> str:
    """What a conversion did, in a line: its variants, and every setting that is not a default."""
    parts = [f"variants = {_value(variants)}"]

    def compare(table: str, found: dict[str, Any], usual: dict[str, Any]) -> None:
        for key, value in found.items():
            if isinstance(value, dict):
                compare(f"{table}{key}.", value, usual.get(key) or {})
            elif value != usual.get(key):
                parts.append(f"{table}{key} = {_value(value)}")

    compare("", msgspec.to_builtins(settings), msgspec.to_builtins(Settings()))
    return ", ".join(parts)


def check_source(recipe: Recipe, source: Source) -> list[str]:
    """What may make another bundle of it than the recipe's, for people to read.

    Raises:
        ConversionError: The recipe is for another kind of source.
    """
    if kind_of(source) != recipe.source.kind:
        raise ConversionError(
            f"The recipe is for a source of kind {recipe.source.kind}, and {source.path} is "
            f"{kind_of(source)}",
            fix="Give the model that the recipe was written for, or write another recipe",
        )
    found = []
    if recipe.source.sha256 and recipe.source.sha256 != fingerprint(source):
        found.append(f"another source than the recipe's ({recipe.source.name})")
    here = tool_versions(*recipe.versions)
    if "nvidia-modelopt" in recipe.versions:
        here |= {"nvidia-modelopt": stated_versions()["nvidia-modelopt"]}
    found += [
        f"{name} is {here.get(name, 'not installed')}, the recipe's was {version}"
        for name, version in sorted(recipe.versions.items())
        if here.get(name) != version
    ]
    return found


def changed_files(recipe: Recipe, bundle: Bundle) -> list[str]:
    """Paths that came out differently from what the recipe states; none when it states none."""
    if not recipe.files:
        return []
    now = _hashes(bundle)
    return sorted(
        path for path in now.keys() | recipe.files.keys() if now.get(path) != recipe.files.get(path)
    )


def kind_of(source: Source) -> SourceKind:
    """Which of the known forms the source has."""
    from converters.sources.bundle import BundleSource
    from converters.sources.gguf import GgufSource
    from converters.sources.onnx_file import OnnxSource
    from converters.sources.torch_module import TorchSource

    if isinstance(source, BundleSource):
        return "bundle"
    if isinstance(source, TorchSource):
        return "pytorch"
    if isinstance(source, OnnxSource):
        return "onnx"
    return "gguf" if isinstance(source, GgufSource) else "huggingface"


def fingerprint(source: Source) -> str:
    """SHA-256 of everything that is read of a source.

    Of one file it is the file's own. Of several it is that of a list as `sha256sum` prints it:
    digest, two spaces, name, line feed; sorted by name. Of a PyTorch module: see its `digest`.
    """
    from converters.sources.bundle import BundleSource
    from converters.sources.onnx_file import OnnxSource
    from converters.sources.torch_module import TorchSource

    if isinstance(source, (TorchSource, BundleSource)):
        return source.digest()
    folder = source.path if source.path.is_dir() else source.path.resolve().parent
    files = [source.path]
    if source.path.is_dir():
        files = [file for file in source.path.iterdir() if file.is_file()]
    elif isinstance(source, OnnxSource):
        beside = [folder / name for name in _BESIDE_ONNX]
        files += [*source.external_files, *(file for file in beside if file.is_file())]
    if len(files) == 1:
        return sha256_file(files[0])
    names = {os.path.relpath(file, folder) if file != source.path else file.name: file
             for file in files}  # fmt: skip
    listed = "".join(f"{sha256_file(file)}  {name}\n" for name, file in sorted(names.items()))
    return hashlib.sha256(listed.encode()).hexdigest()


def overridden(options: ConversionOptions, **stated: object) -> ConversionOptions:
    """Options with those that a person stated beside the recipe."""
    return replace(options, **stated)  # type: ignore[arg-type]  # names are those of the options


def _hashes(bundle: Bundle) -> dict[str, str]:
    manifest = bundle.manifest
    entries = [*manifest.files, *(entry for v in manifest.variants for entry in v.files)]
    return {entry.path: entry.sha256 for entry in sorted(entries, key=lambda entry: entry.path)}


def _emit(table: str, values: dict[str, object], lines: list[str]) -> None:
    inner = {key: value for key, value in values.items() if isinstance(value, dict)}
    own = {key: value for key, value in values.items() if key not in inner and value is not None}
    if table and own:
        lines += ["", f"[{table}]"]
    lines += [f"{_key(key)} = {_value(value)}" for key, value in own.items()]
    for key, value in inner.items():
        _emit(f"{table}.{_key(key)}" if table else _key(key), value, lines)


def _key(key: str) -> str:
    is_bare = key.isascii() and key.replace("-", "").replace("_", "").isalnum()
    return key if is_bare else _value(key)


def _value(value: object) -> str:
    if isinstance(value, (list, tuple)):
        if len(value) > 8:
            return "[\n" + "".join(f"  {_value(item)},\n" for item in value) + "]"
        return "[" + ", ".join(_value(item) for item in value) + "]"
    # JSON's strings, integers, booleans and finite floats are TOML's too, but for DEL (TOML 1.0).
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
