"""The judge, against a server on this machine."""

import http.server
import json
import socket
import threading

import pytest
from evaluation_helpers import FakeEngine, image_cell, write_table

import evaluation
from evaluation.judge import HttpJudge
from evaluation.runner import run
from mindspeed_mm.cli.main import main
from mindspeed_mm.errors import DataError

OPTIONS = {"A": "cat", "B": "dog"}


class Server:
    """Replies with what `reply` makes of the prompt, and notes what it was asked."""

    def __init__(self):
        self.reply, self.asked, self.headers, self.body = lambda prompt: "B", [], [], None
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = request["messages"][0]["content"]
                outer.asked.append((self.path, request["model"], prompt))
                outer.headers.append(dict(self.headers))
                message = {"choices": [{"message": {"content": outer.reply(prompt)}}]}
                data = outer.body or json.dumps(message).encode()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments):
                pass

        self.http = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server():
    started = Server()
    yield started
    started.http.shutdown()
    started.http.server_close()


def test_replies_are_kept(server, tmp_path):
    judge = HttpJudge(server.url, tmp_path / "j.jsonl", model="m", key="secret")
    assert judge.pick("What?", OPTIONS, "the barking one") == "B"
    assert judge.pick("What?", OPTIONS, "the barking one") == "B"
    again = HttpJudge(server.url, tmp_path / "j.jsonl", model="m")
    assert again.pick("What?", OPTIONS, "the barking one") == "B" and again.asked == 0
    ((path, model, prompt),) = server.asked
    assert (path, model) == ("/v1/chat/completions", "m") and "A. cat\nB. dog" in prompt
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert "secret" not in (tmp_path / "j.jsonl").read_text()


def test_only_unreadable_answers_are_asked_about(server, table_path, tmp_path):
    answers = dict.fromkeys(range(6), "A") | {1: "it barks", 3: "who knows"}
    server.reply = lambda prompt: "B." if "it barks" in prompt else "z"
    judge = HttpJudge(server.url, tmp_path / "j.jsonl")
    result = run("toy", table_path, FakeEngine(answers), tmp_path, model="m", progress=False, judge=judge)
    rows = result.reports["strict"].rows
    assert (rows[1].extracted, rows[1].hit, rows[1].log) == ("B", 1, "judge read B")
    assert (rows[3].extracted, rows[3].log) == (None, "judge read no option")
    assert len(server.asked) == 2 and result.reports["strict"].unparsed == 1
    assert json.loads(result.files["report"].read_text())["scores"]["strict"]["notes"] == {"put_to_judge": 2}


def test_yes_no_questions(server, tmp_path):
    rows = [{"index": "0", "image": image_cell(), "question": "Is it?", "answer": "No"}]
    path = write_table(tmp_path / "t.tsv", rows)
    judge = HttpJudge(server.url, tmp_path / "j.jsonl")
    assert evaluation.score("mine", {0: "hardly"}, path, judge=judge).rows[0][:2] == ("no", 1)
    assert evaluation.score("mine", {0: "hardly"}, path, "compat", judge=judge).rows[0][:2] == ("No", 1)


def test_a_reply_that_is_no_letter_ends_the_run(server, tmp_path):
    server.reply = lambda prompt: "Perhaps the dog"
    with pytest.raises(DataError, match="replied 'PERHAPS THE DOG'; expected one of A, B or Z"):
        HttpJudge(server.url, tmp_path / "j.jsonl").pick("?", OPTIONS, "x")
    assert not (tmp_path / "j.jsonl").exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [(b"{}", "sent no choices"), (b'{"choices": []}', "sent no choices"), (b"<", "cannot be asked")],
)
def test_servers_of_another_kind(server, tmp_path, body, message):
    server.body = body
    with pytest.raises(DataError, match=message):
        HttpJudge(server.url, tmp_path / "j.jsonl").pick("?", OPTIONS, "x")


def test_a_server_that_speaks_no_http(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def talk():
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"220 mail ready\r\n")

        threading.Thread(target=talk, daemon=True).start()
        judge = HttpJudge(f"http://127.0.0.1:{listening.getsockname()[1]}", tmp_path / "j.jsonl")
        with pytest.raises(DataError, match="cannot be asked: 220 mail ready"):
            judge.pick("?", OPTIONS, "x")


def test_an_unfinished_last_reply_is_asked_again(tmp_path, caplog):
    path = tmp_path / "j.jsonl"
    path.write_text('["a", "B"]\n["c", "')
    judge = HttpJudge("http://x", path)
    assert judge._cache == {"a": "B"} and "the last line is unfinished" in caplog.text
    judge._keep("c", "A")
    assert HttpJudge("http://x", path)._cache == {"a": "B", "c": "A"}


def test_an_unreachable_judge_is_never_a_guess(table_path, tmp_path):
    judge = HttpJudge("http://127.0.0.1:9/v1", tmp_path / "j.jsonl")
    answers = dict.fromkeys(range(6), "who knows")
    with pytest.raises(DataError, match="cannot be asked: .*leave out --judge"):
        run("toy", table_path, FakeEngine(answers), tmp_path / "o", model="m", progress=False, judge=judge)
    assert run("toy", table_path, FakeEngine({}), tmp_path / "o", model="m", progress=False).resumed == 6


def test_wrong_addresses_and_damaged_caches(tmp_path):
    with pytest.raises(DataError, match="expected an address that begins with http"):
        HttpJudge("file:///etc", tmp_path / "j.jsonl")
    for line in ("{", "5", '[["a"], "B"]'):
        (tmp_path / "j.jsonl").write_text(line + "\n")
        with pytest.raises(DataError, match="line 1 is damaged"):
            HttpJudge("http://x", tmp_path / "j.jsonl")
    (tmp_path / "file").write_text("")
    judge = HttpJudge("http://x", tmp_path / "file" / "j.jsonl")
    with pytest.raises(DataError, match="cannot write"):
        judge._keep("a", "B")


def test_the_command_asks_the_judge(server, table_path, tmp_path, capsys):
    (tmp_path / "answers.json").write_text(json.dumps(dict.fromkeys(range(6), "who knows")))
    (tmp_path / "key").write_text("secret\n")
    line = ["evaluate", "--predictions", str(tmp_path / "answers.json"), "--dataset-path", str(table_path), "--json"]
    line += ["--evaluation-dataset", "toy", "--result-output-path", str(tmp_path / "out"), "--judge", server.url]
    assert main([*line, "--judge-model", "reader", "--judge-key-file", str(tmp_path / "key")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["accuracy"] == 0.5
    assert len(server.asked) == 6 and server.asked[0][1] == "reader"
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert main([*line, "--judge-key-file", str(tmp_path / "no")]) == 1
    assert "expected a file with the judge's key" in capsys.readouterr().err
