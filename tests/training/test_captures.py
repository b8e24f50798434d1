"""Capture processes of a training: none is lost silently, none outlives it, and they get their own GPUs."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from hyperdflash.launch import captures, launcher
from hyperdflash.launch.captures import Captures, last_line
from hyperdflash.launch.child import save_job
from hyperdflash.preparing import dataset
from hyperdflash.states import stream
from hyperdflash.states.modes import Stream
from hyperdflash.states.store import make_shards
from hyperdflash.training.checkpoints import Stopped
from tests.states.random_states import RandomStates, documents, key
from tests.training.test_ddp import TELL, stand_in

ROOT = Path(__file__).resolve().parents[2]
READY = "(run / 'captures' / 'ready').touch()\n"
STAY = "import signal, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n" + READY + "time.sleep(60)"
RANK = """
stopped = lambda *_: (open(f'{RANKS}/stopped', 'w'), sys.exit(143))
signal.signal(signal.SIGTERM, stopped)
time.sleep(60)
"""


@pytest.fixture
def beside(compose_config, monkeypatch, tmp_path):
    """beside(script) -> a configuration of one rank and one capture process, which runs the script."""
    monkeypatch.setattr(captures, "MODULE", "tests.training.capture_stand_in")
    config = compose_config("train", ["cache=stream", "cache.captures=1"])

    def make(script: str):
        (tmp_path / "captures").mkdir()
        (tmp_path / "captures" / "script").write_text(script)
        return config

    return make


def until(found) -> None:
    deadline = time.monotonic() + 60
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def gone(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_failed_capture_ends_the_run_with_the_last_line_of_its_log(beside, monkeypatch, tmp_path):
    stand_in(monkeypatch, [RANK.replace("time.sleep", "open(f'{RANKS}/ready', 'w')\ntime.sleep")])
    wait = f"import os, time\nwhile not os.path.exists({str(tmp_path / 'ranks' / 'ready')!r}): time.sleep(0.05)\n"
    config = beside(f"{wait}print('supply states: 3tok\\rsupply states: 9tok')\nraise ValueError('the server is down')")
    with pytest.raises(ValueError, match=r"process 0 of 1 ended with exit code 1: ValueError: the server is down; more in"):
        launcher.launch_ranks(config, tmp_path)
    assert (tmp_path / "ranks" / "stopped").exists()  # it could save


def test_a_rank_that_cannot_save_says_so_beside_the_capture_that_failed(beside, monkeypatch, tmp_path):
    fails = f"def full(*_):\n    {TELL % ('the disk is full', 0)}\nsignal.signal(signal.SIGTERM, full)\n"
    stand_in(monkeypatch, [f"{fails}open(f'{{RANKS}}/ready', 'w')\ntime.sleep(60)"])
    monkeypatch.setattr(launcher, "SAVE_S", 50)
    wait = f"import os, time\nwhile not os.path.exists({str(tmp_path / 'ranks' / 'ready')!r}): time.sleep(0.05)\n"
    with pytest.raises(ValueError, match=r"process 0 of 1 .* down; more in .*; rank 0 of 1 failed: the disk is full; more in"):
        launcher.launch_ranks(beside(f"{wait}raise ValueError('the server is down')"), tmp_path)


def gone_where(monkeypatch, found) -> None:
    """One capture process, which is gone where ``found()``."""

    class Gone:
        def __init__(self, *given):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *given):
            pass

        def failure(self) -> str | None:
            return "the capture process is gone" if found() else None

    monkeypatch.setattr(launcher, "Captures", Gone)


def test_a_capture_that_fails_after_a_rank_has_finished_is_no_failure(compose_config, monkeypatch, tmp_path):
    """The other rank is told nothing: it would stop before it has finished, too."""
    told = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
    stand_in(monkeypatch, ["", f"{told}time.sleep(1)"])
    started, start = [], launcher._start
    monkeypatch.setattr(launcher, "_start", lambda *given: started.append(start(*given)) or started[-1])
    gone_where(monkeypatch, lambda: started[0].returncode is not None)
    launcher.launch_ranks(compose_config("train", ["trainer=ddp_cpu"]), tmp_path)


def test_ranks_that_finish_although_a_capture_failed_are_no_failure(compose_config, monkeypatch, tmp_path, capsys):
    finish = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\nopen(f'{RANKS}/ready', 'w')\ntime.sleep(60)"
    stand_in(monkeypatch, [finish])
    gone_where(monkeypatch, (tmp_path / "ranks" / "ready").exists)
    launcher.launch_ranks(compose_config("train", []), tmp_path)
    assert "a capture process is gone" in capsys.readouterr().out


def test_when_one_capture_cannot_start_all_end(monkeypatch, tmp_path):
    started = []

    def start(*given) -> subprocess.Popen:
        if started:
            raise OSError("no more processes")
        started.append(subprocess.Popen(["sleep", "60"], stdin=subprocess.PIPE))
        return started[-1]

    monkeypatch.setattr(captures, "start_child", start)
    with pytest.raises(OSError, match="no more"), Captures(tmp_path, 2):
        pytest.fail("one is missing")
    assert started[0].returncode is not None


def test_captures_stay_without_any_demand(monkeypatch, tmp_path):
    """A rank that validates for an hour has nothing in demand."""
    taken = []
    monkeypatch.setattr(captures, "take_job", lambda run: "its configuration")
    monkeypatch.setattr(captures.signal, "signal", lambda *_: None)
    monkeypatch.setattr(dataset, "capture_states", lambda config, *, stay=False: taken.append((config, stay)))
    captures.main(tmp_path)
    assert taken == [("its configuration", True)]

    hours = iter(range(0, 36000, 3600))  # one passes whenever somebody looks
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 5:
            raise InterruptedError

    monkeypatch.setattr(stream, "time", SimpleNamespace(monotonic=lambda: next(hours), sleep=sleep))
    given = {"dtype": "bf16", "documents_per_shard": 2, "budget_gb": 1, "wait_s": 1, "in_process": True}
    mode = Stream(directory=str(tmp_path / "cache"), **given)
    with pytest.raises(InterruptedError):
        mode.fill(make_shards(documents(2), 2), mode.open(key()), RandomStates, stay=True)
    slept.clear()
    mode.fill(make_shards(documents(2), 2), mode.open(key()), RandomStates)
    assert not list(tmp_path.rglob("*.safetensors")) and len(slept) < 2


def test_ranks_that_cannot_save_are_not_waited_for(beside, monkeypatch, tmp_path):
    monkeypatch.setattr(launcher, "SAVE_S", 0.5)
    stand_in(monkeypatch, ["signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)"])
    config = beside("print('out of memory', flush=True)\nimport os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(ValueError, match="was ended by SIGKILL: out of memory"):
        launcher.launch_ranks(config, tmp_path)


@pytest.mark.parametrize("how", ["done", "failed", "stopped"])
def test_captures_end_with_the_training(how, beside, monkeypatch, tmp_path):
    ready = f"while not os.path.exists({str(tmp_path / 'captures' / 'ready')!r}): time.sleep(0.05)\n"
    end = {"done": "", "failed": "sys.exit(3)", "stopped": "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)"}
    stand_in(monkeypatch, [f"signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n{ready}{end[how]}"])
    started = []
    start = captures.start_child
    monkeypatch.setattr(captures, "start_child", lambda *given: started.append(start(*given)) or started[-1])
    config = beside(STAY)
    if how == "done":
        launcher.launch_ranks(config, tmp_path)
    else:
        with pytest.raises(ValueError if how == "failed" else Stopped):
            launcher.launch_ranks(config, tmp_path)
    assert [process.returncode for process in started] == [143]  # asked to, and it put its work away


def test_captures_end_with_a_killed_training(beside, tmp_path):
    tell = "import os, subprocess, time\nworker = subprocess.Popen(['sleep', '60'])\n"
    tell += "(run / 'captures' / 'pids').write_text(f'{os.getpid()} {worker.pid}')\n"
    save_job(beside(f"{tell}{READY}time.sleep(60)"), tmp_path)
    program = (
        "import os, time\nfrom pathlib import Path\nfrom hyperdflash.launch.child import start_child\n"
        f"start_child('tests.training.capture_stand_in', Path({str(tmp_path)!r}), None, os.environ)\ntime.sleep(60)"
    )
    trainer = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    try:
        until((tmp_path / "captures" / "ready").exists)
    finally:
        trainer.kill()
        trainer.wait()
    pids = (tmp_path / "captures" / "pids").read_text().split()
    until(lambda: all(map(gone, pids)))  # with what it had started itself


@pytest.mark.parametrize("leads", [True, False])
def test_a_capture_started_by_hand_ends_alone(leads, beside, tmp_path):
    """``leads``: a session of its own, as `start_child` gives it. Its standard input is at its end from the start."""
    save_job(beside("import time\ntime.sleep(60)"), tmp_path)
    by_hand = f"{sys.executable} -m tests.training.capture_stand_in {tmp_path} < /dev/null"
    told = subprocess.run(
        ["sh", "-c", f"{'exec ' * leads}{by_hand}; echo $?"],
        cwd=ROOT,
        capture_output=True,
        start_new_session=True,
        timeout=60,
    )
    assert (told.returncode, told.stdout) == ((-signal.SIGKILL, b"") if leads else (0, b"1\n"))


def test_a_training_with_captures_computes_no_states_itself(compose_config, monkeypatch):
    given = {"directory": "x", "dtype": "bf16", "documents_per_shard": 1, "budget_gb": 1, "wait_s": 1, "in_process": True}
    assert Stream(**given).loads_target and not Stream(**given, captures=2).loads_target
    with pytest.raises(ValueError, match=r"cache\.captures"):
        Stream(**given, captures=-1)
    trainer = compose_config("train", []).trainer
    assert launcher.must_launch(trainer, 1) and not launcher.must_launch(trainer, 0)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    assert not launcher.must_launch(trainer, 1)  # our own rank: the launcher has started them
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for name, value in (("GROUP_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"cache\.captures=1 .* under torchrun or srun start `python -m src\.capture`"):
        launcher.must_launch(trainer, 1)


def test_the_last_line_of_a_log(tmp_path):
    log = tmp_path / "0.log"
    for text, line in (("", "it said nothing"), ("a\nb\r c \r\n\n", "c")):
        log.write_text(text)
        assert last_line(log) == line
