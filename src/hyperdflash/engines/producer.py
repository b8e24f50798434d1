"""Makes the client of `target.engine`, which fills a cache from servers."""

from collections.abc import Mapping

from hyperdflash.engines.client import EngineClient, EngineSettings
from hyperdflash.engines.sglang import SGLang
from hyperdflash.engines.vllm import VLLM
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.targets.load import DTYPES, fingerprint, load_heads

CLIENTS = {"sglang": SGLang, "vllm": VLLM}


def make_client(target: Mapping[str, object]) -> tuple[EngineClient, TargetHeads]:
    """Returns the client of a `target` group with an engine, and the heads of the checkpoint at ``target.path``, all that is
    read of it; ValueError for a server that is not reachable, or whose settings corrupt states."""
    settings = EngineSettings.of(target)
    heads = load_heads(target["path"], str(target["dtype"]))
    make = CLIENTS[settings.engine]
    client = make(settings, fingerprint(heads), heads.num_paths, heads.hidden_size, DTYPES[target["dtype"]])
    client.check_servers()
    return client, heads
