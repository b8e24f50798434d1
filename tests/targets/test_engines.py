"""States through serving engines: what a sound server gives is the target's, and no unsound answer gets through."""

from __future__ import annotations

import sys
import threading
import time
import tomllib
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save, save_file

from hyperdflash.checks.engine_states import make_client
from hyperdflash.engines import vllm as vllm_client
from hyperdflash.engines.client import EngineSettings, residual_of
from hyperdflash.engines.servers import BadAnswer, Unavailable
from hyperdflash.engines.sglang import check_flags, rows_of, server_info
from hyperdflash.engines.vllm import read_finished
from hyperdflash.export.formats import PLUGIN as PLUGIN_ARCHITECTURE
from hyperdflash.targets.load import ENGINE_KEYS, load_target
from hyperdflash.targets.producer import InProcess
from tests.targets.engine_server import SGLangServer, VLLMServer

PLUGIN = Path(__file__).resolve().parents[2] / "plugins" / "vllm"


@pytest.fixture(scope="module")
def target(mini_target):
    return load_target(path=mini_target, dtype="fp32", attention="windowed", experts="dense")


@pytest.fixture
def sequences():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(8, 320, (length,), generator=generator) for length in (9, 21, 5, 17)]


@pytest.fixture(params=["sglang", "vllm"])
def kind(request):
    return request.param


@pytest.fixture
def start(kind, target, tmp_path):
    """start() -> a running server of the kind."""
    servers = []

    def begin(**keywords):
        server = SGLangServer(target, **keywords) if kind == "sglang" else VLLMServer(target, folder=tmp_path, **keywords)
        servers.append(server)
        return server.__enter__()

    yield begin
    for server in servers:
        server.__exit__()


def client(kind, target, *servers, **keywords):
    given = {"attempts": 3, "timeout_s": 5, "backoff_s": 0.01} | keywords
    settings = {"engine": kind, "servers": [s.url for s in servers], "path": target.path, "dtype": "fp32", "experts": "dense"}
    return make_client(settings | given)[0]


def test_an_engine_gives_the_states_of_the_target(kind, start, target, sequences):
    first, second = start(), start()
    engine = client(kind, target, first, second, concurrency=1)
    own = InProcess(target)
    assert engine.fingerprint == own.fingerprint and kind in engine.where and first.url in engine.where
    found = engine.states(sequences)
    alone = torch.cat([own.states([sequence])[None] for sequence in sequences])
    assert list(found) == [None] and found[None].dtype == torch.float32
    assert torch.equal(found[None], alone)  # a request a sequence, and every digit came through
    assert len(first.bodies) + len(second.bodies) == len(sequences) and first.bodies and second.bodies
    with pytest.raises(ValueError, match=r"layers \[1\].*target.engine=null"):
        engine.states(sequences, [1])


@pytest.mark.parametrize("fault", ["500", "429", "stall", "hang up", "no json", "short", "nan", "huge", "wide", "other ids"])
def test_a_failed_answer_is_asked_for_again(fault, kind, start, target, sequences):
    server = start(**({"echo": True} if kind == "sglang" else {}))
    engine = client(kind, target, server, timeout_s=0.5 if fault == "stall" else 5)
    server.faults = [fault]
    states = engine.states(sequences[:1])[None]
    assert torch.equal(states, InProcess(target).states(sequences[:1])[None])
    assert len(server.bodies) == 2


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("500", "HTTP 500: it is 500"),
        ("short", "states of 20 tokens where 21 were sent"),
        ("nan", "NaN or infinity, first at position 1"),
        ("huge", "root mean square"),
        ("zero", "0.0e\\+00 .root mean square. at position 0"),
        ("collapsed", "wanted 4 paths x 32"),
        ("other ids", "other tokens than were sent, first at position 0"),
    ],
)
def test_a_server_that_stays_wrong_is_named(fault, sentence, kind, start, target, sequences):
    server = start(**({"echo": True} if kind == "sglang" else {}))
    server.faults = [fault] * 9
    with pytest.raises(ValueError, match=sentence) as caught:
        client(kind, target, server).states(sequences[1:2])
    assert (
        server.url in str(caught.value) and "sequence 0 (21 tokens)" in str(caught.value) and "3 attempts" in str(caught.value)
    )
    assert "\n" not in str(caught.value) and len(server.bodies) == 3


def test_a_request_goes_elsewhere_and_a_refusal_is_not_repeated(kind, start, target, sequences):
    broken, sound = start(), start()
    broken.faults = ["500"] * 99
    states = client(kind, target, broken, sound).states(sequences)[None]
    assert torch.equal(states, torch.cat([InProcess(target).states([s])[None] for s in sequences]))
    refusing = start()
    refusing.faults = ["400"] * 9
    with pytest.raises(ValueError, match="HTTP 400: it is 400"):
        client(kind, target, refusing).states(sequences[:1])
    assert len(refusing.bodies) == 1


def test_a_server_that_is_not_there_is_named(target):
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:9/get_server_info cannot be reached"):
        make_client(
            {"engine": "sglang", "servers": ["http://127.0.0.1:9"], "path": target.path, "dtype": "fp32", "attempts": 1}
        )


@pytest.mark.parametrize(
    ("setting", "value", "flag"),
    [
        ("chunked_prefill_size", 8192, "with --chunked-prefill-size -1"),
        ("chunked_prefill_size", None, "with --chunked-prefill-size -1"),
        ("enable_mixed_chunk", True, "without --enable-mixed-chunk"),
        ("disable_radix_cache", False, "with --disable-radix-cache"),
        ("enable_return_hidden_states", False, "with --enable-return-hidden-states"),
    ],
)
def test_sglang_flags_that_spoil_states_are_refused(setting, value, flag, target, sequences):
    with SGLangServer(target) as server:
        check_flags(server.url, server_info(server.url, 5))
        server.info_path = "/server_info"  # as newer servers have it
        server.info[setting] = value
        with pytest.raises(ValueError, match=flag):
            client("sglang", target, server).states(sequences[:1])
        assert not server.bodies


def test_sglang_rows_come_nested_or_flat():
    rows = [[1.0, 2.0], [3.0, 4.0]]
    for answer in ([rows], [rows, [5.0, 6.0]], rows):
        assert rows_of(answer).tolist() == rows
    for answer in (None, [], [["a"]], [[1.0], [1.0, 2.0]]):
        with pytest.raises(BadAnswer):
            rows_of(answer)


def test_states_are_taken_flat_or_by_path():
    states = torch.randn(3, 4, 2)
    for given in (states, states.flatten(1)):
        assert torch.equal(residual_of(given, 3, 4, 2), states)
    with pytest.raises(BadAnswer, match="4 paths x 2"):
        residual_of(states.transpose(1, 2), 3, 4, 2)


def test_vllm_files_are_read_when_they_are_whole_and_then_removed(target, sequences, tmp_path):
    with VLLMServer(target, folder=tmp_path, write_s=0.2) as server:
        engine = client("vllm", target, server)
        assert torch.equal(engine.states(sequences[:1])[None], InProcess(target).states(sequences[:1])[None])
        assert not list(tmp_path.iterdir())
        engine.next_tokens(sequences[:1])
        time.sleep(0.3)  # the writer is done
        assert not list(tmp_path.iterdir())
        server.folder = tmp_path / "seen" / "by" / "the" / "server"
        server.folder.mkdir(parents=True)
        (tmp_path / "here").symlink_to(server.folder)
        engine = client("vllm", target, server, states_dir=tmp_path / "here")
        engine.states(sequences[:1])
        server.faults = ["half"]
        with pytest.raises(ValueError, match=r"half-written after 0\.3 s"):
            client("vllm", target, server, timeout_s=0.3, attempts=1).states(sequences[:1])


def test_half_a_file_is_never_read(tmp_path, monkeypatch):
    whole = save({"hidden_states": torch.randn(5, 4, 2), "token_ids": torch.arange(5)})
    path = tmp_path / "a.safetensors"
    for length in (0, 4, 8, 30, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(Unavailable, match="half-written"):
            read_finished(path, 0.05)

    def finish():
        time.sleep(0.1)
        path.write_bytes(whole)

    monkeypatch.setattr(vllm_client, "POLL_S", 0.01)
    threading.Thread(target=finish).start()
    assert read_finished(path, 5)["token_ids"].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(Unavailable, match="has not appeared"):
        read_finished(path, 0.05)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"engine": "trt"}, "target.engine must be sglang or vllm"),
        ({"servers": []}, r"needs target.servers=\[http://"),
        ({"servers": ["localhost:1"]}, "needs target.servers"),
        ({"attempts": 0}, "target.attempts"),
        ({"timeout_s": "3e2"}, "target.timeout_s"),
        ({"states_dir": "/x"}, "belongs to target.engine=vllm"),
    ],
)
def test_settings_are_checked(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        EngineSettings.of({"engine": "sglang", "servers": ["http://a:1"]} | given)


@pytest.fixture
def plugin(monkeypatch):
    monkeypatch.syspath_prepend(str(PLUGIN))
    for name in ("hyperdflash_vllm", "hyperdflash_vllm_model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return import_module("hyperdflash_vllm")


def test_the_plugin_turns_the_residual_into_one_layer_a_path(plugin):
    states = torch.randn(7, 4, 6)
    buffer = torch.cat([states.flatten(1), torch.full((3, 24), float("nan"))])  # rows past this step's tokens are stale
    aux = plugin.residual_as_layers(buffer, 7, 4, 6)
    assert [tuple(layer.shape) for layer in aux] == [(7, 6)] * 4
    assert torch.equal(torch.stack(aux, dim=1), states)  # how the engine stores them: hidden_states [T, 4, D]
    assert torch.equal(torch.cat(aux, dim=-1), states.flatten(1))  # vec(H)
    hidden = torch.randn(7, 6)
    same, found = plugin.with_residual((hidden, [torch.zeros(7, 6)] * 4), buffer, 4)
    assert same is hidden and torch.equal(torch.stack(found, 1), states)
    assert plugin.with_residual(hidden, buffer, 4) is hidden
    with pytest.raises(RuntimeError, match="4, got 3"):
        plugin.with_residual((hidden, [hidden] * 3), buffer, 4)
    with pytest.raises(RuntimeError, match="has no residual"):
        plugin.with_residual((hidden, [hidden] * 4), None, 4)
    with pytest.raises(RuntimeError, match=r"auxiliary layer is \[5, 6\] where the hidden states are \[7, 6\]"):
        plugin.with_residual((hidden, [hidden] * 3 + [hidden[:5]]), buffer, 4)
    longer = torch.zeros(11, 6)
    for wrong, told in ((buffer, longer), (buffer[:, :12], hidden), (buffer.view(10, 4, 6), hidden)):  # rows, width, form
        with pytest.raises(RuntimeError, match="buffer is"):
            plugin.with_residual((told, [told] * 4), wrong, 4)


def test_the_plugin_registers_its_model_under_vllms_entry_point(plugin, monkeypatch, tmp_path):
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())
    module, _, function = project["project"]["entry-points"]["vllm.general_plugins"]["hyperdflash_pre_hc_head"].partition(":")
    register = getattr(import_module(module), function)
    assert set(project["tool"]["setuptools"]["py-modules"]) == {path.stem for path in PLUGIN.glob("*.py")}

    registered = {}
    vllm, models, v4 = ModuleType("vllm"), ModuleType("vllm.models"), ModuleType("vllm.models.deepseek_v4")
    vllm.ModelRegistry = type("Registry", (), {"register_model": staticmethod(registered.__setitem__)})

    class Model(torch.nn.Module):  # what vLLM's class has of what the plug-in touches
        config = SimpleNamespace(hc_mult=2, hidden_size=2)

        def __init__(self, *, vllm_config, prefix):
            super().__init__()
            self.model = SimpleNamespace(hc_head_fn=torch.zeros(1), _mtp_hidden_buffer=None)  # as for extract_hidden_states

        def forward(self, rows):
            self.model._mtp_hidden_buffer[: len(rows)] = rows  # as long as the longest step; stale from the step's end on
            paths = rows.view(len(rows), 2, 2)
            return paths.sum(dim=1), [paths.mean(dim=1)] * 2

        def get_mtp_target_hidden_states(self):
            return self.model._mtp_hidden_buffer

    v4.DeepseekV4ForCausalLM = Model
    for name, stub in (("vllm", vllm), ("vllm.models", models), ("vllm.models.deepseek_v4", v4)):
        monkeypatch.setitem(sys.modules, name, stub)
    register()
    assert not registered  # switched off, vLLM keeps its own model
    monkeypatch.setenv(plugin.SWITCH, "1")
    register()
    assert set(registered) == {"DeepseekV4ForCausalLM", PLUGIN_ARCHITECTURE}
    place, _, name = registered["DeepseekV4ForCausalLM"].partition(":")
    settings = SimpleNamespace(
        cache_config=SimpleNamespace(sliding_window=128),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=8),
        model_config=SimpleNamespace(dtype=torch.float32),
    )
    model = getattr(import_module(place), name)(vllm_config=settings)
    assert settings.cache_config.sliding_window is None  # which a draft's layers would take for their own
    model.model._mtp_hidden_buffer.fill_(float("nan"))

    def written(states: torch.Tensor) -> torch.Tensor:
        """As vLLM's runner and connector do: padded to a graph's size, which is NaN here, and cut again."""
        num_tokens = len(states)
        _, aux = model(torch.cat([states.flatten(1), torch.full((-num_tokens % 4, 4), float("nan"))]))
        assert all(len(layer) == num_tokens + -num_tokens % 4 for layer in aux)
        save_file({"hidden_states": torch.stack([layer[:num_tokens] for layer in aux], dim=1)}, tmp_path / "a.safetensors")
        return read_finished(tmp_path / "a.safetensors", 1)["hidden_states"]

    for num_tokens in (7, 3):  # the second step leaves rows of the first in the buffer
        states = torch.randn(num_tokens, 2, 2)
        assert torch.equal(residual_of(written(states), num_tokens, 2, 2), states)
    whole = model.model._mtp_hidden_buffer.view(8, 2, 2)  # what must not go out: stale and padded rows
    for wrong, sentence in ((whole, "states of 8 tokens where 3 were sent"), (whole[3:6], "NaN"), (states[:2], "of 2 tokens")):
        with pytest.raises(BadAnswer, match=sentence):
            residual_of(wrong, 3, 2, 2)


def test_a_target_takes_every_setting_of_an_engine():
    assert {field.name for field in fields(EngineSettings)} == ENGINE_KEYS
