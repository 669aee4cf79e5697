"""The command `dense-rlhf serve-rewards`: what is served, from files to a process that stops when told to."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from functools import reduce
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dense_rlhf import __version__
from dense_rlhf.adapters.batcher import Batcher, Limits
from dense_rlhf.adapters.client import is_key
from dense_rlhf.adapters.rewards import Scorer
from dense_rlhf.config.params import AttributionParams, Dtype, RewardParams, ShapeParams
from dense_rlhf.config.parse import merge, parse_settings
from dense_rlhf.config.strict import Flag, Model, Positive, Real, Text, Whole, params, parse
from dense_rlhf.files import content_key, file_sha256, finite, naming
from dense_rlhf.models.dialogue import tokens_key
from dense_rlhf.models.language_models import default_device
from dense_rlhf.models.train_reward_model import load_reward_model
from dense_rlhf.ppo.learner import keep_freed_memory
from dense_rlhf.types import InputError, one_line

if TYPE_CHECKING:
    import uvicorn

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
CONNECTIONS = 2048  # at once
IDLE = 600  # seconds that one stays open between requests
KEY = "DENSE_RLHF_REWARD_KEY"  # the variable of the environment that holds the key


@params("")
class Served:
    """A reward model, how it reads what a trainer wrote, and how its scores become rewards."""

    model: Model  # a folder or hub id of a sequence classifier
    revision: Text | None = None  # of a hub id
    dtype: Dtype = "float32"  # of its weights
    output: Whole | None = None  # which output is the score, where it has several
    pair: Flag = False  # it reads prompt and response as two segments
    offset: Real = 0.0  # a score is (output - offset) / scale
    scale: Positive = 1.0
    trainer_tokenizer: Model | None = None  # whose ids arrive; by default the model's own
    adds_end: Flag = False  # the model reads its EOS after a response without an end; its own tokens only
    shape: ShapeParams = ShapeParams()
    attribution: AttributionParams = AttributionParams()
    limits: Limits = Limits()

    def __post_init__(self):
        if self.shape.is_learned:
            raise InputError(f"shape.weights is {self.shape.weights!r}, wanted the numbers that a search has learned")


def serve(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT, then finish what was accepted; 0 if that was done in time, else 1."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise InputError(f"serve-rewards wants {', '.join(missing)}, not installed; pip install 'dense-rlhf[serve]'")
    served, key = read_settings(arguments), read_key(arguments.key_file)
    _check_reach(arguments.host, key)
    keep_freed_memory()
    with listening(arguments.host, arguments.port) as listener:
        scorer, about = load(served)
        rewards = Batcher(scorer, served.shape.reward_shape(), served.limits)
        host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        url, what = (
            f"http://{host}:{listener.getsockname()[1]}",
            f"{', '.join(served.shape.sources)} of {about['model']}",
        )
        server = make_server(rewards, about, key, one_line(f"serving {what} at {url} ({about['served']})"))
        for one in (signal.SIGTERM, signal.SIGINT):  # the server heeds them, and raises them again when it has stopped
            signal.signal(one, lambda *_: None)
        server.run(sockets=[listener])
    if not rewards.is_alive() and not rewards.cut_off:
        print("stopped", flush=True)
        return 0
    late = f"error: requests were not finished within limits.stop = {served.limits.stop} seconds"
    print(late, file=sys.stderr, flush=True)
    os._exit(1)  # the thread may be in a model, and cannot be ended otherwise


def make_server(rewards: Batcher, about: dict[str, object], key: str | None, line: str) -> uvicorn.Server:
    """An HTTP server, to be run, which prints the line once it heeds signals."""
    import uvicorn

    from dense_rlhf.adapters.server import make_app

    app = make_app(rewards, about, key, lambda: print(line, flush=True))
    quiet = dict(log_config=None, access_log=False, server_header=False)
    plain = dict(http="h11", ws="none", loop="asyncio", **quiet)
    stop = rewards.limits.stop
    config = uvicorn.Config(
        app, limit_concurrency=CONNECTIONS, timeout_keep_alive=IDLE, timeout_graceful_shutdown=stop, **plain
    )
    return uvicorn.Server(config)


def read_settings(arguments: argparse.Namespace) -> Served:
    """The parameters of a command line, `--set` before its other options. Raises `InputError`."""
    given = {"model": arguments.model, "trainer_tokenizer": arguments.trainer_tokenizer}
    shape = {"normalise": arguments.normalise} if arguments.normalise else {}
    if arguments.shape:
        parts = [part.partition("=") for part in arguments.shape.split(",")]
        weights = parse_settings(f"weight={weight or 1.0}" for _, _, weight in parts)
        shape |= {"sources": [source for source, _, _ in parts], "weights": [one["weight"] for one in weights]}
    return parse(Served, reduce(merge, parse_settings(arguments.set or ()), given | {"shape": shape}))


def read_key(file: str | None) -> str | None:
    """The key in a file or in the environment, None without. Raises `InputError` for one that no header can hold."""
    place = file or KEY
    with naming(Path(place), "read"):
        key = Path(file).read_text(encoding="ascii", errors="replace").strip() if file else os.environ.get(KEY)
    if key is not None and not is_key(key):
        raise InputError(f"{place} holds no key; wanted one word of ASCII, such as `openssl rand -hex 32` prints")
    return key


def _check_reach(host: str, key: str | None) -> None:
    try:
        is_local = host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # a name
        is_local = False
    if not is_local and not key:
        raise InputError(f"--host {host} can be reached from elsewhere; give --key-file FILE, or set {KEY}")


def listening(host: str, port: int) -> socket.socket:
    """A socket that is bound before the model is loaded, so that a port in use is told at once."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=2048)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else each answer takes 40 ms longer
        return listener
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{host}:{port} cannot be served at: {reason}; give another --port or --host") from error


def load(served: Served) -> tuple[Scorer, dict[str, object]]:
    """A scorer of the reward model on its device, and what its rewards depend on: names, versions, hashes."""
    if served.model in ("scratch", "policy", "tiny"):
        raise InputError(f"model is {served.model!r}, wanted the folder or hub id of a finished reward model")
    kept = {name: getattr(served, name) for name in ("revision", "dtype", "output", "pair")}
    trainers = _tokenizer(served.trainer_tokenizer) if served.trainer_tokenizer else None
    read = load_reward_model(
        (), trainers or _tokenizer(served.model, served.revision), RewardParams(name=served.model, **kept), ""
    )
    scorer = Scorer(
        read.model.to(default_device()),
        read.tokenizer,
        trainers,
        memory=served.limits.remembered,
        **{name: getattr(served, name) for name in ("attribution", "output", "pair", "adds_end", "offset", "scale")},
    )
    scorer.check(served.shape.reward_shape())
    return scorer, describe(served, scorer, read.revision)


def describe(served: Served, scorer: Scorer, weights: str) -> dict[str, object]:
    """What the rewards depend on, as JSON has it and without paths; `served` is one hash of all the rest."""
    marks, settings = served.attribution.rationale_path, finite(served)
    settings["attribution"]["rationale_path"] = file_sha256(Path(marks)) if marks else None
    about = {name: settings[name] for name in settings if name not in ("limits", "revision")} | {
        "model": Path(served.model).name if os.path.isdir(served.model) else served.model,
        "weights": weights,
        "tokenizer": tokens_key(scorer.tokenizer),
        "trainer_tokenizer": scorer.trainer_tokenizer and tokens_key(scorer.trainer_tokenizer),
        "version": __version__,
    }
    return about | {"served": content_key(about)}


def _tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision or "main")
    except Exception as error:  # the tokenizers' own errors share no base class
        wanted = "wanted a folder or hub id that holds a tokenizer"
        raise InputError(f"cannot load the tokenizer of {name!r} ({type(error).__name__}); {wanted}") from error
