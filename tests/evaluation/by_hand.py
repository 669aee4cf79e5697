"""Judgements of a real server against the same made by hand, item by item.

    python examples/serve_a_judge.py          # in another terminal; export what it says
    python tests/evaluation/by_hand.py        # 10 instructions, 10 questions of two turns

A recorder stands before the server and keeps requests and replies. Winners and ratings are read from these alone, by
the few lines below, and compared with what the run reports.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).parents[2]
STUDY = "by_hand"


def recorder(answer):
    """A server in a thread on a free port, and its list of (request, reply); `answer` makes a reply of a request."""
    kept = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply = answer(asked)
            kept.append((asked, reply))
            body = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, kept


def forwarded(address):
    """An `answer` that asks the server at `address`."""

    def answer(asked):
        request = urllib.request.Request(
            f"{address}/chat/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as reply:
            return json.load(reply)

    return answer


def chats(kept):
    """Last message, reply and whether it was cut, of each request."""
    for asked, reply in kept:
        choice = reply["choices"][0]
        yield asked["messages"][-1]["content"], choice["message"]["content"], choice["finish_reason"] == "length"


def preferences_by_hand(kept, baseline, ours):
    """Instruction -> 1 where our output won, 0 where the baseline's did, None where the reply begins with no letter."""
    preferences = {instruction: 0.5 for instruction in ours if ours[instruction] == baseline[instruction]}
    for text, reply, _ in chats(kept):
        if "\n\nAnswer B: " not in text:
            continue
        instruction, rest = text.removeprefix("Instruction: ").split("\n\nAnswer A: ", 1)
        shown_first = rest.startswith(ours[instruction] + "\n\nAnswer B: ")
        words = "".join(c if c.isalnum() or c == "_" else " " for c in reply).split()
        won = {"A": shown_first, "B": not shown_first}.get(words[0]) if words else None
        preferences[instruction] = None if won is None else float(won)
    return preferences


def ratings_by_hand(kept, questions):
    """(question, turn) -> the rating, None where the reply was cut, holds none, or holds two that differ."""
    ratings = {}
    for text, reply, cut in chats(kept):
        if "\n\nAnswer B: " in text:
            continue
        ids = [id for id, turns in questions.items() if turns[0] in text]
        (id,) = ids
        numbers = {part.split("]]")[0] for part in reply.split("[[")[1:] if "]]" in part}
        numbers = {float(n) for n in numbers if n.replace(".", "", 1).isdigit() and n[-1] != "." and n[0] != "."}
        good = not cut and len(numbers) == 1 and 1 <= min(numbers) <= 10
        ratings[id, 2 if questions[id][1] in text else 1] = min(numbers) if good else None
    return ratings


def compare(run, kept, checkpoint="reference"):
    """Rows of item, by hand, as reported, of both benchmarks, from what one run left."""
    import pandas as pd

    rows, folder = [], run / "alpaca_eval" / checkpoint
    if folder.exists():
        baseline, ours = (
            {row["instruction"]: row["output"] for row in json.loads((folder / name).read_text())}
            for name in ("reference_outputs.json", "model_outputs.json")
        )
        hand = preferences_by_hand(kept, baseline, ours)
        for row in json.loads((folder / "annotations.json").read_text()):
            recorded = None if row["preference"] is None else row["preference"] - 1
            rows.append((f"prefers ours: {row['instruction']}", hand.get(row["instruction"], "never asked"), recorded))
    lines = (ROOT / "params" / "downstream" / "question.jsonl").read_text().splitlines()
    hand = ratings_by_hand(kept, {row["question_id"]: row["turns"] for row in map(json.loads, lines)})
    table = pd.read_csv(run / "ratings.csv")
    for row in table[table["checkpoint"] == checkpoint].to_dict("records"):
        recorded = None if pd.isna(row["rating"]) else row["rating"]
        rows.append(
            (
                f"rating: question {row['question']}, turn {row['turn']}",
                hand.get((row["question"], row["turn"]), "never asked"),
                recorded,
            )
        )
    return rows


def main():
    server, kept = recorder(forwarded(os.environ["OPENAI_BASE_URL"]))
    shutil.rmtree(ROOT / "runs" / STUDY, ignore_errors=True)
    options = [part for pair in ("size=local", f"study={STUDY}", *sys.argv[1:]) for part in ("--set", pair)]
    command = [sys.executable, "-m", "dense_rlhf", "run", "params/downstream.yaml", *options]
    address = f"http://127.0.0.1:{server.server_address[1]}/v1"
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OPENAI_BASE_URL": address})
    if done.returncode:
        return done.returncode
    rows = compare(ROOT / "runs" / STUDY / "10_downstream", kept)
    for item, hand, recorded in rows:
        print(f"{'same' if hand == recorded else 'DIFFERS':8s}{item}: by hand {hand}, reported {recorded}")
    agree = sum(hand == recorded for _, hand, recorded in rows)
    judged = sum(recorded is not None for *_, recorded in rows)
    print(f"{agree} of {len(rows)} agree; {judged} of them are judgements, the others replies without one")
    return 0 if agree == len(rows) and judged else 1


if __name__ == "__main__":
    sys.exit(main())
