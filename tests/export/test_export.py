"""An exported drafter drafts what its run drafts, in every format; what cannot be served or is not whole is refused."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from safetensors.torch import load_file

import hyperdflash
from hyperdflash.export.folder import read_folder, write_folder

SERVED = [
    *(("transformers", method) for method in ("hyperdflash", "dflash", "dspark", "best", "fc", "frozen")),
    *(("dflash", method) for method in ("hyperdflash", "dflash", "fc", "gate_markov", "causal")),
    *(("speculators", method) for method in ("dflash", "dspark", "fc")),
]
PROMPT = [0, 2, *range(40, 70)]


def drafts(drafter, target) -> list[list[int]]:
    settings = dict(max_new_tokens=12, temperature=1.0, seed=5)
    answer = hyperdflash.generate(target, drafter, PROMPT, **settings)
    assert answer.generation.rounds
    return [round.drafted for round in answer.generation.rounds]


@pytest.mark.parametrize(("to", "method"), SERVED)
def test_a_folder_drafts_what_its_run_drafts(to, method, exported, run_of, target):
    folder = exported(method, to)
    drafted = drafts(hyperdflash.load_drafter(folder, target), target)
    assert drafted == drafts(hyperdflash.load_drafter(run_of(method), target), target)
    assert drafted == drafts(hyperdflash.load_drafter(folder), target)  # with the target that it names
    assert sorted(path.name for path in folder.parent.iterdir() if path.name.startswith(method)) == [folder.name]


def layer_names(number: int) -> set[str]:
    parts = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    parts += ["input_layernorm", "post_attention_layernorm", *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]
    return {f"layers.{number}.{part}.weight" for part in parts}


COMMON = {"fc.weight", "hidden_norm.weight", "norm.weight"} | layer_names(0) | layer_names(1)
GATE = {f"reducer.{name}" for name in ("hc_fn", "hc_base", "hc_scale", "path_norm.weight")}


def test_the_common_layout_has_the_field_s_keys_and_names(exported):
    folder = exported("dflash", "dflash")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["DFlashDraftModel"] and config["model_type"] == "qwen3"
    assert config["dflash_config"]["target_layer_ids"] == [0, 2] and config["num_target_layers"] == 4
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "block_size")
    assert [config[name] for name in sizes] == [32, 2, 4, 2, 16, 5]
    assert config["dflash_config"]["mask_token_id"] == config["hyperdflash"]["mask_token_id"]
    tensors = load_file(folder / "model.safetensors")
    assert set(tensors) == COMMON and tensors["fc.weight"].shape == (32, 2 * 32)
    assert "hc_mult" not in json.dumps(config)  # vLLM would widen its buffer

    gate = exported("hyperdflash", "dflash")
    config = json.loads((gate / "config.json").read_text())
    assert config["architectures"] == ["DFlashHyperDraftModel"] and config["dflash_config"]["target_layer_ids"] == [0, 1, 2, 3]
    assert set(config["hyperdflash_config"]) == {"num_paths", "norm_eps", "hc_eps", "path_norm"}
    assert set(load_file(gate / "model.safetensors")) == COMMON - {"fc.weight"} | GATE
    assert json.loads((exported("causal", "dflash") / "config.json").read_text())["is_causal"] is True


def test_speculators_counts_taps_from_one_and_names_the_heads(exported):
    folder = exported("dspark", "speculators", "name=some/target")
    config = json.loads((folder / "config.json").read_text())
    assert config["speculators_model_type"] == "dspark" and config["aux_hidden_state_layer_ids"] == [1, 3]
    assert config["sample_from_anchor"] is False and config["block_size"] == 5 and config["markov_rank"] == 8
    proposed = config["speculators_config"]
    assert proposed["proposal_methods"] == [{"proposal_type": "greedy", "speculative_tokens": 4}]
    assert proposed["verifier"] == {"name_or_path": "some/target", "architectures": []}
    heads = {"markov_head.markov_w1.weight", "markov_head.markov_w2.weight"}
    heads |= {f"confidence_head.proj.{kind}" for kind in ("weight", "bias")}
    assert set(load_file(folder / "model.safetensors")) == COMMON | heads
    plain = json.loads((exported("fc", "speculators") / "config.json").read_text())
    assert plain["architectures"] == ["DFlashSpeculator"] and plain["aux_hidden_state_layer_ids"] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("method", "to", "sentence"),
    [
        ("best", "dflash", "no engine serves lead=mtp, inputs.anchor_state, inputs.next_token; to=transformers keeps it"),
        ("best", "speculators", "no engine serves lead=mtp"),
        ("dspark", "dflash", "vLLM's method dspark serves head=markov, from to=speculators"),
        ("hyperdflash", "speculators", "vLLM with plugins/vllm .* DFlashHyperDraftModel, from to=dflash"),
        ("causal", "speculators", "serve blocks.layout=causal, from to=dflash"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_by_the_engine_that_can(method, to, sentence, exported, tmp_path):
    with pytest.raises(ValueError, match=sentence) as told:
        exported(method, to)
    assert "\n" not in str(told.value) and not (tmp_path / f"{method}-{to}").exists()


def changed(groups: dict, **values) -> dict:
    """``groups`` with {group: {setting: value}} put over its own; None removes the group."""
    return {
        name: own if name not in values else values[name] and {**(own or {}), **values[name]} for name, own in groups.items()
    }


@pytest.mark.parametrize(
    ("values", "to", "sentence"),
    [
        ({"drafter": {"option": "mtp_chain"}}, "dflash", "read an MTP block from the target's own checkpoint"),
        ({"drafter": {"context_window": 8}}, "dflash", "no engine serves drafter.context_window"),
        ({"drafter": {"hidden_size": 16}}, "dflash", "no engine serves drafter.hidden_size"),
        ({"conditioning": {"paths": "flat"}}, "dflash", "no engine serves conditioning.paths=flat"),
        ({"conditioning": {"option": "post_hc_head"}}, "speculators", "no engine serves conditioning=post_hc_head"),
        ({"reducer": {"option": "mean"}}, "dflash", "no engine serves reducer=mean"),
        ({"head": {"option": "markov", "kind": "gated"}}, "speculators", "no engine serves gated"),
        ({"head": {"option": "markov", "kind": "rnn"}}, "dflash", "no engine serves rnn"),
        ({"head": {"option": "domino"}}, "dflash", "no engine serves head=domino"),
        ({"head": {"option": "selector"}}, "speculators", "no engine serves head=selector"),
        ({"drafter": {"convolution": 2}}, "dflash", "no engine serves drafter.convolution"),
        ({"head": {"option": "my_heads.Mine"}}, "transformers", "a part of your own"),
    ],
)
def test_a_part_that_no_class_knows_is_refused(values, to, sentence, exported):
    from hyperdflash.export.formats import check_servable

    groups = read_folder(exported("dflash", "transformers"))[0]["groups"]
    check_servable(to, groups, 32)
    with pytest.raises(ValueError, match=sentence):
        check_servable(to, changed(groups, **values), 32)


@pytest.mark.parametrize("fault", ["cut weights", "changed byte", "no weights", "cut config", "no config", "another's weights"])
def test_a_folder_that_is_not_whole_is_found(fault, exported, target):
    folder = exported("dflash", "dflash")
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole = weights.read_bytes()
    if fault == "cut weights":
        weights.write_bytes(whole[: len(whole) // 2])
    elif fault == "changed byte":
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif fault == "another's weights":
        shutil.copy(exported("fc", "dflash") / "model.safetensors", weights)
    elif fault == "cut config":
        config.write_text(config.read_text()[:200])
    else:
        (weights if fault == "no weights" else config).unlink()
    with pytest.raises(ValueError, match=r"export or copy it again") as told:
        hyperdflash.load_drafter(folder, target)
    assert str(folder) in str(told.value) and "\n" not in str(told.value)


def test_a_write_that_fails_leaves_nothing(tmp_path):
    def refuse(folder):
        assert {path.name for path in folder.iterdir()} == {"model.safetensors", "README.md", "config.json"}
        raise RuntimeError("differs")

    with pytest.raises(RuntimeError, match="differs"):
        write_folder(tmp_path / "out", "transformers", {"hyperdflash": {}}, {"a": torch.ones(2)}, "card", refuse)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("group", "settings", "sentence"),
    [
        ("blocks", {"option": "os.mkdir", "path": "PLANTED"}, "blocks.option must be block_sampler, got 'os.mkdir'"),
        ("head", {"option": "lm_head", "_target_": "os.mkdir", "path": "PLANTED"}, "head=lm_head has other settings"),
        ("reducer", {"option": "fc", "num_streams": {"_target_": "os.mkdir", "path": "PLANTED"}}, "num_streams"),
    ],
)
def test_a_folder_from_elsewhere_runs_nothing(group, settings, sentence, exported, target, tmp_path):
    folder, planted = exported("dflash", "transformers"), tmp_path / "planted"
    config = json.loads((folder / "config.json").read_text())
    assert "_target_" not in json.dumps(config)
    config["hyperdflash"]["groups"][group] = settings
    (folder / "config.json").write_text(json.dumps(config).replace("PLANTED", str(planted)))
    with pytest.raises(ValueError, match=sentence):
        hyperdflash.load_drafter(folder, target)
    assert not planted.exists()


def test_a_drafter_of_another_project_or_target_is_refused(exported, target):
    folder = exported("dflash", "dflash")
    config = json.loads((folder / "config.json").read_text())
    config["hyperdflash"]["target"]["fingerprint"] = "0" * 16
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="was trained on the target 0000000000000000, this one is"):
        hyperdflash.load_drafter(folder, target)
    del config["hyperdflash"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is not an export of this project"):
        hyperdflash.load_drafter(folder, target)


def test_the_card_says_what_it_is_and_how_good(exported, run_of, tmp_path):
    card = (exported("dspark", "speculators", "license=mit") / "README.md").read_text()
    record = json.loads((run_of("dspark") / "result.json").read_text())
    assert card.startswith("---\nlicense: mit\n") and "arXiv 2607.05147" in card and record["target"] in card
    assert record["dataset"]["digest"] in card and "method dspark" in card and "supervised tokens" in card
    assert "| mean | 0 | " in card and " [" in card

    row = {"method": "M", "metric": "tau", "over": "prompts", "group": "math", "temperature": 1.0, "value": 2.5, "n": 7}
    metrics = {"runs": {"M": run_of("fc").name}, "rows": [row | {"low": 2.25, "high": 2.75}]}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    card = (exported("fc", "dflash", f"evaluation={tmp_path}") / "README.md").read_text()
    assert "| math | 1 | 2.50 [2.25, 2.75] | 7 |" in card
    with pytest.raises(ValueError, match=r"measured .*, not "):
        exported("dflash", "dflash", f"evaluation={tmp_path}")


def test_the_command_exports_once(run_command, run_of, tmp_path):
    words = [f"run={run_of('fc')}", "to=dflash", f"out={tmp_path / 'out'}"]
    done = run_command("export", *words)
    assert done.returncode == 0, done.stderr
    assert "read again and equal" in done.stdout
    assert "is there already" in run_command("export", *words).stderr
    assert (
        "to must be dflash or speculators or transformers, got 'gguf'"
        in run_command("export", *words[:1], "to=gguf", words[2]).stderr
    )
    assert "run=DIR to=FORMAT out=DIR" in run_command("export", words[0]).stderr


class Hub(BaseHTTPRequestHandler):
    """The calls of one upload, as the Hub answers them; ``server.commits`` holds {path: bytes} of each commit."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        here = f"http://{self.headers['Host']}"
        if self.path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
        elif self.path.endswith("/commit/main"):
            lines = [json.loads(line) for line in body.splitlines()]
            files = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
            self.server.commits.append((self.path, {path: base64.b64decode(text) for path, text in files.items()}))
            answer = {"success": True, "commitUrl": f"{here}/me/drafter/commit/{'1' * 40}", "commitOid": "1" * 40}
        else:
            answer = {"url": f"{here}/me/drafter", "errors": [], "warnings": []}
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *arguments):
        pass


def test_an_upload_is_one_commit_with_every_file(exported, monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Hub)
    server.commits = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    folder = exported("fc", "dflash")
    try:
        address = hyperdflash.push_to_hub(folder, "me/drafter", token="hf_none")
        (folder / "model.safetensors").write_bytes(b"cut")
        with pytest.raises(ValueError, match="export or copy it again"):
            hyperdflash.push_to_hub(folder, "me/drafter", token="hf_none")
    finally:
        server.shutdown()
        server.server_close()
    ((path, files),) = server.commits
    assert "me/drafter" in path and address.endswith("1" * 40)
    assert set(files) == {"README.md", "config.json", "model.safetensors"}
    assert files["README.md"] == (folder / "README.md").read_bytes()
