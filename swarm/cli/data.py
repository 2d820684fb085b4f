"""`swarm data`: prepare text for a run, look at what was prepared, check it, find and remove documents.

Decides options and what is printed; leaves the work to `coordinator.data_prepare`, `coordinator.data_folder`,
`coordinator.document_index` and `coordinator.removal_list`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.cli import output

if TYPE_CHECKING:
    from coordinator.data_prepare import Progress
    from swarm.data_manifest import DataManifest

_KILOBYTE = 1000

app = typer.Typer(
    help="Turn text into what a run trains on: token shards, a tokenizer and a manifest.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `swarm data prepare` wrote.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command("prepare")
def prepare(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="SOURCE", help="Text files, folders, .jsonl, .jsonl.zst (as The Pile), .parquet."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write.")],
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="An existing tokenizer.json; otherwise one is trained.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Tokens of the tokenizer that is trained, at most.")] = 8192,
    validation_fraction: Annotated[float, typer.Option(help="Share of the documents that is held out.")] = 0.01,
    licence: Annotated[str, typer.Option(metavar="TEXT", help="Licence of the text, for the manifest.")] = "unknown",
    token_shard_tokens: Annotated[int, typer.Option(help="Tokens in each file that peers fetch.")] = 1 << 20,
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Names that count inside folders, with commas or repeated.  [default: text]"),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse at the first malformed document.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace prepared data in DIR.")] = False,
    as_json: Json = False,
) -> None:
    """Tokenise text once, into fixed-size token shards, a tokenizer and a manifest with their digests."""
    from coordinator import data_prepare
    from coordinator.data_sources import DEFAULT_INCLUDE

    globs = tuple(part.strip() for item in include or () for part in item.split(",") if part.strip())
    options = data_prepare.PrepareOptions(
        sources=tuple(sources),
        out=out,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        validation_fraction=validation_fraction,
        licence=licence,
        token_shard_tokens=token_shard_tokens,
        include=globs or DEFAULT_INCLUDE,
        strict=strict,
        force=force,
    )
    with _shown_progress() as view:
        manifest = data_prepare.prepare(options, view.show)
    _warn(view.malformed, view.examples)
    _print_summary(out, manifest, as_json)


@app.command("show")
def show(folder: Folder, as_json: Json = False) -> None:
    """What a folder of prepared data holds: tokens, sources, licences, digests."""
    from swarm import data_manifest

    _print_summary(folder, data_manifest.load(folder), as_json)


@app.command("verify")
def verify(
    folder: Folder,
    digest: Annotated[
        str | None, typer.Option(metavar="HEX", help="The manifest digest to expect: the one a run spec names.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Recompute every digest of a prepared folder; exit code 76 where a file is not what the manifest says."""
    from coordinator import data_folder
    from swarm import data_manifest

    manifest = data_manifest.load(folder, digest)
    with output.progress(len(manifest.train) + len(manifest.validation) + 1, "files", "verify") as advance:
        data_folder.verify(folder, manifest, lambda _name: advance(1))
    if as_json:
        output.print_json({"path": str(folder), "manifest_digest": _digest(folder), "verified": True})
    else:
        typer.echo(f"{folder}: every file matches the manifest {_digest(folder)}")


What = Annotated[str, typer.Argument(metavar="DIGEST|FILE", help="SHA-256 of a document, or a file of documents.")]


@app.command("find")
def find(folder: Folder, what: What, as_json: Json = False) -> None:
    """Where a document lies in prepared data; exit code 69 where it does not."""
    from coordinator import document_index, removal_list
    from swarm import data_manifest
    from swarm.errors import NotFound

    manifest = data_manifest.load(folder)
    digests = removal_list.digests_of(what)
    places = [place for digest in digests for place in document_index.find(folder, digest)]
    if as_json:
        rows = [
            {
                "document": place.digest.hex(),
                "split": place.split,
                "start": place.start,
                "num_tokens": place.num_tokens,
                "files": place.files(manifest),
            }
            for place in places
        ]
        output.print_json({"documents": len(digests), "places": rows})
    elif places:
        cells = [
            (place.digest.hex(), place.split, place.start, place.num_tokens, place.files(manifest)[0])
            for place in places
        ]
        output.table("", ("document", "split", "first token", "tokens", "first file"), cells)
    if not places:
        raise NotFound(f"{folder} holds none of {len(digests)} documents", "documents are found by their exact text")


@app.command("remove")
def remove(
    folder: Folder,
    what: What,
    state: Annotated[Path, typer.Option(metavar="DIR", help="The run's folder `state`, beside its run file.")],
    reason: Annotated[str, typer.Option(help="Why, for everybody to read.")],
    from_round: Annotated[int, typer.Option(help="The first round without it; some minutes ahead.")],
    as_json: Json = False,
) -> None:
    """Take documents out of a started run: sign the removal list that its peers follow."""
    from coordinator import removal_list
    from swarm.errors import ConfigError
    from swarm.keyfiles import data_home, load

    if not 1 <= from_round < 2**62 or not 1 <= len(reason) <= 4096:
        raise ConfigError("--from-round must be at least 1, and --reason 1 to 4096 characters")
    path = data_home() / "organizer.key"
    try:
        organizer = load(path)
    except FileNotFoundError as error:
        raise ConfigError(f"there is no organizer's key {path}", "run this where `swarm start` was run") from error
    made = removal_list.add(folder, state, organizer, removal_list.digests_of(what), (reason, from_round))
    if as_json:
        output.print_json(made.model_dump(mode="json"))
    else:
        print(f"removal list {made.version}: {len(made.removals)} documents; peers look for it once a minute")


class _ProgressView:
    """Shows each phase as its own bar, in kB of input read; remembers what was malformed."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._phase = ""
        self._shown_kb = 0
        self._advance: output.Advance | None = None
        self.malformed = 0
        self.examples: tuple[str, ...] = ()

    def show(self, now: Progress) -> None:
        self.malformed, self.examples = now.malformed, now.examples
        if now.phase != self._phase or self._advance is None:
            self._stack.close()
            self._phase, self._shown_kb = now.phase, 0
            total = -(-now.bytes_total // _KILOBYTE)
            self._advance = self._stack.enter_context(output.progress(total, "kB", now.phase))
        done = -(-now.bytes_done // _KILOBYTE)
        self._advance(done - self._shown_kb)
        self._shown_kb = done


@contextmanager
def _shown_progress() -> Iterator[_ProgressView]:
    with ExitStack() as stack:
        yield _ProgressView(stack)


def _warn(malformed: int, examples: tuple[str, ...]) -> None:
    if not malformed:
        return
    typer.echo(f"{malformed} malformed left out:", err=True)
    for example in examples:
        typer.echo(f"  {example}", err=True)
    if malformed > len(examples):
        typer.echo(f"  and {malformed - len(examples)} more", err=True)


def _print_summary(folder: Path, manifest: DataManifest, as_json: bool) -> None:
    if as_json:
        output.print_json(_summary(folder, manifest))
        return
    rows = [
        (source.path, source.licence, source.documents, source.text_bytes, source.malformed)
        for source in manifest.sources
    ]
    output.table(f"data in {folder}", ("source", "licence", "documents", "text bytes", "malformed"), rows)
    for split, shards, tokens in (
        ("train", manifest.train, manifest.train_tokens),
        ("validation", manifest.validation, manifest.validation_tokens),
    ):
        typer.echo(f"{split}: {tokens} tokens in {len(shards)} files")
    typer.echo(f"tokenizer: {manifest.vocab_size} tokens, digest {manifest.tokenizer_digest}")
    for text in manifest.filters:
        typer.echo(f"filter: {text}")
    typer.echo(f"manifest digest: {_digest(folder)}")


def _summary(folder: Path, manifest: DataManifest) -> dict[str, Any]:
    return {
        "path": str(folder),
        "manifest_digest": _digest(folder),
        "tokenizer_digest": manifest.tokenizer_digest,
        "vocab_size": manifest.vocab_size,
        "tokens": {"train": manifest.train_tokens, "validation": manifest.validation_tokens},
        "files": {"train": len(manifest.train), "validation": len(manifest.validation)},
        "documents": sum(source.documents for source in manifest.sources),
        "malformed": sum(source.malformed for source in manifest.sources),
        "sources": [source.model_dump(mode="json") for source in manifest.sources],
        "filters": list(manifest.filters),
    }


def _digest(folder: Path) -> str:
    """SHA-256 of the manifest's file, in hex: what a run spec names."""
    from swarm.data_manifest import MANIFEST_NAME
    from swarm.digest import sha256

    return sha256((folder / MANIFEST_NAME).read_bytes()).hex()
