"""The README's map is true: its files exist, its line counts hold, its endpoints are routed."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def path_rows() -> list[tuple[str, int]]:
    """The files one request walks through, with the line counts that the README gives."""
    table = README.split("<!-- path -->")[1].split("<!-- /path -->")[0]
    return [
        (name, int(lines)) for name, lines in re.findall(r"^\| `(\S+)` \| (\d+) \|", table, re.M)
    ]


def test_path_of_one_request() -> None:
    rows = path_rows()
    assert len(rows) >= 10
    total = 0
    for name, claimed in rows:
        lines = len((ROOT / name).read_text().splitlines())
        total += lines
        print(f"{lines:5d}  {name}")
        assert abs(lines - claimed) <= max(10, 0.2 * lines), f"{name} has {lines} lines now"
    print(f"{total:5d}  in {len(rows)} files")


def test_the_maps_rooms_exist() -> None:
    drawing = README.split("```\nserver/octavo/")[1].split("```")[0]
    rooms = set(re.findall(r"(?<![\w/])([a-z_]+(?:/[a-z_]+)*)/(?=\s)", drawing))
    for room in rooms - {"octavo", "results", "e2e"}:
        candidates = [
            ROOT / room,
            ROOT / "server" / "octavo" / room,
            ROOT / "kernels" / room,
            ROOT / "kernels" / "octavo_kernels" / room,
        ]
        assert any(path.is_dir() for path in candidates), f"{room}/ is in the README's map only"


def test_endpoints_of_the_readme_are_routed() -> None:
    sources = "".join(
        path.read_text() for path in (ROOT / "server" / "octavo" / "api").glob("*.py")
    )
    table = README.split("## HTTP API")[1].split("Beyond OpenAI")[0]
    for endpoint in set(re.findall(r"`(?:GET |POST )?(/[a-z0-9_/]+)", table)):
        if endpoint != "/docs":  # FastAPI's own
            assert f'"{endpoint.rstrip("/")}' in sources, f"{endpoint} is in the README only"
