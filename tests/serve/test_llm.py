"""The server under ``llm``, which finds it by its configuration file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from serve.conftest import Running

pytestmark = pytest.mark.bench


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("completion", "model"), [(True, "nanothink_mla"), (False, "transformer_expert")])
def test_llm_writes_what_generate_writes(
    server: Running, tmp_path: Path, completion: bool, model: str, stream: bool
) -> None:
    program = shutil.which("llm", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert program, "pip install -e '.[bench]'"
    entry = f"- model_id: mine\n  model_name: {model}\n  api_base: {server.url}/v1\n"
    entry += "  completion: true\n" if completion else ""
    (tmp_path / "extra-openai-models.yaml").write_text(entry)
    command = [program, "-m", "mine", "The river", "-o", "temperature", "0", "-o", "max_tokens", "12"]
    done = subprocess.run(
        [*command, *([] if stream else ["--no-stream"])],
        env={**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none", "LLM_LOAD_PLUGINS": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    expected = server.models[model].generate("The river", temperature=0, max_new_tokens=12)
    assert done.stdout.strip() == expected.strip()
