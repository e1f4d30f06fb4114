"""`nearfar jobs list|cancel|run`."""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Optional

import typer

from nearfar.errors import ConfigError, InvalidInput
from nearfar.units import format_bytes
from sdk.config_file import load_config
from sdk.jobs.desk import no_such_job
from sdk.jobs.store import ENDED, JobInfo, JobStore

app = typer.Typer(
    help="Jobs that wait for policy and link: list them, cancel them, run them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_Config = Annotated[
    Path, typer.Option("--config", "-c", help="Configuration file with a [jobs] section.")
]
_DEFAULT_CONFIG = Path("nearfar.toml")
_AGES = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"))


@app.command("list")
def list_jobs(
    config: _Config = _DEFAULT_CONFIG,
    json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
) -> None:
    """List the jobs of the queue; shows no content."""
    store = _store(config)
    try:
        infos = store.infos()
    finally:
        store.close()
    if json:
        import msgspec

        for info in infos:
            facts = {**msgspec.structs.asdict(info), **msgspec.structs.asdict(info.label)}
            del facts["label"]
            sys.stdout.write(msgspec.json.encode(facts).decode() + "\n")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not infos:
        console.print("no jobs")
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("job", "status", "what", "class", "submitted", "failed tries", "size"):
        table.add_column(title, header_style="dim", no_wrap=title != "what")
    now_s = time.time()
    for info in infos:
        table.add_row(
            info.id[:12],
            Text(_status(info, now_s), style="" if info.status in ENDED else "bold"),
            Text(f"{info.label.method} {info.label.model}"),
            Text(info.label.sensitivity),
            f"{_age(now_s - info.created_s)} ago",
            str(info.attempts),
            format_bytes(info.size_bytes),
        )
    console.print(table)


@app.command()
def cancel(
    ids: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[JOB]...", help="Ids, or beginnings of ids."),
    ] = None,
    all_jobs: Annotated[
        bool, typer.Option("--all", help="Every job that has not ended yet.")
    ] = False,
    forget: Annotated[
        bool, typer.Option("--forget", help="Also delete the jobs and what came of them.")
    ] = False,
    config: _Config = _DEFAULT_CONFIG,
) -> None:
    """Cancel jobs that have not ended; with --forget, delete jobs and results."""
    if bool(ids) == all_jobs:
        raise InvalidInput(
            "Give either ids or --all", field="ids", fix="See the ids with nearfar jobs list"
        )
    store = _store(config)
    try:
        known = [info.id for info in store.infos()]
        chosen = known if all_jobs else [_find(prefix, known) for prefix in ids or ()]
        cancelled = sum(store.cancel(job_id, time.time()) for job_id in chosen)
        forgotten = sum(store.forget(job_id) for job_id in chosen) if forget else 0
    finally:
        store.close()
    sys.stdout.write(f"{cancelled} cancelled" + (f", {forgotten} deleted\n" if forget else "\n"))


@app.command()
def run(
    config: _Config = _DEFAULT_CONFIG,
    wait: Annotated[
        bool, typer.Option("--wait", help="Go on until no job waits, whatever it takes.")
    ] = False,
) -> None:
    """Run the jobs that can be run now; with --wait, those that come later as well."""
    from sdk.client import Client
    from sdk.jobs.runner import Runner

    with Client.from_config(config) as client:
        runner = Runner(client, client._desk())
        try:
            before = {info.id: info.status for info in runner.desk.store.infos()}
            runner.run_due()
            while wait and runner.desk.store.next_due_s() is not None:
                time.sleep(runner.desk.idle_s())
                runner.run_due()
            after = runner.desk.store.infos()
        finally:
            runner.close()
    ended = Counter(
        info.status for info in after if info.status in ENDED and before.get(info.id) not in ENDED
    )
    waiting = sum(info.status not in ENDED for info in after)
    parts = [f"{count} {status}" for status, count in sorted(ended.items())]
    sys.stdout.write(", ".join([*parts, f"{waiting} waiting"]) + "\n")


def _store(path: Path) -> JobStore:
    config = load_config(path)
    if config.jobs is None:
        raise ConfigError(
            f"{path} has no [jobs] section", field="jobs", fix='Add one with file = "…"'
        )
    if not config.jobs.file.expanduser().exists():
        raise ConfigError(
            f"There is no queue of jobs {config.jobs.file}",
            field="jobs.file",
            fix="It is made when an app submits its first job",
        )
    return JobStore(config.jobs)


def _find(prefix: str, known: list[str]) -> str:
    found = [job_id for job_id in known if prefix and job_id.startswith(prefix)]
    if not found:
        raise no_such_job(prefix)
    if len(found) > 1:
        raise InvalidInput(
            f"{len(found)} jobs begin with {prefix!r}", field="ids", fix="Give more digits"
        )
    return found[0]


def _status(info: JobInfo, now_s: float) -> str:
    if info.status != "waiting" or info.due_s <= now_s:
        return info.status
    return f"{info.status} {_age(info.due_s - now_s)}"


def _age(seconds: float) -> str:
    for unit_s, name in _AGES:
        if seconds >= unit_s:
            return f"{seconds / unit_s:.0f} {name}"
    return f"{max(0.0, seconds):.0f} s"
