"""Serve a page to try a run: drop a photograph, see its mask, switch classes on and off, name concepts.

`transfgu serve RUN` prints the address of the page with a secret token, and serves until Ctrl-C. It listens only on
this machine; `--host 0.0.0.0` opens it, unencrypted, to the network: prefer `ssh -L 8000:127.0.0.1:8000 HOST`.
"""

from collections.abc import Sequence

from transfgu.cli.command_line import Parser
from transfgu.store import storage
from transfgu.store.artifacts import Run


def parser(words: Sequence[str] = ()) -> Parser:
    """Return the parser."""
    made = Parser(__doc__ or "", "serve", "RUN")
    made.add_argument(
        "run", metavar="RUN", help="a finished run: the --run of `transfgu train`; or a folder with a model"
    )
    made.add_argument(
        "--host", metavar="ADDRESS", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)"
    )
    made.add_argument("--port", metavar="N", type=int, default=8000, help="port; 0: any free port (default: 8000)")
    return made


def main(words: Sequence[str]) -> None:
    """Serve until interrupted."""
    given = parser(words).parse(words)
    run = Run(given.run)
    run.recipe()  # before importing torch, which takes seconds
    from transfgu.report.serving import Playground

    with Playground(run, given.host, given.port) as server:
        print(f"{storage.shown(run.uri)}: {server.address}", flush=True)
        print("press Ctrl-C to stop", flush=True)
        server.serve_forever()
