"""The command `nearfar doctor`: what works here, what does not, and what to do about it."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import typer

if TYPE_CHECKING:
    from sdk.config import CloudConfig, Config

Status = Literal["ok", "warn", "fail"]

_PACKAGES = ("numpy", "msgspec", "websockets", "cryptography", "typer", "rich")
_EDGE_PACKAGES = ("onnxruntime", "onnxruntime-genai", "tokenizers", "jinja2")
#: Alternatives that bring the same module.
_SAME_MODULE = {
    "onnxruntime": ("onnxruntime-gpu",),
    "onnxruntime-genai": ("onnxruntime-genai-cuda",),
}
_FEWEST_CORES = 2
#: A device that may use less of its clock than this is slower than it could be.
_SLOW = 0.7


class Finding(msgspec.Struct, frozen=True):
    """One line of the report.

    Attributes:
        status: ``ok``, ``warn`` (something is missing that you may not need) or ``fail``.
        subject: What was looked at.
        detail: What was found.
        fix: What to do; ``""`` when there is nothing to do.
    """

    status: Status
    subject: str
    detail: str
    fix: str = ""


def doctor(
    config: Annotated[
        Path, typer.Option("--config", "-c", help="Configuration file to check.")
    ] = Path("nearfar.toml"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per line instead.")
    ] = False,
) -> None:
    """Check this machine: Python, packages, engines, model store, policy, cloud.

    Ends with status 1 when something fails. Sends nothing to the cloud but the connection itself.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    failed = False
    for finding in examine(config):
        failed = failed or finding.status == "fail"
        if as_json:
            sys.stdout.write(msgspec.json.encode(finding).decode() + "\n")
            continue
        line = Text.assemble(
            (f"{finding.status:<5}", styles[finding.status]),
            (f"{finding.subject:<12}", "bold"),
            finding.detail,
        )
        console.print(line, soft_wrap=True)
        if finding.fix:
            console.print(Text(f"{'':17}→ {finding.fix}", style="dim"), soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def examine(config_path: Path) -> Iterator[Finding]:
    """All findings, one after the other, as they are made."""
    yield _python()
    yield from _packages()
    yield _device()
    yield from _condition()
    if not config_path.is_file():
        yield Finding(
            "warn",
            "config",
            f"there is no {config_path}",
            "Write one (docs/reference/configuration.md), or name one with --config",
        )
        return
    from nearfar.errors import NearfarError
    from sdk.config_file import load_config

    try:
        config = load_config(config_path)
    except NearfarError as error:
        yield Finding("fail", "config", error.problem, error.fix)
        return
    yield Finding("ok", "config", str(config_path))
    yield from _policy(config)
    yield from _store(config)
    if config.cloud is None:
        yield Finding("ok", "cloud", "none configured: everything runs on this device")
    # Where there are several, one that is away is not the only route.
    is_only_route = config.models_store is None and len(config.clouds) == 1
    for cloud in config.clouds.values():
        yield from _cloud(cloud, is_only_route=is_only_route)


def _python() -> Finding:
    version = platform.python_version()
    return Finding("ok", "python", f"{version} on {platform.machine()} {platform.system()}")


def _packages() -> Iterator[Finding]:
    missing = [name for name in _PACKAGES if _version(name) is None]
    versions = " ".join(f"{n} {_version(n)}" for n in _PACKAGES if n not in missing)
    if missing:
        yield Finding("fail", "client", f"missing: {', '.join(missing)}", "pip install nearfar")
    else:
        yield Finding("ok", "client", versions)
    missing = [name for name in _EDGE_PACKAGES if _version(name) is None]
    versions = " ".join(f"{n} {_version(n)}" for n in _EDGE_PACKAGES if n not in missing)
    if missing:
        yield Finding(
            "warn",
            "edge",
            f"missing: {', '.join(missing)}" + (f"; found: {versions}" if versions else ""),
            "pip install 'nearfar[edge]' to run models on this device (on Jetson: NVIDIA's own "
            "onnxruntime wheel; there is no onnxruntime-genai for Python 3.10 on aarch64: convert "
            "language models with --variants onnx-int4)",
        )
    else:
        yield Finding("ok", "edge", versions)


def _version(name: str) -> str | None:
    for candidate in (name, *_SAME_MODULE.get(name, ())):
        try:
            return metadata.version(candidate)
        except metadata.PackageNotFoundError:
            continue
    return None


def _device() -> Finding:
    from nearfar.errors import NearfarError

    try:
        from nearfar.engines.devices import probe

        device = probe()
    except (ImportError, NearfarError) as error:
        return Finding("warn", "device", str(error), "pip install 'nearfar[edge]'")
    from nearfar.units import format_bytes

    providers = ", ".join(device.execution_providers) or "no execution provider"
    cores = device.physical_cores
    detail = f"{device.machine}, {format_bytes(device.memory_bytes)}, {providers}"
    if cores < _FEWEST_CORES:
        return Finding("warn", "device", detail, "One core: expect slow answers on the edge")
    return Finding("ok", "device", detail)


def _condition() -> Iterator[Finding]:
    """How fast the device may run just now, where it says anything about that."""
    from nearfar.errors import NearfarError

    try:
        from nearfar.engines.condition import DeviceCondition, describe, read_condition
        from nearfar.engines.devices import probe

        condition = read_condition(uses_gpu=probe().sm_arch is not None)
    except (ImportError, NearfarError):
        return  # the finding before this one says why
    if condition == DeviceCondition():
        return
    if condition.speed is not None and condition.speed < _SLOW:
        yield Finding(
            "warn",
            "condition",
            describe(condition),
            "Let the device cool down, or choose a faster power mode; the router reckons with it",
        )
    else:
        yield Finding("ok", "condition", describe(condition))


def _policy(config: Config) -> Iterator[Finding]:
    from nearfar.errors import NearfarError
    from sdk.policy import load_policy

    if config.policy_file is None:
        if config.cloud is not None:
            yield Finding(
                "warn",
                "policy",
                "none: everything stays on this device, the cloud is never used",
                "Set [policy] file to a policy that allows the cloud for some data",
            )
        else:
            yield Finding("ok", "policy", "none: everything stays on this device")
        return
    try:
        policy = load_policy(config.policy_file)
    except NearfarError as error:
        yield Finding("fail", "policy", error.problem, error.fix)
        return
    default = config.default_sensitivity or policy.strictest
    yield Finding(
        "ok",
        "policy",
        f"{config.policy_file}: {len(policy.rules)} rules; unlabelled data counts as {default}",
    )


def _store(config: Config) -> Iterator[Finding]:
    from nearfar.errors import NearfarError
    from sdk.edge import EdgeRoute

    if config.models_store is None:
        yield Finding("ok", "models", "no store configured: everything goes to the cloud")
        return
    try:
        route = EdgeRoute(config.models_store, trusted_keys=config.trusted_keys)
        manifests = route.models()
    except NearfarError as error:
        yield Finding("fail", "models", error.problem, error.fix)
        return
    if not manifests:
        yield Finding(
            "warn",
            "models",
            f"{config.models_store} holds no bundle",
            "Convert a model into it: nearfar convert --help",
        )
    for manifest in manifests:
        label = f"{manifest.name} {manifest.version} ({manifest.task})"
        try:
            variant = route.find(manifest.name, None).variant
        except NearfarError as error:
            yield Finding("warn", "model", f"{label}: {error.problem}", error.fix)
        else:
            origin = _signature(config, manifest.name)
            yield Finding("ok", "model", f"{label} runs here as {variant.id}; {origin}")
    route.close()


def _signature(config: Config, model: str) -> str:
    """Whether the model's bundle is signed, and by a key that this configuration trusts."""
    from nearfar.bundle import BundleStore
    from nearfar.bundle.bundle import read_signature

    assert config.models_store is not None
    store = BundleStore(config.models_store, trusted_keys=config.trusted_keys or None)
    bundle = store.open(model)
    if bundle.signed is not None:
        return f"signed by the trusted key {bundle.signed.key_id[:16]}"
    if read_signature(bundle.path) is None:
        return "unsigned"
    return "signed, not checked ([models] trusted_keys is not set)"


def _cloud(config: CloudConfig, *, is_only_route: bool) -> Iterator[Finding]:
    from nearfar.errors import CloudUnavailable, NearfarError
    from nearfar.units import Deadline, format_ms
    from sdk.background import BackgroundLoop
    from sdk.cloud.link import CloudLink

    loop, link = BackgroundLoop(), CloudLink(config)
    try:
        state = loop.call(link.connect(Deadline()))
    except NearfarError as error:
        # A cloud that is away is weather while the device can answer; a wrong pin never is.
        is_weather = isinstance(error, CloudUnavailable) and not is_only_route
        yield Finding("warn" if is_weather else "fail", "cloud", error.problem, error.fix)
        return
    finally:
        loop.call(link.close())
        loop.close()
    served = ", ".join(sorted(state.offers or ())) or "no models"
    where = f" in {state.region}" if state.region else ""
    yield Finding(
        "ok",
        "cloud",
        f"{config.name}: {state.server}{where}, round trip {format_ms(state.rtt_ms)}, "
        f"serves {served}",
    )
    if config.region and state.region and config.region != state.region:
        yield Finding(
            "warn",
            "cloud",
            f"the configuration says region {config.region}, the cloud says {state.region}",
            "Correct `region`; until then rules that ask for a region do not hold",
        )
