"""Name the classes of a finished run, and merge classes by giving them the same name; nothing is trained again.

`transfgu name RUN > names.yaml` writes the present names, one per line. Edit the file and run
`transfgu name RUN names.yaml`: the report, `Segmenter`, exports and new masks use the names. Name concepts that are no
class `ignore`. `--masks OUT` updates earlier masks to the same classes; `--undo` removes the names.
"""

from collections.abc import Sequence

from transfgu.cli.command_line import Parser
from transfgu.errors import UserError, counted
from transfgu.store import storage
from transfgu.store.artifacts import Run


def parser(words: Sequence[str] = ()) -> Parser:
    """Return the parser."""
    made = Parser(__doc__ or "", "name", "RUN [FILE]")
    made.add_argument("run", metavar="RUN", help="a finished run: the --run of `transfgu train`")
    made.add_argument(
        "file", metavar="FILE", nargs="?", help="YAML file of names by class, such as {3: cow, 7: cow, 9: ignore}"
    )
    made.add_argument("--masks", metavar="URI", help="also re-index these masks: the --out of `transfgu predict`")
    made.add_argument("--undo", action="store_true", help="remove the names and merges of the run")
    return made


def main(words: Sequence[str]) -> None:
    """Parse the command line, name the classes, print the table."""
    given = parser(words).parse(words)
    if given.undo and given.file:
        raise UserError("--undo removes names: leave out FILE", code="flags-conflict")
    run = Run(given.run)
    text = storage.read_bytes(given.file) if given.file else b""
    # Import torch only now, because it takes seconds: mistakes on the command line are reported at once.
    from transfgu import naming, pipeline
    from transfgu.report.page import write
    from transfgu.sharing.names import parse

    unnamed = pipeline.class_table(run.recipe(), run, named=False)
    if not (given.file or given.undo or given.masks):
        print(naming.as_yaml(pipeline.class_table(run.recipe(), run)), end="")
        return
    if given.file or given.undo:
        names = parse(text, unnamed.names, storage.shown(given.file)) if given.file else {}
        table = naming.name_classes(run, names, write)
        for index, name in enumerate(table.names):
            members = [unnamed.names[i] for i in range(len(unnamed.names)) if table.index_of[i] == index]
            print(f"{index:4}  {name}" + ("" if members == [name] else f"  ({', '.join(members)})"))
    if given.masks:
        done = naming.reindex(given.masks, run)
        print(f"{counted(done.files, 'mask file')} re-indexed in {storage.join(storage.shown(given.masks), 'masks')}")
        if done.removed:
            print(f"{counted(done.removed, 'mask')} made with other names removed: run the same transfgu predict again")
        if storage.exists(storage.join(given.masks, "overlays")):
            print("overlays show the former classes: delete them, and run the same transfgu predict --overlays again")
    elif given.file or given.undo:
        print(f"earlier masks keep their classes: transfgu name {storage.shown(run.uri)} --masks OUT re-indexes them")
