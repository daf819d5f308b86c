"""A small multiple-choice table, an engine that answers from a dictionary, and a judge on this machine."""

import base64
import csv
import http.server
import io
import json
import threading

from PIL import Image


def image_cell(colour: str = "red", size: tuple[int, int] = (4, 3), mode: str = "RGB") -> str:
    """Base64 of a PNG."""
    data = io.BytesIO()
    Image.new("RGB", size, colour).convert(mode).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def write_table(path, rows, **csv_options):
    """Write rows (dicts with equal keys) as a TSV and return its path."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t", lineterminator="\n", **csv_options)
        writer.writeheader()
        writer.writerows(rows)
    return path


def choice_rows(count: int = 6) -> list[dict[str, str]]:
    """Rows whose right answers are A, B, A, B, ...; every third one is of category "y"."""
    return [
        {
            "index": str(number),
            "image": image_cell() if number % 2 == 0 else str(number - 1),
            "question": f"Question {number}{' and more' * number}?",
            "A": "cat",
            "B": "dog",
            "C": "" if number % 2 else "None",
            "answer": "AB"[number % 2],
            "category": "y" if number % 3 == 0 else "x",
        }
        for number in range(count)
    ]


class FakeEngine:
    """Answers from a dictionary; fails after `fails_after` answers, and notes what it was asked."""

    def __init__(self, answers, *, name="fake", fails_after=None):
        self.answers, self.name, self.fails_after = answers, name, fails_after
        self.asked, self.images = [], []

    def describe(self):
        return {"weights": self.name, "template": "v1", "decoding": {"max_new_tokens": 4}}

    def generate(self, requests, batch_size):
        for request in reversed(requests):
            if self.fails_after is not None and len(self.asked) >= self.fails_after:
                raise KeyboardInterrupt
            self.asked.append(request)
            self.images.append([image.copy() for image in request.images()])
            yield request.id, self.answers[request.id]


class JudgeServer:
    """Replies with what `reply` makes of the prompt, and notes what it was asked."""

    def __init__(self):
        self.reply, self.asked, self.headers, self.bodies = lambda prompt: "B", [], [], []
        self.body = None
        self.statuses: list[int] = []
        """Of the next replies; then 200."""
        self.location = ""
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = request["messages"][0]["content"]
                outer.asked.append((self.path, request["model"], prompt))
                outer.headers.append(dict(self.headers))
                outer.bodies.append(request)
                message = {"choices": [{"message": {"content": outer.reply(prompt)}}]}
                data = outer.body or json.dumps(message).encode()
                status = outer.statuses.pop(0) if outer.statuses else 200
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", outer.location)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments):
                pass

        self.http = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


class ThreadRank:
    """One of several ranks that live as threads of the test."""

    def __init__(self, rank, values, barrier):
        self.rank, self.world_size, self._values, self._barrier = rank, len(values), values, barrier
        self.replica, self.replicas, self.is_leader = rank, len(values), True
        self.counted = None  # answers of all ranks, where a test shows the bar

    def count(self, answers):
        self.counted.append(answers)
        return sum(self.counted)

    def all_gather(self, value):
        self._values[self.rank] = value
        self._barrier.wait(timeout=30)
        found = list(self._values)
        self._barrier.wait(timeout=30)
        return found


def on_ranks(count, function):
    """What `function(communicator)` returns on each of `count` threads."""
    values, barrier, results = [None] * count, threading.Barrier(count), {}
    threads = [
        threading.Thread(target=lambda rank=rank: results.update({rank: function(ThreadRank(rank, values, barrier))}))
        for rank in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(count)]
