"""Two processes over SFTTrainer train as one does; each has half of every micro-batch."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("trl")

from tests.support import sft_in_processes as in_processes
from tests.support import two_processes

CONFIGURATION = Path(__file__).parents[2] / "examples/accelerate/two_cpu_processes.yaml"
#: Of the machine, and of the padding of each half.
OTHER = ("runtime", "_per_second", "seconds", "total_flos")


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    """Losses, TRL's metrics, and every parameter, with norms in float32."""
    folder = tmp_path / "two"
    results = two_processes.run("sft_in_processes.py", folder, configuration=CONFIGURATION)
    for name in in_processes.RUNS:
        logs, values = in_processes.train(tmp_path / name, 4, name)
        for result in results:
            others, parameters = result[name]
            for key, value in values.items():
                assert (parameters[key] - value).norm() < 1e-4 * value.norm(), (name, key)
            for ours, theirs in zip(logs, others, strict=True):
                for key in [key for key in ours if not key.endswith(OTHER)]:
                    assert theirs[key] == pytest.approx(ours[key], rel=1e-2, abs=1e-5), (name, key)
