"""`nearfar bundle`: look into bundles, check, sign, compare, cut and carry them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nearfar.bundle import Bundle

app = typer.Typer(
    help="Look into a model bundle, check that it is whole and whose it is, sign and compare it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

BundlePath = Annotated[
    Path, typer.Argument(help="The bundle's folder or .nfb file.", show_default=False)
]


@app.command()
def inspect(
    path: BundlePath,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the manifest as JSON, for programs.")
    ] = False,
) -> None:
    """Show what a bundle holds: variants, sizes, quality, speed, origin. Hashes nothing."""
    from rich.console import Console

    from nearfar.bundle import open_bundle
    from nearfar.bundle.manifest import encode_manifest
    from nearfar.bundle.tables import facts_table, quality_table, variants_table

    bundle = open_bundle(path)
    if as_json:
        sys.stdout.write(encode_manifest(bundle.manifest).decode())
        return
    console = Console(highlight=False)
    console.print(facts_table(bundle))
    console.print()
    console.print(variants_table(bundle.manifest))
    console.print()
    console.print(quality_table(bundle.manifest))


@app.command()
def verify(
    path: BundlePath,
    key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PUBLIC_KEY",
            help="Require a signature of this key: a .pub file or its text (ed25519:…); "
            "repeatable.",
        ),
    ] = None,
    golden: Annotated[
        bool,
        typer.Option(
            "--golden/--no-golden",
            help="Run the bundle's golden inputs through every variant that this machine can run.",
        ),
    ] = True,
) -> None:
    """Check every file's SHA-256, that nothing unlisted is there, and with --key who signed.

    Then the golden inputs, if the bundle has any: a variant that computes something else here than
    where it was made is named. Exit status 1 if anything is wrong.
    """
    from nearfar.bundle import open_bundle
    from nearfar.bundle.keys import trusted
    from nearfar.bundle.tables import signature_line
    from nearfar.units import format_bytes

    bundle = open_bundle(path, trusted_keys=trusted(key) if key else None)
    total = bundle.size_bytes()
    with _bar(f"verifying {bundle.manifest.name}", total) as advance:
        bundle.verify(progress=advance)
    manifest = bundle.manifest
    count = len(manifest.files) + sum(len(variant.files) for variant in manifest.variants)
    typer.echo(
        f"{manifest.name} {manifest.version}: {count} files, {format_bytes(total)}, all good"
    )
    typer.echo(f"signature: {signature_line(bundle)}")
    if golden and manifest.golden is not None:
        _check_golden(bundle)


def _check_golden(bundle: Bundle) -> None:
    """Tell how every variant does on the golden inputs.

    Raises:
        BundleError: One computes something else than it did where the bundle was made.
    """
    from nearfar.engines.devices import probe
    from nearfar.engines.golden import check_golden, is_known
    from nearfar.engines.selection import why_not
    from nearfar.errors import BundleError

    device = probe()
    wrong = []
    for variant in bundle.manifest.variants:
        reason = why_not(variant, device)
        if reason is None and not is_known(bundle, variant.id):
            reason = "it did not run where the bundle was made"
        if reason is not None:
            typer.echo(f"golden inputs: {variant.id} is not run here: {reason}")
            continue
        result = check_golden(bundle, variant.id)
        typer.echo(
            f"golden inputs: {variant.id} {'good' if result.is_good else 'WRONG'}: {result.cases} "
            f"cases, differs by {result.difference:.2g}, {result.allowed:.2g} is fine"
        )
        if not result.is_good:
            wrong.append(variant.id)
    if wrong:
        raise BundleError(
            f"On this machine {' and '.join(wrong)} of bundle {bundle.path} compute something else "
            "than where the bundle was made",
            fix="Do not use them here: CPUs without VNNI saturate in 8-bit kernels. Convert on "
            "this machine, or with --int8 weights",
        )


@app.command()
def keygen(
    path: Annotated[
        Path,
        typer.Argument(metavar="KEY", help="File of the new private key.", show_default=False),
    ],
) -> None:
    """Make an Ed25519 key to sign bundles with: KEY (keep it) and KEY.pub (give it away).

    The private key is encrypted when NEARFAR_SIGNING_PASSPHRASE is set.
    """
    from nearfar.bundle.keys import SigningKey

    key = SigningKey.generate()
    public = key.save(path)
    typer.echo(str(key.public))
    _say(f"{path} is the private key: keep it where bundles are signed, and nowhere else.")
    _say(f"{public} is for the readers: trusted_keys in nearfar.toml, or --trusted-key.")


@app.command()
def sign(
    path: BundlePath,
    key: Annotated[
        Path,
        typer.Option(help="Private key, made by `nearfar bundle keygen`.", show_default=False),
    ],
) -> None:
    """Check a bundle and sign it. Signatures of other keys over the same files stay."""
    from nearfar.bundle import open_bundle
    from nearfar.bundle.keys import SigningKey
    from nearfar.bundle.sealing import sign_bundle

    signing_key = SigningKey.load(key)
    bundle = open_bundle(path)
    with _bar(f"verifying {bundle.manifest.name}", bundle.size_bytes()) as advance:
        sign_bundle(path, signing_key, progress=advance)
    typer.echo(
        f"{bundle.manifest.name} {bundle.manifest.version}: signed by {signing_key.public.id[:16]}"
    )


@app.command()
def diff(
    before: Annotated[Path, typer.Argument(metavar="A", help="A bundle.", show_default=False)],
    after: Annotated[Path, typer.Argument(metavar="B", help="Another.", show_default=False)],
    files_only: Annotated[
        bool, typer.Option("--files-only", help="Compare the files, and no figures or texts.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per difference.")
    ] = False,
) -> None:
    """Show where two bundles differ: manifest, variants, files, sizes, quality, speed.

    Exit status 0 when they do not, 1 when they do. Compares what the manifests state, which
    `nearfar bundle verify` holds against the files. Signatures are not compared.
    """
    import msgspec
    from rich.console import Console

    from nearfar.bundle import open_bundle
    from nearfar.bundle.diff import differences
    from nearfar.bundle.tables import differences_table

    found = differences(
        open_bundle(before).manifest, open_bundle(after).manifest, files_only=files_only
    )
    if as_json:
        for one in found:
            sys.stdout.write(msgspec.json.encode(one).decode() + "\n")
    elif found:
        Console(highlight=False).print(differences_table(found))
    else:
        typer.echo("no difference")
    if found:
        raise typer.Exit(1)


@app.command()
def extract(
    path: BundlePath,
    variant: Annotated[str, typer.Option(help="Id of the variant to keep.", show_default=False)],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder of the new bundle.", show_default=False)
    ],
    force: Annotated[
        bool, typer.Option("--force", help="Replace a bundle that is already there.")
    ] = False,
    sign_with: Annotated[
        Path | None,
        typer.Option("--sign", metavar="KEY", help="Sign the new bundle.", show_default=False),
    ] = None,
) -> None:
    """Write a bundle with one variant only, for a device that runs no other.

    The signature is dropped, since it is one of the whole bundle; --sign makes a new one.
    """
    from nearfar.bundle import open_bundle
    from nearfar.bundle.bundle import read_signature
    from nearfar.bundle.extract import extract_variant
    from nearfar.bundle.keys import SigningKey
    from nearfar.bundle.sealing import sign_bundle
    from nearfar.units import format_bytes

    key = SigningKey.load(sign_with) if sign_with is not None else None
    bundle = open_bundle(path)
    with _bar(f"verifying {variant}", bundle.size_bytes(variant)) as advance:
        new = extract_variant(bundle, variant, output, replace=force, progress=advance)
    typer.echo(
        f"{new.path}: {new.manifest.name} {new.manifest.version}, {variant} only, "
        f"{format_bytes(new.size_bytes())} of {format_bytes(bundle.size_bytes())}"
    )
    if key is not None:
        sign_bundle(new.path, key)
        _say(f"signed by {key.public.id[:16]}")
    elif read_signature(bundle.path) is not None:
        _say("The signature was dropped: it is one of the whole bundle. Sign with --sign KEY.")


@app.command()
def pack(
    path: BundlePath,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Default: NAME-VERSION.nfb.", show_default=False),
    ] = None,
) -> None:
    """Check a bundle and write it as one file, its signature included."""
    from nearfar.bundle import archive, open_bundle

    bundle = open_bundle(path)
    name = f"{bundle.manifest.name}-{bundle.manifest.version}{archive.SUFFIX}"
    with _bar(f"verifying {bundle.manifest.name}", bundle.size_bytes()) as advance:
        target = archive.pack(bundle, output or Path(name), progress=advance)
    typer.echo(str(target))


@app.command()
def unpack(
    archive_path: Annotated[
        Path, typer.Argument(metavar="FILE", help="The .nfb file.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder of the bundle.", show_default=False)
    ],
    key: Annotated[
        list[str] | None,
        typer.Option(metavar="PUBLIC_KEY", help="Require a signature of this key; repeatable."),
    ] = None,
) -> None:
    """Write the bundle of one file into a folder, checked."""
    from nearfar.bundle import archive
    from nearfar.bundle.keys import trusted

    keys = trusted(key) if key else None
    bundle = archive.unpack(archive_path, output, trusted_keys=keys)
    typer.echo(f"{bundle.path}: {bundle.manifest.name} {bundle.manifest.version}")


@contextmanager
def _bar(title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total_bytes)
        yield lambda count: bar.advance(task, count)


def _say(line: str) -> None:
    typer.echo(line, err=True)
