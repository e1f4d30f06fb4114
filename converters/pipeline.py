"""One conversion from source to bundle."""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from converters.cache import StepCache
from converters.options import ConversionOptions
from converters.plan import plan
from converters.recipe_file import (
    Recipe,
    changed_files,
    check_source,
    in_short,
    recipe_of,
    write_recipe,
)
from converters.recipes.base import Workshop
from converters.reporting import Reporter
from converters.slim.shape import check_slim
from converters.sources.base import Source, slug
from converters.sources.detect import open_source
from nearfar.bundle import Bundle, BundleWriter
from nearfar.bundle.keys import SigningKey
from nearfar.bundle.manifest import Manifest
from nearfar.bundle.versions import is_version
from nearfar.bundle.writer import check_target
from nearfar.errors import ConversionError, InvalidInput
from nearfar.units import format_bytes

logger = logging.getLogger(__name__)

#: A left-over folder younger than this may belong to a conversion that is just starting.
_STALE_AFTER_S = 60.0


def convert_model(
    source_path: Path,
    bundle_path: Path,
    options: ConversionOptions | None = None,
    *,
    reporter: Reporter | None = None,
    recipe: Recipe | None = None,
    save_recipe: Path | None = None,
) -> Bundle:
    """Convert a model into a bundle; at `bundle_path` there is a whole bundle afterwards or none.

    Args:
        source_path: GGUF file, Hugging Face folder, ONNX file, or ``package.module:factory``.
        bundle_path: Folder to make.
        options: What to choose differently from the defaults.
        reporter: Where progress goes; `None` says nothing.
        recipe: The recipe that `options` were taken from (`recipe_file.options_of`); what came out
            is compared with what it states.
        save_recipe: Where to write down what was done.

    Returns:
        The opened bundle.

    Raises:
        InvalidInput: Name or version are not of the right form, or the key cannot be read.
        BundleError: `bundle_path` is taken or cannot be written.
        ConversionError: The source cannot be converted, or a step failed.
    """
    options = options or ConversionOptions()
    reporter = reporter or Reporter()
    check_options(options)
    # Minutes of work must not end with a key that cannot be read.
    signing_key = SigningKey.load(options.sign) if options.sign is not None else None
    check_target(bundle_path.absolute(), replace=options.replace)
    if options.settings.tensorrt.check:
        from converters.tensorrt.check import require_library

        require_library()
    with reporter.step(f"check {source_path.name}") as step:
        source = open_source(
            source_path,
            inputs=options.inputs,
            axes=options.axes,
            allow_pickle=options.allow_pickle,
        )
        step.note(source.title)
    check_slim(source, options)
    for line in check_source(recipe, source) if recipe is not None else ():
        reporter.say(f"! {line}: the files may differ from the recipe's")
    if reporter.is_live:
        reporter.expect(plan(source, options).time_s)
    name = options.name or source.default_name
    with (
        BundleWriter(bundle_path, replace=options.replace) as writer,
        work_folder(bundle_path.absolute(), keep=options.keep_work) as work,
    ):
        cache = StepCache(options.cache)
        shop = Workshop(writer=writer, work=work, options=options, reporter=reporter, cache=cache)
        manifest = _recipe(source, name, shop)
        if options.golden:
            manifest = with_golden(manifest, shop.writer, options, reporter)
        with reporter.step("hash and write the bundle") as step:
            bundle = writer.finish(
                manifest,
                signing_key=signing_key,
                beside=partial(_beside, source, shop),
            )
            step.note(f"{bundle.manifest.name} {bundle.manifest.version}, "
                      f"{format_bytes(bundle.size_bytes())}")  # fmt: skip
    if cache.hits:
        reporter.say(f"✓ {cache.hits} results of earlier steps were taken from {options.cache}")
    if recipe is not None and recipe.files:
        changed = changed_files(recipe, bundle)
        reporter.say(
            f"! other files than the recipe states: {', '.join(changed)}"
            if changed
            else "✓ the files are those that the recipe states, by their SHA-256"
        )
    made = [variant.id for variant in bundle.manifest.variants]
    reporter.say(f"✓ recipe: {in_short(shop.settings_found, made)}")
    if save_recipe is not None:
        done = replace(options, settings=shop.settings_found)
        write_recipe(recipe_of(source, done, bundle, save_recipe), save_recipe)
        reporter.say(f"✓ the whole recipe is in {save_recipe}")
    return bundle


def _recipe(source: Source, name: str, shop: Workshop) -> Manifest:
    from converters.recipes import (
        bundle,
        classifier,
        embedding,
        onnx_model,
        text_generation,
        torch_module,
    )
    from converters.sources.bundle import BundleSource
    from converters.sources.gguf import GgufSource
    from converters.sources.huggingface import HuggingFaceSource
    from converters.sources.onnx_file import OnnxSource
    from converters.sources.torch_module import TorchSource

    wished = shop.options.task
    if isinstance(source, TorchSource):
        return torch_module.build(source, name, shop)
    if isinstance(source, OnnxSource):
        return onnx_model.build(source, name, shop)
    if isinstance(source, BundleSource):
        return bundle.build(source, name, shop)
    task = source.task if isinstance(source, HuggingFaceSource) else "text-generation"
    if wished is not None and wished != task:
        raise ConversionError(
            f"{source.path} is a model for {task}, not for {wished}", fix="Leave --task out"
        )
    if isinstance(source, HuggingFaceSource) and task == "embedding":
        return embedding.build(source, name, shop)
    if isinstance(source, HuggingFaceSource) and task == "classification":
        return classifier.build(source, name, shop)
    assert isinstance(source, (GgufSource, HuggingFaceSource))
    return text_generation.build(source, name, shop)


def with_golden(
    manifest: Manifest, writer: BundleWriter, options: ConversionOptions, reporter: Reporter
) -> Manifest:
    """Add golden inputs and outputs, where that is possible; see `add_golden`."""
    from converters.steps.golden import add_golden

    with reporter.step("run golden inputs as they will be served") as step:
        manifest, said = add_golden(writer, manifest, options.settings.seed)
        step.note(said if manifest.golden else f"left out: {said}")
    return manifest


def _beside(source: Source, shop: Workshop, manifest: Manifest) -> dict[str, bytes]:
    from converters.report.files import files_beside

    done = replace(shop.options, settings=shop.settings_found)
    return files_beside(source, manifest, done, shop.evidence)


def check_options(options: ConversionOptions) -> None:
    """Refuse what cannot be, before anything is done.

    Raises:
        InvalidInput: A name, a version or a limit is not possible.
    """
    if options.name is not None and slug(options.name) != options.name.strip("._-"):
        raise InvalidInput(
            f"The name {options.name!r} cannot be a bundle's",
            field="name",
            fix=f"Use lower-case letters, digits and '-', such as {slug(options.name)!r}",
        )
    if not is_version(options.version):
        raise InvalidInput(
            f"{options.version!r} is not a semantic version",
            field="version",
            fix="Use a version such as 1.0.0",
        )
    if options.settings.gates.max_latency_ms is not None and not options.measure:
        raise InvalidInput(
            "A limit of latency needs the measuring that --no-measure leaves out",
            field="max_latency",
            fix="Leave out one of the two",
        )


@contextmanager
def work_folder(bundle_path: Path, *, keep: bool) -> Iterator[Path]:
    """Folder for intermediate files beside the bundle: they are large, and `/tmp` may be memory."""
    prefix = f".{bundle_path.name}.work-"
    _remove_stale(bundle_path.parent, prefix)
    work = bundle_path.parent / (prefix + secrets.token_hex(6))
    work.mkdir(parents=True)
    lock = os.open(work, os.O_RDONLY | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield work
    finally:
        os.close(lock)
        if keep:
            kept = bundle_path.parent / f"{bundle_path.name}.work"
            shutil.rmtree(kept, ignore_errors=True)
            os.rename(work, kept)
            logger.info("intermediate files are in %s", kept)
        else:
            shutil.rmtree(work, ignore_errors=True)


def _remove_stale(parent: Path, prefix: str) -> None:
    """Remove intermediate files of killed conversions; a living one holds a lock on its folder."""
    for work in parent.iterdir() if parent.is_dir() else ():
        if not work.name.startswith(prefix):
            continue
        try:
            if time.time() - work.stat().st_mtime < _STALE_AFTER_S:
                continue
            descriptor = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(work, ignore_errors=True)
            logger.info("removed left-over folder %s", work.name)
        except BlockingIOError:
            continue
        finally:
            os.close(descriptor)
