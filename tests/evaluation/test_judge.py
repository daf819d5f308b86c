"""The judge, against a server on this machine."""

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
    assert not (tmp_path / "j.jsonl").exists() and len(server.asked) == 3
    assert [body["temperature"] for body in server.bodies] == [0, 0.5, 0.5]


def test_a_reply_that_cannot_be_read_is_asked_for_again(server, tmp_path):
    replies = iter(["Perhaps", "a"])
    server.reply = lambda prompt: next(replies)
    judge = HttpJudge(server.url, tmp_path / "j.jsonl")
    assert judge.pick("?", OPTIONS, "x") == "A" == judge.pick("?", OPTIONS, "x") and judge.asked == 2


def test_a_busy_judge_is_asked_again_and_a_closed_one_is_not(server, tmp_path):
    server.statuses = [503, 429]
    judge = HttpJudge(server.url, tmp_path / "j.jsonl", waits=(0.01, 0.01))
    assert judge.pick("?", OPTIONS, "x") == "B" and judge.asked == 3
    server.statuses = [401]
    with pytest.raises(DataError, match="cannot be asked: HTTP Error 401: Unauthorized"):
        judge.pick("?", OPTIONS, "y")
    assert judge.asked == 4


def test_the_key_goes_to_the_judge_alone(server, tmp_path, caplog):
    """Not along a redirection, not into an error that the server makes of it, not into the kept replies."""
    server.statuses, server.location = [302], server.url + "/elsewhere"
    server.reply = lambda prompt: "B" if "x" in prompt else "my key is secret-1"
    judge = HttpJudge(server.url, tmp_path / "j.jsonl", key="secret-1", waits=())
    with pytest.raises(DataError, match="302") as moved:
        judge.pick("?", OPTIONS, "x")
    assert len(server.headers) == 1
    server.statuses, server.body = [403], b"no access for secret-1"
    with pytest.raises(DataError, match=r"no access for \[key\]") as refused:
        judge.pick("?", OPTIONS, "x")
    server.body = None
    with pytest.raises(DataError, match="expected one of A, B or Z") as echoed:
        judge.pick("?", OPTIONS, "y")
    assert judge.verdicts("1", ["a"], "z", lambda reply: True) == "my key is [key]"
    seen = f"{moved.value}{refused.value}{echoed.value}{caplog.text}{(tmp_path / 'j.jsonl').read_text()}"
    assert "secret" not in seen.lower()
    for key in ("two words", "line\nend", "\u00e9"):
        with pytest.raises(DataError, match="it is not shown") as error:
            HttpJudge(server.url, tmp_path / "j.jsonl", key=key)
        assert key not in str(error.value)


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
    judge = HttpJudge("http://127.0.0.1:9/v1", tmp_path / "j.jsonl", waits=(0.01,))
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


def test_the_command_asks_the_judge(server, table_path, tmp_path, capsys, monkeypatch):
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
    monkeypatch.setenv("JUDGE_API_KEY", "from-the-variable")
    assert main([*line, "--judge-model", "another"]) == 0
    assert server.headers[-1]["Authorization"] == "Bearer from-the-variable"
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert b"from-the-variable" not in written and b"secret" not in written
