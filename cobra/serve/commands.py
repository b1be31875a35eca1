"""The command `cobra serve`."""

import argparse
import logging
import os
import socket
from pathlib import Path

from vision_scan.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
KEY_VARIABLE = "COBRA_API_KEY"


def add_serve_command(add) -> None:
    """Adds it; `add` is that of the command line."""
    from cobra.ask_commands import add_model_options

    serve = add(
        "serve",
        run_serve,
        "answer over HTTP as OpenAI's chat completions do, with a chat page at /",
        "cobra serve --model runs/demo/cobra",
    )
    add_model_options(serve)
    option = serve.add_argument
    option("--name", default=None, help="of the model, in requests (default: the directory's)")
    option("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    option("--port", type=int, default=8000, help="default: 8000; 0 takes a free one")
    option("--api-key", default=None, metavar="KEY", help=f"what requests must show (default: {KEY_VARIABLE}, if set)")
    option("--slots", type=int, default=16, metavar="N", help="answers made at a time (default: 16)")
    option("--max-waiting", type=int, default=64, metavar="N", help="requests that may wait for one (default: 64)")
    option("--cache-mb", type=float, default=1024, metavar="MB", help="for states behind what was read (default: 1024)")
    option("--stall-ms", type=float, default=100, metavar="MS", help="by which reading may delay others (default: 100)")
    option("--max-images", type=int, default=1024, metavar="N", help="of a request (default: 1024)")
    option("--max-pixels", type=int, default=64_000_000, metavar="N", help="of an image (default: 64 million)")
    option("--max-prompt-tokens", type=int, default=1_000_000, metavar="N", help="of a request (default: a million)")
    option("--max-new-tokens", type=int, default=4096, metavar="N", help="of an answer (default: 4096)")
    option("--max-body-mb", type=float, default=64, metavar="MB", help="of a request (default: 64)")
    option("--timeout", type=float, default=600, metavar="S", help="seconds for a whole answer (default: 600)")


def run_serve(arguments: argparse.Namespace) -> None:
    """`cobra serve`"""
    try:
        import uvicorn

        from cobra.serve.app import create_app
        from cobra.serve.engine import Engine
        from cobra.serve.limits import Limits
    except ImportError as error:
        raise UserError(f"serving needs {error.name}: pip install 'cobra-vlm[serve]'") from error
    from cobra.ask_commands import load_model

    limits = Limits(
        body_bytes=int(_positive(arguments, "max_body_mb") * 2**20),
        images=_positive(arguments, "max_images"),
        pixels=_positive(arguments, "max_pixels"),
        prompt_tokens=_positive(arguments, "max_prompt_tokens"),
        new_tokens=_positive(arguments, "max_new_tokens"),
        seconds=_positive(arguments, "timeout"),
    )
    slots, stall = _positive(arguments, "slots"), _positive(arguments, "stall_ms") / 1000
    if arguments.cache_mb < 0 or arguments.max_waiting < 0:
        raise UserError("--cache-mb and --max-waiting must be 0 or more")
    api_key = arguments.api_key or os.environ.get(KEY_VARIABLE) or None
    if not 0 <= arguments.port < 2**16:
        raise UserError(f"--port {arguments.port}: must be from 1 to {2**16 - 1}, or 0 for a free one")
    listener = _listen(arguments.host, arguments.port)
    with listener:
        model = load_model(arguments)
        cache_bytes = int(arguments.cache_mb * 2**20)
        engine = Engine(model, slots=slots, cache_bytes=cache_bytes, max_waiting=arguments.max_waiting, stall=stall)
        name = arguments.name or Path(arguments.model).resolve().name
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"{name} at http://{shown}:{port} (chat page), OpenAI's protocol at http://{shown}:{port}/v1", flush=True)
        if arguments.host not in LOOPBACK and api_key is None:
            print(f"anybody who reaches {host} can ask: set --api-key or {KEY_VARIABLE}", flush=True)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        config = uvicorn.Config(
            create_app(engine, name, limits, api_key),
            log_config=None,
            log_level="warning",
            timeout_graceful_shutdown=5,
            timeout_keep_alive=75,  # a client that asks again just as the server hangs up would get an error
        )
        uvicorn.Server(config).run(sockets=[listener])


def _positive(arguments: argparse.Namespace, name: str):
    value = getattr(arguments, name)
    if not value > 0:
        raise UserError(f"--{name.replace('_', '-')} {value}: must be above 0")
    return value


def _listen(host: str, port: int) -> socket.socket:
    """Before the model is loaded: who finds the port taken should not wait for that."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen at {host} port {port} ({error}); name another --host or --port") from error
    return listener
