"""The command line. Bodies of a few lines; torch is loaded only once a command needs it."""

from __future__ import annotations

import errno
import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ppclc.errors import PpclcError, memory_lacks
from ppclc.machine.interrupts import terminate_as_interrupt

INTERRUPTED, TOLD = 130, "ppclc: interrupted; the same command goes on from here"
app = typer.Typer(
    name="ppclc",
    help="Compress multi-modal diffusion transformers: analyze, distill, slice, export, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

lora_app = typer.Typer(help="LoRAs that were trained on a teacher.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(lora_app, name="lora")

Out = Annotated[Path | None, typer.Option("--out", "-o", help="Output folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
Changes = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a recipe key; may be repeated.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub's model.")]
Variant = Annotated[str | None, typer.Option("--variant", help="Which weights of several beside each other, e.g. fp16.")]
SlicedRevision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub's model; not for a run.")]
SlicedVariant = Annotated[str | None, typer.Option("--variant", help="Which weights of a model, e.g. fp16; not for a run.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]
Model = Annotated[str, typer.Argument(help="A folder, a hub id, or builtin:two-digits.")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Options of ppclc itself."""
    if version:
        from ppclc import __version__

        typer.echo(f"ppclc {__version__}")
        raise typer.Exit


@app.command()
def init(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Recipe to write.")] = Path("recipe.yaml"),
    revision: Revision = None,
    variant: Variant = None,
) -> None:
    """Write a commented starter recipe for a model."""
    from ppclc import commands

    typer.echo(commands.init(model, out, revision, variant))


@app.command()
def inspect(
    model: Model,
    check: Annotated[bool, typer.Option("--check", help="Read all weights and verify them.")] = False,
    revision: Revision = None,
    variant: Variant = None,
    as_json: AsJson = False,
) -> None:
    """Show family, blocks by group, parameters by part, and bytes of a model."""
    from ppclc import commands

    _show(commands.inspect(model, check, revision, variant), as_json)


@app.command()
def plan(recipe: str, changes: Changes = None, out: Out = None, as_json: AsJson = False) -> None:
    """Say what a recipe would cut, what would remain, and what the run would take, without running it."""
    from ppclc import commands

    document = commands.plan(recipe, changes or [], out)
    if as_json:
        typer.echo(json.dumps(document))
    else:
        commands.print_plan(document, commands.leaves_free(recipe, changes or []))


@app.command()
def compress(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe.")],
    out: Out = None,
    until: Annotated[str, typer.Option("--until", metavar="PASS", help="Stop after this pass.")] = "report",
    changes: Changes = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Run every pass, recipe to report. Resumes where an earlier run stopped."""
    from ppclc import commands

    code, document = commands.compress(recipe, changes or [], out, until, verbose - quiet)
    if as_json and document is not None:
        typer.echo(json.dumps(document))
    if code:
        raise typer.Exit(code)


@app.command(name="slice")
def cut(
    run: Annotated[str, typer.Argument(metavar="OUT", help="Output folder of a finished run; or a model, with --plan and -o.")],
    parameters: Annotated[float | None, typer.Option("--parameters", help="What remains: a share up to 1.0, or a number.")] = None,
    plan_file: Annotated[Path | None, typer.Option("--plan", metavar="FILE", help="A plan.json to follow exactly.")] = None,
    out: Out = None,
    comfyui: Annotated[bool, typer.Option("--comfyui", help="Write one file for ComfyUI beside it, in comfyui/.")] = False,
    revision: SlicedRevision = None,
    variant: SlicedVariant = None,
    changes: Changes = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Cut another size from the distilled edits of a finished run, without training."""
    from ppclc import commands

    document = commands.slice_size(run, parameters, plan_file, out, changes or [], verbose - quiet, comfyui, revision, variant)
    if as_json:
        typer.echo(json.dumps(document))


@app.command()
def export(
    model: Annotated[str | None, typer.Argument(help="A model folder; the newest student without it.")] = None,
    backend: Annotated[str, typer.Option("--backend", help="Back end to lower to.")] = "onnx",
    out: Out = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16, or float8 for large products in it.")] = "float32",
    force: Annotated[bool, typer.Option("--force", help="float16 even where a family is known to overflow in it.")] = False,
    changes: Changes = None,
    revision: Revision = None,
    variant: Variant = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Lower any model folder, teacher or student, to a back end. Its options: --set export.opset=20."""
    from ppclc import commands

    _show(commands.export(model, backend, out, dtype, -quiet, changes or [], force, revision, variant), as_json)


@app.command()
def bench(
    targets: Annotated[
        list[str] | None, typer.Argument(metavar="[TARGET]...", help="Folders of models or exports; the newest student without them.")
    ] = None,
    against: Annotated[str | None, typer.Option("--against", help="The teacher that speed-ups are told against.")] = None,
    random_weights: Annotated[
        str | None, typer.Option("--random-weights", metavar="CONFIG", help="A config.json or its folder: bench it with random weights.")
    ] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32 unless all targets are exports in another.")] = None,
    runs: Annotated[int | None, typer.Option("--runs", min=2, hidden=True)] = None,
    changes: Changes = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for the result as JSON, Markdown and a picture.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure latency, throughput and memory on this machine. Section bench of a recipe by --set bench.steps=4."""
    from ppclc import commands

    given = [*([f"bench.runs={runs}"] if runs is not None else []), *(changes or [])]
    rows = commands.bench(targets or [], against, random_weights, dtype, given, out, -quiet)
    if as_json:
        typer.echo(json.dumps(rows))
    else:
        commands.print_bench(rows)


@app.command()
def report(out: Annotated[Path, typer.Argument(help="Output folder of a finished run.")]) -> None:
    """Write the report of a finished run again."""
    from ppclc import commands

    typer.echo(commands.report(out))


@lora_app.command()
def remap(
    lora: Annotated[Path, typer.Argument(help="A LoRA of the teacher: a .safetensors file, or the folder that holds it.")],
    plan_file: Annotated[Path, typer.Option("--plan", metavar="FILE", help="The student's plan.json, best where its weights lie.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write; LORA's name with -student without it.")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="The teacher; its config.json is enough, and only needed where no student lies by the plan."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Rewrite a teacher's LoRA for the student of a plan."""
    from ppclc import commands

    document = commands.remap_lora(lora, plan_file, out, model)
    if as_json:
        typer.echo(json.dumps(document))
    else:
        commands.print_remapped(document)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine can do, and the command that mends what it cannot."""
    from ppclc import commands

    _show(commands.doctor(), as_json)


def _show(document: dict[str, Any], as_json: bool) -> None:
    """A document as JSON, or as indented lines for people."""
    if as_json:
        typer.echo(json.dumps(document))
        return
    from ppclc import commands

    commands.print_document(document)


def main() -> None:
    """Entry point: runs a command and turns errors into one message and an exit code."""
    terminate_as_interrupt()
    try:
        code = app(standalone_mode=False)
    except PpclcError as error:
        print(f"ppclc: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):  # typer turns the one into the other
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would end this process by the signal itself
        print(TOLD, file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            print(f"ppclc: {str(error.filename)[:60]}...: a name too long for this system; wanted a path", file=sys.stderr)
            sys.exit(2)
        if lacking := memory_lacks(error):
            print(f"ppclc: {lacking}; wanted a machine with more, or less at once", file=sys.stderr)
            sys.exit(3)
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        sys.exit(2)
    if code == INTERRUPTED:  # which is how typer hands on a KeyboardInterrupt
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(TOLD, file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
