"""`nearfar policy check|explain|test`: the tools of a policy's author."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nearfar.secure.shaping import check_shaping
from sdk.policy.cases import outcome, parse_cases, run_case
from sdk.policy.evaluate import evaluate
from sdk.policy.explain import report_rules, warnings
from sdk.policy.model import RequestFacts
from sdk.policy.parser import load_policy
from sdk.toml_table import read_text

app = typer.Typer(
    help="Check, explain and test a policy file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_PolicyFile = Annotated[Path, typer.Argument(metavar="FILE", help="Policy file (TOML).")]
_OUTCOME_STYLE = {
    "denied": "bold red",
    "edge_only": "bold yellow",
    "cloud_only": "bold cyan",
    "edge_or_cloud": "bold green",
}


@app.command()
def check(file: _PolicyFile) -> None:
    """Check that a policy file is well-formed, and warn of what looks like a mistake."""
    policy = load_policy(file)
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(f"{policy.source}: ok"))
    console.print(Text(f"  classes  {' < '.join(policy.classes)}"))
    console.print(Text(f"  rules    {len(policy.rules)}"))
    console.print(Text(f"  hash     {policy.hash}"))
    for warning in warnings(policy):
        console.print(Text.assemble(("warning: ", "bold yellow"), warning))


@app.command()
def explain(
    file: _PolicyFile,
    model: Annotated[str, typer.Option(help="Name of the model.")],
    sensitivity: Annotated[str, typer.Option(help="Data class of the request.")],
    task: Annotated[str, typer.Option(help="Task of the model.")] = "",
    tenant: Annotated[str | None, typer.Option(help="On whose behalf.")] = None,
    purpose: Annotated[str | None, typer.Option(help="What the answer is for.")] = None,
    region: Annotated[str | None, typer.Option(help="Where the cloud stands.")] = None,
    network: Annotated[str | None, typer.Option(help="Link in use.")] = None,
    shaping: Annotated[
        str | None,
        typer.Option(help="Traffic shaping of the cloud: off, balanced or strict."),
    ] = None,
    attested: Annotated[
        bool | None,
        typer.Option(
            "--attested/--not-attested", help="Whether a plug-in must accept the cloud's evidence."
        ),
    ] = None,
) -> None:
    """Show where a request may be answered, and what each rule says about it."""
    policy = load_policy(file)
    facts = RequestFacts(
        model=model,
        task=task,
        sensitivity=sensitivity,
        tenant=tenant,
        purpose=purpose,
        region=region,
        network=network,
        shaping=None if shaping is None else check_shaping(shaping),
        attested=attested,
    )
    verdict = evaluate(policy, facts)
    console = Console(highlight=False, soft_wrap=True)
    found = outcome(verdict)
    console.print(Text.assemble((found, _OUTCOME_STYLE[found]), f": {verdict.reason}"))
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("rule", "effect", "matches", "because"):
        table.add_column(heading, header_style="dim")
    for report in report_rules(policy, facts):
        table.add_row(
            Text(report.rule.id),
            report.rule.effect,
            Text(report.match, style="dim" if report.match == "no" else "bold"),
            Text(report.because),
        )
    if policy.rules:
        console.print(table)


@app.command()
def test(
    file: _PolicyFile,
    cases: Annotated[Path, typer.Argument(metavar="CASES", help="Table of expectations (TOML).")],
) -> None:
    """Compare a policy with a table of expectations; exit status 1 when one is not met."""
    policy = load_policy(file)
    results = [
        run_case(policy, case) for case in parse_cases(read_text(cases), policy, source=str(cases))
    ]
    console = Console(highlight=False, soft_wrap=True)
    for result in results:
        if result.mismatch:
            console.print(
                Text.assemble(("FAIL ", "bold red"), f"{result.case.name}: {result.mismatch}")
            )
            console.print(Text(f"     {result.verdict.reason}"))
        else:
            console.print(Text.assemble(("ok   ", "bold green"), result.case.name))
    failed = sum(bool(result.mismatch) for result in results)
    console.print(f"{len(results) - failed} of {len(results)} cases hold")
    if failed:
        raise typer.Exit(1)
