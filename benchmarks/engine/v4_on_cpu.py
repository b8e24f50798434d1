"""A vLLM plug-in with what DeepSeek-V4 with a drafter lacks in vLLM 0.32 on a CPU; `make engine` alone installs it.

Each function names the gap that it closes. Nothing here belongs on a GPU, and none of it changes what is computed there.
"""

import fcntl
import inspect
import os
from functools import partial

import torch


def register() -> None:
    from vllm.platforms import current_platform

    platform = type(current_platform)
    if not current_platform.is_cpu() or getattr(platform, "_v4_on_cpu", False):
        return
    platform._v4_on_cpu = True
    zero_new_pages_of_every_group()  # in the scheduler's process too
    if not torch.cpu._is_avx512_bf16_supported():
        import v4_kernels

        v4_kernels.define()
    upstream = platform.register_triton_kernel_overrides

    def both(c):
        from vllm.triton_utils import HAS_TRITON

        upstream()
        if not HAS_TRITON:
            install()

    platform.register_triton_kernel_overrides = classmethod(both)


def install() -> None:
    from vllm.triton_utils.dispatcher import register_kernels

    complete_tile_scheduler()
    write_states_without_cuda()
    norm_every_draft_layer_by_its_own_weight()
    attention_in_block_major_pages()
    let_a_draft_keep_its_own_cache_type()
    mla = "vllm.v1.attention.backends.mla."
    register_kernels(
        {
            "vllm.v1.attention.ops.metadata._token_request_mapping_kernel": token_request_mapping,
            mla + "sparse_swa.ComputePrefillMetadataKernel.kernel": prefill_metadata,
            mla + "sparse_swa.ComputeSWAIndicesAndLensKernel.kernel": nothing,  # the CPU attention computes its window itself
            mla + "compressor_utils.CompressedSlotMappingKernel.kernel": compressed_slot_mapping,
            mla + "indexer.PrepareUniformDecodeKernel.kernel": prepare_uniform_decode,
            mla + "indexer.BuildPrefillChunkMetadataKernel.kernel": prefill_chunk_metadata,
        }
    )


def complete_tile_scheduler() -> None:
    """The CPU's builder lacks two of the five kinds of layers that the shared build() asks for."""
    from vllm.models.deepseek_v4.cpu.cpu_mla import DeepseekV4CPUSparseSWAMetadataBuilder as Builder
    from vllm.v1.attention.backends.mla import sparse_swa

    kinds = [value for name, value in vars(sparse_swa).items() if name.startswith("_LAYER_TYPE_")]
    Builder.build_tile_scheduler = lambda self, num_decode_tokens: dict.fromkeys(kinds)


def attention_in_block_major_pages() -> None:
    """V4's pages hold all layers of a block; CPU_ATTN declares layer-major ones alone, though it reads strides."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.kv_cache_layout import KVCacheLayout

    CPUAttentionBackend.supported_kv_cache_layouts = classmethod(lambda cls: (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC))


def let_a_draft_keep_its_own_cache_type() -> None:
    """The CPU's builder looks at the target's cache, fp8_ds_mla, where the draft's is bf16, and refuses it without AVX-512."""
    from vllm.v1.attention.backends import cpu_attn

    choose, signature = cpu_attn._get_attn_isa, inspect.signature(cpu_attn._get_attn_isa)

    def of_bf16(*args, **kwargs):
        return choose(**(signature.bind(*args, **kwargs).arguments | {"kv_cache_dtype": None}))

    cpu_attn._get_attn_isa = of_bf16


def zero_new_pages_of_every_group() -> None:
    """The CPU's attention multiplies masked slots by 0, so stale bytes of another group's page that read as NaN spread. vLLM
    zeroes new blocks of FullAttentionSpec groups; beside V4 the draft's group is a UniformTypeKVCacheSpecs."""
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
    from vllm.v1.kv_cache_interface import AttentionSpec, iter_layer_specs
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    plain = SingleTypeKVCacheManager.__init__

    def init(self, kv_cache_spec, *args, needs_kv_cache_zeroing=False, **kwargs):
        plain(self, kv_cache_spec, *args, needs_kv_cache_zeroing=needs_kv_cache_zeroing, **kwargs)
        of_attention = all(isinstance(spec, AttentionSpec) for spec in iter_layer_specs(kv_cache_spec))
        self._record_new_block_ids = needs_kv_cache_zeroing and of_attention

    def zero(self, block_ids):
        for group in self.kv_cache_config.kv_cache_groups:
            for name in group.layer_names:
                cache = getattr(self.compilation_config.static_forward_context.get(name), "kv_cache", None)
                if isinstance(cache, torch.Tensor) and cache.numel():
                    cache[torch.as_tensor(block_ids)] = 0

    SingleTypeKVCacheManager.__init__ = init
    CPUModelRunner._zero_block_ids = zero


def norm_every_draft_layer_by_its_own_weight() -> None:
    """The CPU's rms_norm takes row 0 of a [layers, width] weight for all of them."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model

    def normalize(self, all_k):
        out = torch.empty_like(all_k)
        for layer, weight in enumerate(self._k_norm_weights):
            ops.rms_norm(out[layer], all_k[layer], weight, self._rms_norm_eps)
        return out

    DFlashQwen3Model._normalize_context_k = normalize


def write_states_without_cuda() -> None:
    """The hidden-states connector copies on a CUDA stream into pinned memory; here the cache is in host memory already."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import example_hidden_states_connector as module

    class Done:
        synchronize = staticmethod(lambda: None)
        query = staticmethod(lambda: True)

    def submit(self, pending):
        if not self._is_tp_rank_zero:
            return
        blocks = torch.tensor(pending.block_ids, dtype=torch.long)
        slots = (torch.arange(self._block_size) + blocks[:, None] * self._block_size).flatten()
        states = module.extract_from_kv_cache(self._kv_cache, slots, len(pending.token_ids)).clone()
        os.makedirs(os.path.dirname(pending.filename), exist_ok=True)
        lock = self._lock_fds.pop(pending.req_id, None)
        if lock is None and self.use_lock:
            lock = os.open(pending.filename + ".lock", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
            fcntl.flock(lock, fcntl.LOCK_EX)
        tensors = {"hidden_states": states, "token_ids": pending.token_ids.clone()}
        future = self._executor.submit(self._write_tensors, tensors, Done, pending.filename, lock)
        self._req_copy_events[pending.req_id] = Done
        self._req_futures[pending.req_id] = future
        future.add_done_callback(partial(self._on_write_done, pending.req_id))

    module.ExampleHiddenStatesConnector._submit_async_write = submit


def nothing(*_, **__):
    pass


def token_request_mapping(query_start_loc, output, num_reqs, num_mapped, num_tokens, **_):
    token = torch.arange(num_tokens, dtype=query_start_loc.dtype)
    request = torch.searchsorted(query_start_loc[1 : num_reqs + 1].contiguous(), token, right=True).clamp(max=num_reqs - 1)
    output[:num_tokens] = torch.where(token < num_mapped, request, 0).to(output.dtype)


def prefill_metadata(
    prefill_gather_lens_ptr,
    seq_lens_ptr,
    query_start_loc_ptr,
    replay_start_ptr,
    num_prefills,
    num_decodes,
    window_size,
    BLOCK_SIZE,
):
    end = num_decodes + num_prefills
    query = query_start_loc_ptr[num_decodes + 1 : end + 1] - query_start_loc_ptr[num_decodes:end]
    visible = (seq_lens_ptr[num_decodes:end] - query - replay_start_ptr[num_decodes:end]).clamp(min=0)
    prefill_gather_lens_ptr[:num_prefills] = (query + visible.clamp(max=window_size - 1)).to(prefill_gather_lens_ptr.dtype)


def compressed_slot_mapping(
    compressed_slot_mapping_ptr, slot_mapping_ptr, query_start_loc_ptr, seq_lens_ptr, block_table_ptr, block_table_stride,
    block_size, dcp_world_size, cp_interleave, COMPRESS_RATIO, PAD_ID, TRITON_BLOCK_SIZE,
):  # fmt: skip
    assert dcp_world_size == 1
    starts = query_start_loc_ptr.tolist()
    for row in range(block_table_ptr.shape[0]):
        first, last = starts[row], starts[row + 1]
        if first == last:
            continue
        position = torch.arange(last - first) + int(seq_lens_ptr[row]) - (last - first)
        valid = ((position + 1) % COMPRESS_RATIO == 0) & (slot_mapping_ptr[first:last] != PAD_ID)
        state = position // COMPRESS_RATIO
        block = block_table_ptr[row, torch.where(valid, state // block_size, 0)].long()
        compressed_slot_mapping_ptr[first:last] = torch.where(valid, block * block_size + state % block_size, PAD_ID)


def prepare_uniform_decode(
    seq_lens_ptr, decode_seq_lens_ptr, block_table_ptr, block_table_stride, expanded_block_table_ptr, expanded_bt_stride,
    decode_lens_ptr, max_decode_len, BLOCK_SIZE,
):  # fmt: skip
    count = seq_lens_ptr.shape[0] * max_decode_len
    lengths = seq_lens_ptr[:, None] - max_decode_len + torch.arange(max_decode_len) + 1
    decode_seq_lens_ptr[:count] = lengths.clamp(min=0).flatten().to(decode_seq_lens_ptr.dtype)
    width = min(block_table_ptr.shape[1], expanded_block_table_ptr.shape[1])
    rows = block_table_ptr[: seq_lens_ptr.shape[0], :width]
    expanded_block_table_ptr[:count, :width] = rows.repeat_interleave(max_decode_len, dim=0)
    decode_lens_ptr[:count] = 1


def prefill_chunk_metadata(
    query_start_loc_ptr, uncompressed_seq_lens_ptr, cu_compressed_seq_lens_ptr, row_start_cu_compressed_seq_lens_ptr,
    token_to_seq_ptr, cu_compressed_seq_len_ks_ptr, cu_compressed_seq_len_ke_ptr, query_slice_start, query_slice_stop,
    DCP_RANK, DCP_WORLD, DCP_INTERLEAVE, BLOCK_SIZE, COMPRESS_RATIO,
):  # fmt: skip
    assert DCP_WORLD == 1
    starts, compressed = query_start_loc_ptr.tolist(), cu_compressed_seq_lens_ptr.tolist()
    rows = row_start_cu_compressed_seq_lens_ptr.tolist()
    for row in range(len(starts) - 1):
        first, last = starts[row], starts[row + 1]
        low, high = max(first, query_slice_start), min(last, query_slice_stop)
        if low < high:
            context = torch.arange(low, high) - first + int(uncompressed_seq_lens_ptr[row]) - (last - first) + 1
            part = slice(low - query_slice_start, high - query_slice_start)
            cu_compressed_seq_len_ks_ptr[part] = rows[row]
            cu_compressed_seq_len_ke_ptr[part] = (rows[row] + context // COMPRESS_RATIO).int()
        token_to_seq_ptr[compressed[row] : compressed[row + 1]] = row
